import json
from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score

from helpers import registry
from helpers.data.students import STUDENT_CATEGORICAL
from helpers.registry import groups
from helpers.registry.groups import ARTIFACT, alarm_label, group_labels, make_grouping, measure
from helpers.workspace import ParameterError


def measured(hits_by_group):
    """Measure rows of which all are of class ``yes``; by group: rows and how many are found."""
    parts = [([name] * n, ["yes"] * k + ["no"] * (n - k)) for name, (n, k) in hits_by_group.items()]
    names, answers = (np.concatenate(each) for each in zip(*parts, strict=True))
    columns = pd.DataFrame({"side": pd.Categorical(names)})
    answer = pd.DataFrame({"prediction": answers})
    return measure(pd.Series(["yes"] * len(names)), answer, ["no", "yes"], columns, "yes")


def test_groups_are_the_same_for_any_rows_and_name_what_they_hold(small_split):
    grouping = json.loads(json.dumps(make_grouping(small_split, ["age", "city", "course"])))
    low, high = grouping["age"]["edges"]
    rows = pd.DataFrame(
        {
            "age": [low - 1, low, high, None],
            "city": ["Faro", None, "Nowhere", "Porto"],
            "course": [33, 33.0, 171.0, 5],
        }
    )
    labels = group_labels(rows, grouping)
    middle = f"{low:g} to under {high:g}"
    assert labels["age"].tolist() == [f"under {low:g}", middle, f"{high:g} and above", "missing"]
    assert labels["city"].tolist() == ["Faro", "missing", "other", "Porto"]
    assert labels["course"].tolist() == ["33", "33", "171", "other"]


def test_students_are_grouped_by_themselves_and_others_only_on_demand(small_split):
    assert make_grouping(small_split, None) == {}
    columns = {name: [1, 41] for name in STUDENT_CATEGORICAL}
    columns |= {"Gender": [0, 1], "Age at enrollment": [20, 30]}
    students = replace(small_split, X_train=pd.DataFrame(columns))
    labels = group_labels(students.X_train, make_grouping(students, None))
    assert labels.loc[1].to_dict() == {
        "Gender": "male",
        "Age at enrollment": "26 and above",
        "Nacionality": "other",
    }


def test_columns_and_classes_that_are_not_there_are_named(small_split):
    with pytest.raises(ParameterError, match="GROUPS names 'cty'.* Did you mean 'city'"):
        make_grouping(small_split, ["age", "cty"])
    with pytest.raises(ParameterError, match=r"ALARM_CLASS .*\(high, low, middle\), not 'hi'"):
        alarm_label(small_split.labels, "hi")
    assert alarm_label(small_split.labels, None) is None
    assert alarm_label([0, 1], "1") == 1


def test_metrics_by_group_are_those_of_its_rows_and_small_ones_are_not_judged(small_split):
    random, truth = np.random.default_rng(0), small_split.y_test
    answer = pd.DataFrame({"prediction": random.permutation(truth)})
    columns = group_labels(small_split.X_test, make_grouping(small_split, ["city"]))
    columns.iloc[:3] = "missing"
    report = measure(truth, answer, small_split.labels, columns, "low")
    for (column, group), row in report.table.iterrows():
        rows = (columns[column] == group).to_numpy()
        guess = answer["prediction"][rows]
        assert row["rows"] == rows.sum()
        if rows.sum() >= groups.FEWEST_ROWS:
            assert row["accuracy"] == (guess == truth[rows].to_numpy()).mean()
            assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
            assert row["selection_rate"] == (guess == "low").mean()
        else:
            assert np.isnan(row["accuracy"])
    assert "missing (city)" in report.too_small
    overall = recall_score(truth, answer["prediction"], labels=["low"], average=None)
    assert report.overall["recall_low"] == overall
    assert report.gap is None
    assert "no two groups have 20 test rows of low each" in str(report)


def test_gap_is_sure_only_where_chance_does_not_explain_it():
    report = measured({"left": (100, 90), "right": (100, 50), "small": (10, 0)})
    gap = report.gap
    assert (gap.better, gap.worse, gap.size) == ("left", "right", pytest.approx(0.4))
    half = 1.96 * np.sqrt(0.9 * 0.1 / 100 + 0.5 * 0.5 / 100)
    assert (gap.low, gap.high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.02)
    assert gap.sure
    assert report.too_small == ["small (side)"]
    assert not measured({"left": (30, 20), "right": (30, 17)}).gap.sure


@pytest.mark.parametrize(
    ("found", "max_gap", "passed", "begin"),
    [
        ((90, 50), 0.5, True, "warning: recall of yes differs by 0.40"),
        ((90, 50), 0.3, False, "recall of yes differs by 0.40"),
        ((55, 50), 0.01, True, "recall of yes differs by 0.05"),
    ],
)
def test_gap_is_a_warning_and_above_max_gap_a_reason_to_refuse(
    model, runs, found, max_gap, passed, begin
):
    candidate = model.candidate(runs.good[0])
    candidate.groups = measured({"left": (100, found[0]), "right": (100, found[1])})
    checks = registry.check_candidates(
        {model.name: candidate}, runs.baselines, model.rules(max_gap=max_gap)
    ).loc[model.name]
    row = checks.loc["gap between groups"]
    assert row["passed"] == passed
    assert row["finding"].startswith(begin)
    assert ("MAX_GAP" in row["finding"]) == (not passed)
    orange = (
        registry.colour_checks(row)[0]
        == registry.colour_checks(pd.Series({"passed": True, "finding": "warning: "}))[0]
    )
    assert orange == begin.startswith("warning")


def test_groups_are_logged_with_the_run_and_nothing_is_where_a_name_is_wrong(model, runs, capsys):
    candidates = {model.name: model.candidate(runs.good[1])}
    client, run_id = mlflow.MlflowClient(), runs.good[1].info.run_id
    for wrong in ((["city"], "hi"), (["cty"], "low")):
        with pytest.raises(ParameterError):
            registry.measure_groups(candidates, *wrong)
    assert registry.measure_groups(candidates, None, None) == {}
    assert "GROUPS names no column" in capsys.readouterr().out
    assert client.list_artifacts(run_id, "groups") == []
    (report,) = registry.measure_groups(candidates, ["city", "age"], "low").values()
    assert candidates[model.name].groups is report
    assert "fewer than 20 rows of class low" in capsys.readouterr().out
    content = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/{ARTIFACT}"))
    assert {row["group"] for row in content["groups"]} >= {"Faro", "Lisboa", "Porto"}
    names = {file.path for file in client.list_artifacts(run_id, "groups")}
    assert names == {"groups/groups.json", "groups/groups.png"}
