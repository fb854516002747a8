"""Pictures of the candidates and of what they are asked before promotion: notebook 04."""

from copy import copy

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from helpers.plots.style import (
    PALETTE,
    bars,
    model_colours,
    one_panel,
    panels_of,
    picture,
    short_names,
    wrap,
)

COMPARED_METRICS = ("accuracy", "f1_macro", "roc_auc_ovr")
MOST_COLUMNS = 12
MOST_VALUES = 9  # of a row, that are shown each
SHORTEST = 0.04  # arrow, as a part of the width of all


@picture
def comparison(
    metrics: dict[str, dict[str, float]], intervals: dict[str, dict] | None = None
) -> Figure:
    """Draw the metrics of several models, by model, side by side; as lines the `intervals`."""
    colours = model_colours(list(metrics))
    figure, panels = panels_of(3, 3, 0.6 * len(metrics), rest=1.1, sharey=True)
    for axes, name in zip(panels, COMPARED_METRICS, strict=True):
        bars(axes, name, [of.get(name) for of in metrics.values()], colours)
        for place, model in enumerate(metrics):
            if ends := (intervals or {}).get(model, {}).get(name):
                axes.hlines(place, *ends, color="black", linewidth=2)
    figure.suptitle("Measured on the test rows (line: 95 % interval)")
    return figure


@picture
def robustness(result, name: str) -> Figure:
    """Draw how many answers of a model flip with how few changed columns, and which columns.

    Parameters
    ----------
    result : helpers.registry.robustness.Robustness
    name : str
        The model.
    """
    colour = model_colours([name])[name]
    flipped, most = result.flipped(), result.flips.sort_values(ascending=False).head(8)
    figure, (left, right) = panels_of(2, 2, 0.48 * max(6, len(most)), rest=1.0)
    left.bar(flipped.index, flipped, color=colour)
    left.set(xlabel="columns changed, at most", ylabel="answers flipped", ylim=(0, 1))
    left.set_xticks(flipped.index)
    right.barh(list(short_names(most.index, 26).values()), most, color=colour)
    right.set(xlabel="flips that change the column", xlim=(0, 1))
    right.invert_yaxis()
    for axes, names, shares in ((left, "x", left.yaxis), (right, "y", right.xaxis)):
        axes.grid(visible=False, axis=names)
        shares.set_major_formatter(PercentFormatter(1))
    figure.suptitle(f"{name}: {result.n_rows} rows attacked")
    return figure


@picture
def importance(explanation, name: str) -> Figure:
    """Draw how much the log loss of a model rises when a column is shuffled, for the top ones.

    Parameters
    ----------
    explanation : helpers.registry.explanations.Explanation
    name : str
        The model.
    """
    most = explanation.importance.head(MOST_COLUMNS)
    figure, axes = one_panel(1.0 + 0.34 * len(most))
    names = list(short_names(most.index, 44, 1).values())
    look = {"color": model_colours([name])[name], "error_kw": {"elinewidth": 1.5, "capsize": 3}}
    axes.barh(names, most["mean"], xerr=most["std"], **look)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    part = f"the {MOST_COLUMNS} most important columns" * (len(explanation.importance) > len(most))
    axes.set(xlabel="rise of the log loss when the column is shuffled (line: ± 1 std. deviation)")
    axes.set_title(f"{name}: {part or 'all columns'}")
    return figure


@picture
def waterfall(explanation, row: str, name: str) -> Figure:
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
    names = short_names(values.feature_names, 38, 1).values()
    # It writes f(x) as a formula; a "$" in the name of a column is still a character.
    values.feature_names = [each.replace("$", r"\$") for each in names]
    # Of less than this part of the picture it draws no arrow that points its way.
    added = np.array(sorted(values.values, key=abs))
    visible = np.abs(added) > SHORTEST * np.ptp([0, *np.cumsum(added)])
    n_shown = min(MOST_VALUES, 1 + int(visible.sum()))
    look = style_context(**colours, tick_labels_color="#555555")
    with pyplot.ioff(), look, matplotlib.rc_context({"text.parse_math": True}):
        figure = pyplot.figure()
        # Before it draws: it looks what fits into a bar.
        figure.subplots_adjust(left=0.5, right=0.9, top=0.86, bottom=0.12)
        try:
            shap.plots.waterfall(values, max_display=n_shown, show=False)
        finally:
            # So that a notebook does not show it a second time.
            pyplot.close(figure)
    figure.suptitle(f"{name}, {row}: probability of {explanation.label}")
    return figure


@picture
def groups(report, name: str) -> Figure:
    """Draw accuracy, recall of the class that matters and selection rate of each group.

    Parameters
    ----------
    report : helpers.registry.groups.GroupReport
    name : str
        The model.
    """
    table, alarm = report.table, report.alarm
    titles = {"accuracy": "accuracy"}
    if alarm is not None:
        titles |= {f"recall_{alarm}": f"recall of {alarm}", "selection_rate": f"predicted {alarm}"}
    figure, panels = panels_of(len(titles), len(titles), 0.33 * len(table) + 0.5, sharey=True)
    places, colour = np.arange(len(table)), model_colours([name])[name]
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        low, high = report.interval(metric)
        axes.hlines(places, low, high, color=colour, linewidth=2)
        axes.plot(table[metric], places, "o", color=colour)
        axes.axvline(report.overall[metric], color="black", linestyle=":", linewidth=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_title(wrap(title, 28))
    rows = [f"{column}: {group} ({n:,})" for (column, group), n in table["rows"].items()]
    panels[0].set_yticks(places, short_names(rows, 40, 1).values())
    panels[0].set_ylim(len(table) - 0.5, -0.5)
    figure.suptitle(f"{name} by group (test rows); line: 95 % interval, dotted: all rows")
    return figure


@picture
def calibration(curves: dict[str, pd.DataFrame], title: str) -> Figure:
    """Draw how often models are right beside how sure they are; `curves` by model."""
    figure, axes = one_panel(4.2, 6.5)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    for (name, curve), colour in zip(
        curves.items(), model_colours([*curves]).values(), strict=True
    ):
        ends = np.abs(curve[["low", "high"]].T - curve["share"])
        look = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "elinewidth": 1}
        axes.errorbar(curve["probability"], curve["share"], ends, label=name, **look)
    axes.set(xlabel="probability (mean of a bin)", ylabel="observed share", title=title)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.legend(loc="upper left")
    return figure
