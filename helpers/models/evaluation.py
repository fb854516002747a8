"""Metrics on the test rows, the confusion matrix, and the comparison of models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from helpers.data import Split
from helpers.display import notice
from helpers.models.interface import TabularPreprocessor

METRIC_NAMES = {  # where a person reads them
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "log_loss": "log loss",
    "brier": "Brier score",
    "roc_auc_ovr": "ROC AUC, one class against the rest",
    "calibration_error": "calibration error",
    "drifted_columns": "drifted columns",
}
HEADLINE = ("accuracy", "f1_macro", "log_loss", "brier", "roc_auc_ovr")
MAJORITY, LOGISTIC = "majority class", "logistic regression"
SCORES = ("precision", "recall", "f1")


def metric_name(text) -> str:
    """Return a label in the characters that MLflow allows in a metric's name."""
    allowed = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in str(text))
    return allowed.strip() or "_"


def class_names(labels: Sequence) -> list[str]:
    """Return one name per class for its metrics, none that of an average or of another class."""
    names = ["micro", "macro"]
    for label in labels:
        name, number = metric_name(label), 1
        while name in names:
            number += 1
            name = f"{metric_name(label)}_{number}"
        names.append(name)
    return names[2:]


def compute_metrics(y_true, answer: pd.DataFrame, labels: Sequence) -> dict[str, float]:
    """Compute every metric of the series.

    In single-label problems the micro averages equal accuracy by definition; the macro and
    per-class figures tell more.

    Parameters
    ----------
    y_true : array-like, shape (n_rows,)
        Labels as in the CSV.
    answer : shape (n_rows, 1 + n_classes)
        A model's answer: ``prediction`` and ``probability_<label>``.
    labels
        All class labels, sorted.

    Returns
    -------
    dict of str to float
        ``accuracy``, ``f1_micro``, ``precision_micro``, ``recall_micro``, the same macro,
        ``precision_<label>``, ``recall_<label>``, ``f1_<label>``, ``log_loss`` (nats), ``brier``
        (squared errors of the probabilities, summed over the classes: 0 to 2) and
        ``roc_auc_ovr`` (macro average of one class against the rest). Characters of a label
        that MLflow does not allow are ``_``; a name that is taken then gets a number.
    """
    probabilities = answer[[f"probability_{label}" for label in labels]].to_numpy()
    y_true, y_pred = np.asarray(y_true), answer["prediction"].to_numpy()
    truth = y_true[:, None] == np.asarray(labels)
    metrics = {
        "accuracy": accuracy_score(y_true, y_pred),
        "log_loss": log_loss(y_true, probabilities, labels=labels),
        "brier": np.square(probabilities - truth).sum(axis=1).mean(),
        "roc_auc_ovr": _roc_auc(y_true, probabilities, labels),
    }
    score = partial(precision_recall_fscore_support, y_true, y_pred, labels=labels, zero_division=0)
    for average in ("micro", "macro"):
        for name, value in zip(SCORES, score(average=average), strict=False):
            metrics[f"{name}_{average}"] = value
    for name, values in zip(SCORES, score(), strict=False):
        for label, value in zip(class_names(labels), values, strict=True):
            metrics[f"{name}_{label}"] = value
    return {name: float(value) for name, value in metrics.items()}


def _roc_auc(y_true: np.ndarray, probabilities: np.ndarray, labels: Sequence) -> float:
    if len(labels) == 2:
        return roc_auc_score(y_true == labels[1], probabilities[:, 1])
    return roc_auc_score(y_true, probabilities, multi_class="ovr", labels=labels)


def bootstrap_interval(
    score: Callable[[np.ndarray, np.ndarray], float],
    y_true,
    y_pred_or_proba,
    level: float = 0.95,
    n_resamples: int = 1000,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a score over rows.

    One draw of the rows is in memory at a time; `scipy.stats.bootstrap` holds all of them.

    Parameters
    ----------
    score
        Of drawn labels and answers, such as a metric of scikit-learn; give it its ``labels``,
        as a draw may lack a class.
    y_true : array-like, shape (n_rows,)
    y_pred_or_proba : array-like, shape (n_rows,) or (n_rows, n_columns)
        What `score` takes: labels, probabilities, or the answers of two models to be compared on
        the same draws.
    level
        Share of the draws between the two bounds.
    """
    y_true, answers = np.asarray(y_true), np.asarray(y_pred_or_proba)
    rng, n_rows = np.random.default_rng(0), len(y_true)
    draws = (rng.integers(0, n_rows, n_rows) for _ in range(n_resamples))
    low, high = np.quantile(
        [score(y_true[rows], answers[rows]) for rows in draws], [(1 - level) / 2, (1 + level) / 2]
    )
    return float(low), float(high)


def macro_f1(y_true: np.ndarray, y_pred: np.ndarray, size: int) -> float:
    """Return the macro F1 of positions of `size` labels; scikit-learn takes 100 times as long."""
    matrix = np.bincount(y_true * size + y_pred, minlength=size**2).reshape(size, size)
    counted = matrix.sum(axis=0) + matrix.sum(axis=1)
    return float(np.mean(2 * matrix.diagonal() / np.maximum(counted, 1)))


def paired_gain(
    split: Split,
    own: pd.Series,
    other: pd.Series,
    rows: np.ndarray | slice = slice(None),
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return by how much macro F1 is higher with one model's predictions than with another's.

    Both answered the same rows, those of the test rows that `rows` says, so most of the chance in
    which rows these are falls out of the difference.

    Returns
    -------
    size, low, high : float
        The difference and the ends of its interval.
    """
    size, truth = len(split.labels), split.encode(split.y_test[rows])
    guesses = np.column_stack([split.encode(own), split.encode(other)])

    def gain(truth, guesses):
        return macro_f1(truth, guesses[:, 0], size) - macro_f1(truth, guesses[:, 1], size)

    ends = bootstrap_interval(gain, truth, guesses, level)
    return gain(truth, guesses), *ends


@dataclass(frozen=True)
class Baselines:
    """What a trained model must beat: the answers of simple models to the test rows.

    Attributes
    ----------
    split : helpers.data.Split
    answers : dict of str to pandas.DataFrame
        By name, as for `compute_metrics`.
    """

    split: Split
    answers: dict[str, pd.DataFrame]

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics by name."""
        return {
            name: compute_metrics(self.split.y_test, answer, self.split.labels)
            for name, answer in self.answers.items()
        }

    def gain(
        self, answer: pd.DataFrame, name: str, level: float = 0.95
    ) -> tuple[float, float, float]:
        """Return by how much macro F1 is above that of a baseline, and its bootstrap interval."""
        other = self.answers[name]["prediction"]
        return paired_gain(self.split, answer["prediction"], other, level=level)


def baselines(split: Split) -> Baselines:
    """Train a logistic regression, preprocessed as for the SVM, and count the majority class."""
    linear = make_pipeline(
        TabularPreprocessor(categorical=split.categorical), LogisticRegression(max_iter=1000)
    )
    with threadpool_limits(1):  # tables this small wait for each other's threads ten times as long
        linear.fit(split.X_train, split.y_train)
    shares = split.y_train.value_counts(normalize=True)[split.labels].to_numpy()
    chances = {
        LOGISTIC: linear.predict_proba(split.X_test),
        MAJORITY: np.tile(shares, (len(split.X_test), 1)),
    }
    names, labels = [f"probability_{label}" for label in split.labels], np.asarray(split.labels)
    answers = {
        model: pd.DataFrame(each, columns=names).assign(prediction=labels[each.argmax(axis=1)])
        for model, each in chances.items()
    }
    return Baselines(split, answers)


def warn_if_weak(title: str, answer: pd.DataFrame, simple: Baselines, advice: str = "") -> None:
    """Say so where a model gives every row the same answer, or is surely worse than a simple one.

    `advice` is what to change where it always answers the same.
    """
    given = answer["prediction"].unique()
    if len(given) == 1:
        text = f"{title} answers {given[0]!r} for every test row: it has not learnt the others."
        notice(f"{text} {advice}".strip(), "warning")
    _, low, high = simple.gain(answer, LOGISTIC)
    if high < 0:
        notice(
            f"{title} is surely worse than a logistic regression, by {-high:.3f} to {-low:.3f} of "
            "macro F1. Prefer the simple model, or look at data and settings.",
            "warning",
        )


def metrics_table(
    metrics: dict[str, dict], names: Sequence[str] = (), intervals: dict[str, dict] | None = None
) -> pd.DataFrame:
    """Return metrics by model as a table: one row per metric, or per name, one column per model.

    With `intervals`, the ends by model and metric, as texts: where there are some, in brackets.
    """
    table = pd.DataFrame(metrics)
    table = table.loc[list(names)] if names else table
    if intervals is None:
        return table
    texts = table.map("{:.4f}".format)
    for model, ends in intervals.items():
        for name in texts.index.intersection(list(ends)):
            texts.loc[name, model] += " ({:.3f} to {:.3f})".format(*ends[name])
    return texts
