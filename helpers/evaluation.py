"""Metrics on the test rows, the confusion matrix, and the comparison of models."""

import numpy as np
import pandas as pd
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from helpers.display import new_figure

HEADLINE = ("accuracy", "f1_macro", "log_loss", "roc_auc_ovr")


def metric_name(text):
    """Return a label in the characters that MLflow allows in a metric's name."""
    allowed = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in str(text))
    return allowed.strip() or "_"


def class_names(labels):
    """Return one name per class for its metrics, none that of an average or of another class.

    Parameters
    ----------
    labels : sequence

    Returns
    -------
    list of str
        In the order of `labels`.
    """
    names = ["micro", "macro"]
    for label in labels:
        name, number = metric_name(label), 1
        while name in names:
            number += 1
            name = f"{metric_name(label)}_{number}"
        names.append(name)
    return names[2:]


def _average_scores(y_true, y_pred, labels):
    scores = {}
    for average in ("micro", "macro"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            y_true, y_pred, labels=labels, average=average, zero_division=0
        )
        scores |= {
            f"f1_{average}": f1,
            f"precision_{average}": precision,
            f"recall_{average}": recall,
        }
    return scores


def _class_scores(y_true, y_pred, labels):
    columns = precision_recall_fscore_support(y_true, y_pred, labels=labels, zero_division=0)
    return {
        f"{score}_{name}": value
        for score, values in zip(("precision", "recall", "f1"), columns, strict=False)
        for name, value in zip(class_names(labels), values, strict=True)
    }


def _ranking_score(y_true, probabilities, labels):
    if len(labels) == 2:
        return roc_auc_score(np.asarray(y_true) == labels[1], probabilities[:, 1])
    return roc_auc_score(y_true, probabilities, multi_class="ovr", labels=labels)


def compute_metrics(y_true, answer, labels):
    """Compute every metric of the series.

    In single-label problems the micro averages equal accuracy by definition; the macro and
    per-class figures tell more.

    Parameters
    ----------
    y_true : array-like, shape (n_rows,)
        Labels as in the CSV.
    answer : pandas.DataFrame, shape (n_rows, 1 + n_classes)
        A model's answer: ``prediction`` and ``probability_<label>``.
    labels : sequence
        All class labels, sorted.

    Returns
    -------
    dict of str to float
        ``accuracy``, ``f1_micro``, ``precision_micro``, ``recall_micro``, the same macro,
        ``precision_<label>``, ``recall_<label>``, ``f1_<label>``, ``log_loss`` (nats) and
        ``roc_auc_ovr`` (macro average of one class against the rest). Characters of a label
        that MLflow does not allow are ``_``; a name that is taken then gets a number.
    """
    probabilities = answer[[f"probability_{label}" for label in labels]].to_numpy()
    y_true, y_pred = np.asarray(y_true), answer["prediction"].to_numpy()
    metrics = {
        "accuracy": accuracy_score(y_true, y_pred),
        **_average_scores(y_true, y_pred, labels),
        **_class_scores(y_true, y_pred, labels),
        "log_loss": log_loss(y_true, probabilities, labels=labels),
        "roc_auc_ovr": _ranking_score(y_true, probabilities, labels),
    }
    return {name: float(value) for name, value in metrics.items()}


def majority_baseline(y_train, y_test, labels):
    """Compute the metrics of always answering the most frequent class of the training rows.

    Parameters
    ----------
    y_train, y_test : pandas.Series
    labels : sequence

    Returns
    -------
    dict of str to float
        See `compute_metrics`.
    """
    shares = y_train.value_counts(normalize=True)
    answer = pd.DataFrame({"prediction": [shares.idxmax()] * len(y_test)})
    for label in labels:
        answer[f"probability_{label}"] = shares[label]
    return compute_metrics(y_test, answer, labels)


def metrics_table(metrics, names=None):
    """Lay metrics out as a table.

    Parameters
    ----------
    metrics : dict of str to dict
        Metrics by model.
    names : sequence of str, optional
        Which metrics; default: all.

    Returns
    -------
    pandas.DataFrame
        One row per metric, one column per model.
    """
    table = pd.DataFrame(metrics)
    return table.loc[list(names)] if names else table


def plot_confusion_matrix(y_true, y_pred, labels, title="Confusion matrix"):
    """Draw the confusion matrix: counts, coloured by the share of the true class.

    Parameters
    ----------
    y_true, y_pred : array-like, shape (n_rows,)
    labels : sequence
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    counts = confusion_matrix(y_true, y_pred, labels=labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.75 * len(labels)
    figure, axes = new_figure(width=side + 0.8, height=side)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        colour = "white" if shares[i, j] > 0.5 else "black"
        text = f"{count}\n{shares[i, j]:.0%}" if len(labels) <= 8 else str(count)
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    names = [str(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def plot_comparison(metrics, names=("accuracy", "f1_macro", "roc_auc_ovr")):
    """Draw the metrics of several models side by side.

    Parameters
    ----------
    metrics : dict of str to dict
        Metrics by model.
    names : sequence of str
        Metrics between 0 and 1.

    Returns
    -------
    matplotlib.figure.Figure
    """
    table = metrics_table(metrics, names)
    figure, axes = new_figure(width=7.5, height=3.6)
    width = 0.8 / len(table.columns)
    for number, (model, values) in enumerate(table.items()):
        places = np.arange(len(table)) + (number - (len(table.columns) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.92, label=model)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
    axes.set_xticks(range(len(table)), table.index)
    axes.set(ylim=(0, 1.08), title="Test rows: candidates, Production and baseline")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
