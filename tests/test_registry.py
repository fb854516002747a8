import io
import json
import shutil
import sys
import uuid
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND
from sklearn.dummy import DummyClassifier

from helpers import access, registry, svm, tracking
from helpers.evaluation import majority_baseline
from helpers.registry import Candidate, Rules
from helpers.workspace import MissingStepError


def with_manifest(split, **changes):
    return replace(split, manifest={**split.manifest, **changes})


def log_run(split, classifier, **falsified):
    """Log a classifier as notebook 03 does; `falsified` metrics are logged over the real ones."""
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        info = tracking.log_model(split, classifier=classifier)
        tracking.evaluate_logged_model(info, split)
        mlflow.log_metrics(falsified)
    return mlflow.get_run(run.info.run_id)


def partly_shuffled(y, share, seed=0):
    random = np.random.default_rng(seed)
    rows = random.choice(len(y), int(share * len(y)), replace=False)
    values = y.to_numpy(dtype=object).copy()
    values[rows] = random.permutation(values[rows])
    return pd.Series(values, index=y.index, name=y.name)


@pytest.fixture(scope="module")
def shop(running_server, small_split):
    """Runs of good, weak, useless and narrow models on a split of this module's own."""
    running_server.connect()
    split = with_manifest(small_split, split_digest=uuid.uuid4().hex)
    good = svm.fit_best(split, 1.0, 0.1, folds=3)
    shuffled = replace(split, y_train=partly_shuffled(split.y_train, 0.75))
    drop = {
        "X_train": split.X_train.drop(columns="age"),
        "X_test": split.X_test.drop(columns="age"),
    }
    numeric = [name for name in split.numeric if name != "age"]
    narrow = with_manifest(replace(split, **drop), numeric=numeric, digest="narrow")
    synthetic = with_manifest(split, synthetic=True, source="sample", digest="synthetic")
    return SimpleNamespace(
        split=split,
        classifier=good,
        good=[log_run(split, good) for _ in range(3)],
        weak=log_run(split, svm.fit_best(shuffled, 1.0, 0.1, folds=3)),
        useless=log_run(split, DummyClassifier().fit(split.X_train, split.y_train)),
        narrow_split=narrow,
        narrow=log_run(narrow, svm.fit_best(narrow, 1.0, 0.1, folds=3)),
        synthetic_split=synthetic,
        synthetic=log_run(synthetic, good),
        baseline=majority_baseline(split.y_train, split.y_test, split.labels),
    )


@pytest.fixture
def name(tracking_server):
    """A registered model's name that no other test uses."""
    return f"model_{uuid.uuid4().hex[:12]}"


def register_all(name, shop, runs):
    """Register runs as versions 1, 2, … without promoting them."""
    passed = pd.DataFrame({"passed": [True], "finding": [""]}, index=["all"])
    versions = [registry.register(Candidate(name, run, shop.split), passed) for run in runs]
    assert [version.version for version in versions] == [str(n + 1) for n in range(len(runs))]
    return versions


def try_to_promote(name, shop, run, split=None, rules=None):
    """Check and promote one candidate, as notebook 04 does; return the checks and the decision."""
    candidates = {name: Candidate(name, run, split or shop.split)}
    checks = registry.check_candidates(candidates, shop.baseline, rules)
    decisions = registry.promote_candidates(candidates, checks, "a test", "tester")
    return checks.loc[name], decisions.loc[name]


def stages(name):
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return {version.version: version.current_stage for version in found}


def aliased(name):
    return mlflow.MlflowClient().get_model_version_by_alias(name, "production").version


def failed(checks):
    return list(checks.index[~checks["passed"]])


# --- promoting ---------------------------------------------------------------------------------


def test_good_candidate_passes_every_check_and_gets_alias_and_stage(name, shop):
    checks, decision = try_to_promote(name, shop, shop.good[0])
    assert failed(checks) == []
    assert list(checks.index) == list(registry.CHECKS)
    assert (decision["version"], decision["decision"]) == ("1", "in Production")
    assert aliased(name) == "1"
    assert stages(name) == {"1": "Production"}
    version = registry.production_version(name)
    assert version.version == "1"
    assert version.run_id == shop.good[0].info.run_id
    assert version.tags["checks"] == "passed"
    assert version.tags["data_digest"] == shop.split.manifest["digest"]
    accuracy = shop.good[0].data.metrics["accuracy"]
    assert f"accuracy {accuracy:.4f}" in version.description
    answer = registry.load_production(name).predict(shop.split.X_test)
    assert (answer["prediction"] == shop.split.y_test).mean() == pytest.approx(accuracy)


def test_promoting_again_changes_and_records_nothing(name, shop):
    try_to_promote(name, shop, shop.good[0])
    before = registry.production_version(name)
    checks, decision = try_to_promote(name, shop, shop.good[0])
    assert failed(checks) == []
    assert (decision["version"], decision["why"]) == ("1", "already")
    registry.promote(name, 1, "by hand")
    after = registry.production_version(name)
    assert (after.version, after.last_updated_timestamp) == (
        before.version,
        before.last_updated_timestamp,
    )
    assert stages(name) == {"1": "Production"}
    assert len(registry.history(name)) == 1


def test_second_version_archives_the_first(name, shop):
    try_to_promote(name, shop, shop.good[0])
    checks, decision = try_to_promote(name, shop, shop.good[1])
    assert failed(checks) == []
    assert decision["version"] == "2"
    assert aliased(name) == "2"
    assert stages(name) == {"1": "Archived", "2": "Production"}


def test_promoting_a_version_that_is_not_there_is_refused(name, shop):
    register_all(name, shop, shop.good[:2])
    with pytest.raises(registry.RegistryError, match="no version 7.*2, 1"):
        registry.promote(name, 7, "wrong")
    assert registry.production_version(name) is None
    assert registry.history(name).empty


def test_nothing_is_in_production_of_a_model_that_nobody_registered(name):
    assert registry.production_version(name) is None
    assert registry.history(name).empty
    with pytest.raises(registry.RegistryError, match=name):
        registry.promote(name, 1, "nothing there")


# --- rolling back and history ------------------------------------------------------------------


def test_rollback_goes_one_version_back_at_each_call_until_nothing_is_left(name, shop):
    for version in register_all(name, shop, shop.good):
        registry.promote(name, version.version, "promoted")
    assert registry.rollback(name, "first complaint").version == "2"
    assert aliased(name) == "2"
    assert stages(name) == {"1": "Archived", "2": "Production", "3": "Archived"}
    assert registry.rollback(name, "second complaint").version == "1"
    assert aliased(name) == "1"
    assert stages(name) == {"1": "Production", "2": "Archived", "3": "Archived"}
    with pytest.raises(registry.RegistryError, match=name):
        registry.rollback(name, "third complaint")
    assert aliased(name) == "1"
    assert len(registry.history(name)) == 5


def test_version_promoted_after_a_rollback_is_rolled_back_to_the_one_before(name, shop):
    register_all(name, shop, shop.good)
    for version in (1, 2):
        registry.promote(name, version, "promoted")
    registry.rollback(name, "complaint")
    registry.promote(name, 3, "repaired")
    assert registry.rollback(name, "complaint again").version == "1"


def test_nothing_to_roll_back_to_after_a_first_promotion(name, shop):
    register_all(name, shop, shop.good[:1])
    with pytest.raises(registry.RegistryError, match=name):
        registry.rollback(name, "nothing promoted")
    registry.promote(name, 1, "first")
    with pytest.raises(registry.RegistryError, match=name):
        registry.rollback(name, "only one")
    assert aliased(name) == "1"


def test_history_says_who_when_from_to_why_and_how_good(name, shop):
    start = pd.Timestamp.now(tz="UTC").floor("ms")
    register_all(name, shop, shop.good[:2])
    registry.promote(name, 1, "the first one", by="Ada")
    registry.promote(name, 2, "a better one", by="Grace")
    registry.rollback(name, "complaints", by="Ada")
    history = registry.history(name)
    assert history["action"].tolist() == ["rollback", "promote", "promote"]
    assert history["from_version"].tolist()[:2] == ["2", "1"]
    assert pd.isna(history["from_version"].iloc[2])
    assert history["to_version"].tolist() == ["1", "2", "1"]
    assert history["by"].tolist() == ["Ada", "Grace", "Ada"]
    assert history["reason"].tolist() == ["complaints", "a better one", "the first one"]
    assert history["when"].is_monotonic_decreasing
    assert history["when"].between(start, pd.Timestamp.now(tz="UTC")).all()
    assert set(history["model"]) == {name}
    assert set(history["result"]) == {"FINISHED"}
    metrics = [shop.good[0].data.metrics, shop.good[1].data.metrics]
    assert history["accuracy"].tolist() == pytest.approx(
        [metrics[n]["accuracy"] for n in (0, 1, 0)]
    )
    assert history["f1_macro"].tolist() == pytest.approx(
        [metrics[n]["f1_macro"] for n in (0, 1, 0)]
    )
    assert history["f1_macro_before"].iloc[0] == pytest.approx(metrics[1]["f1_macro"])
    assert pd.isna(history["f1_macro_before"].iloc[2])


def test_who_promotes_is_the_mlflow_user_where_nobody_is_named(
    name, shop, tracking_server, monkeypatch
):
    users = access.parse_users(["ana:editor"])
    access.set_up_users(tracking_server.workspace, tracking_server.url, users)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ana")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_PASSWORD", access.stored_secret(tracking_server.workspace, "ana")
    )
    register_all(name, shop, shop.good[:1])
    registry.promote(name, 1, "first")
    assert registry.history(name)["by"].tolist() == ["ana"]


# --- production that somebody set by hand ------------------------------------------------------


@pytest.fixture
def by_hand(name, shop):
    """Version 1 in Production through the stage alone, as the classic UI does it."""
    register_all(name, shop, shop.good[:2])
    mlflow.MlflowClient().transition_model_version_stage(name, "1", "Production")
    return name


def test_version_promoted_through_the_stage_alone_is_in_production(by_hand, shop):
    assert registry.production_version(by_hand).version == "1"
    assert Candidate(by_hand, shop.good[1], shop.split).champion.version.version == "1"


def test_version_promoted_through_the_stage_alone_can_be_loaded(by_hand, shop):
    assert len(registry.load_production(by_hand).predict(shop.split.X_test.head(2))) == 2


def test_rollback_returns_to_the_version_promoted_through_the_stage_alone(by_hand):
    registry.promote(by_hand, 2, "after the one set by hand")
    assert registry.history(by_hand)["from_version"].tolist() == ["1"]
    assert stages(by_hand) == {"1": "Archived", "2": "Production"}
    assert registry.rollback(by_hand, "complaint").version == "1"
    assert aliased(by_hand) == "1"


def test_promoting_the_version_set_by_hand_adds_the_alias(by_hand):
    registry.promote(by_hand, 1, "adopted")
    assert aliased(by_hand) == "1"
    assert stages(by_hand)["1"] == "Production"


def test_server_without_stages_gets_the_alias_alone(name, shop, monkeypatch):
    def gone(*arguments, **options):
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(mlflow.MlflowClient, "transition_model_version_stage", gone)
    checks, decision = try_to_promote(name, shop, shop.good[0])
    assert decision["decision"] == "in Production"
    assert aliased(name) == "1"
    assert stages(name) == {"1": "None"}
    assert registry.history(name)["result"].tolist() == ["FINISHED"]
    _, again = try_to_promote(name, shop, shop.good[0])
    assert again["why"] == "already"
    assert len(registry.history(name)) == 1


def test_error_of_the_server_other_than_missing_stages_is_not_hidden(name, shop, monkeypatch):
    def broken(*arguments, **options):
        raise MlflowException("the disk is full")

    register_all(name, shop, shop.good[:1])
    monkeypatch.setattr(mlflow.MlflowClient, "transition_model_version_stage", broken)
    with pytest.raises(MlflowException, match="the disk is full"):
        registry.promote(name, 1, "first")
    assert registry.history(name)["result"].tolist() == ["FAILED"]


# --- candidates that are refused ---------------------------------------------------------------


def assert_not_promoted(name, decision, production="1"):
    assert decision["decision"] == "refused"
    assert decision["why"]
    current = registry.production_version(name)
    assert (current.version if current else None) == production
    assert stages(name).get(production) == ("Production" if production else None)


def test_candidate_worse_than_production_is_refused(name, shop):
    try_to_promote(name, shop, shop.good[0])
    checks, decision = try_to_promote(name, shop, shop.weak)
    assert failed(checks) == ["not worse than Production"]
    assert_not_promoted(name, decision)
    assert decision["version"] == "2"
    tags = mlflow.MlflowClient().get_model_version(name, "2").tags
    assert tags["checks"] == "failed: not worse than Production"
    assert len(registry.history(name)) == 1


def test_candidate_within_max_loss_of_production_is_promoted(name, shop):
    try_to_promote(name, shop, shop.good[0])
    checks, decision = try_to_promote(name, shop, shop.weak, rules=Rules(max_loss=1.0))
    assert failed(checks) == []
    assert decision["decision"] == "in Production"
    assert aliased(name) == "2"


def test_candidate_no_better_than_the_majority_class_is_refused(name, shop):
    checks, decision = try_to_promote(name, shop, shop.useless)
    assert failed(checks) == ["better than the majority class"]
    assert_not_promoted(name, decision, production=None)


def test_candidate_with_a_falsified_metric_is_refused(name, shop):
    run = log_run(shop.split, shop.classifier, accuracy=0.9999)
    checks, decision = try_to_promote(name, shop, run)
    assert failed(checks) == ["metrics reproduced"]
    assert "accuracy" in decision["why"]
    assert "0.9999" in decision["why"]
    assert_not_promoted(name, decision, production=None)


def damage_gone(folder):
    shutil.rmtree(folder)


def damage_cut_short(folder):
    (path,) = folder.rglob("classifier.joblib")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_garbage(folder):
    (path,) = folder.rglob("classifier.joblib")
    content = bytearray(path.read_bytes())
    content[50:] = bytes(len(content) - 50)
    path.write_bytes(content)


def damage_no_pickle(folder):
    (path,) = folder.rglob("classifier.joblib")
    path.write_text("this is no model")


def damage_no_mlmodel(folder):
    (folder / "MLmodel").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_gone, damage_cut_short, damage_garbage, damage_no_pickle, damage_no_mlmodel],
)
def test_candidate_whose_files_are_destroyed_is_refused_and_not_registered(
    name, shop, tracking_server, damage
):
    run = log_run(shop.split, shop.classifier)
    (logged,) = run.outputs.model_outputs
    (folder,) = tracking_server.workspace.artifacts.rglob(f"{logged.model_id}/artifacts")
    damage(folder)
    checks, decision = try_to_promote(name, shop, run)
    assert failed(checks) == ["loads back and answers"]
    assert list(checks.index) == ["loads back and answers"]
    assert decision["decision"] == "refused"
    assert decision["version"] is None
    assert decision["why"]
    assert stages(name) == {}


def test_candidate_with_other_columns_is_refused_unless_replacing_is_allowed(name, shop):
    try_to_promote(name, shop, shop.good[0])
    checks, decision = try_to_promote(name, shop, shop.narrow, shop.narrow_split)
    assert failed(checks) == ["may replace Production", "not worse than Production"]
    assert "ALLOW_REPLACE" in decision["why"]
    assert_not_promoted(name, decision)
    checks, decision = try_to_promote(
        name, shop, shop.narrow, shop.narrow_split, Rules(allow_replace=True)
    )
    assert failed(checks) == []
    assert decision["decision"] == "in Production"
    assert aliased(name) == "2"


def test_model_of_synthetic_data_never_replaces_one_of_real_data(name, shop):
    try_to_promote(name, shop, shop.good[0])
    checks, decision = try_to_promote(name, shop, shop.synthetic, shop.synthetic_split)
    assert failed(checks) == ["may replace Production"]
    assert "synthetic" in decision["why"]
    assert_not_promoted(name, decision)
    version = mlflow.MlflowClient().get_model_version(name, "2")
    assert version.tags["synthetic_data"] == "true"
    assert "SYNTHETIC" in version.description


def test_model_of_real_data_replaces_one_of_synthetic_data(name, shop):
    try_to_promote(name, shop, shop.synthetic, shop.synthetic_split)
    checks, decision = try_to_promote(name, shop, shop.good[0])
    assert failed(checks) == []
    assert decision["decision"] == "in Production"
    assert aliased(name) == "2"
    assert "SYNTHETIC" not in registry.production_version(name).description


def test_production_trained_on_some_of_the_test_rows_is_judged_by_its_own_metrics(name, shop):
    try_to_promote(name, shop, shop.good[0])
    other = with_manifest(shop.split, split_digest=uuid.uuid4().hex)
    champion = Candidate(name, shop.good[1], other).champion
    metrics, basis = champion.evaluation
    assert metrics == shop.good[0].data.metrics
    assert "its own test rows" in basis


def test_refused_candidate_fails_a_batch_run(name, shop, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    candidates = {name: Candidate(name, shop.useless, shop.split)}
    checks = registry.check_candidates(candidates, shop.baseline)
    decisions = registry.promote_candidates(candidates, checks)
    with pytest.raises(registry.PromotionRefusedError, match=f"{name}.*majority class"):
        registry.require_promoted(decisions)


def test_promoted_candidate_does_not_fail_a_batch_run(name, shop, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    candidates = {name: Candidate(name, shop.good[0], shop.split)}
    checks = registry.check_candidates(candidates, shop.baseline)
    registry.require_promoted(registry.promote_candidates(candidates, checks))
    assert "in Production" in capsys.readouterr().out


# --- finding candidates ------------------------------------------------------------------------


def test_candidate_is_the_newest_finished_run_on_the_prepared_split(shop, tracking_server):
    split = with_manifest(shop.split, split_digest=uuid.uuid4().hex)
    runs = []
    for _ in range(2):
        with tracking.start_run("svc_model", "svm", split.manifest) as run:
            runs.append(run.info.run_id)
    with (
        pytest.raises(RuntimeError, match="broken"),
        tracking.start_run("svc_model", "svm", split.manifest),
    ):
        raise RuntimeError("broken")
    with tracking.start_run("svc_model", "svm", shop.split.manifest) as other:
        pass
    mlflow.MlflowClient().delete_run(other.info.run_id)
    candidates = registry.find_candidates(split, ["model_svm_rbf"])
    assert candidates["model_svm_rbf"].run.info.run_id == runs[-1]


def test_model_not_trained_on_the_prepared_split_names_the_notebook_to_run(shop, tracking_server):
    split = with_manifest(shop.split, split_digest=uuid.uuid4().hex)
    with pytest.raises(MissingStepError) as caught:
        registry.find_candidates(split)
    assert "02_cnn_training" in str(caught.value)
    assert "03_svm_grid_search" in str(caught.value)


def test_comparison_shows_candidate_production_and_baseline(name, shop):
    try_to_promote(name, shop, shop.good[0])
    metrics = registry.comparison({name: Candidate(name, shop.weak, shop.split)}, shop.baseline)
    assert list(metrics) == [name, f"{name} in Production (version 1)", "majority class"]
    assert metrics[name] == shop.weak.data.metrics
    production = metrics[f"{name} in Production (version 1)"]
    assert production["accuracy"] == pytest.approx(shop.good[0].data.metrics["accuracy"])
    assert json.dumps(production)
