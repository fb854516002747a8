import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from helpers import data, plots
from helpers.registry import behaviour, robustness
from helpers.registry.behaviour import BehaviourError
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
    with pytest.raises(BehaviourError, match="400 of 400 rows"):
        behaviour.check_cases(Rule(lambda rows: np.ones(len(rows))), students)


def test_model_that_rewards_failure_fails_direction(students):
    with pytest.raises(BehaviourError, match="fewer approved units.*-0"):
        behaviour.check_directions(Rule(lambda rows: 0.1 * rows[APPROVED].clip(upper=6)), students)


@pytest.mark.parametrize(
    ("dropout", "message"),
    [
        (lambda rows: np.arange(len(rows)) / len(rows), "order of the rows"),
        (lambda rows: rows.iloc[:, 0] / 10_000, "order of the columns"),
        (lambda rows: (rows["Course"] % 7) / 7, "unseen code"),
    ],
)
def test_model_that_is_moved_by_what_means_nothing_fails_invariance(students, dropout, message):
    with pytest.raises(BehaviourError, match=message):
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
    short = behaviour.Case(
        "short ones are not high", lambda rows: rows.assign(length=-1.0), "high", ("length",)
    )
    monkeypatch.setattr(behaviour, "CASES", (short,))
    model = SimpleNamespace(
        predict=lambda rows: pd.DataFrame({"prediction": [labels[0]] * len(rows)})
    )
    with pytest.raises(BehaviourError, match="short ones are not high"):
        behaviour.check_cases(model, small_split)


# --- robustness --------------------------------------------------------------------------------


class Unwrapped:
    """A model as MLflow gives it, around a rule."""

    def __init__(self, rule):
        self.rule = rule

    def unwrap_python_model(self):
        return SimpleNamespace(predict=lambda context, rows: self.rule(rows))


def threshold_model(labels, score):
    """Answer the first label where the score is above 0, else the second."""

    def rule(rows):
        p = 1 / (1 + np.exp(-np.asarray(score(rows), dtype="float64")))
        answer = {"prediction": np.where(p > 0.5, labels[0], labels[1])}
        answer |= {f"probability_{label}": 0.0 for label in labels}
        answer[f"probability_{labels[0]}"], answer[f"probability_{labels[1]}"] = p, 1 - p
        return pd.DataFrame(answer)

    return Unwrapped(rule)


def attacked(split, score, n_rows=20):
    """Attack a model that is right on every row."""
    model = threshold_model(split.labels, score)
    right = model.rule(split.X_test)["prediction"].to_numpy()
    return robustness.measure(model, replace(split, y_test=pd.Series(right)), n_rows)


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
    within = float((distance < robustness.LARGEST * spread).mean())
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
    both = float((distance < 2 * robustness.LARGEST).mean())
    one = float((distance < robustness.LARGEST).mean())
    assert one < both
    assert result.flip_rate == pytest.approx(both, abs=0.07)
    assert np.nanmax(result.columns) == 2
    assert result.one_column_rate <= one + 0.05


def test_what_was_measured_is_read_back(small_split):
    result = attacked(small_split, lambda rows: 4 * (rows["length"] - 1.5))
    again = robustness.Robustness.from_json(result.to_json())
    assert json.loads(again.to_json()) == json.loads(result.to_json())
    assert again.metrics() == result.metrics()
    assert len(plots.robustness(again, "a model").axes) == 2


def test_table_without_numbers_is_not_attacked(small_split):
    drop = ["length", "width", "age"]
    rest = replace(
        small_split,
        X_train=small_split.X_train.drop(columns=drop),
        X_test=small_split.X_test.drop(columns=drop),
        manifest={**small_split.manifest, "numeric": []},
    )
    assert robustness.measure(None, rest) is None
