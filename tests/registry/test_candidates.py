import json
import uuid
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import pytest
from sklearn.tree import DecisionTreeClassifier

from helpers import registry, series, tracking
from helpers.models import evaluation
from helpers.models.evaluation import compute_metrics
from helpers.registry.candidates import MIN_UNSEEN
from helpers.workspace import MissingStepError
from tests.conftest import split_frame
from tests.registry.conftest import RULES, fit, log_run, partly_shuffled, with_manifest
from tests.scoring import fit_svm


def test_candidate_is_the_newest_finished_run_on_the_prepared_split(runs, tracking_server):
    split = with_manifest(runs.split, split_digest=uuid.uuid4().hex)
    newest = {}
    for name, model in list(series.MODELS.items()) * 2:
        with tracking.start_run(model.experiment, model.run_name, split.manifest) as run:
            newest[name] = run.info.run_id
    with (
        pytest.raises(RuntimeError, match="broken"),
        tracking.start_run("svc_model", "svm", split.manifest),
    ):
        raise RuntimeError("broken")
    with tracking.start_run("svc_model", "svm", runs.split.manifest) as other:
        pass
    mlflow.MlflowClient().delete_run(other.info.run_id)
    candidates = registry.find_candidates(split)
    assert {name: each.run.info.run_id for name, each in candidates.items()} == newest


def test_model_not_trained_on_the_prepared_split_names_the_notebook_to_run(runs, tracking_server):
    split = with_manifest(runs.split, split_digest=uuid.uuid4().hex)
    with pytest.raises(MissingStepError, match=r"02_cnn_training.*03_svm_grid_search"):
        registry.find_candidates(split)


def test_comparison_shows_candidate_production_and_baseline(model, runs):
    model.register(runs.good[0])
    model.promote(1)
    metrics = registry.comparison({model.name: model.candidate(runs.weak)}, runs.baselines)
    title = f"{model.name} in Production (version 1)"
    assert list(metrics) == [model.name, title, "logistic regression", "majority class"]
    assert metrics[model.name] == runs.weak.data.metrics
    assert metrics[title]["accuracy"] == pytest.approx(runs.good[0].data.metrics["accuracy"])
    assert json.dumps(metrics)


# --- what production is measured on --------------------------------------------------------------


@pytest.fixture
def learned(model, small_frame):
    """What knows its rows by heart is in Production; its table is the start of a longer one."""
    frame = small_frame(rows=300)
    frame["Target"] = partly_shuffled(frame["Target"], 0.4)
    split = split_frame(frame.head(240))
    parts = fit(split, DecisionTreeClassifier(random_state=0))
    run = log_run(split, parts, with_rows=True)
    model.register(run)
    model.promote(1)
    return SimpleNamespace(frame=frame, split=split, run=run)


def test_production_is_measured_on_rows_of_a_grown_table_that_it_has_not_seen(model, runs, learned):
    grown = learned.frame[learned.frame.columns[::-1]].copy()
    # A missing value turns whole numbers into floats; the rows are the same.
    grown.loc[299, "age"] = None
    split = split_frame(grown)
    new = ~split.X_test.index.isin(learned.split.X_train.index)
    assert MIN_UNSEEN < new.sum() < len(new)
    candidate, checks = model.check(log_run(split, fit_svm(split)), split)
    assert checks["passed"].all()
    assert candidate.champion.new_rows.tolist() == new.tolist()
    answers = candidate.champion.model.predict(split.X_test)
    everywhere = compute_metrics(split.y_test, answers, split.labels)["f1_macro"]
    fair = compute_metrics(split.y_test[new], answers[new], split.labels)["f1_macro"]
    assert fair < candidate.metrics["f1_macro"] < everywhere - RULES.max_loss
    own = compute_metrics(split.y_test[new], candidate.answer[new], split.labels)["f1_macro"]
    finding = checks["finding"][model.name, "not worse than Production"]
    assert f"the {new.sum()} test rows that are new to it" in finding
    assert f"macro F1 {own:.4f}" in finding
    table = registry.comparison({model.name: candidate}, runs.baselines)
    part = [
        f"{model.name} on {new.sum()} rows",
        f"{model.name} in Production (version 1) on {new.sum()} rows",
    ]
    assert list(table) == [model.name, *part, "logistic regression", "majority class"]
    assert [table[column]["f1_macro"] for column in part] == pytest.approx([own, fair])


def assert_own_metrics(candidate, run):
    """Make sure that Production is judged by the metrics that its run logged."""
    assert candidate.champion.new_rows is None
    _, production, basis = candidate.beside_champion
    assert production == run.data.metrics
    assert "its own test rows (too few" in basis
    title = f"{candidate.name} in Production (version 1) on its own test rows"
    assert title in registry.comparison(
        {candidate.name: candidate}, evaluation.baselines(candidate.split)
    )


def test_too_few_new_rows_leave_production_with_its_own_metrics(model, learned):
    split = split_frame(learned.frame.head(240), seed=1)
    assert 0 < (~split.X_test.index.isin(learned.split.X_train.index)).sum() < MIN_UNSEEN
    assert_own_metrics(model.candidate(learned.run, split), learned.run)


def test_class_missing_among_new_rows_leaves_production_with_its_own_metrics(model, learned):
    split = split_frame(learned.frame)
    assert model.candidate(learned.run, split).champion.new_rows.sum() >= MIN_UNSEEN
    without = replace(split, y_test=split.y_test.replace({"high": "low"}))
    assert_own_metrics(model.candidate(learned.run, without), learned.run)


def test_production_whose_training_rows_are_not_known_is_judged_by_its_own_metrics(model, runs):
    model.register(runs.good[0])
    model.promote(1)
    other = with_manifest(runs.split, split_digest=uuid.uuid4().hex)
    assert_own_metrics(model.candidate(runs.good[1], other), runs.good[0])
