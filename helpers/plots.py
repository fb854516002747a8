"""Every picture of the series: one look, one size of letters, a colour per model and per class.

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
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import confusion_matrix as count_pairs
from sklearn.model_selection import GridSearchCV

from helpers.data import Table, most_telling
from helpers.models.evaluation import METRIC_NAMES
from helpers.server.activity import KINDS, MOST_USERS, OTHERS, count_by_user

WIDTH = 9.0  # inches; at 100 dots per inch the width of a notebook's cell
MOST_PANELS = 12
MOST_FEATURES = 30  # whose correlations can be told apart
MOST_CLASSES = 10  # whose distributions can be told apart
LEGIBLE = 21  # rows or columns of the grid, up to which a score fits into its cell
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
PALETTE = sns.color_palette("colorblind").as_hex()
MODEL_COLOURS = {"network": PALETTE[0], "svm": PALETTE[1], "majority": PALETTE[7]}
OTHER_MODELS = [PALETTE[number] for number in (9, 5, 6)]
CLASS_COLOURS = [PALETTE[number] for number in (3, 4, 2, 8, 9, 5, 6)]
KIND_COLOURS = dict(zip(KINDS, [PALETTE[number] for number in (7, 9, 2, 4, 0, 3)], strict=True))


# --- the look ---------------------------------------------------------------------------------


def _picture(draw: Callable) -> Callable:
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


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _panels(number: int, columns: int, height: float, rest: float = 0.5, **options):
    """Return a figure and its panels, each of `height` inches, with `rest` inches around them."""
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, rest + height * rows), layout="constrained")
    panels = figure.subplots(rows, min(columns, number), squeeze=False, **options).ravel()
    for unused in panels[number:]:
        unused.set_visible(False)
    return figure, panels[:number]


def _wrap(text, width: int = 28, lines: int = 2) -> str:
    """Break a text into lines; what does not fit into them ends in an ellipsis."""
    text = " ".join(str(text).split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _names(texts: Iterable, width: int = 28, lines: int = 2) -> dict:
    """Return short texts for different names, by name; those that became equal get a number."""
    short = {}
    for text in texts:
        name, number = _wrap(text, width, lines), 1
        while name in short.values():
            number += 1
            name = f"{_wrap(text, width, lines)} ({number})"
        short[text] = name
    return short


def _class_colours(labels: Iterable) -> dict:
    """Return a colour per class, by its place among all classes of the table."""
    labels = sorted(labels)
    many = len(labels) > len(CLASS_COLOURS)
    return dict(zip(labels, sns.husl_palette(len(labels)) if many else CLASS_COLOURS, strict=False))


def _model_colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour per model: the same for all its versions, lighter for those after it."""
    colours, others, seen = {}, iter(OTHER_MODELS * len(names)), []
    for name in names:
        known = [colour for word, colour in MODEL_COLOURS.items() if word in name.lower()]
        colour = known[0] if known else next(others)
        lighter = sns.light_palette(colour, 6)[-1 - min(2 * seen.count(colour), 4)]
        colours[name] = matplotlib.colors.to_hex(lighter)
        seen.append(colour)
    return colours


def _title(metric: str) -> str:
    name = METRIC_NAMES.get(metric) or metric.replace("recall_", "recall of ")
    return _wrap(name, 30)


def _whole_numbers(axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _heat_map(axes: Axes, values: pd.DataFrame, label: str, upright: bool, form=None, **look):
    """Draw a heat map with all names of rows and columns, and a colour bar with a label."""
    bar = {"label": label, "pad": 0.01, "aspect": 40, "format": form}
    sns.heatmap(values, xticklabels=True, yticklabels=True, fmt="", cbar_kws=bar, ax=axes, **look)
    axes.grid(visible=False)
    axes.tick_params("x", rotation=0 if upright else 90)
    axes.tick_params("y", rotation=0)


# --- 01: the table ----------------------------------------------------------------------------


@_picture
def class_balance(table: Table) -> Figure:
    """Draw the number of rows of each class."""
    counts = table.labels.value_counts()
    names, colours = _names(counts.index), _class_colours(counts.index)
    figure, axes = _figure(0.9 + max(1.6, 0.42 * len(counts)))
    bars = axes.barh(list(names.values()), counts, color=[colours[label] for label in names])
    axes.bar_label(bars, [f"{n:,} ({n / counts.sum():.0%})" for n in counts], padding=4)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.18, y=0.01)
    _whole_numbers(axes.xaxis)
    axes.set(xlabel="rows", title="Rows of each class")
    return figure


@_picture
def numeric_by_class(table: Table) -> Figure | None:
    """Draw numeric features by class: box plots, or the share of ones for 0/1 columns.

    Of many features those are drawn whose class means differ most; None if there is none.
    """
    features = most_telling(table.frame[list(table.numeric)], table.labels, MOST_PANELS)
    if not features:
        return None
    counts = table.labels.value_counts()
    names = _names(sorted(counts.index[:MOST_CLASSES]), 20)
    all_colours = _class_colours(counts.index)
    colours = {name: all_colours[label] for label, name in names.items()}
    frame = table.frame[table.labels.isin(names)]
    classes = frame[table.target].map(names)
    look = {"y": classes, "order": names.values(), "hue": classes, "palette": colours}
    look |= {"saturation": 1, "legend": False}
    height = 1.0 + max(0.8, 0.36 * len(names))
    figure, panels = _panels(len(features), 3, height, sharey=True)
    for axes, name in zip(panels, features, strict=True):
        values = frame[name].astype(float)
        if set(values.dropna()) <= {0, 1}:
            # A box plot of zeros and ones shows nothing; the share of ones does.
            sns.barplot(x=values, **look, errorbar=None, ax=axes)
            meaning = table.meanings.get(name, "").removeprefix("1 ").split(",")[0]
            title = _wrap(f"{name} = 1", 34) + f"\n({meaning})" * bool(meaning)
            axes.set(xlim=(0, 1), title=title, xlabel="share of rows", ylabel="")
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        else:
            sns.boxplot(x=values, **look, fliersize=2, linewidth=1, width=0.65, ax=axes)
            axes.set(title=_wrap(name, 34), xlabel="", ylabel="")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    part = f", the {MOST_CLASSES} most frequent of them" * (len(counts) > MOST_CLASSES)
    shown = f"the {len(features)} most telling of {len(table.numeric)}"
    if len(features) == len(table.numeric):
        shown = "the most telling features first"
    figure.suptitle(f"Numeric features by class{part}; {shown}")
    return figure


@_picture
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
    matrix.index = [f"{_wrap(name, 48, 1)}  {n}" for name, n in zip(features, numbers, strict=True)]
    lower = matrix.where(np.tri(len(features), dtype=bool))
    figure, axes = _figure(1.2 + max(1.4, 0.25 * len(features)))
    upright, look = len(features) <= 20, {"cmap": "vlag", "vmin": -1, "vmax": 1}
    _heat_map(axes, lower, "Spearman's rank correlation", upright, **look)
    part = f"the {len(features)} most telling of " * (len(features) < len(table.numeric))
    figure.suptitle(f"Correlations of {part}{len(table.numeric)} numeric features")
    return figure


# --- 02, 03: the models -----------------------------------------------------------------------


@_picture
def learning_curves(history: pd.DataFrame) -> Figure:
    """Draw loss and accuracy over the epochs.

    Parameters
    ----------
    history : pandas.DataFrame
        Index: epoch. Columns ``loss`` and ``accuracy``, and ``val_loss`` and ``val_accuracy``
        where there were validation rows.
    """
    figure, panels = _panels(2, 2, 2.9)
    look = {"color": MODEL_COLOURS["network"], "marker": "o" if len(history) == 1 else ""}
    for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
        axes.plot(history[name], label="training rows", **look)
        if f"val_{name}" in history:
            axes.plot(history[f"val_{name}"], "--", label="validation rows", **look)
        _whole_numbers(axes.xaxis)
        axes.set(xlabel="epoch", ylabel=name)
    validated = "val_loss" in history
    if validated:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Learning curves" + " on the training rows" * (not validated))
    return figure


@_picture
def confusion_matrix(y_true, y_pred, labels: Sequence, title: str = "Confusion matrix") -> Figure:
    """Draw the confusion matrix: counts, coloured by the share of the true class."""
    counts = count_pairs(y_true, y_pred, labels=labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n_labels = len(labels)
    names = list(_names(labels, 20, 3 if n_labels <= 8 else 1).values())
    both = "{:,}\n{:.0%}" if n_labels <= 7 else "{:,}"
    wide = max(len(line) for name in names for line in name.split("\n")) * 0.09
    column = min(0.85, (WIDTH - wide - 1.6) / n_labels)
    upright = wide + 0.03 < column
    height = 1.1 + max(1.5, max(0.34, column) * n_labels) + (0.3 if upright else wide)
    figure, axes = _figure(height, max(6.0, column * n_labels + wide + 1.6))
    texts = np.vectorize(both.format)(counts, shares) if n_labels <= 16 else None
    look = {"annot": texts, "cmap": "Blues", "vmin": 0, "vmax": 1, "form": PercentFormatter(1)}
    named = pd.DataFrame(shares, names, names)
    _heat_map(axes, named, "share of the true class", upright, **look)
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


@_picture
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
    figure, axes = _figure(1.3 + max(1.0, line * len(scores)))
    legible = scores.shape[1] <= LEGIBLE
    texts = scores.map(lambda score: f"{score:.3f}".lstrip("0")) if legible else None
    named = scores.rename(index=_power, columns=_power)
    _heat_map(axes, named, f"mean {metric}", legible, annot=texts, cmap="viridis")
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


# --- 04: the candidates -----------------------------------------------------------------------

COMPARED_METRICS = ("accuracy", "f1_macro", "roc_auc_ovr")
SCALES = {"calibration_error": (0.2, "{:.3f}"), "drifted_columns": (4, "{:.0f}")}


def _bars(axes: Axes, metric: str, values: Iterable[float], colours: dict[str, str]) -> None:
    """Draw a bar per model, and its value where neither bar nor mark can cover it."""
    values, models = np.asarray(values, dtype=float), list(_names(colours, 28, 3).values())
    axes.barh(models, values, color=list(colours.values()))
    step, form = SCALES.get(metric, (1.0, "{:.3f}"))
    top = step * np.ceil(np.nanmax([step, *values]) / step)
    for place, value in enumerate(values):
        if np.isfinite(value):
            axes.text(1.4 * top, place, form.format(value), va="center", ha="right")
    axes.grid(visible=False, axis="y")
    axes.set(xlim=(0, 1.4 * top), xticks=(0, top / 2, top), ylim=(len(models) - 0.5, -0.5))
    axes.set_title(_title(metric))


@_picture
def comparison(
    metrics: dict[str, dict[str, float]], intervals: dict[str, dict] | None = None
) -> Figure:
    """Draw the metrics of several models, by model, side by side; as lines the `intervals`."""
    colours = _model_colours(list(metrics))
    figure, panels = _panels(3, 3, 0.6 * len(metrics), rest=1.1, sharey=True)
    for axes, name in zip(panels, COMPARED_METRICS, strict=True):
        _bars(axes, name, [of.get(name) for of in metrics.values()], colours)
        for place, model in enumerate(metrics):
            if ends := (intervals or {}).get(model, {}).get(name):
                axes.hlines(place, *ends, color="black", linewidth=2)
    figure.suptitle("Measured on the test rows (line: 95 % interval)")
    return figure


@_picture
def robustness(result, name: str) -> Figure:
    """Draw how many answers of a model flip with how few changed columns, and which columns.

    Parameters
    ----------
    result : helpers.registry.robustness.Robustness
    name : str
        The model.
    """
    colour = _model_colours([name])[name]
    flipped, most = result.flipped(), result.flips.sort_values(ascending=False).head(8)
    figure, (left, right) = _panels(2, 2, 0.48 * max(6, len(most)), rest=1.0)
    left.bar(flipped.index, flipped, color=colour)
    left.set(xlabel="columns changed, at most", ylabel="answers flipped", ylim=(0, 1))
    left.set_xticks(flipped.index)
    right.barh(list(_names(most.index, 26).values()), most, color=colour)
    right.set(xlabel="flips that change the column", xlim=(0, 1))
    right.invert_yaxis()
    for axes, names, shares in ((left, "x", left.yaxis), (right, "y", right.xaxis)):
        axes.grid(visible=False, axis=names)
        shares.set_major_formatter(PercentFormatter(1))
    figure.suptitle(f"{name}: {result.n_rows} rows attacked")
    return figure


# --- 05: production ---------------------------------------------------------------------------

PERIOD_METRICS = ("accuracy", "f1_macro", "calibration_error", "drifted_columns")
MOST_RECALLS = 5  # classes whose recall is drawn, those that are found worst


@_picture
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


@_picture
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
    colours = dict(sorted(_model_colours(list(versions["who"][::-1])).items()))
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
    figure, panels = _panels(len(shown), 2, height, rest=0.7, sharey=single)
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
    _bars(axes, metric, values[list(colours)].iloc[0], colours)
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
    axes.set_xticks(ticks, [_wrap(values.index[tick].split("/")[0], 11) for tick in ticks])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_title(_title(metric))
    if metric == "drifted_columns":
        _whole_numbers(axes.yaxis)
        axes.set_ylim(-0.2, max(4, values.max(axis=None) + 0.5))
    else:
        axes.margins(y=0.3)


@_picture
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
    counts = counts.rename(index=_names(counts.index))
    figure, axes = _figure(1.1 + max(1.0, 0.42 * len(counts)))
    kinds = [kind for kind in KIND_COLOURS if kind in counts]
    counts[kinds].plot.barh(stacked=True, color=KIND_COLOURS, width=0.75, ax=axes)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _whole_numbers(axes.xaxis)
    some = f", the {MOST_USERS} busiest users and others" * (OTHERS in counts.index)
    axes.set(xlabel="requests", ylabel="", title=f"Requests to the MLflow server{some}")
    return figure
