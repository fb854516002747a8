"""Pictures of the table: notebook 01."""

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from helpers.data import Table, most_telling
from helpers.plots.style import (
    class_colours,
    heat_map,
    one_panel,
    panels_of,
    picture,
    short_names,
    whole_numbers,
    wrap,
)

MOST_PANELS = 12
MOST_FEATURES = 30  # whose correlations can be told apart
MOST_CLASSES = 10  # whose distributions can be told apart


@picture
def class_balance(table: Table) -> Figure:
    """Draw the number of rows of each class."""
    counts = table.labels.value_counts()
    names, colours = short_names(counts.index), class_colours(counts.index)
    figure, axes = one_panel(0.9 + max(1.6, 0.42 * len(counts)))
    bars = axes.barh(list(names.values()), counts, color=[colours[label] for label in names])
    axes.bar_label(bars, [f"{n:,} ({n / counts.sum():.0%})" for n in counts], padding=4)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.18, y=0.01)
    whole_numbers(axes.xaxis)
    axes.set(xlabel="rows", title="Rows of each class")
    return figure


@picture
def numeric_by_class(table: Table) -> Figure | None:
    """Draw numeric features by class: box plots, or the share of ones for 0/1 columns.

    Of many features those are drawn whose class means differ most; None if there is none.
    """
    features = most_telling(table.frame[list(table.numeric)], table.labels, MOST_PANELS)
    if not features:
        return None
    counts = table.labels.value_counts()
    names = short_names(sorted(counts.index[:MOST_CLASSES]), 20)
    all_colours = class_colours(counts.index)
    colours = {name: all_colours[label] for label, name in names.items()}
    frame = table.frame[table.labels.isin(names)]
    classes = frame[table.target].map(names)
    look = {"y": classes, "order": names.values(), "hue": classes, "palette": colours}
    look |= {"saturation": 1, "legend": False}
    height = 1.0 + max(0.8, 0.36 * len(names))
    figure, panels = panels_of(len(features), 3, height, sharey=True)
    for axes, name in zip(panels, features, strict=True):
        values = frame[name].astype(float)
        if set(values.dropna()) <= {0, 1}:
            # A box plot of zeros and ones shows nothing; the share of ones does.
            sns.barplot(x=values, **look, errorbar=None, ax=axes)
            meaning = table.meanings.get(name, "").removeprefix("1 ").split(",")[0]
            title = wrap(f"{name} = 1", 34) + f"\n({meaning})" * bool(meaning)
            axes.set(xlim=(0, 1), title=title, xlabel="share of rows", ylabel="")
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        else:
            sns.boxplot(x=values, **look, fliersize=2, linewidth=1, width=0.65, ax=axes)
            axes.set(title=wrap(name, 34), xlabel="", ylabel="")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    part = f", the {MOST_CLASSES} most frequent of them" * (len(counts) > MOST_CLASSES)
    shown = f"the {len(features)} most telling of {len(table.numeric)}"
    if len(features) == len(table.numeric):
        shown = "the most telling features first"
    figure.suptitle(f"Numeric features by class{part}; {shown}")
    return figure


@picture
def correlations(table: Table) -> Figure | None:
    """Draw the rank correlations of the numeric features; None if there are fewer than two."""
    if len(table.numeric) < 2:
        return None
    numbers = table.frame[list(table.numeric)]
    chosen = most_telling(numbers, table.labels, MOST_FEATURES)
    features = [name for name in table.numeric if name in chosen]
    matrix = table.frame[features].astype(float).corr(method="spearman")
    numbers = range(1, len(features) + 1)
    matrix.columns = numbers
    matrix.index = [f"{wrap(name, 48, 1)}  {n}" for name, n in zip(features, numbers, strict=True)]
    lower = matrix.where(np.tri(len(features), dtype=bool))
    figure, axes = one_panel(1.2 + max(1.4, 0.25 * len(features)))
    upright, look = len(features) <= 20, {"cmap": "vlag", "vmin": -1, "vmax": 1}
    heat_map(axes, lower, "Spearman's rank correlation", upright, **look)
    part = f"the {len(features)} most telling of " * (len(features) < len(table.numeric))
    figure.suptitle(f"Correlations of {part}{len(table.numeric)} numeric features")
    return figure
