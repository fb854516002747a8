"""Pictures of what a model is asked before it is promoted, in the look of `helpers.plots`."""

from copy import copy

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from helpers.plots import PALETTE, _figure, _model_colours, _names, _panels, _picture, _wrap
from helpers.registry.explanations import Explanation
from helpers.registry.groups import ENDS, GroupReport

MOST_COLUMNS = 12
MOST_VALUES = 9  # of a row, that are shown each


@_picture
def importance(explanation: Explanation, name: str) -> Figure:
    """Draw how much the log loss of a model rises when a column is shuffled, for the top ones."""
    most = explanation.importance.head(MOST_COLUMNS)
    figure, axes = _figure(1.0 + 0.34 * len(most))
    names = list(_names(most.index, 44, 1).values())
    look = {"color": _model_colours([name])[name], "error_kw": {"elinewidth": 1.5, "capsize": 3}}
    axes.barh(names, most["mean"], xerr=most["std"], **look)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    part = f"the {MOST_COLUMNS} most important columns" * (len(explanation.importance) > len(most))
    axes.set(xlabel="rise of the log loss when the column is shuffled (line: ± 1 std. deviation)")
    axes.set_title(f"{name}: {part or 'all columns'}")
    return figure


@_picture
def waterfall(explanation: Explanation, row: str, name: str) -> Figure:
    """Draw what each value of a row adds to a probability: shap's own picture.

    Parameters
    ----------
    explanation : helpers.registry.explanations.Explanation
    row : str
        One of its `rows`.
    name : str
        The model.
    """
    import shap  # here: it takes seconds to import
    from shap.plots._style import style_context

    colours = {"primary_color_positive": PALETTE[3], "primary_color_negative": PALETTE[0]}
    values = copy(explanation.rows[row])
    names = _names(values.feature_names, 38, 1).values()
    # It writes f(x) as a formula; a "$" in the name of a column is still a character.
    values.feature_names = [each.replace("$", r"\$") for each in names]
    look = style_context(**colours, tick_labels_color="#555555")
    with pyplot.ioff(), look, matplotlib.rc_context({"text.parse_math": True}):
        figure = pyplot.figure()
        # Before it draws: it looks what fits into a bar.
        figure.subplots_adjust(left=0.5, right=0.9, top=0.86, bottom=0.12)
        try:
            shap.plots.waterfall(values, max_display=MOST_VALUES, show=False)
        finally:
            # So that a notebook does not show it a second time.
            pyplot.close(figure)
    figure.suptitle(f"{name}, {row}: probability of {explanation.label}")
    return figure


@_picture
def groups(report: GroupReport, name: str) -> Figure:
    """Draw accuracy, recall of the class that matters and selection rate of each group."""
    table, alarm = report.table, report.alarm
    titles = {"accuracy": "accuracy"}
    if alarm is not None:
        titles |= {f"recall_{alarm}": f"recall of {alarm}", "selection_rate": f"predicted {alarm}"}
    figure, panels = _panels(len(titles), len(titles), 0.33 * len(table) + 0.5, sharey=True)
    places, colour = np.arange(len(table)), _model_colours([name])[name]
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        low, high = (table[f"{metric}{end}"] for end in ENDS)
        axes.hlines(places, low, high, color=colour, linewidth=2)
        axes.plot(table[metric], places, "o", color=colour)
        axes.axvline(report.overall[metric], color="black", linestyle=":", linewidth=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_title(_wrap(title, 28))
    rows = [f"{column}: {group} ({n:,})" for (column, group), n in table["rows"].items()]
    panels[0].set_yticks(places, _names(rows, 40, 1).values())
    panels[0].set_ylim(len(table) - 0.5, -0.5)
    figure.suptitle(f"{name} by group (test rows); line: 95 % interval, dotted: all rows")
    return figure


@_picture
def calibration(curves: dict[str, pd.DataFrame], title: str) -> Figure:
    """Draw how often models are right beside how sure they are; `curves` by model."""
    figure, axes = _figure(4.2, 6.5)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    for (name, curve), colour in zip(
        curves.items(), _model_colours([*curves]).values(), strict=True
    ):
        ends = np.abs(curve[["low", "high"]].T - curve["share"])
        look = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "elinewidth": 1}
        axes.errorbar(curve["probability"], curve["share"], ends, label=name, **look)
    axes.set(xlabel="probability (mean of a bin)", ylabel="observed share", title=title)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left")
    return figure
