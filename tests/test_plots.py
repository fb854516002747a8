"""Pictures: letters of one size that fit, the same colours everywhere, names shown as they are."""

import functools
import io
import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from helpers import data, plots
from helpers.registry.robustness import Robustness

NASTY = "$\\frac{1}{ & <b>$"
LONG = "Administrative and support service activities"
LABELS = sorted([NASTY, LONG, "x_1^2$ or so", "a", "b", "c", "d"])
MODELS = ("model_conv_network", "model_svm_rbf")


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    label = np.array(LABELS)[np.arange(210) % 7]
    frame = pd.DataFrame({f"length in ${n}$": random.normal(size=210) for n in range(4)})
    frame = frame.assign(**{LONG + " of all kinds": random.normal(size=210)})
    frame = frame.assign(flag=random.integers(0, 2, 210), city=NASTY, Target=label)
    return data.read_table(frame.to_csv(index=False).encode(), "nasty")


def make_search(beyond=()):
    exponents = [*itertools.product(range(-5, 7), repeat=2), *beyond]
    C, gamma = 2.0 ** np.transpose(exponents)
    scores = 1 / (1 + abs(np.log2(C) - 1) + abs(np.log2(gamma) + 6))
    return SimpleNamespace(
        cv_results_={"param_svc__C": C, "param_svc__gamma": gamma, "mean_test_score": scores},
        best_index_=scores.argmax(),
        scoring="accuracy",
        n_splits_=5,
        n_grid_=12 * 12,
    )


def make_report(n_periods, models=MODELS, labelled=True):
    rows = []
    for model in models:
        for number in range(n_periods):
            start = pd.Timestamp("2026-11-01", tz="UTC") + pd.Timedelta(days=number)
            row = {"model": model, "version": "1", "period": str(start.date()), "start": start}
            measured = {"accuracy": 0.78, "f1_macro": 0.71, "calibration_error": 0.04}
            row |= {"estimated_accuracy": 0.76, f"estimated_recall_{LONG}": 0.6}
            rows.append({**row, "drifted_columns": 1, **(measured if labelled else {})})
    promised = {"accuracy": 0.79, "f1_macro": 0.7, "recall_macro": 0.7, f"recall_{LONG}": 0.5}
    references = {f"{model} 1": promised for model in models}
    return SimpleNamespace(periods=pd.DataFrame(rows), references=references, demo=True)


def make_log(users=(LONG, NASTY, "x_1^2$ or so", None), kinds=("look", "rejected")):
    requests = [{"user": user, "kind": kind} for user in users for kind in kinds]
    return pd.DataFrame(requests * 5)


def make_robustness():
    flips = pd.Series({f"{LONG} ${number}$": number / 10 for number in range(9)})
    return Robustness(np.array([1.0, 2, 2, np.nan]), flips)


METRICS = {"accuracy": 0.78, "f1_macro": 0.71, "log_loss": 0.5, "roc_auc_ovr": 0.9}
HISTORY = pd.DataFrame(
    {"loss": [1, 0.5], "accuracy": [0.5, 0.7], "val_loss": [1, 0.6], "val_accuracy": [0.5, 0.6]},
    index=[1, 2],
)
PICTURES = {
    "class balance": plots.class_balance,
    "numeric by class": plots.numeric_by_class,
    "correlations": plots.correlations,
    "learning curves": lambda _: plots.learning_curves(HISTORY),
    "one epoch": lambda _: plots.learning_curves(HISTORY[["loss", "accuracy"]].head(1)),
    "confusion matrix": lambda _: plots.confusion_matrix(LABELS * 9, LABELS[::-1] * 9, LABELS),
    "grid": lambda _: plots.grid_map(make_search()),
    "grid and beyond": lambda _: plots.grid_map(make_search(beyond=[(1, -6), (1, -6.5)])),
    "comparison": lambda _: plots.comparison(
        dict.fromkeys((*MODELS, f"{MODELS[0]} in Production (version 2)", NASTY), METRICS)
    ),
    "robustness": lambda _: plots.robustness(make_robustness(), MODELS[1]),
    "one period": lambda _: plots.periods(make_report(1)),
    "no labels yet": lambda _: plots.periods(make_report(1, labelled=False)),
    "periods": lambda _: plots.periods(make_report(20)),
    "estimates of one period": lambda _: plots.estimates(make_report(1, labelled=False)),
    "estimates": lambda _: plots.estimates(make_report(20)),
    "activity": lambda _: plots.activity(make_log()),
}


@pytest.fixture(scope="module")
def picture(table):
    """A picture by its name, drawn once."""
    return functools.cache(lambda name: PICTURES[name](table))


def texts(figure):
    return [each for each in figure.findobj(Text) if each.get_text().strip()]


def bar_colours(axes):
    return {to_hex(bar.get_facecolor()) for bar in axes.patches if bar.get_width() > 0}


@pytest.mark.parametrize("name", PICTURES)
def test_letters_have_one_size_and_fit_into_the_width_of_a_notebook(picture, name):
    figure = picture(name)
    assert {text.get_fontsize() for text in texts(figure)} == {11}
    assert figure.dpi * figure.get_tightbbox().width <= 920
    figure.savefig(io.BytesIO(), bbox_inches="tight")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", PICTURES)
def test_labels_of_an_axis_do_not_cover_each_other(picture, name):
    figure = picture(name)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            boxes = [label.get_window_extent() for label in labels if label.get_visible()]
            for number, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[number + 1 :]), labels


@pytest.mark.parametrize(
    "name", ["class balance", "numeric by class", "confusion matrix", "activity"]
)
def test_names_from_outside_are_shown_as_they_are(picture, name):
    shown = {text.get_text().replace("\n", " ") for text in texts(picture(name))}
    assert {NASTY, "x_1^2$ or so"} <= shown
    assert any(text.startswith("Administrative and") for text in shown)


def test_a_model_has_its_colour_in_every_picture():
    for name, other in (MODELS, MODELS[::-1]):
        robust = bar_colours(plots.robustness(make_robustness(), name).axes[0])
        alone = bar_colours(plots.comparison({name: METRICS}).axes[0])
        both = bar_colours(plots.comparison({other: METRICS, name: METRICS}).axes[0])
        production = bar_colours(plots.periods(make_report(1, models=(name,))).axes[0])
        assert robust == alone == production
        assert alone < both
    curve = plots.learning_curves(HISTORY).axes[0].lines[0].get_color()
    assert {to_hex(curve)} == bar_colours(plots.comparison({MODELS[0]: METRICS}).axes[0])


def test_a_version_in_production_has_another_shade_than_the_candidate():
    names = [MODELS[0], f"{MODELS[0]} in Production (version 2)", "majority class"]
    axes = plots.comparison(dict.fromkeys(names, METRICS)).axes[0]
    assert len(bar_colours(axes)) == 3


def test_a_class_has_its_colour_in_every_picture_of_the_table(picture):
    balance = bar_colours(picture("class balance").axes[0])
    flag = next(axes for axes in picture("numeric by class").axes if "flag" in axes.get_title())
    assert len(balance) == 7
    assert bar_colours(flag) == balance


def test_zeros_and_ones_of_the_students_table_say_what_they_mean(workspace):
    figure = plots.numeric_by_class(data.load_table("sample", workspace))
    titles = [axes.get_title() for axes in figure.axes]
    assert "Tuition fees up to date = 1\n(has paid all fees so far)" in titles


def test_many_columns_and_many_classes_are_cut_with_their_number():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(400, 90))).add_prefix("column ")
    frame["Target"] = np.arange(400) % 40
    wide = data.read_table(frame.to_csv(index=False).encode(), "wide")
    figure = plots.correlations(wide)
    assert "30 most telling of 90" in figure.get_suptitle()
    assert len(figure.axes[0].get_yticklabels()) == 30
    assert "10 most frequent" in plots.numeric_by_class(wide).get_suptitle()
    assert len(plots.class_balance(wide).axes[0].get_yticklabels()) == 40


def test_table_without_numbers_has_no_picture_of_them():
    frame = pd.DataFrame({"city": ["Faro", "Porto"] * 10, "Target": ["a", "b"] * 10})
    table = data.read_table(frame.to_csv(index=False).encode(), "texts")
    assert plots.numeric_by_class(table) is None
    assert plots.correlations(table) is None


def test_grid_marks_the_winner_and_names_powers_of_two():
    axes = plots.grid_map(make_search()).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["2⁻⁵", "2⁻⁴"]
    assert "C = 2¹, gamma = 2⁻⁵" in axes.get_title()
    (frame,) = [patch for patch in axes.patches if patch.get_linewidth() > 1]
    assert (frame.get_x(), frame.get_y(), frame.get_width()) == (0, 6, 1)


def test_grid_shows_what_the_search_added_beyond_it():
    axes = plots.grid_map(make_search(beyond=[(c, -6) for c in range(-5, 7)])).axes[0]
    assert "12 pairs beyond it" in axes.get_title()
    grid, winner = (patch for patch in axes.patches if patch.get_linewidth() > 1)
    assert (grid.get_x(), grid.get_width(), grid.get_height()) == (1, 12, 12)
    assert (winner.get_x(), winner.get_y()) == (0, 6)


def test_metrics_have_names_for_people():
    shown = " ".join(text.get_text() for text in texts(plots.comparison({"a": METRICS})))
    assert "macro F1" in shown
    assert "_" not in shown


def test_one_period_shows_each_model_and_several_hide_none():
    single = plots.periods(make_report(1))
    assert len(single.axes[0].get_yticklabels()) == 2
    lines = [line for line in plots.periods(make_report(5)).axes[0].lines if len(line.get_xdata())]
    curves = [line for line in lines if len(line.get_xdata()) == 5]
    assert len(curves) == 2
    assert not set(curves[0].get_xdata()) & set(curves[1].get_xdata())
    assert plots.periods(SimpleNamespace(periods=pd.DataFrame(), references={})) is None


def test_estimates_stand_in_the_picture_of_what_labels_say():
    report = make_report(5)
    report.periods.loc[report.periods["period"] == "2026-11-05", "accuracy"] = np.nan
    figure = plots.estimates(report)
    assert figure.get_suptitle().startswith("Demo, over time")
    accuracy, recall = figure.axes
    assert recall.get_title().startswith("recall of")
    lines = {line.get_linestyle(): line.get_ydata() for line in accuracy.lines}
    np.testing.assert_equal(lines["-"], [0.78] * 4 + [np.nan])
    np.testing.assert_equal(lines["--"], [0.76] * 5)
    assert plots.estimates(SimpleNamespace(periods=pd.DataFrame(), references={})) is None


def test_legend_of_the_activity_has_only_what_happened():
    axes = plots.activity(make_log(kinds=["look", "change"])).axes[0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"look", "change"}
    assert "(none)" in {label.get_text() for label in axes.get_yticklabels()}
    assert plots.activity(make_log().head(0)) is None
