"""One look for every picture: size of letters, colours of models and classes, short names.

The figures are not pyplot's: a notebook shows each once, and nothing keeps it in memory.
"""

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.models.evaluation import METRIC_NAMES

WIDTH = 9.0  # inches; at 100 dots per inch the width of a notebook's cell
STYLE = {
    **sns.axes_style("whitegrid"),
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Names of classes and users come from outside: "$" is a character, not a formula.
    "text.parse_math": False,
    "font.size": 11,
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "figure.titlesize"), "medium"),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), "medium"),
}
SCALES = {"calibration_error": (0.2, "{:.3f}"), "drifted_columns": (4, "{:.0f}")}
PALETTE = sns.color_palette("colorblind").as_hex()
MODEL_COLOURS = {"network": PALETTE[0], "svm": PALETTE[1], "majority": PALETTE[7]}
OTHER_MODELS = [PALETTE[number] for number in (9, 5, 6)]
CLASS_COLOURS = [PALETTE[number] for number in (3, 4, 2, 8, 9, 5, 6)]


def picture(draw: Callable) -> Callable:
    """Draw in the style of the series."""

    @functools.wraps(draw)
    def styled(*arguments, **options):
        with matplotlib.rc_context(STYLE):
            figure = draw(*arguments, **options)
            if figure is not None:
                # Some texts are made only when they are drawn, with the style of that moment.
                figure.draw_without_rendering()
        return figure

    return styled


def one_panel(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure of one panel; in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def panels_of(number: int, columns: int, height: float, rest: float = 0.5, **options):
    """Return a figure and its panels, each of `height` inches, with `rest` inches around them."""
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, rest + height * rows), layout="constrained")
    panels = figure.subplots(rows, min(columns, number), squeeze=False, **options).ravel()
    for unused in panels[number:]:
        unused.set_visible(False)
    return figure, panels[:number]


def wrap(text, width: int = 28, lines: int = 2) -> str:
    """Break a text into lines; what does not fit into them ends in an ellipsis."""
    text = " ".join(str(text).split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def short_names(texts: Iterable, width: int = 28, lines: int = 2) -> dict:
    """Return short texts for different names, by name; those that became equal get a number."""
    short = {}
    for text in texts:
        name, number = wrap(text, width, lines), 1
        while name in short.values():
            number += 1
            name = f"{wrap(text, width, lines)} ({number})"
        short[text] = name
    return short


def class_colours(labels: Iterable) -> dict:
    """Return a colour per class, by its place among all classes of the table."""
    labels = sorted(labels)
    many = len(labels) > len(CLASS_COLOURS)
    return dict(zip(labels, sns.husl_palette(len(labels)) if many else CLASS_COLOURS, strict=False))


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour per model: the same for all its versions, lighter for those after it."""
    colours, others, seen = {}, iter(OTHER_MODELS * len(names)), []
    for name in names:
        known = [colour for word, colour in MODEL_COLOURS.items() if word in name.lower()]
        colour = known[0] if known else next(others)
        lighter = sns.light_palette(colour, 6)[-1 - min(2 * seen.count(colour), 4)]
        colours[name] = matplotlib.colors.to_hex(lighter)
        seen.append(colour)
    return colours


def metric_title(metric: str) -> str:
    """Write a metric as a person reads it."""
    name = METRIC_NAMES.get(metric) or metric.replace("recall_", "recall of ")
    return wrap(name, 30)


def whole_numbers(axis) -> None:
    """Mark whole numbers only on an axis."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def heat_map(axes: Axes, values: pd.DataFrame, label: str, upright: bool, form=None, **look):
    """Draw a heat map with all names of rows and columns, and a colour bar with a label."""
    bar = {"label": label, "pad": 0.01, "aspect": 40, "format": form}
    sns.heatmap(values, xticklabels=True, yticklabels=True, fmt="", cbar_kws=bar, ax=axes, **look)
    axes.grid(visible=False)
    axes.tick_params("x", rotation=0 if upright else 90)
    axes.tick_params("y", rotation=0)


def bars(axes: Axes, metric: str, values: Iterable[float], colours: dict[str, str]) -> None:
    """Draw a bar per model, and its value where neither bar nor mark can cover it."""
    values, models = np.asarray(values, dtype=float), list(short_names(colours, 28, 3).values())
    axes.barh(models, values, color=list(colours.values()))
    step, form = SCALES.get(metric, (1.0, "{:.3f}"))
    top = step * np.ceil(np.nanmax([step, *values]) / step)
    for place, value in enumerate(values):
        if np.isfinite(value):
            axes.text(1.4 * top, place, form.format(value), va="center", ha="right")
    axes.grid(visible=False, axis="y")
    axes.set(xlim=(0, 1.4 * top), xticks=(0, top / 2, top), ylim=(len(models) - 0.5, -0.5))
    axes.set_title(metric_title(metric))
