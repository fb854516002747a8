import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from helpers.monitoring.drift import column_drift, prediction_shift
from helpers.registry.reference import make_reference
from tests.scoring import answer_of

DRIFTED = {
    "length": lambda rows: rows["length"] + 0.8,
    "city": lambda rows: np.where(rows.index % 2 == 0, "Porto", rows["city"]),
    "age": lambda rows: rows["age"].where(rows.index % 3 > 0),
    "width": lambda rows: np.nan,
}


@pytest.mark.parametrize("column", DRIFTED)
def test_column_that_changed_has_drifted_and_no_other(promoted, column):
    for seed in range(10):
        rows, _ = promoted.stream(seed, **{column: DRIFTED[column]})
        table = column_drift(promoted.reference, rows)
        assert table.index[0] == column
        assert list(table.index[table["drifted"]]) == [column]


def test_drift_of_numbers_is_scipys_test_on_the_rows_themselves(promoted):
    rows, _ = promoted.stream(length=DRIFTED["length"])
    table = column_drift(promoted.reference, rows)
    expected = stats.ks_2samp(promoted.split.X_train["length"], rows["length"]).statistic
    assert table.loc["length", "effect"] == pytest.approx(expected, abs=0.02)


def test_codes_are_the_same_levels_as_integers_and_floats(promoted):
    rows, _ = promoted.stream()
    whole = column_drift(promoted.reference, rows.astype({"course": "int64"}))
    floats = column_drift(promoted.reference, rows.astype({"course": "float64"}))
    assert floats.loc["course", "effect"] == whole.loc["course", "effect"] < 0.15


def test_predictions_of_one_class_only_are_a_shift(promoted):
    _, answers = promoted.stream()
    assert not prediction_shift(promoted.reference, answers["prediction"])[1]
    assert prediction_shift(promoted.reference, answers["prediction"].map(lambda _: "low"))[1]


def test_reference_does_not_tell_which_values_stood_in_one_row(promoted):
    split, random = promoted.split, np.random.default_rng(0)
    shuffled = split.X_train.apply(lambda column: random.permutation(column.to_numpy()))
    assert not (shuffled == split.X_train).all(axis=1).any()
    answer = answer_of(promoted.classifier, split.X_test, split.labels)
    reference = make_reference(replace(split, X_train=shuffled), answer)
    for one in (promoted.reference, reference):
        for summary in one["columns"].values():
            # Of values that are equally frequent the first comes first.
            summary["counts"] = sorted(summary.get("counts", []))
    assert json.loads(json.dumps(reference)).items() <= promoted.reference.items()
    assert len(json.dumps(reference)) < 40_000
