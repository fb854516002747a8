import io
import json
import sys
import uuid

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from helpers import registry
from helpers.registry.promotion import PromotionRefusedError, RegistryError
from tests.registry.conftest import failed, promote_by_cell
from tests.scoring import promote_without

CALLS = ["register_model", "transition_model_version_stage", "set_registered_model_alias"]


def test_good_candidate_gets_alias_and_stage(model, runs):
    checks, decision = model.try_to_promote(runs.good[0])
    assert failed(checks) == []
    assert (decision["version"], decision["decision"]) == ("1", "in Production")
    assert (model.aliased, model.stages) == ("1", {"1": "Production"})
    version = registry.production_version(model.name)
    assert (version.version, version.run_id) == ("1", runs.good[0].info.run_id)
    assert version.tags["checks"] == "passed"
    assert version.tags["data_digest"] == runs.split.manifest["digest"]
    accuracy = runs.good[0].data.metrics["accuracy"]
    assert f"| accuracy | {accuracy:.4f} |" in version.description
    answer = registry.load_production(model.name).predict(runs.split.X_test)
    assert (answer["prediction"] == runs.split.y_test).mean() == pytest.approx(accuracy)


def test_promoting_again_changes_and_records_nothing(model, runs):
    model.try_to_promote(runs.good[0])
    before = registry.production_version(model.name)
    checks, decision = model.try_to_promote(runs.good[0])
    assert failed(checks) == []
    assert (decision["version"], decision["why"]) == ("1", "already")
    model.promote(1)
    after = registry.production_version(model.name)
    assert after.last_updated_timestamp == before.last_updated_timestamp
    assert model.stages == {"1": "Production"}
    assert len(model.history) == 1


def test_promoting_a_version_that_is_not_there_is_refused(model, runs):
    with pytest.raises(RegistryError, match=f"{model.name}.*none"):
        model.promote(1)
    model.register(*runs.good[:2])
    with pytest.raises(RegistryError, match="no version 7.*2, 1"):
        model.promote(7)
    assert registry.production_version(model.name) is None
    assert model.history.empty


def test_refused_candidate_is_registered_and_production_stays(model, runs):
    model.put(runs.good[0])
    _, decision = model.try_to_promote(runs.weak)
    assert (decision["version"], decision["decision"]) == ("2", "refused")
    assert "not worse than Production" in decision["why"]
    assert (model.aliased, model.stages) == ("1", {"1": "Production", "2": "None"})
    tags = mlflow.MlflowClient().get_model_version(model.name, "2").tags
    assert tags["checks"] == "failed: not worse than Production"
    assert len(model.history) == 1


def test_version_trained_on_the_synthetic_sample_says_so(model, runs):
    model.try_to_promote(runs.synthetic, runs.synthetic_split)
    version = registry.production_version(model.name)
    assert version.tags["synthetic_data"] == "true"
    assert "SYNTHETIC" in version.description
    model.try_to_promote(runs.good[0])
    assert "SYNTHETIC" not in registry.production_version(model.name).description


def test_reference_for_the_monitoring_is_logged_with_the_run(model, runs):
    model.try_to_promote(runs.good[0])
    path = f"runs:/{runs.good[0].info.run_id}/{registry.REFERENCE}"
    reference = json.loads(mlflow.artifacts.load_text(path))
    assert set(reference["columns"]) == set(runs.split.X_test.columns)
    expected = runs.good[0].data.metrics["accuracy"]
    assert reference["metrics"]["accuracy"] == pytest.approx(expected)


def test_candidate_is_checked_again_where_production_changed_since(model, runs, capsys):
    candidate, checks = model.check(runs.weak)
    assert failed(checks) == []
    model.put(runs.good[0])
    decision = promote_by_cell(candidate, checks)
    assert "version 1 went into Production meanwhile; checked again" in capsys.readouterr().out
    assert decision["decision"] == "refused"
    assert (model.aliased, model.stages["1"]) == ("1", "Production")


def test_what_mlflow_says_about_a_new_version_is_no_error(model, runs, capfd):
    model.try_to_promote(runs.good[0])
    shown = capfd.readouterr()
    assert f"Created version '1' of model '{model.name}'" in shown.out
    assert "Created" not in shown.err


def test_refused_candidate_fails_a_batch_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    decisions = {"one model": {"decision": "in Production", "why": "passed all checks"}}
    registry.require_promoted(decisions)
    assert "in Production" in capsys.readouterr().out
    decisions["other model"] = {"decision": "refused", "why": "direction: no"}
    with pytest.raises(PromotionRefusedError, match="Not promoted: other model: direction: no$"):
        registry.require_promoted(decisions)


# --- lines of the cell that are missing, errors, and others who promote -------------------------


@pytest.mark.parametrize("call", CALLS)
def test_cell_without_a_line_is_an_error_and_production_stays(model, runs, call):
    model.put(runs.good[0])
    with pytest.raises(RegistryError, match=f"lacks.*{call}"):
        promote_without(*model.passed(runs.good[1]), call)
    registered = {"2": "None"} if call != "register_model" else {}
    assert (model.aliased, model.stages) == ("1", {"1": "Production", **registered})
    assert model.history["result"].tolist() == ["FAILED", "FINISHED"]
    assert model.put(runs.good[1]).version == "2"
    assert (model.aliased, model.stages) == ("2", {"1": "Archived", "2": "Production"})


@pytest.mark.parametrize("call", CALLS[1:])
def test_cell_without_a_line_is_an_error_for_a_first_and_an_archived_version(model, runs, call):
    with pytest.raises(RegistryError, match=f"lacks {call}"):
        promote_without(*model.passed(runs.good[0]), call)
    assert registry.production_version(model.name) is None
    assert model.stages == {"1": "None"}
    for run in runs.good[:2]:
        model.put(run)
    with pytest.raises(RegistryError, match=f"lacks {call}"):
        promote_without(*model.passed(runs.good[0]), call)
    assert (model.aliased, model.stages) == ("2", {"1": "Archived", "2": "Production"})


def test_cell_that_does_not_ask_whether_promotion_is_due_is_an_error(model, runs):
    model.put(runs.good[0])
    candidate, checks = model.check(runs.weak)
    for missing in ((), CALLS[1:2], CALLS[2:]):
        with pytest.raises(RegistryError, match="failed a check"):
            promote_without(candidate, checks, "promotion.due", *missing)
        assert (model.aliased, model.stages) == ("1", {"1": "Production", "2": "None"})
    with pytest.raises(RegistryError, match="lacks register_model"):
        promote_without(model.candidate(runs.good[2]), checks, *CALLS)


@pytest.mark.parametrize("error", [MlflowException("the disk is full"), KeyboardInterrupt()])
def test_error_and_interrupt_in_the_cell_are_undone(model, runs, error):
    model.put(runs.good[0])
    with pytest.raises(type(error)):
        promote_without(*model.passed(runs.good[1]), broken=error)
    assert (model.aliased, model.stages) == ("1", {"1": "Production", "2": "None"})
    event = model.history.iloc[0]
    assert event["result"] in ("FAILED", "KILLED")
    assert event["to_version"] == "2"


def test_error_does_not_undo_what_somebody_else_promoted_meanwhile(model, runs):
    model.put(runs.good[0])
    candidate, checks = model.passed(runs.good[1])
    other = mlflow.register_model(model.candidate(runs.good[2]).model_uri, model.name)
    with (
        pytest.raises(MlflowException, match="the disk is full"),
        registry.promoting(candidate, checks, "a test") as promotion,
    ):
        assert promotion.due
        registry.promote(model.name, other.version, "meanwhile")
        mlflow.start_run()
        raise MlflowException("the disk is full")
    assert (model.aliased, model.stages) == ("2", {"1": "Archived", "2": "Production"})


def break_stages(monkeypatch, error):
    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(mlflow.MlflowClient, "transition_model_version_stage", broken)


def test_server_without_stages_gets_the_alias_alone(model, runs, monkeypatch):
    gone = MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)
    break_stages(monkeypatch, gone)
    _, decision = model.try_to_promote(runs.good[0])
    assert decision["decision"] == "in Production"
    assert (model.aliased, model.stages) == ("1", {"1": "None"})
    assert model.history["result"].tolist() == ["FINISHED"]
    _, again = model.try_to_promote(runs.good[0])
    assert again["why"] == "already"
    assert len(model.history) == 1


def test_promotion_that_fails_half_way_leaves_production_and_can_be_done_again(
    model, runs, monkeypatch
):
    model.register(*runs.good[:2])
    model.promote(1)
    with monkeypatch.context() as patch:
        break_stages(patch, MlflowException("the disk is full"))
        with pytest.raises(MlflowException, match="the disk is full"):
            model.promote(2)
    assert (model.aliased, model.stages) == ("1", {"1": "Production", "2": "None"})
    version = registry.promote(model.name, 2, "again")
    assert (version.version, version.current_stage) == ("2", "Production")
    assert version.aliases == ["production"]
    assert model.history["result"].tolist() == ["FINISHED", "FAILED", "FINISHED"]
    assert model.rollback().version == "1"


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
        for version in (1, 2, 2):
            registry.promote("model", version, "promoted")
        assert registry.rollback("model", "complaint").current_stage == "Production"
        assert registry.history("model")["to_version"].tolist() == ["1", "2", "1"]
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
