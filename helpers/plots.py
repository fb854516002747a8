"""Every picture of the series: one look, one size of letters, a colour per model and per class.

The figures are not pyplot's: a notebook shows each once, and nothing keeps it in memory.
"""

import functools
import textwrap

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from helpers.models.evaluation import METRIC_NAMES, metrics_table

WIDTH = 9.0  # inches; at 100 dots per inch the width of a notebook's cell
MOST_FEATURES = 30  # whose correlations can be told apart
MOST_CLASSES = 10  # whose distributions can be told apart
MOST_USERS = 20
ANNOTATED_COLUMNS = 21  # of the grid, up to which a score fits into its cell
STYLE = {
    **sns.axes_style("whitegrid"),
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Names of classes and users come from outside: "$" is a character, not a formula.
    "text.parse_math": False,
    **dict.fromkeys(
        (
            "font.size",
            "axes.labelsize",
            "axes.titlesize",
            "figure.titlesize",
            "xtick.labelsize",
            "ytick.labelsize",
            "legend.fontsize",
            "legend.title_fontsize",
        ),
        11,
    ),
}
_COLOURS = sns.color_palette("colorblind").as_hex()
MODEL_COLOURS = {"network": _COLOURS[0], "svm": _COLOURS[1], "majority": _COLOURS[7]}
OTHER_MODELS = [_COLOURS[number] for number in (9, 5, 6)]
CLASS_COLOURS = [_COLOURS[number] for number in (3, 4, 2, 8, 9, 5, 6)]
KIND_COLOURS = {
    "page": _COLOURS[7],
    "look": _COLOURS[9],
    "change": _COLOURS[2],
    "artifact": _COLOURS[4],
    "prediction": _COLOURS[0],
    "rejected": _COLOURS[3],
}


FULL = {"saturation": 1, "legend": False}  # of bars: the colours as they are


# --- the look ---------------------------------------------------------------------------------


def _picture(draw):
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


def _figure(height, rows=1, columns=1, width=WIDTH, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _wrap(text, width=28, lines=2):
    """Break a text into lines; what does not fit into them ends in an ellipsis."""
    text = " ".join(str(text).split())
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _names(texts, width=28, lines=2):
    """Return short texts for different names, by name; those that became equal get a number."""
    short = {}
    for text in texts:
        name, number = _wrap(text, width, lines), 1
        while name in short.values():
            number += 1
            name = f"{_wrap(text, width, lines)} ({number})"
        short[text] = name
    return short


def _class_colours(labels):
    """Return a colour per class, by its place among all classes of the table."""
    labels = sorted(labels)
    many = len(labels) > len(CLASS_COLOURS)
    colours = sns.husl_palette(len(labels)).as_hex() if many else CLASS_COLOURS
    return dict(zip(labels, colours, strict=False))


def _model_colours(names):
    """Return a colour per model: the same for all its versions, lighter for those after it."""
    colours, others, seen = {}, iter(OTHER_MODELS * len(names)), []
    for name in names:
        known = [c for word, c in MODEL_COLOURS.items() if word in str(name).lower()]
        colour = known[0] if known else next(others)
        lighter = sns.light_palette(colour, 6)[-1 - min(2 * seen.count(colour), 4)]
        colours[name] = matplotlib.colors.to_hex(lighter)
        seen.append(colour)
    return colours


# --- 01: the table ----------------------------------------------------------------------------


@_picture
def class_balance(table) -> Figure:
    """Draw the number of rows of each class.

    Parameters
    ----------
    table : helpers.data.Table

    Returns
    -------
    matplotlib.figure.Figure
    """
    labels = table.labels
    counts = labels.value_counts()
    names = _names(counts.index)
    figure, axes = _figure(0.9 + max(1.6, 0.42 * len(counts)))
    colours = {names[label]: colour for label, colour in _class_colours(counts.index).items()}
    rows = labels.map(names)
    sns.countplot(y=rows, order=names.values(), hue=rows, palette=colours, **FULL, ax=axes)
    for place, count in enumerate(counts):
        axes.text(count, place, f" {count:,} ({count / len(labels):.0%})", va="center")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="rows", ylabel="", xlim=(0, 1.18 * counts.max()), title="Rows of each class")
    return figure


def _most_telling(table, most):
    """Return the numeric features whose class means differ most, in units of their spread."""
    features = table.frame[list(table.numeric)].astype(float)
    means = features.groupby(table.labels).mean()
    spread = features.std().replace(0, np.nan)
    order = ((means.max() - means.min()) / spread).fillna(0).sort_values(ascending=False)
    return list(order.index[:most])


@_picture
def numeric_by_class(table, most: int = 12) -> Figure | None:
    """Draw numeric features by class: box plots, or the share of ones for 0/1 columns.

    Parameters
    ----------
    table : helpers.data.Table
    most : int
        At most so many features, those whose class means differ most.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if the table has no numeric feature.
    """
    features = _most_telling(table, most)
    if not features:
        return None
    counts = table.labels.value_counts()
    labels = sorted(counts.index[:MOST_CLASSES])
    names = _names(labels, 20)
    all_colours = _class_colours(counts.index)
    colours = {names[label]: all_colours[label] for label in labels}
    frame = table.frame[table.labels.isin(labels)]
    classes = frame[table.target].map(names)
    columns = min(3, len(features))
    rows = -(-len(features) // columns)
    height = 1.0 + max(0.8, 0.36 * len(labels))
    figure, axes = _figure(0.4 + height * rows, rows, columns, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, features, strict=False):
        data = {"x": frame[name].astype(float), "y": classes}
        look = {"order": names.values(), "hue": classes, "palette": colours, **FULL}
        share = set(frame[name].dropna().unique()) <= {0, 1}
        if share:
            # A box plot of zeros and ones shows nothing; the share of ones does.
            sns.barplot(**data, **look, errorbar=None, ax=axis)
            meaning = table.meanings.get(name, "").removeprefix("1 ").split(",")[0]
            title = _wrap(f"{name} = 1", 34) + f"\n({meaning})" * bool(meaning)
            axis.set(xlim=(0, 1), title=title)
            axis.xaxis.set_major_formatter(PercentFormatter(1))
        else:
            sns.boxplot(**data, **look, fliersize=2, linewidth=1, width=0.65, ax=axis)
            axis.set_title(_wrap(name, 34))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set(xlabel="share of rows" if share else "", ylabel="")
    for axis in axes.flat[len(features) :]:
        axis.set_visible(False)
    part = "" if len(counts) <= MOST_CLASSES else f", the {MOST_CLASSES} most frequent of them"
    figure.suptitle(f"Numeric features by class{part}; the most telling features first")
    return figure


@_picture
def correlations(table) -> Figure | None:
    """Draw the correlations of the numeric features (Spearman's rank correlation).

    Parameters
    ----------
    table : helpers.data.Table

    Returns
    -------
    matplotlib.figure.Figure or None
        None if the table has fewer than two numeric features.
    """
    if len(table.numeric) < 2:
        return None
    chosen = set(_most_telling(table, MOST_FEATURES))
    features = [name for name in table.numeric if name in chosen]
    matrix = table.frame[features].astype(float).corr(method="spearman")
    numbers = range(1, len(features) + 1)
    titles = [f"{_wrap(name, 48, 1)}  {number}" for number, name in enumerate(features, 1)]
    figure, axes = _figure(1.2 + max(1.4, 0.25 * len(features)))
    upper = np.triu(np.ones(matrix.shape, dtype=bool), 1)
    sns.heatmap(
        matrix,
        mask=upper,
        cmap="vlag",
        vmin=-1,
        vmax=1,
        xticklabels=numbers,
        yticklabels=titles,
        cbar_kws={"label": "Spearman's rank correlation", "pad": 0.01, "aspect": 40},
        ax=axes,
    )
    axes.grid(visible=False)
    axes.tick_params("x", rotation=90 if len(features) > 20 else 0)
    axes.tick_params("y", rotation=0)
    part = f"the {len(features)} most telling of " if len(chosen) < len(table.numeric) else ""
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

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = _figure(3.4, 1, 2)
    parts = {"": ("training rows", "-"), "val_": ("validation rows", "--")}
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for prefix, (label, line) in parts.items():
            if prefix + name in history:
                sns.lineplot(
                    x=history.index,
                    y=history[prefix + name],
                    color=MODEL_COLOURS["network"],
                    linestyle=line,
                    marker="o" if len(history) == 1 else None,
                    label=label,
                    legend=False,
                    ax=axis,
                )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        first, last = history.index.min(), history.index.max()
        axis.set(xlabel="epoch", ylabel=name, xlim=(first - 0.5, last + 0.5))
    lines, labels = axes[0].get_legend_handles_labels()
    if len(lines) > 1:
        figure.legend(lines, labels, loc="outside lower center", ncols=2)
    figure.suptitle("Learning curves" + (" on the training rows" if len(lines) == 1 else ""))
    return figure


@_picture
def confusion_matrix(y_true, y_pred, labels, title: str = "Confusion matrix") -> Figure:
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
    from sklearn.metrics import confusion_matrix as count

    counts = count(y_true, y_pred, labels=labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = list(_names(labels, 20, 3 if len(labels) <= 8 else 1).values())
    texts = np.array([[f"{n:,}" for n in row] for row in counts], dtype=object)
    if len(labels) <= 7:
        texts += np.array([[f"\n{share:.0%}" for share in row] for row in shares], dtype=object)
    wide = max(len(line) for name in names for line in name.split("\n")) * 0.09
    cell = max(0.34, min(0.85, (WIDTH - wide - 1.6) / len(labels)))
    flat = wide < cell
    side = cell * len(labels)
    width = min(WIDTH, max(6.0, side + wide + 1.6))
    figure, axes = _figure(1.1 + max(1.5, side) + (0.3 if flat else wide), width=width)
    sns.heatmap(
        shares,
        annot=texts if len(labels) <= 16 else None,
        fmt="",
        annot_kws={"size": STYLE["font.size"]},
        cmap="Blues",
        vmin=0,
        vmax=1,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "share of the true class", "format": PercentFormatter(1)},
        ax=axes,
    )
    axes.tick_params("x", rotation=0 if flat else 90)
    axes.tick_params("y", rotation=0)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title)
    return figure


def _power(value):
    """Write a power of two as such, other numbers as they are."""
    exponent = round(float(np.log2(value)), 9)
    if not (2 * exponent).is_integer():
        return f"{value:.3g}"
    return "2" + f"{exponent:g}".translate(str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _frame(axes, cells, rows, columns, **look):
    """Draw a frame around the cells of a heat map that are given by C and gamma."""
    at_rows = [rows.index(C) for C, _ in cells]
    at_columns = [columns.index(gamma) for _, gamma in cells]
    corner = min(at_columns), min(at_rows)
    size = max(at_columns) + 1 - corner[0], max(at_rows) + 1 - corner[1]
    axes.add_patch(Rectangle(corner, *size, fill=False, clip_on=False, **look))


@_picture
def grid_map(search) -> Figure:
    """Draw the mean score over the grid as a heat map, the winner marked.

    Parameters
    ----------
    search : sklearn.model_selection.GridSearchCV or the like
        Fitted, over ``svc__C`` and ``svc__gamma``. If it went on beyond its grid, ``n_grid_``
        tells how many of the candidates, the first ones, belong to the grid, which is framed.

    Returns
    -------
    matplotlib.figure.Figure
    """
    results = search.cv_results_
    pairs = [
        (float(C), float(gamma))
        for C, gamma in zip(results["param_svc__C"], results["param_svc__gamma"], strict=True)
    ]
    scores = pd.Series(results["mean_test_score"], pd.MultiIndex.from_tuples(pairs)).unstack()
    rows, columns = list(scores.index), list(scores.columns)
    metric = search.scoring if isinstance(search.scoring, str) else "score"
    metric = METRIC_NAMES.get("accuracy" if search.scoring is None else metric, metric)
    line = 0.4 if len(rows) <= ANNOTATED_COLUMNS else 0.25
    figure, axes = _figure(1.3 + max(1.0, line * len(rows)))
    texts = scores.map(lambda score: f"{score:.3f}".replace("0.", ".", 1))
    sns.heatmap(
        scores,
        annot=texts if len(columns) <= ANNOTATED_COLUMNS else None,
        fmt="",
        annot_kws={"size": STYLE["font.size"]},
        cmap="viridis",
        xticklabels=[_power(value) for value in columns],
        yticklabels=[_power(value) for value in rows],
        cbar_kws={"label": f"mean {metric}", "pad": 0.01, "aspect": 30},
        ax=axes,
    )
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.tick_params("x", rotation=0 if len(columns) <= ANNOTATED_COLUMNS else 90)
    axes.tick_params("y", rotation=0)
    best = search.best_params_["svc__C"], search.best_params_["svc__gamma"]
    n_grid = getattr(search, "n_grid_", len(pairs))
    title = f"Mean {metric} over {search.n_splits_} folds"
    if n_grid < len(pairs):
        look = {"edgecolor": "white", "linewidth": 2, "linestyle": "--"}
        seen = [withStroke(linewidth=5, foreground="black")]  # on light cells as on dark ones
        _frame(axes, pairs[:n_grid], rows, columns, **look, path_effects=seen)
        title += f": grid (dashed frame) and {len(pairs) - n_grid} pairs beyond it"
    _frame(axes, [best], rows, columns, edgecolor="red", linewidth=2.5)
    winner = f"best (red): C = {_power(best[0])}, gamma = {_power(best[1])}"
    axes.set(xlabel="gamma", ylabel="C", title=f"{title}\n{winner}, {metric} {scores.at[best]:.3f}")
    return figure


# --- 04: the candidates -----------------------------------------------------------------------


@_picture
def comparison(metrics: dict, names=("accuracy", "f1_macro", "roc_auc_ovr")) -> Figure:
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
    titles = _names(table.columns, 26, 3)
    colours = {titles[name]: colour for name, colour in _model_colours(table.columns).items()}
    models = [titles[name] for name in table.columns]
    figure, axes = _figure(1.1 + 0.6 * len(models), 1, len(names), sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        _bars(axis, models, table.loc[name], colours)
        axis.set_title(_wrap(METRIC_NAMES.get(name, name), 24))
    figure.suptitle("Measured on the test rows")
    return figure


def _bars(axis, models, values, colours, least=1.0, form="{:.3f}"):
    """Draw a bar per model, and its value where neither bar nor mark can cover it."""
    sns.barplot(x=values, y=models, hue=models, palette=colours, **FULL, ax=axis)
    top = least * np.ceil(max(1, values.max() / least))
    for place, value in enumerate(values):
        if np.isfinite(value):
            axis.text(1.4 * top, place, form.format(value), va="center", ha="right")
    axis.set(xlabel="", ylabel="", xlim=(0, 1.4 * top), xticks=(0, top / 2, top))


@_picture
def robustness(result, name: str) -> Figure:
    """Draw how many answers flip with how few changed columns, and which columns.

    Parameters
    ----------
    result : helpers.registry.robustness.Robustness
    name : str
        The model.

    Returns
    -------
    matplotlib.figure.Figure
    """
    colour = _model_colours([name])[name]
    flipped, most = result.flipped(), result.flips.sort_values(ascending=False).head(8)
    figure, (left, right) = _figure(1.0 + 0.48 * max(6, len(most)), 1, 2)
    sns.barplot(x=flipped.index, y=flipped, color=colour, saturation=1, ax=left)
    left.set(xlabel="columns changed, at most", ylabel="answers flipped", ylim=(0, 1))
    columns = list(_names(most.index, 26).values())
    sns.barplot(x=most.to_numpy(), y=columns, color=colour, saturation=1, ax=right)
    right.set(xlabel="flips that change the column", ylabel="", xlim=(0, 1))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    right.xaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(f"{name}: {result.n_rows} rows attacked")
    return figure


# --- 05: production ---------------------------------------------------------------------------

PERIOD_METRICS = ("accuracy", "f1_macro", "calibration_error", "drifted_columns")


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
    if report.periods.empty:
        return None
    table = report.periods.sort_values("start")
    table = table.assign(who=table["model"] + " version " + table["version"].astype(str))
    # Newest first: it has the model's own colour.
    newest = table.drop_duplicates("who").sort_values(
        "version", key=lambda versions: versions.astype(int), ascending=False
    )
    colours = _model_colours(newest["who"].tolist())
    colours = {who: colours[who] for who in sorted(colours)}
    promised = {
        f"{model} version {version}": report.references[f"{model} {version}"]
        for model, version in zip(newest["model"], newest["version"], strict=True)
    }
    single = table["period"].nunique() == 1
    shown = [name for name in PERIOD_METRICS if name in table and table[name].notna().any()]
    rows = -(-len(shown) // 2)
    height = 0.9 + 0.45 * len(colours) if single else 2.6
    figure, axes = _figure(
        0.7 + height * rows, rows, min(2, len(shown)), sharey=single, squeeze=False
    )
    for axis, metric in zip(axes.flat, shown, strict=False):
        draw = _one_period if single else _many_periods
        draw(axis, table, metric, colours, {who: of.get(metric) for who, of in promised.items()})
        axis.set_title(METRIC_NAMES[metric])
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    if not single:
        entries = axes.flat[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=2)
    when = table["period"].iloc[0] if single else "over time"
    figure.suptitle(f"Production, {when}" + " (dotted: at promotion)" * (len(shown) > 1))
    return figure


def _one_period(axis, table, metric, colours, promised):
    values = table.set_index("who")[metric].reindex(list(colours))
    titles = _names(colours)
    palette = {titles[who]: colour for who, colour in colours.items()}
    least, form = {
        "calibration_error": (0.2, "{:.3f}"),
        "drifted_columns": (4, "{:.0f}"),
    }.get(metric, (1.0, "{:.3f}"))
    _bars(axis, list(palette), values, palette, least, form)
    for place, who in enumerate(colours):
        if promised[who] is not None:
            axis.plot([promised[who]] * 2, [place - 0.45, place + 0.45], ":", color="black")


def _many_periods(axis, table, metric, colours, promised):
    names = table["period"].unique().tolist()
    sns.pointplot(
        x=table["period"],
        y=table[metric],
        order=names,
        hue=table["who"],
        hue_order=list(colours),
        palette=colours,
        markers=["o", "s", "^", "D", "v"][: len(colours)] * len(colours),
        dodge=0.3 if len(colours) > 1 else False,
        errorbar=None,
        linewidth=1.5,
        ax=axis,
    )
    axis.get_legend().set_visible(False)
    for who, value in promised.items():
        if value is not None:
            axis.axhline(value, color=colours[who], linestyle=":")
    # At most some four of them are legible; of a week its first day.
    ticks = range(0, len(names), -(-len(names) // 4))
    axis.set_xticks(ticks, [_wrap(names[tick].split("/")[0], 11) for tick in ticks])
    axis.set(xlabel="", ylabel="")
    if metric == "drifted_columns":
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(-0.2, max(4, table[metric].max() + 0.5))
    else:
        axis.margins(y=0.3)


@_picture
def activity(log: pd.DataFrame) -> Figure | None:
    """Draw the requests to the MLflow server by user and kind.

    Parameters
    ----------
    log : pandas.DataFrame
        From `helpers.server.activity.read_activity`.

    Returns
    -------
    matplotlib.figure.Figure or None
        None if there was no request.
    """
    if log.empty:
        return None
    users = log["user"].fillna("(none)")
    most = users.value_counts().index[:MOST_USERS]
    log = log[users.isin(most)]
    names = _names(most)
    kinds = [kind for kind in KIND_COLOURS if kind in set(log["kind"])]
    figure, axes = _figure(1.1 + max(1.0, 0.42 * len(most)))
    sns.histplot(
        y=pd.Categorical(users[log.index].map(names), names.values()),
        hue=pd.Categorical(log["kind"], kinds),
        palette=KIND_COLOURS,
        hue_order=kinds[::-1],  # the last one is drawn first
        multiple="stack",
        shrink=0.75,
        alpha=1,
        ax=axes,
    )
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title=None, reverse=True)
    some = users.nunique() > MOST_USERS
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="requests", ylabel="")
    axes.set_title("Requests to the MLflow server" + f", the {MOST_USERS} busiest users" * some)
    return figure
