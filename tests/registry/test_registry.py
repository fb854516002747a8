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
from sklearn.tree import DecisionTreeClassifier

from helpers import data, registry, tracking
from helpers.models.evaluation import compute_metrics, majority_baseline
from helpers.models.interface import TabularPreprocessor
from helpers.registry import Candidate, Rules, behaviour, robustness
from helpers.server import credentials, users
from helpers.workspace import MissingStepError
from tests.conftest import split_table
from tests.scoring import fit_svm


def with_manifest(split, **changes):
    return replace(split, manifest={**split.manifest, **changes})


def fit(split, classifier=None):
    """Fit preprocessing and classifier, an SVM unless another is given."""
    if classifier is None:
        return fit_svm(split, 1.0, 0.1)
    preprocessing = TabularPreprocessor(split.categorical)
    return preprocessing, classifier.fit(preprocessing.fit_transform(split.X_train), split.y_train)


def log_run(split, parts, with_rows=False, **falsified):
    """Log preprocessing and classifier as notebook 03 does.

    `falsified` metrics are logged over the real ones.
    Runs from before training rows were logged are as those without `with_rows`.
    """
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        if with_rows:
            tracking.log_split(split)
        info = tracking.log_model(split, *parts)
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
    good = fit(split)
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
        weak=log_run(split, fit(shuffled)),
        useless=log_run(split, fit(split, DummyClassifier())),
        narrow_split=narrow,
        narrow=log_run(narrow, fit(narrow)),
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
    versions = [
        mlflow.register_model(Candidate(name, run, shop.split).model_uri, name) for run in runs
    ]
    assert [version.version for version in versions] == [str(n + 1) for n in range(len(runs))]
    return versions


def run_cell(candidates, checks, REASON="a test", PROMOTED_BY="tester"):
    """Do what the cell of notebook 04 does, word for word."""
    client, decisions = mlflow.MlflowClient(), {}
    for name, candidate in candidates.items():
        with registry.promoting(candidate, checks, REASON, PROMOTED_BY) as promotion:
            if promotion.loads:
                version = promotion.version or mlflow.register_model(candidate.model_uri, name)
            if promotion.due:
                number = version.version
                client.transition_model_version_stage(name, number, "Production", True)
                client.set_registered_model_alias(name, "production", number)
        decisions[name] = promotion.decision
    return decisions


def check(name, shop, run, split=None, rules=None):
    candidates = {name: Candidate(name, run, split or shop.split)}
    return candidates, registry.check_candidates(candidates, shop.baseline, rules)


def try_to_promote(name, shop, run, split=None, rules=None):
    """Check and promote one candidate; return the checks and the decision."""
    candidates, checks = check(name, shop, run, split, rules)
    return checks.loc[name], run_cell(candidates, checks)[name]


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


# --- lines of the cell that are missing ---------------------------------------------------------


def promote_without(candidate, checks, *missing, broken=None):
    """Run the cell's lines except those whose call is `missing`; raise `broken` at the end."""
    client, name = mlflow.MlflowClient(), candidate.name
    with registry.promoting(candidate, checks, "a test") as promotion:
        version = promotion.version
        if not version and "register_model" not in missing:
            version = mlflow.register_model(candidate.model_uri, name)
        if promotion.due or "promotion.due" in missing:
            if version and "transition_model_version_stage" not in missing:
                client.transition_model_version_stage(name, version.version, "Production", True)
            if version and "set_registered_model_alias" not in missing:
                client.set_registered_model_alias(name, "production", version.version)
        if broken:
            raise broken
    return promotion


CALLS = ["register_model", "transition_model_version_stage", "set_registered_model_alias"]


@pytest.mark.parametrize("call", CALLS)
def test_cell_without_a_line_is_an_error_and_production_stays(name, shop, call):
    try_to_promote(name, shop, shop.good[0])
    candidates, checks = check(name, shop, shop.good[1])
    with pytest.raises(registry.RegistryError, match=f"lacks.*{call}"):
        promote_without(candidates[name], checks, call)
    assert aliased(name) == "1"
    assert stages(name) == {"1": "Production"} | ({"2": "None"} if call != CALLS[0] else {})
    assert registry.history(name)["result"].tolist() == ["FAILED", "FINISHED"]
    decision = run_cell(*check(name, shop, shop.good[1]))[name]
    assert (decision["version"], decision["decision"]) == ("2", "in Production")
    assert (aliased(name), stages(name)) == ("2", {"1": "Archived", "2": "Production"})


@pytest.mark.parametrize("call", CALLS[1:])
def test_cell_without_a_line_is_an_error_for_a_first_and_an_archived_version(name, shop, call):
    candidates, checks = check(name, shop, shop.good[0])
    with pytest.raises(registry.RegistryError, match=f"lacks {call}"):
        promote_without(candidates[name], checks, call)
    assert registry.production_version(name) is None
    assert stages(name) == {"1": "None"}
    for run in shop.good[:2]:
        try_to_promote(name, shop, run)
    with pytest.raises(registry.RegistryError, match=f"lacks {call}"):
        promote_without(candidates[name], *check(name, shop, shop.good[0])[1:], call)
    assert (aliased(name), stages(name)) == ("2", {"1": "Archived", "2": "Production"})


def test_cell_that_does_not_ask_whether_promotion_is_due_is_an_error(name, shop):
    try_to_promote(name, shop, shop.good[0])
    candidates, checks = check(name, shop, shop.weak)
    for missing in ((), CALLS[1:2], CALLS[2:]):
        with pytest.raises(registry.RegistryError, match="failed a check"):
            promote_without(candidates[name], checks, "promotion.due", *missing)
        assert (aliased(name), stages(name)) == ("1", {"1": "Production", "2": "None"})
    with pytest.raises(registry.RegistryError, match="lacks register_model"):
        promote_without(Candidate(name, shop.good[2], shop.split), checks, *CALLS)


@pytest.mark.parametrize("error", [MlflowException("the disk is full"), KeyboardInterrupt()])
def test_error_and_interrupt_in_the_cell_are_undone(name, shop, error):
    try_to_promote(name, shop, shop.good[0])
    candidates, checks = check(name, shop, shop.good[1])
    with pytest.raises(type(error)):
        promote_without(candidates[name], checks, broken=error)
    assert (aliased(name), stages(name)) == ("1", {"1": "Production", "2": "None"})
    assert registry.history(name)["result"].iloc[0] in ("FAILED", "KILLED")
    assert registry.history(name)["to_version"].iloc[0] == "2"


def test_error_does_not_undo_what_somebody_else_promoted_meanwhile(name, shop):
    try_to_promote(name, shop, shop.good[0])
    candidates, checks = check(name, shop, shop.good[1])
    other = mlflow.register_model(Candidate(name, shop.good[2], shop.split).model_uri, name)
    with (
        pytest.raises(MlflowException, match="the disk is full"),
        registry.promoting(candidates[name], checks) as promotion,
    ):
        assert promotion.due
        registry.promote(name, other.version, "meanwhile")
        mlflow.start_run()
        raise MlflowException("the disk is full")
    assert (aliased(name), stages(name)) == ("2", {"1": "Archived", "2": "Production"})


def test_candidate_is_checked_again_where_production_changed_since(name, shop, capsys):
    candidates, checks = check(name, shop, shop.weak)
    assert failed(checks.loc[name]) == []
    try_to_promote(name, shop, shop.good[0])
    decision = run_cell(candidates, checks)[name]
    assert "version 1 went into Production meanwhile; checked again" in capsys.readouterr().out
    assert_not_promoted(name, decision)


def test_what_mlflow_says_about_a_new_version_is_no_error(name, shop, capfd):
    try_to_promote(name, shop, shop.good[0])
    shown = capfd.readouterr()
    assert f"Created version '1' of model '{name}'" in shown.out
    assert "Created" not in shown.err


# --- behaviour and robustness ------------------------------------------------------------------


def test_candidate_that_does_not_behave_is_not_promoted(name, shop, monkeypatch):
    never_low = behaviour.Case("nobody is low", lambda rows: rows, "low", ("length",))
    monkeypatch.setattr(behaviour, "CASES", (never_low,))
    checks, decision = try_to_promote(name, shop, shop.good[0])
    assert failed(checks) == ["minimum functionality"]
    assert "nobody is low" in decision["why"]
    assert registry.production_version(name) is None


def test_robustness_is_logged_with_the_run_and_measured_once(name, shop, monkeypatch):
    candidate = Candidate(name, shop.good[2], shop.split)
    measured = registry.attack_candidates({name: candidate}, 6)[name]
    assert measured.n_rows == 6
    run = mlflow.get_run(shop.good[2].info.run_id)
    assert run.data.metrics["robustness"] == 1 - measured.flip_rate
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id, "robustness")
    assert {file.path for file in files} == {
        "robustness/robustness.json",
        "robustness/robustness.png",
    }
    monkeypatch.setattr(registry.robustness, "measure", None)
    again = Candidate(name, run, shop.split)
    assert registry.attack_candidates({name: again}, 6)[name].metrics() == measured.metrics()
    assert again.robustness is not None
    assert registry.attack_candidates({name: again}, 0) == {}


@pytest.mark.parametrize(("holds", "wanted", "refused"), [(0.5, 0.4, False), (0.5, 0.6, True)])
def test_min_robustness_blocks_promotion(name, shop, holds, wanted, refused):
    columns = np.array([1.0, np.nan] * 5)
    measured = robustness.Robustness(10, columns, pd.Series(dtype=float), 10)
    assert 1 - measured.flip_rate == holds
    candidate = Candidate(name, shop.good[0], shop.split, measured)
    checks = registry.check_candidates(
        {name: candidate}, shop.baseline, Rules(min_robustness=wanted)
    )
    assert failed(checks.loc[name]) == (["robustness"] if refused else [])


def colour(checks, name):
    return registry.colour_checks(checks.loc[name])[0].removeprefix("color: ")


def test_check_that_cannot_fail_is_grey(name, shop):
    columns = np.array([1.0, np.nan] * 5)
    measured = robustness.Robustness(10, columns, pd.Series(dtype=float), 10)
    candidate = Candidate(name, shop.good[0], shop.split, measured)
    checks = registry.check_candidate(candidate, shop.baseline)
    assert checks["finding"]["robustness"] == "no condition: 50% of 10 attacked rows hold"
    grey = {check for check in checks.index if colour(checks, check) == "grey"}
    assert grey == {
        "minimum functionality",
        "direction",
        "robustness",
        "may replace Production",
        "not worse than Production",
    }
    assert colour(checks, "interface") == registry.COLOURS["good"]
    for wanted, expected in ((0.4, "good"), (0.6, "bad")):
        checks = registry.check_candidate(candidate, shop.baseline, Rules(min_robustness=wanted))
        assert colour(checks, "robustness") == registry.COLOURS[expected]


def test_min_robustness_needs_a_measurement(name, shop):
    checks, decision = try_to_promote(name, shop, shop.good[0], rules=Rules(min_robustness=0.1))
    assert failed(checks) == ["robustness"]
    assert "not measured" in decision["why"]


def test_reference_for_the_monitoring_is_logged_with_the_run(name, shop):
    try_to_promote(name, shop, shop.good[0])
    run_id = shop.good[0].info.run_id
    reference = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/{registry.REFERENCE}"))
    assert set(reference["columns"]) == set(shop.split.X_train.columns)
    expected = shop.good[0].data.metrics["accuracy"]
    assert reference["metrics"]["accuracy"] == pytest.approx(expected)


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


@pytest.mark.slow
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
    roles = users.parse_users(["ana:editor"])
    users.set_up_users(tracking_server.workspace, tracking_server.url, roles)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ana")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_PASSWORD", credentials.stored_secret(tracking_server.workspace, "ana")
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


def set_alias(name, version):
    mlflow.MlflowClient().set_registered_model_alias(name, "production", version)


def promote_1_and_2_of_3(name, shop):
    register_all(name, shop, shop.good)
    for version in (1, 2):
        registry.promote(name, version, "promoted")


@pytest.mark.slow
def test_rollback_from_an_alias_moved_forward_by_hand_goes_to_the_last_one_promoted(name, shop):
    promote_1_and_2_of_3(name, shop)
    set_alias(name, "3")
    assert registry.rollback(name, "by hand was wrong").version == "2"
    assert (aliased(name), stages(name)["2"]) == ("2", "Production")
    assert registry.history(name)["from_version"].iloc[0] == "3"
    assert registry.rollback(name, "further back").version == "1"


@pytest.mark.slow
def test_rollback_from_an_alias_moved_back_by_hand_never_goes_to_that_version(name, shop):
    promote_1_and_2_of_3(name, shop)
    set_alias(name, "1")
    assert registry.rollback(name, "complaint").version == "2"
    event = registry.history(name).iloc[0]
    assert (event["from_version"], event["to_version"]) == ("1", "2")
    assert registry.rollback(name, "complaint").version == "1"
    with pytest.raises(registry.RegistryError, match=name):
        registry.rollback(name, "nothing is left")


@pytest.mark.slow
def test_promotion_that_fails_half_way_leaves_production_and_can_be_done_again(
    name, shop, monkeypatch
):
    def broken(*arguments, **options):
        raise MlflowException("the disk is full")

    promote_1_and_2_of_3(name, shop)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "transition_model_version_stage", broken)
        with pytest.raises(MlflowException, match="the disk is full"):
            registry.promote(name, 3, "fails")
    assert aliased(name) == "2"
    assert stages(name)["2"] == "Production"
    version = registry.promote(name, 3, "again")
    assert (version.version, version.current_stage) == ("3", "Production")
    assert version.aliases == ["production"]
    assert registry.history(name)["result"].tolist()[:2] == ["FINISHED", "FAILED"]
    assert registry.rollback(name, "complaint").version == "2"


def test_promoting_the_version_with_the_alias_returns_it_with_its_stage(name, shop):
    register_all(name, shop, shop.good[:1])
    set_alias(name, "1")
    assert registry.promote(name, 1, "adopted").current_stage == "Production"


@pytest.mark.slow
def test_database_without_a_server_promotes_and_rolls_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/store.db"
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient()
        client.create_registered_model("model")
        for _ in range(2):
            run = client.create_run(client.create_experiment(uuid.uuid4().hex)).info.run_id
            client.create_model_version("model", str(tmp_path), run)
        with pytest.raises(registry.RegistryError, match="no version 7.*2, 1"):
            registry.promote("model", 7, "wrong")
        for version in (1, 2):
            registry.promote("model", version, "promoted")
        registry.promote("model", 2, "again")
        assert registry.rollback("model", "complaint").current_stage == "Production"
        assert registry.history("model")["to_version"].tolist() == ["1", "2", "1"]
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


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


@pytest.mark.slow
def test_production_that_no_longer_loads_is_replaced(name, shop, tracking_server, capsys):
    lost = log_run(shop.split, shop.classifier)
    try_to_promote(name, shop, lost)
    (logged,) = lost.outputs.model_outputs
    (folder,) = tracking_server.workspace.artifacts.rglob(f"{logged.model_id}/artifacts")
    damage_gone(folder)
    metrics = registry.comparison({name: Candidate(name, shop.weak, shop.split)}, shop.baseline)
    assert list(metrics) == [name, "majority class"]
    assert "version 1 in Production does not load" in capsys.readouterr().out
    checks, decision = try_to_promote(name, shop, shop.synthetic, shop.synthetic_split)
    assert failed(checks) == ["may replace Production"]
    checks, decision = try_to_promote(name, shop, shop.weak)
    assert failed(checks) == []
    for check in ("may replace Production", "not worse than Production"):
        assert "version 1 in Production does not load" in checks["finding"][check]
    assert decision["decision"] == "in Production"
    assert aliased(name) == decision["version"]


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


def learner(split):
    """Fit what knows its training rows by heart."""
    return fit(split, DecisionTreeClassifier(random_state=0))


def split_of(frame, seed=0, categorical=("course",)):
    content = frame.to_csv(index=False).encode()
    return split_table(data.read_table(content, "grown", categorical=list(categorical)), 0.3, seed)


@pytest.fixture
def learned(name, small_frame):
    """What knows its rows by heart is in Production; its table is the start of a longer one."""
    frame = small_frame(rows=300)
    frame["Target"] = partly_shuffled(frame["Target"], 0.4)
    split = split_of(frame.head(240))
    run = log_run(split, learner(split), with_rows=True)
    version = mlflow.register_model(Candidate(name, run, split).model_uri, name)
    registry.promote(name, version.version, "first")
    return SimpleNamespace(name=name, frame=frame, split=split, run=run)


def test_production_is_measured_on_rows_of_a_grown_table_that_it_has_not_seen(learned, shop):
    grown = learned.frame[learned.frame.columns[::-1]].copy()
    # A missing value turns whole numbers into floats; the rows are the same.
    grown.loc[299, "age"] = None
    split = split_of(grown)
    candidate = Candidate(learned.name, log_run(split, fit(split)), split)
    known = set(learned.split.X_train.index)
    new = ~split.X_test.index.isin(known)
    assert 30 < new.sum() < len(new)
    checks = registry.check_candidate(candidate, shop.baseline)
    assert failed(checks) == []
    assert candidate.champion.unseen.tolist() == new.tolist()
    answers = candidate.champion.model.predict(split.X_test)
    everywhere = compute_metrics(split.y_test, answers, split.labels)["f1_macro"]
    fair = compute_metrics(split.y_test[new], answers[new], split.labels)["f1_macro"]
    assert fair < candidate.metrics["f1_macro"] < everywhere - Rules().max_loss
    assert candidate.champion.evaluation[0]["f1_macro"] == pytest.approx(fair)
    own = compute_metrics(split.y_test[new], candidate.answer[new], split.labels)["f1_macro"]
    finding = checks["finding"]["not worse than Production"]
    assert f"the {new.sum()} test rows that are new to it" in finding
    assert f"macro F1 {own:.4f}" in finding
    table = registry.comparison({learned.name: candidate}, shop.baseline)
    columns = [
        learned.name,
        f"{learned.name} on {new.sum()} rows",
        f"{learned.name} in Production (version 1) on {new.sum()} rows",
        "majority class",
    ]
    assert list(table) == columns
    assert [table[column]["f1_macro"] for column in columns[1:3]] == pytest.approx([own, fair])


def test_too_few_new_rows_leave_production_with_its_own_metrics(learned):
    split = split_of(learned.frame.head(240), seed=1)
    candidate = Candidate(learned.name, learned.run, split)
    assert 0 < candidate.champion.unseen.sum() < registry.MIN_UNSEEN
    metrics, basis = candidate.champion.evaluation
    assert metrics == learned.run.data.metrics
    assert "its own test rows (too few" in basis
    title = f"{learned.name} in Production (version 1) on its own test rows"
    assert title in registry.comparison({learned.name: candidate}, {})


def test_class_missing_among_new_rows_leaves_production_with_its_own_metrics(learned, monkeypatch):
    monkeypatch.setattr(registry, "MIN_UNSEEN", 10)
    split = split_of(learned.frame)
    champion = Candidate(learned.name, learned.run, split).champion
    assert champion.measurable
    champion.unseen &= (split.y_test != "high").to_numpy()
    assert champion.unseen.sum() >= registry.MIN_UNSEEN
    assert champion.evaluation[0] == learned.run.data.metrics


def test_production_whose_training_rows_are_not_known_is_judged_by_its_own_metrics(name, shop):
    try_to_promote(name, shop, shop.good[0])
    other = with_manifest(shop.split, split_digest=uuid.uuid4().hex, digest="grown")
    metrics, basis = Candidate(name, shop.good[1], other).champion.evaluation
    assert metrics == shop.good[0].data.metrics
    assert "its own test rows" in basis


def test_true_or_false_column_that_is_a_category_can_be_promoted(name, small_frame):
    frame = small_frame(seed=3).assign(debtor=lambda table: table["width"] > 7)
    split = split_of(frame, categorical=["course", "debtor"])
    assert split.X_train["debtor"].dtype == bool
    candidate = Candidate(name, log_run(split, fit(split)), split)
    baseline = majority_baseline(split.y_train, split.y_test, split.labels)
    assert failed(registry.check_candidate(candidate, baseline)) == []


def test_refused_candidate_fails_a_batch_run(name, shop, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    decisions = run_cell(*check(name, shop, shop.useless))
    with pytest.raises(registry.PromotionRefusedError, match=f"{name}.*majority class"):
        registry.require_promoted(decisions)


def test_promoted_candidate_does_not_fail_a_batch_run(name, shop, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    registry.require_promoted(run_cell(*check(name, shop, shop.good[0])))
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
