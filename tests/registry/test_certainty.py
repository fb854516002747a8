from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from helpers import plots
from helpers.models import evaluation
from helpers.models.evaluation import compute_metrics, metrics_table
from helpers.registry import certainty


@pytest.fixture
def answers(big_split):
    """Two answers to the test rows that differ in a few, with the probabilities they have."""
    random, labels = np.random.default_rng(0), big_split.labels
    chances = random.dirichlet(np.ones(3), len(big_split.y_test))
    truth = np.array([random.choice(labels, p=row) for row in chances])
    answer = pd.DataFrame(chances, columns=[f"probability_{label}" for label in labels])
    answer.insert(0, "prediction", np.array(labels)[chances.argmax(axis=1)])
    other = answer.assign(
        prediction=answer["prediction"].mask(random.random(len(answer)) < 0.05, "low")
    )
    return pd.Series(truth, big_split.X_test.index), answer, other


@pytest.fixture
def split(big_split, answers):
    return replace(big_split, y_test=answers[0])


def test_intervals_hold_the_metrics_and_are_shown_beside_them(split, answers):
    _, answer, _ = answers
    metrics = compute_metrics(split.y_test, answer, split.labels)
    intervals = certainty.intervals(split, answer)
    recalls = {f"recall_{label}" for label in split.labels}
    assert set(intervals) == {"accuracy", "f1_macro", "log_loss", "brier"} | recalls
    for name, (low, high) in intervals.items():
        assert low < metrics[name] < high
    table = metrics_table({"a": metrics, "b": metrics}, ("brier", "roc_auc_ovr"), {"a": intervals})
    low, high = intervals["brier"]
    assert table.loc["brier", "a"] == f"{metrics['brier']:.4f} ({low:.3f} to {high:.3f})"
    assert table.loc["roc_auc_ovr", "a"] == table.loc["roc_auc_ovr", "b"]


def test_difference_is_of_the_same_rows(split, answers):
    truth, answer, other = answers
    rows = np.arange(len(truth)) % 2 == 0
    own, theirs = answer["prediction"][rows], other["prediction"][rows]
    size, low, high = evaluation.paired_gain(split, own, theirs, rows)
    expected = [f1_score(truth[rows], each, average="macro") for each in (own, theirs)]
    assert size == pytest.approx(expected[0] - expected[1])
    assert low < size < high
    alone = certainty.intervals(replace(split, y_test=truth[rows]), answer[rows])["f1_macro"]
    assert high - low < (alone[1] - alone[0]) / 2
    assert evaluation.paired_gain(split, own, own, rows) == (0, 0, 0)


@pytest.mark.parametrize("label", ["low", None])
def test_probabilities_that_mean_what_they_say_are_on_the_line(split, answers, label):
    _, answer, _ = answers
    curve = certainty.calibration_curve(split, answer, label)
    assert len(curve) == 10
    assert curve["rows"].sum() == len(answer)
    assert (
        (curve["low"] <= curve["probability"]) & (curve["probability"] <= curve["high"])
    ).mean() > 0.7
    too_sure = answer.assign(probability_low=answer["probability_low"] ** 0.2)
    bold = certainty.calibration_curve(split, too_sure, "low")
    assert (bold["share"] < bold["probability"]).all()
    assert len(plots.calibration({"a": curve, "b": bold}, "title").axes) == 1
