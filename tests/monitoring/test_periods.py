import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from helpers import monitoring, plots, registry, series
from helpers.monitoring.alerting import AlertError
from helpers.monitoring.labels import LabelsError, read_labels
from helpers.registry.production import ALIAS
from helpers.serving import scored_rows
from tests.scoring import SVM, serve_here
from tests.series import run_module


def test_healthy_day_is_logged_tagged_ok_and_passes(watched, promoted, capsys):
    rows, answers = promoted.stream()
    watched.score("good", rows, answers, answers["label"])
    report = watched.monitor()
    monitoring.require_healthy(report)
    assert "No alert" in capsys.readouterr().out
    (run,) = watched.runs()
    expected = accuracy_score(answers["label"], answers["prediction"])
    assert run.data.metrics["accuracy"] == pytest.approx(expected)
    assert run.data.metrics["labelled"] == 300
    assert {"f1_macro", "recall_low", "calibration_error"} <= set(run.data.metrics)
    assert run.info.status == "FINISHED"
    assert watched.tag().startswith("ok ")
    assert monitoring.alerts(watched.workspace).empty
    assert len(plots.periods(report).axes) == 4


def test_labels_that_arrive_later_bring_the_period_up_to_date(watched, promoted):
    rows, answers = promoted.stream(2)
    watched.score("first", rows, answers)
    assert watched.monitor().periods["labelled"].tolist() == [0]
    before = watched.runs()[0].data.metrics
    assert "accuracy" not in before
    assert before["estimated_accuracy"] == pytest.approx(
        answers.filter(like="probability_").max(axis=1).mean()
    )
    watched.label("first", answers["label"])
    watched.monitor()
    (run,) = watched.runs()
    assert run.data.metrics["labelled"] == 300
    assert "accuracy" in run.data.metrics


def test_label_that_is_no_class_is_said_and_left_out(watched, promoted, capsys):
    rows, answers = promoted.stream(2)
    watched.score("odd", rows, answers, ["hihg", *answers["label"][1:]])
    assert watched.monitor().periods["labelled"].tolist() == [299]
    assert "'hihg'" in capsys.readouterr().out


def test_version_that_was_deleted_is_left_out(watched, promoted, capsys):
    watched.score("old", *promoted.stream(2))
    client = mlflow.MlflowClient()
    client.delete_registered_model_alias(watched.name, ALIAS)
    with pytest.warns(FutureWarning):
        client.transition_model_version_stage(watched.name, watched.version, "Archived")
    client.delete_model_version(watched.name, watched.version)
    assert watched.monitor().periods.empty
    assert "has no reference" in capsys.readouterr().out


def test_version_without_groups_says_so_and_is_watched_as_a_whole(
    watch, monkeypatch, promoted, tmp_path, capsys
):
    name = f"model_{tmp_path.name}"
    monkeypatch.setattr(series, "MODELS", {name: series.MODELS[SVM]})
    monkeypatch.setattr(promoted, "grouping", {})
    watched = watch(name, tmp_path / "ws")
    rows, answers = promoted.stream()
    watched.score("good", rows, answers, answers["label"])
    report = watched.monitor()
    assert "without GROUPS" in capsys.readouterr().out
    assert report.groups == {}
    assert report.periods["estimated_accuracy"].notna().all()
    assert plots.estimates(report) is not None
    # What an earlier edition logged at promotion knows of neither groups nor estimates.
    version = registry.production_version(name)
    kept = {key: promoted.reference[key] for key in ("labels", "columns", "predictions", "metrics")}
    mlflow.MlflowClient().log_dict(version.run_id, kept, registry.REFERENCE)
    earlier = watched.monitor().periods
    pd.testing.assert_frame_equal(earlier, report.periods)


# --- alerts ------------------------------------------------------------------------------------


@pytest.fixture
def hook(monkeypatch):
    """What a webhook was sent."""
    seen = []

    async def note(request):
        seen.append(await request.json())
        return Response()

    routes = [Route("/secret-path", note, methods=["POST"])]
    with serve_here(Starlette(routes=routes)) as url:
        monkeypatch.setenv("ALERT_WEBHOOK", f"{url}/secret-path")
        yield seen


def test_alert_is_in_the_table_the_tag_the_webhook_and_fails_a_batch_run(watched, promoted, hook):
    rows, answers = promoted.stream(length=lambda rows: -rows["length"])
    watched.score("bad", rows, answers, answers["label"])
    report = watched.monitor()
    table = monitoring.alerts(watched.workspace)
    assert {"accuracy", "f1_macro", "drift length"} <= set(table["metric"])
    assert table["metric"].str.startswith("accuracy of city ").any()
    assert report.findings["message"].tolist() == table["message"].tolist()
    assert (table["model"] == watched.name).all()
    assert watched.tag().startswith("alert ")
    assert "accuracy" in watched.tag()
    with pytest.raises(AlertError, match="accuracy"):
        monitoring.require_healthy(report)
    (sent,) = hook
    assert watched.name in sent["text"]
    assert {alert["metric"] for alert in sent["alerts"]} == set(table["metric"])
    assert watched.monitor().current == report.current
    assert len(hook) == 1
    pd.testing.assert_frame_equal(monitoring.alerts(watched.workspace), table)
    assert len(watched.runs()) == 1


def test_webhook_that_does_not_answer_stops_nothing_and_is_not_shown(
    watched, promoted, monkeypatch, capsys
):
    monkeypatch.setenv("ALERT_WEBHOOK", "http://127.0.0.1:9/secret-path")
    watched.score("bad", *promoted.stream(1, age=np.nan))
    assert watched.monitor().current
    shown = capsys.readouterr().out
    assert "webhook was not reached" in shown
    assert "secret-path" not in shown


@pytest.mark.slow
def test_command_ends_with_3_after_an_alert(watch, tmp_path, promoted, tracking_server):
    workspace = tracking_server.workspace
    rows, answers = promoted.stream(age=np.nan)
    watch(SVM, workspace.root).score("cli", rows, answers)
    labels = pd.DataFrame({"row_id": scored_rows.row_ids("cli", 300), "label": answers["label"]})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    command = ("helpers.monitoring", "--workspace", workspace.root)
    done = run_module(*command, "--labels", tmp_path / "labels.csv")
    assert done.returncode == 3, done.stderr
    assert "300 labels kept" in done.stdout
    assert "ALERT: model_svm_rbf" in done.stderr


# --- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "message"), [("low", "'x-0'"), (None, "'x-0' is missing")])
def test_labels_that_cannot_be_kept_are_refused(workspace, label, message):
    with pytest.raises(LabelsError, match=message):
        monitoring.add_labels(workspace, pd.Series([label], index=["x-0"]))


def test_file_of_labels_must_have_its_columns(tmp_path):
    path = tmp_path / "labels.csv"
    with pytest.raises(LabelsError, match="cannot be read"):
        read_labels(path)
    path.write_text("row,label\n1,low\n")
    with pytest.raises(LabelsError, match="row_id and label"):
        read_labels(path)
