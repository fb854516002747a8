from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from helpers import plots, registry
from helpers.registry import attack
from helpers.registry.reference import MOST_COLUMNS, make_reference
from helpers.registry.robustness import Robustness
from tests.conftest import split_frame
from tests.registry.conftest import by_rule, with_manifest

CERTAIN = {"prediction": "high", "probability_high": 1.0}
CERTAIN |= {"probability_low": 0.0, "probability_middle": 0.0}


def attacked(split, score, n_rows=20):
    """Attack a model that is right everywhere: one label where a score is above 0, else another."""
    model, predict = by_rule(split, lambda rows: expit(score(rows)))
    right = predict(None, split.X_test)["prediction"]
    return attack.measure(model, replace(split, y_test=right), n_rows)


def test_constant_answer_never_flips(small_split):
    result = attacked(small_split, lambda rows: np.full(len(rows), 3.0))
    assert result.n_rows == 20
    assert result.metrics()["robustness"] == 1
    assert result.flip_rate == 0


def test_answers_near_a_threshold_flip_by_that_column_and_the_others_hold(small_split):
    middle = small_split.X_test["length"].median() + 1e-3
    result = attacked(small_split, lambda rows: 4 * (rows["length"] - middle), 45)
    spread = np.ptp(small_split.X_train["length"])
    distance = (small_split.X_test["length"] - middle).abs()
    within = float((distance < attack.LARGEST * spread).mean())
    assert result.flip_rate == pytest.approx(within, abs=0.05)
    assert set(result.columns[~np.isnan(result.columns)]) == {1.0}
    assert result.flips.idxmax() == "length"
    assert result.flips.drop("length").max() == 0


def test_one_column_is_not_enough_where_two_have_to_move(small_split):
    split = small_split
    low, high = split.X_train["length"].min(), split.X_train["length"].max()
    wide = np.ptp(split.X_train["width"])

    def total(rows):
        return (rows["length"] - low) / (high - low) + rows["width"] / wide

    middle = total(split.X_test).median() + 1e-3
    result = attacked(split, lambda rows: 20 * (total(rows) - middle), 45)
    distance = (total(split.X_test) - middle).abs()
    both = float((distance < 2 * attack.LARGEST).mean())
    one = float((distance < attack.LARGEST).mean())
    assert one < both
    assert result.flip_rate == pytest.approx(both, abs=0.07)
    assert np.nanmax(result.columns) == 2
    assert result.one_column_rate <= one + 0.05


def test_what_was_measured_is_read_back(small_split):
    result = attacked(small_split, lambda rows: 4 * (rows["length"] - 1.5))
    again = Robustness.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert again.metrics() == result.metrics()
    assert len(plots.robustness(again, "a model").axes) == 2


def test_table_without_numbers_is_not_attacked(small_split):
    assert attack.measure(None, with_manifest(small_split, numeric=[]), 5) is None


def test_robustness_is_logged_with_the_run_and_measured_once(model, runs, monkeypatch):
    candidate = model.candidate(runs.good[2])
    measured = registry.attack_candidates({model.name: candidate}, 6)[model.name]
    assert candidate.robustness is measured
    assert measured.n_rows == 6
    run = mlflow.get_run(runs.good[2].info.run_id)
    assert run.data.metrics["robustness"] == 1 - measured.flip_rate
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id, "robustness")
    names = {"robustness/robustness.json", "robustness/robustness.png"}
    assert {file.path for file in files} == names
    monkeypatch.setattr(attack, "measure", None)
    again = model.candidate(run)
    assert registry.attack_candidates({model.name: again}, 6) == {model.name: again.robustness}
    assert again.robustness.metrics() == measured.metrics()
    assert registry.attack_candidates({model.name: again}, 0) == {}


def test_of_many_columns_the_most_telling_are_attacked_and_watched(small_frame):
    noise = np.random.default_rng(0).normal(size=(150, 220))
    many = pd.DataFrame(noise).add_prefix("noise ").join(small_frame())
    split = split_frame(many)
    middle = split.X_test["length"].median() + 1e-3
    result = attacked(split, lambda rows: 4 * (rows["length"] - middle), 1)
    assert result.metrics()["robustness_columns"] == attack.MOST_ATTACKED == len(result.flips)
    assert {"length", "width"} <= set(result.flips.index)
    watched = list(make_reference(split, split.X_test.assign(**CERTAIN))["columns"])
    assert len(watched) == MOST_COLUMNS
    assert {"length", "width", "city", "course"} <= set(watched)
    assert watched == [name for name in split.X_train if name in watched]
