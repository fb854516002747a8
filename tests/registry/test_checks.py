import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from helpers import registry
from helpers.display import COLOURS
from helpers.models import evaluation
from helpers.registry import behaviour
from helpers.registry.behaviour import CheckFailedError
from helpers.registry.checks import CHECKS, LOADS, check_candidate
from tests.conftest import split_frame
from tests.registry.conftest import HALF_HOLDS, RULES, failed, log_run
from tests.scoring import fit_svm


def colours(checks):
    """Return the names of the checks by colour."""
    by_style = {f"color: {colour}": name for name, colour in COLOURS.items()}
    found = {}
    for name, row in checks.iterrows():
        (colour,) = set(registry.colour_checks(row))
        found.setdefault(by_style.get(colour, "grey"), set()).add(name)
    return found


def test_good_candidate_passes_every_check_and_one_that_cannot_fail_is_grey(model, runs):
    checks = model.findings(runs.good[0], robustness=HALF_HOLDS)
    assert list(checks.index) == list(CHECKS)
    assert failed(checks) == []
    assert checks["finding"]["robustness"] == "no condition: 50% of 10 attacked rows hold"
    grey = {
        "minimum functionality",
        "direction",
        "robustness",
        "gap between groups",
        "beside a logistic regression",
        "may replace Production",
        "not worse than Production",
        "runs elsewhere",
    }
    assert colours(checks) == {"grey": grey, "good": set(CHECKS) - grey}


@pytest.mark.parametrize(("wanted", "colour"), [(0.4, "good"), (0.6, "bad")])
def test_min_robustness_is_a_condition(model, runs, wanted, colour):
    checks = model.findings(runs.good[0], robustness=HALF_HOLDS, min_robustness=wanted)
    assert "robustness" in colours(checks)[colour]
    assert checks["passed"].all() == (colour == "good")


def test_min_robustness_needs_a_measurement(model, runs):
    checks = model.findings(runs.good[0], min_robustness=0.1)
    assert failed(checks) == ["robustness"]
    assert "not measured" in checks["finding"]["robustness"]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda answer: answer.iloc[:, ::-1], "answers ['probability_middle'"),
        (lambda answer: answer.assign(prediction="else"), "labels that are not in the CSV"),
        (lambda answer: answer.assign(probability_high=2.0), "do not sum to 1"),
        (lambda answer: answer.assign(probability_high=np.nan), "do not sum to 1"),
    ],
)
def test_answer_of_another_form_is_refused(model, runs, change, finding):
    candidate = model.candidate(runs.good[0])
    candidate.answer = change(candidate.answer)
    checks = check_candidate(candidate, runs.baselines, RULES)
    assert list(checks.index) == failed(checks) == [LOADS]
    assert finding in checks["finding"][LOADS]


def test_model_of_other_columns_than_the_data_is_refused(model, runs):
    assert failed(model.findings(runs.narrow)) == ["schema"]


def test_candidate_that_does_not_behave_is_refused(model, runs, monkeypatch):
    never_low = behaviour.Case("nobody is low", {"length": 0}, "low")
    monkeypatch.setattr(behaviour, "CASES", (never_low,))
    checks = model.findings(runs.good[0])
    assert failed(checks) == ["minimum functionality"]
    assert "nobody is low" in checks["finding"]["minimum functionality"]


def test_candidate_no_better_than_the_majority_class_is_refused(model, runs):
    assert failed(model.findings(runs.useless)) == ["better than the baseline"]


@pytest.fixture(scope="module")
def rare_class():
    """Baselines of a table of which one row in a hundred is a fault, and answers to its rows."""
    rng, labels = np.random.default_rng(0), np.repeat(["ok", "fault"], [1980, 20])
    frame = pd.DataFrame({"noise": rng.normal(size=2000).round(3), "Target": labels})
    simple = evaluation.baselines(split_frame(frame, categorical=()))
    true = simple.split.y_test.to_numpy()

    def answer(found, false_alarms=0):
        """Find some of the faults, and take some other rows for faults."""
        said = np.full(len(true), "ok", dtype=object)
        said[np.flatnonzero(true == "fault")[:found]] = "fault"
        said[np.flatnonzero(true == "ok")[:false_alarms]] = "fault"
        return SimpleNamespace(answer=pd.DataFrame({"prediction": said}))

    return simple, answer


@pytest.mark.parametrize(
    ("found", "false_alarms", "passes"),
    [(0, 0, False), (3, 1, True), (5, 0, True), (1, 100, False), (6, 590, False)],
)
def test_rare_class_has_to_be_found_and_accuracy_does_not_decide(
    rare_class, found, false_alarms, passes
):
    simple, answer = rare_class
    assert simple.metrics["majority class"]["accuracy"] == 0.99
    check, rules = CHECKS["better than the baseline"], replace(RULES, min_gain=0.0)
    if passes:
        assert "beside the majority class" in check(answer(found, false_alarms), simple, rules)
        return
    with pytest.raises(CheckFailedError, match="surely above 0"):
        check(answer(found, false_alarms), simple, rules)


def test_gain_may_count_from_a_logistic_regression(model, runs):
    beside = "better than the baseline", "beside a logistic regression"
    checks = model.findings(runs.good[0], gain_over="logistic regression")
    assert failed(checks) == [beside[0]]
    assert "beside the logistic regression" in checks["finding"][beside[0]]
    assert beside[1] in colours(checks)["grey"]
    checks = model.findings(runs.useless)
    assert "surely worse" in checks["finding"][beside[1]]
    assert beside[1] in colours(checks)["warning"]


def test_candidate_with_a_falsified_metric_is_refused(model, runs):
    checks = model.findings(log_run(runs.split, runs.fitted, accuracy=0.9999))
    assert failed(checks) == ["metrics reproduced"]
    assert "accuracy" in checks["finding"]["metrics reproduced"]
    assert "0.9999" in checks["finding"]["metrics reproduced"]


@pytest.mark.parametrize(("max_loss", "refused"), [(0.01, True), (1.0, False)])
def test_candidate_may_be_worse_than_production_by_max_loss(model, runs, max_loss, refused):
    model.register(runs.good[0])
    model.promote(1)
    checks = model.findings(runs.weak, max_loss=max_loss)
    assert failed(checks) == (["not worse than Production"] if refused else [])


@pytest.mark.parametrize(
    ("gain", "colour", "finding"),
    [
        ((-0.02, -0.03, -0.011), "bad", "surely below it, and by more than 0.01 (MAX_LOSS)"),
        (
            (-0.02, -0.05, 0.01),
            "warning",
            "-0.0500 to +0.0100: below it by more than MAX_LOSS, but",
        ),
        ((-0.005, -0.008, -0.002), "good", "not below it by more than MAX_LOSS"),
    ],
)
def test_production_is_surely_better_or_it_is_no_reason_to_refuse(
    model, runs, gain, colour, finding
):
    model.register(runs.good[0])
    model.promote(1)
    candidate = model.candidate(runs.good[1])
    assert candidate.gain == (0, 0, 0)
    candidate.gain = gain
    checks = check_candidate(candidate, runs.baselines, RULES)
    assert "not worse than Production" in colours(checks)[colour]
    assert finding in checks["finding"]["not worse than Production"]


def test_candidate_with_other_columns_is_refused_unless_replacing_is_allowed(model, runs):
    model.register(runs.good[0])
    model.promote(1)
    checks = model.findings(runs.narrow, runs.narrow_split)
    assert failed(checks) == ["may replace Production"]
    assert "ALLOW_REPLACE" in checks["finding"]["may replace Production"]
    assert failed(model.findings(runs.narrow, runs.narrow_split, allow_replace=True)) == []


def test_model_of_synthetic_data_never_replaces_one_of_real_data(model, runs):
    model.register(runs.good[0], runs.synthetic)
    model.promote(1)
    checks = model.findings(runs.synthetic, runs.synthetic_split)
    assert failed(checks) == ["may replace Production"]
    assert "synthetic" in checks["finding"]["may replace Production"]
    model.promote(2)
    assert failed(model.findings(runs.synthetic, runs.synthetic_split)) == []
    assert failed(model.findings(runs.good[0])) == []


def test_true_or_false_column_that_is_a_category_can_be_promoted(model, small_frame):
    frame = small_frame(seed=3).assign(debtor=lambda table: table["width"] > 7)
    split = split_frame(frame, categorical=["course", "debtor"])
    assert split.X_train["debtor"].dtype == bool
    assert failed(model.findings(log_run(split, fit_svm(split)), split)) == []


# --- models that do not load --------------------------------------------------------------------


def cut_short(folder):
    (path,) = folder.rglob("classifier.joblib")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(folder):
    (path,) = folder.rglob("classifier.joblib")
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes(len(content) - 50))


def no_pickle(folder):
    (path,) = folder.rglob("classifier.joblib")
    path.write_text("this is no model")


def no_mlmodel(folder):
    (folder / "MLmodel").unlink()


@pytest.fixture
def files_of(tracking_server):
    """Find the folder of a run's logged model."""

    def find(run):
        (logged,) = run.outputs.model_outputs
        (folder,) = tracking_server.workspace.artifacts.rglob(f"{logged.model_id}/artifacts")
        return folder

    return find


@pytest.mark.parametrize("damage", [shutil.rmtree, cut_short, garbage, no_pickle, no_mlmodel])
def test_candidate_whose_files_are_destroyed_is_refused_and_not_registered(
    model, runs, files_of, damage
):
    run = log_run(runs.split, runs.fitted)
    damage(files_of(run))
    checks, decision = model.try_to_promote(run)
    assert list(checks.index) == failed(checks) == [LOADS]
    assert (decision["decision"], decision["version"]) == ("refused", None)
    assert LOADS in decision["why"]
    assert model.stages == {}


@pytest.mark.slow
def test_production_that_no_longer_loads_is_replaced(model, runs, files_of, capsys):
    lost = log_run(runs.split, runs.fitted)
    model.try_to_promote(lost)
    shutil.rmtree(files_of(lost))
    metrics = registry.comparison({model.name: model.candidate(runs.weak)}, runs.baselines)
    assert list(metrics) == [model.name, "logistic regression", "majority class"]
    assert "version 1 in Production does not load" in capsys.readouterr().out
    checks = model.findings(runs.synthetic, runs.synthetic_split)
    assert failed(checks) == ["may replace Production"]
    checks, decision = model.try_to_promote(runs.weak)
    assert failed(checks) == []
    for check in ("may replace Production", "not worse than Production"):
        assert "version 1 in Production does not load" in checks["finding"][check]
    assert decision["decision"] == "in Production"
    assert model.aliased == decision["version"]
