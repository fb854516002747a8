import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score

from helpers.monitoring.checks import check_labelled, check_unlabelled, measure

SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_like_the_training_rows_is_silent(promoted, seed):
    rows, answers = promoted.stream(seed)
    assert check_labelled(answers, promoted.reference) == []
    findings, table = check_unlabelled(rows, answers, promoted.reference)
    assert findings == []
    assert not table["drifted"].any()


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
