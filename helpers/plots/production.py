"""Pictures of what runs: production over time and who used the server, notebook 05."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.plots.style import (
    PALETTE,
    bars,
    metric_title,
    model_colours,
    one_panel,
    panels_of,
    picture,
    short_names,
    whole_numbers,
    wrap,
)
from helpers.server.activity import KINDS, MOST_USERS, OTHERS, count_by_user

PERIOD_METRICS = ("accuracy", "f1_macro", "calibration_error", "drifted_columns")
MOST_RECALLS = 5  # classes whose recall is drawn, those that are found worst
KIND_COLOURS = dict(zip(KINDS, [PALETTE[number] for number in (7, 9, 2, 4, 0, 3)], strict=True))


@picture
def periods(report) -> Figure | None:
    """Draw metrics and drifted columns of Production, period by period, and at promotion.

    Parameters
    ----------
    report : helpers.monitoring.Report

    Returns
    -------
    matplotlib.figure.Figure or None
        None if there is no period yet.
    """
    return _production(report, PERIOD_METRICS, estimated=False)


@picture
def estimates(report) -> Figure | None:
    """Draw accuracy and recalls of Production, estimated and as labels say, like `periods`."""
    promised = pd.DataFrame(report.references).mean(axis=1)
    recalls = promised.filter(regex="^recall_(?!micro$|macro$)")
    worst = sorted(recalls.nsmallest(MOST_RECALLS).index)
    return _production(report, ("accuracy", *worst), estimated=True)


def _production(report, metrics: Sequence[str], estimated: bool) -> Figure | None:
    if report.periods.empty:
        return None
    table = report.periods.sort_values("start")
    table = table.assign(who=table["model"] + " version " + table["version"].astype(str))
    versions = table.drop_duplicates("who").sort_values("version", key=pd.to_numeric)
    # Newest first: it has the model's own colour.
    colours = dict(sorted(model_colours(list(versions["who"][::-1])).items()))
    promised = {
        row.who: report.references[f"{row.model} {row.version}"] for row in versions.itertuples()
    }
    guesses = {name: f"estimated_{name}" for name in metrics if estimated}
    table = table.reindex(columns=[*table.columns.union([*metrics, *guesses.values()])])
    shown = [
        name for name in metrics if table.filter([name, guesses.get(name)]).notna().any(axis=None)
    ]
    order = table["period"].unique()
    values = table.pivot(index="period", columns="who").loc[order]
    single = len(order) == 1
    height = 0.9 + 0.45 * len(colours) if single else 2.6
    figure, panels = panels_of(len(shown), 2, height, rest=0.7, sharey=single)
    for axes, metric in zip(panels, shown, strict=True):
        marks = {who: of[metric] for who, of in promised.items() if metric in of}
        draw = _one_period if single else _many_periods
        guess = values[guesses[metric]].astype(float) if estimated else None
        draw(axes, metric, values[metric].astype(float), colours, marks, guess)
    if not single:
        entries = axes.get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=2)
    what = "Demo" if report.demo else "Production"
    key = "dotted: at promotion" * (len(shown) > 1)
    if estimated:
        key += f"; {'diamond' if single else 'dashed'}: estimated without labels"
    when = order[0] if single else "over time"
    figure.suptitle(f"{what}, {when}" + f" ({key})" * bool(key))
    return figure


def _one_period(axes: Axes, metric: str, values, colours: dict, marks: dict, guess=None):
    bars(axes, metric, values[list(colours)].iloc[0], colours)
    for place, who in enumerate(colours):
        if who in marks:
            axes.vlines(marks[who], place - 0.45, place + 0.45, "black", ":")
        if guess is not None:
            axes.plot(guess[who], place, "D", color="black", fillstyle="none")


def _many_periods(axes: Axes, metric: str, values, colours: dict, marks: dict, guess=None):
    places = np.arange(len(values))
    for number, (who, colour) in enumerate(colours.items()):
        beside = 0.2 * (number - (len(colours) - 1) / 2)
        look = {"marker": "os^Dv"[number % 5], "markersize": 4, "color": colour}
        axes.plot(places + beside, values[who], label=who, **look)
        if guess is not None:
            axes.plot(places + beside, guess[who], "--", color=colour, alpha=0.8)
        if who in marks:
            axes.axhline(marks[who], color=colour, linestyle=":")
    # At most three of them are legible; of a week its first day.
    ticks = places[:: -(-len(places) // 3)]
    axes.set_xticks(ticks, [wrap(values.index[tick].split("/")[0], 11) for tick in ticks])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_title(metric_title(metric))
    if metric == "drifted_columns":
        whole_numbers(axes.yaxis)
        axes.set_ylim(-0.2, max(4, values.max(axis=None) + 0.5))
    else:
        axes.margins(y=0.3)


@picture
def activity(log: pd.DataFrame) -> Figure | None:
    """Draw the requests to the MLflow server by kind, of the users with most of them.

    None if there was none.

    Parameters
    ----------
    log : pandas.DataFrame
        From `helpers.server.activity.read_activity`.
    """
    if log.empty:
        return None
    counts = count_by_user(log, "kind")
    counts = counts.rename(index=short_names(counts.index))
    figure, axes = one_panel(1.1 + max(1.0, 0.42 * len(counts)))
    kinds = [kind for kind in KIND_COLOURS if kind in counts]
    counts[kinds].plot.barh(stacked=True, color=KIND_COLOURS, width=0.75, ax=axes)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    whole_numbers(axes.xaxis)
    some = f", the {MOST_USERS} busiest users and others" * (OTHERS in counts.index)
    axes.set(xlabel="requests", ylabel="", title=f"Requests to the MLflow server{some}")
    return figure
