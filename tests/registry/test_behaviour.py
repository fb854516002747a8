from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from helpers import data
from helpers.registry import behaviour
from helpers.registry.behaviour import CheckFailedError
from helpers.workspace import open_workspace
from tests.conftest import split_table


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """The split of the bundled sample."""
    workspace = open_workspace(tmp_path_factory.mktemp("students") / "ws")
    return split_table(data.load_table("sample", workspace))


class Rule:
    """A model that answers by a rule: P(Dropout) from the rows; the rest is Graduate."""

    def __init__(self, dropout):
        self.dropout = dropout

    def predict(self, rows):
        p = np.asarray(self.dropout(rows), dtype="float64")
        answer = pd.DataFrame({"prediction": np.where(p > 0.5, "Dropout", "Graduate")})
        answer["probability_Dropout"] = p
        answer["probability_Enrolled"] = 0.0
        answer["probability_Graduate"] = 1 - p
        return answer


APPROVED = "Curricular units 2nd sem (approved)"


def sensible(rows):
    unpaid = (rows["Tuition fees up to date"] == 0) * 0.3
    return (0.6 - 0.1 * rows[APPROVED].clip(upper=6) + unpaid).clip(0, 1)


def test_sensible_model_behaves(students):
    model = Rule(sensible)
    assert "not Dropout" in behaviour.check_cases(model, students)
    assert "fewer approved units" in behaviour.check_directions(model, students)
    assert "order of the rows" in behaviour.check_invariances(model, students)


def test_model_that_drops_everybody_out_fails_minimum_functionality(students):
    with pytest.raises(CheckFailedError, match="400 of 400 rows"):
        behaviour.check_cases(Rule(lambda rows: np.ones(len(rows))), students)


def test_model_that_rewards_failure_fails_direction(students):
    with pytest.raises(CheckFailedError, match="fewer approved units.*-0"):
        behaviour.check_directions(Rule(lambda rows: 0.1 * rows[APPROVED].clip(upper=6)), students)


def refuses_unseen_codes(rows):
    if rows["Course"].max() > 10_000:
        raise ValueError("unknown course")
    return sensible(rows)


@pytest.mark.parametrize(
    ("dropout", "message"),
    [
        (lambda rows: np.arange(len(rows)) / len(rows), "order of the rows"),
        (lambda rows: rows.iloc[:, 0] / 10_000, "order of the columns"),
        (lambda rows: rows.dtypes.eq("int64").mean() + np.zeros(len(rows)), "as floats"),
        (lambda rows: (rows["Course"] % 7) / 7, "unseen code"),
        (refuses_unseen_codes, "ValueError: unknown course"),
    ],
)
def test_model_that_is_moved_by_what_means_nothing_fails_invariance(students, dropout, message):
    with pytest.raises(CheckFailedError, match=message):
        behaviour.check_invariances(Rule(dropout), students)


def test_cases_and_directions_do_not_apply_to_other_tables(small_split):
    labels = small_split.labels
    model = SimpleNamespace(
        predict=lambda rows: pd.DataFrame(
            {"prediction": labels[0], **{f"probability_{label}": 1 / 3 for label in labels}},
            index=rows.index,
        )
    )
    assert "none is known" in behaviour.check_cases(model, small_split)
    assert "none is known" in behaviour.check_directions(model, small_split)
    assert "no change" in behaviour.check_invariances(model, small_split)


def test_cases_for_another_table_are_given_in_one_place(small_split, monkeypatch):
    labels = small_split.labels
    short = behaviour.Case("short ones are not high", {"length": -1.0}, "high")
    monkeypatch.setattr(behaviour, "CASES", (short,))
    model = SimpleNamespace(
        predict=lambda rows: pd.DataFrame({"prediction": [labels[0]] * len(rows)})
    )
    with pytest.raises(CheckFailedError, match="short ones are not high"):
        behaviour.check_cases(model, small_split)
