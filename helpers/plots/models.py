"""Pictures of a training and a search: notebooks 02 and 03."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import confusion_matrix as count_pairs
from sklearn.model_selection import GridSearchCV

from helpers.models.evaluation import METRIC_NAMES
from helpers.plots.style import (
    MODEL_COLOURS,
    WIDTH,
    heat_map,
    one_panel,
    panels_of,
    picture,
    short_names,
    whole_numbers,
)

LEGIBLE = 21  # rows or columns of the grid, up to which a score fits into its cell


@picture
def learning_curves(history: pd.DataFrame) -> Figure:
    """Draw loss and accuracy over the epochs.

    Parameters
    ----------
    history : pandas.DataFrame
        Index: epoch. Columns ``loss`` and ``accuracy``, and ``val_loss`` and ``val_accuracy``
        where there were validation rows.
    """
    figure, panels = panels_of(2, 2, 2.9)
    look = {"color": MODEL_COLOURS["network"], "marker": "o" if len(history) == 1 else ""}
    for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
        axes.plot(history[name], label="training rows", **look)
        if f"val_{name}" in history:
            axes.plot(history[f"val_{name}"], "--", label="validation rows", **look)
        whole_numbers(axes.xaxis)
        axes.set(xlabel="epoch", ylabel=name)
    validated = "val_loss" in history
    if validated:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Learning curves" + " on the training rows" * (not validated))
    return figure


@picture
def confusion_matrix(y_true, y_pred, labels: Sequence, title: str = "Confusion matrix") -> Figure:
    """Draw the confusion matrix: counts, coloured by the share of the true class."""
    counts = count_pairs(y_true, y_pred, labels=labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n_labels = len(labels)
    names = list(short_names(labels, 20, 3 if n_labels <= 8 else 1).values())
    both = "{:,}\n{:.0%}" if n_labels <= 7 else "{:,}"
    wide = max(len(line) for name in names for line in name.split("\n")) * 0.09
    column = min(0.85, (WIDTH - wide - 1.6) / n_labels)
    upright = wide + 0.03 < column
    height = 1.1 + max(1.5, max(0.34, column) * n_labels) + (0.3 if upright else wide)
    figure, axes = one_panel(height, max(6.0, column * n_labels + wide + 1.6))
    texts = np.vectorize(both.format)(counts, shares) if n_labels <= 16 else None
    look = {"annot": texts, "cmap": "Blues", "vmin": 0, "vmax": 1, "form": PercentFormatter(1)}
    named = pd.DataFrame(shares, names, names)
    heat_map(axes, named, "share of the true class", upright, **look)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title)
    return figure


def _power(value: float) -> str:
    """Write a power of two as such, other numbers as they are."""
    exponent = round(float(np.log2(value)), 9)
    if not (2 * exponent).is_integer():
        return f"{value:.3g}"
    return "2" + f"{exponent:g}".translate(str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _frame(axes: Axes, scores: pd.DataFrame, pairs: pd.DataFrame, **look) -> None:
    """Draw a frame around the cells of some pairs of C and gamma."""
    x, y = scores.columns.get_indexer(pairs["gamma"]), scores.index.get_indexer(pairs["C"])
    size = np.ptp(x) + 1, np.ptp(y) + 1
    axes.add_patch(Rectangle((x.min(), y.min()), *size, fill=False, clip_on=False, **look))


@picture
def grid_map(search: GridSearchCV) -> Figure:
    """Draw the mean score over the grid as a heat map, the winner marked.

    Parameters
    ----------
    search : sklearn.model_selection.GridSearchCV or the like
        Fitted, over ``svc__C`` and ``svc__gamma``. If it went on beyond its grid, ``n_grid_``
        tells how many of the candidates, the first ones, belong to the grid, which is framed.
    """
    columns = {"C": "param_svc__C", "gamma": "param_svc__gamma", "score": "mean_test_score"}
    pairs = pd.DataFrame({name: search.cv_results_[key] for name, key in columns.items()})
    pairs = pairs.astype(float)
    scores = pairs.pivot(index="C", columns="gamma", values="score")
    metric = METRIC_NAMES.get(search.scoring or "accuracy", "score")
    line = 0.4 if len(scores) <= LEGIBLE else 0.25
    figure, axes = one_panel(1.3 + max(1.0, line * len(scores)))
    legible = scores.shape[1] <= LEGIBLE
    texts = scores.map(lambda score: f"{score:.3f}".lstrip("0")) if legible else None
    named = scores.rename(index=_power, columns=_power)
    heat_map(axes, named, f"mean {metric}", legible, annot=texts, cmap="viridis")
    axes.invert_yaxis()
    title = f"Mean {metric} over {search.n_splits_} folds"
    n_grid = getattr(search, "n_grid_", len(pairs))
    if n_grid < len(pairs):
        look = {"edgecolor": "white", "linewidth": 2, "linestyle": "--"}
        seen = [withStroke(linewidth=5, foreground="black")]  # on light cells as on dark ones
        _frame(axes, scores, pairs[:n_grid], **look, path_effects=seen)
        title += f": grid (dashed frame) and {len(pairs) - n_grid} pairs beyond it"
    best = pairs.loc[search.best_index_]
    _frame(axes, scores, best.to_frame().T, edgecolor="red", linewidth=2.5)
    winner = f"best (red): C = {_power(best['C'])}, gamma = {_power(best['gamma'])}"
    axes.set_title(f"{title}\n{winner}, {metric} {best['score']:.3f}")
    return figure
