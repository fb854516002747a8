import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score

from helpers.monitoring.checks import check_labelled, check_rates, check_unlabelled, measure
from helpers.registry.rates import count_rates

SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_like_the_training_rows_is_silent(promoted, seed):
    rows, answers = promoted.stream(seed)
    assert check_labelled(answers, promoted.reference) == []
    findings, table = check_unlabelled(rows, answers, promoted.reference)
    assert findings == []
    assert not table["drifted"].any()
    for known in (answers, answers.drop(columns="label")):
        assert check_rates(rows, known, promoted.reference)[0] == []


@pytest.mark.parametrize("seed", SEEDS)
def test_worse_answers_raise_an_alert_when_labels_arrive(promoted, seed):
    _, answers = promoted.stream(seed, length=lambda rows: -rows["length"])
    found = {finding.metric: finding for finding in check_labelled(answers, promoted.reference)}
    assert {"accuracy", "f1_macro"} <= set(found)
    accuracy = accuracy_score(answers["label"], answers["prediction"])
    assert found["accuracy"].value == pytest.approx(accuracy, abs=0.01)
    before = promoted.reference["metrics"]["accuracy"]
    assert found["accuracy"].threshold == pytest.approx(before - 0.05)


def test_drifted_columns_and_shifted_classes_are_found_without_labels(promoted):
    rows, answers = promoted.stream(length=lambda rows: rows["length"] + 0.8, age=np.nan)
    answers = answers.assign(prediction="low")
    findings, _ = check_unlabelled(rows, answers, promoted.reference)
    messages = {finding.metric: finding.message for finding in findings}
    assert list(messages) == ["drift age", "drift length", "predictions"]
    assert "Kolmogorov-Smirnov" in messages["drift length"]
    assert "missing values" in messages["drift age"]
    assert "low 100%" in messages["predictions"]


def test_overconfident_answers_raise_an_alert(promoted):
    _, answers = promoted.stream(n_rows=600)
    columns = [f"probability_{label}" for label in promoted.split.labels]
    answers[columns] = np.eye(3)[answers[columns].to_numpy().argmax(axis=1)]
    found = [finding.metric for finding in check_labelled(answers, promoted.reference)]
    assert found == ["overconfidence"]


def test_few_rows_prove_nothing(promoted):
    rows, answers = promoted.stream(n_rows=40, length=100.0)
    assert check_labelled(answers.assign(label="low"), promoted.reference) == []
    assert check_unlabelled(rows, answers, promoted.reference) == ([], None)


def test_class_that_is_missing_from_a_period_is_not_held_against_it(promoted):
    _, answers = promoted.stream(1, 400)
    answers = answers[answers["label"] != "high"]
    found = [finding.metric for finding in check_labelled(answers, promoted.reference)]
    assert "f1_macro" not in found
    assert not [name for name in found if name.startswith("recall")]


@pytest.mark.parametrize("labels", [["high", "low", "middle"], [0, 1], [3, 5, 7], ["0", "1"]])
def test_metrics_are_those_of_scikit_learn(labels):
    random = np.random.default_rng(0)
    said, true = random.choice(labels, 200), random.choice(labels, 200)
    names = [f"probability_{label}" for label in labels]
    answers = pd.DataFrame(random.dirichlet(np.ones(len(labels)), 200), columns=names)
    metrics = measure(answers.assign(prediction=said, label=true), labels)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, said))
    assert metrics["f1_macro"] == pytest.approx(f1_score(true, said, average="macro"))
    recalls = recall_score(true, said, average=None, labels=labels)
    for label, recall in zip(labels, recalls, strict=True):
        assert metrics[f"recall_{label}"] == pytest.approx(recall)
    expected = answers[names].max(axis=1).mean() - (true == said).mean()
    assert metrics["overconfidence"] == pytest.approx(expected)


# --- by group, and before labels arrive ---------------------------------------------------------


@pytest.mark.parametrize("labels", [["high", "low", "middle"], [0, 1]])
def test_calibrated_probabilities_foretell_what_labels_say_later(labels):
    random, n_rows = np.random.default_rng(0), 20_000
    chances = random.dirichlet(np.ones(len(labels)), n_rows)
    answers = pd.DataFrame(chances, columns=[f"probability_{label}" for label in labels])
    answers.insert(0, "prediction", np.asarray(labels)[chances.argmax(axis=1)])
    drawn = (chances.cumsum(axis=1) < random.random((n_rows, 1))).sum(axis=1)
    true = np.asarray(labels)[np.minimum(drawn, len(labels) - 1)]
    rows = pd.DataFrame({"side": random.choice(["a", "b"], n_rows)})
    grouping = {"side": {"levels": {"a": "left", "b": "right"}}}
    estimated = count_rates(rows, answers, labels, grouping)
    counted = count_rates(rows, answers, labels, grouping, true)
    assert {group for _, group, _ in counted.index} == {"", "left", "right"}
    shares = [each["hits"] / each["whole"] for each in (estimated, counted)]
    np.testing.assert_allclose(*shares, atol=0.02)
    of_all = counted.xs("", level="column").droplevel("group")
    assert (of_all["hits"] / of_all["whole"])["accuracy"] == accuracy_score(
        true, answers["prediction"]
    )
    recalls = recall_score(true, answers["prediction"], average=None, labels=labels)
    measured = (of_all["hits"] / of_all["whole"])[[f"recall_{label}" for label in labels]]
    np.testing.assert_allclose(measured, recalls)


def test_alert_names_the_group_that_it_got_worse_for(promoted):
    rows, answers = promoted.stream(n_rows=900)
    of_group = rows["city"] == "Faro"
    answers.loc[of_group, "label"] = "high"
    findings, table = check_rates(rows, answers, promoted.reference)
    messages = [each.message for each in findings if " city " in each.message]
    assert any(message.startswith("accuracy of city Faro 0.") for message in messages)
    assert all("city Faro" in message for message in messages)
    assert table.index[0][:2] == ("city", "Faro")


def test_rows_that_became_harder_are_an_alert_before_their_labels_arrive(promoted):
    rows, answers = promoted.stream(n_rows=3000)
    answers = answers.drop(columns="label")
    hard = answers.filter(like="probability_").max(axis=1).nsmallest(300).index
    findings, _ = check_rates(rows.loc[hard], answers.loc[hard], promoted.reference)
    metrics = [each.metric for each in findings]
    assert "accuracy (estimated)" in metrics
    assert [name for name in metrics if " of city " in name]


def test_group_of_few_rows_and_group_that_is_new_prove_nothing(promoted):
    rows, answers = promoted.stream(n_rows=300)
    rows.loc[rows.index[:40], "city"] = "Nowhere"
    rows.loc[rows.index[40:], "city"] = "Porto"
    rows.loc[rows.index[40:55], "city"] = "Faro"
    wrong = rows["city"] != "Porto"
    answers.loc[wrong, "label"] = answers.loc[wrong, "prediction"].map(
        {"low": "high", "high": "low", "middle": "low"}
    )
    _, table = check_rates(rows, answers, promoted.reference)
    groups = {group for column, group, _ in table.index if column == "city"}
    assert groups == {"Porto"}
