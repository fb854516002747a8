from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd
import pytest

from helpers import plots, registry
from helpers.registry import explanations
from helpers.registry.explanations import explain
from helpers.workspace import ParameterError
from tests.registry.conftest import by_rule


def explained(split, score):
    """Explain a model with two classes, the first one with the probability that `score` gives."""
    model, predict = by_rule(split, score)
    answer = predict(None, split.X_test)
    truth = answer["prediction"].set_axis(split.X_test.index)
    return explain(model, replace(split, y_test=truth), answer, split.labels[0])


def test_column_that_decides_is_the_most_important_and_the_others_are_not(small_split):
    middle = small_split.X_train["length"].median()
    found = explained(small_split, lambda rows: np.where(rows["length"] > middle, 0.9, 0.1))
    assert found.importance.index[0] == "length"
    assert (found.importance["mean"].drop("length") == 0).all()
    assert list(found.deciding.index) == ["length"]
    assert str(found).startswith("What decides most: length (+")
    assert "Of 5 columns 1 matter" in str(found)
    assert "No column decides" in str(explained(small_split, lambda rows: np.full(len(rows), 0.5)))


def test_values_of_a_row_add_up_to_its_answer_and_each_adds_its_own_part(small_split):
    rows = small_split.X_train
    missing = replace(small_split, X_train=rows.assign(city=rows["city"].where(rows["age"] > 30)))
    middle = rows["length"].median()

    def score(rows):
        return 0.5 + 0.2 * (rows["length"] > middle) + 0.1 * (rows["city"] == "Porto")

    found = explained(missing, score)
    for values in found.rows.values():
        row = pd.Series(values.data, values.feature_names)
        answer = float(score(pd.DataFrame([row])).iloc[0])
        assert values.base_values + values.values.sum() == pytest.approx(answer, abs=1e-3)
        adds = pd.Series(values.values, values.feature_names)
        assert adds.drop(["length", "city"]).abs().max() == pytest.approx(0, abs=1e-3)
        assert (adds["length"] > 0) == (row["length"] > middle)
        assert (adds["city"] > 0) == (row["city"] == "Porto")


def test_of_many_columns_the_most_telling_are_explained_and_counted(small_split, monkeypatch):
    monkeypatch.setattr(explanations, "MOST_EXPLAINED", 2)
    found = explained(small_split, lambda rows: 0.2 + 0.6 * (rows["length"] > 1))
    assert set(found.importance.index) == {"city", "length"}
    assert "Of the 2 most telling of 5 columns 1 matter" in str(found)
    for values in found.rows.values():
        assert list(values.feature_names) == list(found.importance.index.sort_values())


def test_pictures_show_names_with_dollars_as_they_are(small_split):
    found = explained(small_split, lambda rows: 0.2 + 0.01 * rows["age"])
    (row, values), *_ = found.rows.items()
    values.feature_names = ["$a$" if name == "age" else name for name in values.feature_names]
    figure = plots.waterfall(found, row, "a model")
    texts = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert any(r"\$a\$" in text for text in texts)
    assert "$a$" in values.feature_names


def test_explanation_is_logged_with_the_run(model, runs):
    candidates = {model.name: model.candidate(runs.good[1])}
    with pytest.raises(ParameterError, match="ALARM_CLASS"):
        registry.explain_candidates(candidates, "hi")
    client, run_id = mlflow.MlflowClient(), runs.good[1].info.run_id
    assert client.list_artifacts(run_id, "explanation") == []
    (found,) = registry.explain_candidates(candidates, "low").values()
    assert candidates[model.name].explanation is found
    assert found.importance.index[0] in ("length", "width", "city", "course")
    files = {file.path for file in client.list_artifacts(run_id, "explanation")}
    rows = ("surest_right_alarm", "closest_decision", "worst_mistake")
    names = ["importance.csv", "importance.png"]
    names += [f"{row}.{kind}" for row in rows for kind in ("png", "csv")]
    assert files == {f"explanation/{name}" for name in names}


def test_rarest_class_is_explained_where_none_matters(small_split, model, runs):
    rare = replace(runs.split, y_train=runs.split.y_train[runs.split.y_train != "middle"])
    rare = replace(rare, y_train=pd.concat([rare.y_train, pd.Series(["middle"])]))
    candidate = model.candidate(runs.good[0])
    assert explain(candidate.model, rare, candidate.answer).label == "middle"
