import mlflow
import pandas as pd
import pytest

from helpers import registry
from helpers.registry.promotion import RegistryError
from helpers.server import credentials, users

PROMOTED = [("promote", "1"), ("promote", "2")]


@pytest.mark.parametrize(
    ("done", "back"),
    [
        ([], []),
        ([("promote", "1")], []),
        ([*PROMOTED, ("promote", "3")], ["2", "1"]),
        pytest.param([*PROMOTED, ("rollback",), ("promote", "3")], ["1"], marks=pytest.mark.slow),
        pytest.param([*PROMOTED, ("set_alias", "3")], ["2", "1"], marks=pytest.mark.slow),
        pytest.param([*PROMOTED, ("set_alias", "1")], ["2", "1"], marks=pytest.mark.slow),
    ],
)
def test_rollback_undoes_each_promotion_once_until_nothing_is_left(model, runs, done, back):
    model.register(*runs.good)
    for call, *arguments in done:
        getattr(model, call)(*arguments)
    for expected in back:
        left = model.aliased
        assert model.rollback().version == expected
        assert model.aliased == expected
        assert [n for n, stage in model.stages.items() if stage == "Production"] == [expected]
        event = model.history.iloc[0]
        assert (event["from_version"], event["to_version"]) == (left, expected)
    with pytest.raises(RegistryError, match=model.name):
        model.rollback()
    assert model.stages.get((back or ["1"])[-1]) == ("Production" if done else "None")


def test_history_says_who_when_from_to_why_and_how_good(model, runs):
    start = pd.Timestamp.now(tz="UTC").floor("ms")
    assert model.history.empty
    model.register(*runs.good[:2])
    registry.promote(model.name, 1, "the first one", by="Ada")
    registry.promote(model.name, 2, "a better one", by="Grace")
    registry.rollback(model.name, "complaints", by="Ada")
    history = model.history
    assert history["action"].tolist() == ["rollback", "promote", "promote"]
    assert history["from_version"].tolist() == ["2", "1", None]
    assert history["to_version"].tolist() == ["1", "2", "1"]
    assert history["by"].tolist() == ["Ada", "Grace", "Ada"]
    assert history["reason"].tolist() == ["complaints", "a better one", "the first one"]
    assert (history["when"].dt.microsecond == 0).all()
    assert history["when"].is_monotonic_decreasing
    assert history["when"].between(start.floor("s"), pd.Timestamp.now(tz="UTC")).all()
    assert set(history["model"]) == {model.name}
    assert set(history["result"]) == {"FINISHED"}
    metrics = [run.data.metrics for run in (runs.good[0], runs.good[1], runs.good[0])]
    for name in ("accuracy", "f1_macro"):
        assert history[name].tolist() == pytest.approx([each[name] for each in metrics])
    assert history["f1_macro_before"].iloc[0] == pytest.approx(metrics[1]["f1_macro"])
    assert pd.isna(history["f1_macro_before"].iloc[2])


def test_who_promotes_is_the_mlflow_user_where_nobody_is_named(
    model, runs, tracking_server, monkeypatch
):
    roles = users.parse_users(["ana:admin"])
    users.set_up_users(tracking_server.workspace, tracking_server.url, roles)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ana")
    monkeypatch.setenv(
        "MLFLOW_TRACKING_PASSWORD", credentials.stored_secret(tracking_server.workspace, "ana")
    )
    model.register(runs.good[0])
    model.promote(1)
    assert model.history["by"].tolist() == ["ana"]


# --- production that somebody set by hand ------------------------------------------------------


def test_version_promoted_through_the_stage_alone_is_in_production(model, runs):
    model.register(*runs.good[:2])
    mlflow.MlflowClient().transition_model_version_stage(model.name, "1", "Production")
    assert registry.production_version(model.name).version == "1"
    assert model.candidate(runs.good[1]).champion.version.version == "1"
    answer = registry.load_production(model.name).predict(runs.split.X_test.head(2))
    assert len(answer) == 2
    model.promote(2)
    assert model.history["from_version"].tolist() == ["1"]
    assert model.stages == {"1": "Archived", "2": "Production"}
    assert model.rollback().version == "1"
    assert model.aliased == "1"


def test_promoting_the_version_set_by_hand_adds_what_is_missing(model, runs):
    model.register(*runs.good[:2])
    mlflow.MlflowClient().transition_model_version_stage(model.name, "1", "Production")
    model.promote(1)
    assert (model.aliased, model.stages["1"]) == ("1", "Production")
    model.set_alias("2")
    assert registry.promote(model.name, 2, "adopted").current_stage == "Production"
