import numpy as np
import pandas as pd
import pytest

from helpers import data
from helpers.registry.behaviour import (
    CheckFailedError,
    check_cases,
    check_directions,
    check_invariances,
)
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
    assert "not Dropout" in check_cases(model, students)
    assert "fewer approved units" in check_directions(model, students)
    assert "order of the rows" in check_invariances(model, students)


def refuses_unseen_codes(rows):
    if rows["Course"].max() > 10_000:
        raise ValueError("unknown course")
    return sensible(rows)


@pytest.mark.parametrize(
    ("check", "dropout", "message"),
    [
        (check_cases, lambda rows: np.ones(len(rows)), "400 of 400 rows"),
        (
            check_directions,
            lambda rows: 0.1 * rows[APPROVED].clip(upper=6),
            "fewer approved units.*-0",
        ),
        (check_invariances, lambda rows: np.arange(len(rows)) / len(rows), "order of the rows"),
        (check_invariances, lambda rows: rows.iloc[:, 0] / 10_000, "order of the columns"),
        (
            check_invariances,
            lambda rows: np.full(len(rows), rows.dtypes.eq("int64").mean()),
            "as floats",
        ),
        (check_invariances, lambda rows: (rows["Course"] % 7) / 7, "unseen code"),
        (check_invariances, refuses_unseen_codes, "ValueError: unknown course"),
    ],
)
def test_model_that_does_not_behave_is_told_how(students, check, dropout, message):
    with pytest.raises(CheckFailedError, match=message):
        check(Rule(dropout), students)
