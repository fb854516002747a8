"""The metrics: those of scikit-learn, one name each, and those of the model that is logged."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
)

from helpers.models.evaluation import baselines, bootstrap_interval, compute_metrics, warn_if_weak


def test_logged_metrics_are_those_of_the_model_loaded_back(logged, small_split):
    answer = logged.model.predict(small_split.X_test)
    expected = compute_metrics(small_split.y_test, answer, small_split.labels)
    stored = {name: logged.run.data.metrics[name] for name in expected}
    assert stored == pytest.approx(expected, abs=1e-6)
    assert expected["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["macro", "micro", "other"], ["macro_2", "micro_2", "other"]),
        (["A*", "A+", "B"], ["A_", "A__2", "B"]),
        (["A*", "A+", "A__2"], ["A_", "A__2", "A__2_2"]),
    ],
)
def test_metrics_are_those_of_scikit_learn_and_each_class_has_a_name_of_its_own(labels, names):
    truth = np.array(labels)[[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    guess = np.array(labels)[[0, 0, 0, 1, 1, 2, 2, 2, 0]]
    answer = pd.DataFrame({"prediction": guess})
    for label in labels:
        answer[f"probability_{label}"] = np.where(guess == label, 0.8, 0.1)
    metrics, chances = compute_metrics(truth, answer, labels), answer.iloc[:, 1:].to_numpy()
    assert metrics["accuracy"] == accuracy_score(truth, guess)
    assert metrics["log_loss"] == log_loss(truth, chances, labels=labels)
    ranking = roc_auc_score(truth, chances, multi_class="ovr", labels=labels)
    assert metrics["roc_auc_ovr"] == ranking
    functions = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    for score, function in functions.items():
        for average in ("micro", "macro"):
            assert metrics[f"{score}_{average}"] == function(truth, guess, average=average)
        each = function(truth, guess, average=None, labels=labels)
        assert [metrics[f"{score}_{name}"] for name in names] == each.tolist()


def test_bootstrap_interval_is_as_wide_as_theory_says_and_takes_probabilities_and_pairs():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 400)
    guess = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    accuracy = accuracy_score(truth, guess)
    low, high = bootstrap_interval(accuracy_score, truth, guess)
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 400)
    assert (low, high) == pytest.approx((accuracy - half, accuracy + half), abs=0.006)
    assert (low, high) == bootstrap_interval(accuracy_score, truth, guess)
    narrow = bootstrap_interval(accuracy_score, truth, guess, level=0.5)
    assert low < narrow[0] < accuracy < narrow[1] < high
    chances = np.column_stack([1 - guess, guess]) * 0.8 + 0.1
    low, high = bootstrap_interval(log_loss, truth, chances, n_resamples=100)
    assert low < log_loss(truth, chances) < high

    def gain(y_true, both):
        return accuracy_score(y_true, both[:, 0]) - accuracy_score(y_true, both[:, 1])

    same = np.column_stack([guess, guess])
    assert bootstrap_interval(gain, truth, same, n_resamples=50) == (0, 0)


def test_baselines_are_scikit_learns_and_a_weak_model_gets_a_remark(small_split, capsys):
    split, simple = small_split, baselines(small_split)
    assert list(simple.metrics) == ["logistic regression", "majority class"]
    share = (split.y_test == split.y_train.mode()[0]).mean()
    assert simple.metrics["majority class"]["accuracy"] == share
    linear = simple.answers["logistic regression"]
    assert simple.metrics["logistic regression"]["accuracy"] > share + 0.3
    half = linear.assign(prediction=np.where(np.arange(45) % 2, linear["prediction"], "low"))
    gain, low, high = simple.gain(half, "logistic regression")
    scores = [
        f1_score(split.y_test, each["prediction"], average="macro") for each in (half, linear)
    ]
    assert gain == pytest.approx(scores[0] - scores[1])
    assert low < gain < high < 0
    warn_if_weak("The model", linear, simple)
    assert capsys.readouterr().out == ""
    warn_if_weak("The model", half, simple)
    assert "surely worse than a logistic regression" in capsys.readouterr().out
    warn_if_weak("The model", linear.assign(prediction="low"), simple, "Do this.")
    said = capsys.readouterr().out
    assert "The model answers 'low' for every test row: it has not learnt the others. Do" in said
