import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.pipeline import make_pipeline

from helpers import monitoring, plots, registry, series, tracking
from helpers.models.interface import convert
from helpers.monitoring import check_labelled, check_unlabelled, drift
from helpers.registry.reference import _counts, make_reference
from helpers.server import credentials
from helpers.serving import scored_rows
from helpers.workspace import PROJECT_ROOT, open_workspace
from tests.scoring import fit_svm, log_svm, put_in_production
from tests.series import clean_environment

SVM = "model_svm_rbf"
SEEDS = range(10)


def answer_of(classifier, rows, labels):
    """Answer rows as the model's interface does."""
    probabilities = classifier.predict_proba(rows)
    answer = {"prediction": np.asarray(labels)[probabilities.argmax(axis=1)]}
    for number, label in enumerate(labels):
        answer[f"probability_{label}"] = probabilities[:, number]
    return pd.DataFrame(answer, index=rows.index)


@pytest.fixture(scope="module")
def promoted(big_split):
    """A model, its reference, and a stream of rows that nobody trained on."""
    classifier = make_pipeline(*fit_svm(big_split, 1.0, 0.1))
    answer = answer_of(classifier, big_split.X_test, big_split.labels)
    reference = json.loads(json.dumps(make_reference(big_split, answer)))
    return SimpleNamespace(classifier=classifier, split=big_split, reference=reference)


def stream(promoted, seed, n_rows=300, change=None):
    """Draw rows and labels as production might get them, changed on the way."""
    rows = promoted.split.X_test.sample(n_rows, replace=True, random_state=seed)
    labels = promoted.split.y_test[rows.index].to_numpy(dtype=object)
    rows = rows.reset_index(drop=True)
    if change is not None:
        rows = change(rows.copy())
    answers = answer_of(promoted.classifier, rows, promoted.split.labels)
    return rows, answers.assign(label=labels)


# --- an undrifted and a drifted stream ---------------------------------------------------------


def longer(rows):
    return rows.assign(length=rows["length"] + 0.8)


def other_city(rows):
    return rows.assign(city=np.where(np.arange(len(rows)) % 2 == 0, "Porto", rows["city"]))


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_like_the_training_rows_is_silent(promoted, seed):
    rows, answers = stream(promoted, seed)
    assert check_labelled(answers, promoted.reference) == []
    findings, table = check_unlabelled(rows, answers, promoted.reference)
    assert findings == []
    assert not table["drifted"].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("change", "column"), [(longer, "length"), (other_city, "city")])
def test_drifted_stream_raises_an_alert_without_labels(promoted, seed, change, column):
    rows, answers = stream(promoted, seed, change=change)
    findings, table = check_unlabelled(rows, answers, promoted.reference)
    assert table.index[0] == column
    assert list(table.index[table["drifted"]]) == [column]
    assert f"drift {column}" in [finding.metric for finding in findings]


@pytest.mark.parametrize("seed", SEEDS)
def test_worse_answers_raise_an_alert_when_labels_arrive(promoted, seed):
    _, answers = stream(promoted, seed, change=lambda rows: rows.assign(length=rows["length"] * -1))
    found = {finding.metric: finding for finding in check_labelled(answers, promoted.reference)}
    assert {"accuracy", "f1_macro"} <= set(found)
    accuracy = accuracy_score(answers["label"], answers["prediction"])
    assert found["accuracy"].value == pytest.approx(accuracy, abs=0.01)
    assert found["accuracy"].threshold == pytest.approx(
        promoted.reference["metrics"]["accuracy"] - 0.05
    )


def test_numbers_that_go_missing_are_drift(promoted):
    rows, answers = stream(promoted, 0)
    gone = rows.assign(age=np.where(np.arange(len(rows)) % 3 == 0, np.nan, rows["age"]))
    for changed in (gone, rows.assign(age=np.nan)):
        findings, table = check_unlabelled(changed, answers, promoted.reference)
        assert list(table.index[table["drifted"]]) == ["age"]
        assert "missing values" in findings[0].message


def test_predictions_of_one_class_only_are_a_shift(promoted):
    rows, answers = stream(promoted, 0)
    shifted = answers.assign(prediction="low")
    findings, _ = check_unlabelled(rows, shifted, promoted.reference)
    assert [finding.metric for finding in findings] == ["predictions"]
    assert "low 100%" in findings[0].message


def test_overconfident_answers_raise_an_alert(promoted):
    _, answers = stream(promoted, 0, n_rows=600)
    columns = [f"probability_{label}" for label in promoted.split.labels]
    sure = answers.copy()
    sure[columns] = np.eye(3)[answers[columns].to_numpy().argmax(axis=1)]
    found = [finding.metric for finding in check_labelled(sure, promoted.reference)]
    assert found == ["overconfidence"]


def test_few_rows_prove_nothing(promoted):
    rows, answers = stream(promoted, 0, 40, longer)
    assert check_labelled(answers.assign(label="low"), promoted.reference) == []
    assert check_unlabelled(rows, answers, promoted.reference) == ([], None)


def test_class_that_is_missing_from_a_period_is_not_held_against_it(promoted):
    _, answers = stream(promoted, 1, 400)
    answers = answers[answers["label"] != "high"]
    found = [finding.metric for finding in check_labelled(answers, promoted.reference)]
    assert "f1_macro" not in found
    assert not [name for name in found if name.startswith("recall")]


# --- figures against independent sources -------------------------------------------------------


def test_metrics_are_those_of_scikit_learn(promoted):
    _, answers = stream(promoted, 3)
    metrics = monitoring.measure(answers, promoted.split.labels)
    true, said = answers["label"], answers["prediction"]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, said))
    assert metrics["f1_macro"] == pytest.approx(f1_score(true, said, average="macro"))
    recalls = recall_score(true, said, average=None, labels=promoted.split.labels)
    for label, recall in zip(promoted.split.labels, recalls, strict=True):
        assert metrics[f"recall_{label}"] == pytest.approx(recall)
    confidence = answers.filter(like="probability_").max(axis=1)
    expected = confidence.mean() - (true == said).mean()
    assert metrics["overconfidence"] == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[0, 1], [3, 5, 7], ["0", "1"]])
def test_labels_may_be_numbers_or_texts(labels):
    random = np.random.default_rng(0)
    said, true = random.choice(labels, 200), random.choice(labels, 200)
    answers = pd.DataFrame({"prediction": said, "label": pd.Series(true.tolist(), dtype=object)})
    for label in labels:
        answers[f"probability_{label}"] = 1 / len(labels)
    metrics = monitoring.measure(answers, labels)
    assert metrics["accuracy"] == pytest.approx((true == said).mean())
    assert metrics["f1_macro"] == pytest.approx(f1_score(true, said, average="macro"))


def test_drift_of_numbers_is_scipys_test_on_the_rows_themselves(promoted):
    rows, _ = stream(promoted, 0, change=longer)
    table = drift.column_drift(promoted.reference, rows)
    expected = stats.ks_2samp(promoted.split.X_train["length"], rows["length"]).statistic
    assert table.loc["length", "effect"] == pytest.approx(expected, abs=0.02)


def test_reference_holds_no_row(promoted):
    text = json.dumps(promoted.reference)
    lengths = promoted.split.X_train["length"].map(str)
    held = [value for value in lengths if value in text]
    assert len(held) < len(lengths) / 4
    assert len(text) < 40_000


@pytest.mark.parametrize("values", [[1, 2, 3], [1.0, 2.0, 3.0]])
def test_codes_are_the_same_levels_as_integers_and_floats(values):
    counts = _counts(pd.Series([1, 2, 3] * 50))
    p_value, effect = drift._compare_levels(counts, pd.Series(values * 50))
    assert p_value > 0.9
    assert effect < 0.01


# --- what is kept ------------------------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path):
    made = []

    def make(**options):
        made.append(scored_rows.Recorder(tmp_path / "scored.db", **options))
        return made[-1]

    yield make
    for each in made:
        if each.alive:
            each.close()


def write(recorder, promoted, request_id, rows):
    served = SimpleNamespace(name=SVM, version="1", labels=promoted.split.labels)
    answer = answer_of(promoted.classifier, rows, served.labels)
    probabilities = answer.iloc[:, 1:].to_numpy().tolist()
    recorder.write(request_id, served, rows, answer["prediction"].tolist(), probabilities)
    return answer


def test_rows_answers_and_labels_are_read_back(recorder, promoted):
    keeping = recorder()
    rows = convert(promoted.split.X_test.head(5), tracking.column_kinds(promoted.split.X_test))
    answer = write(keeping, promoted, "a", rows)
    assert scored_rows.wait_for(keeping.path, "a-4")
    scored_rows.write_labels(keeping.path, {"a-1": "low"})
    got, answers = scored_rows.read_rows(keeping.path, SVM)
    pd.testing.assert_frame_equal(got.reset_index(drop=True), rows.reset_index(drop=True))
    assert answers["prediction"].tolist() == answer["prediction"].tolist()
    assert answers["label"].tolist() == [None, "low", None, None, None]
    assert scored_rows.read_rows(keeping.path, "model_conv_network")[0].empty


def test_no_more_rows_are_kept_than_allowed_and_the_oldest_go(recorder, promoted):
    keeping = recorder(most_rows=25)
    for number in range(6):
        write(keeping, promoted, f"r{number}", promoted.split.X_test.head(10))
        assert scored_rows.wait_for(keeping.path, f"r{number}-9")
        scored_rows.write_labels(keeping.path, {f"r{number}-0": "low"})
    keeping.write("last", SimpleNamespace(name=SVM, version="1", labels=[]), pd.DataFrame(), [], [])
    _, answers = scored_rows.read_rows(keeping.path, SVM)
    assert set(answers.index.str.split("-").str[0]) == {"r4", "r5"}
    with scored_rows.connect(keeping.path) as connection:
        labels = connection.execute("SELECT id FROM labels").fetchall()
    assert labels == [("r4-0",), ("r5-0",)]


def test_file_is_closed_to_others(recorder):
    keeping = recorder()
    keeping.close()
    assert oct(keeping.path.stat().st_mode)[-3:] == "600"


def test_labels_of_rows_that_nobody_scored_are_refused(recorder, promoted, workspace):
    with pytest.raises(monitoring.LabelsError, match="'x-0'"):
        monitoring.add_labels(workspace, pd.Series(["low"], index=["x-0"]))
    with pytest.raises(monitoring.LabelsError, match="'x-1' is missing"):
        monitoring.add_labels(workspace, pd.Series([None], index=["x-1"]))


def test_file_of_labels_must_have_its_columns(tmp_path):
    path = tmp_path / "labels.csv"
    with pytest.raises(monitoring.LabelsError, match="cannot be read"):
        monitoring.read_labels(path)
    path.write_text("row,label\n1,low\n")
    with pytest.raises(monitoring.LabelsError, match="row_id and label"):
        monitoring.read_labels(path)


# --- alerts, end to end ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hook():
    """A webhook that notes what it is sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            seen.append(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}/secret-path", seen=seen)
        httpd.shutdown()
        thread.join()


@pytest.fixture
def watched(running_server, promoted, monkeypatch, tmp_path):
    """A model in Production whose scored rows can be written."""
    running_server.connect()
    split = replace(
        promoted.split, manifest={**promoted.split.manifest, "split_digest": str(tmp_path)}
    )
    name = f"model_{tmp_path.name}"
    monkeypatch.setattr(series, "MODELS", {name: series.MODELS[SVM]})
    run = log_svm(split)
    version = put_in_production(name, run, split)
    workspace = replace(open_workspace(tmp_path / "ws"))
    keeping = scored_rows.Recorder(workspace.scored_rows)

    def score(request_id, rows, labels):
        served = SimpleNamespace(name=name, version=str(version.version), labels=split.labels)
        answer = answer_of(promoted.classifier, rows, split.labels)
        probabilities = answer.iloc[:, 1:].to_numpy().tolist()
        keeping.write(request_id, served, rows, answer["prediction"].tolist(), probabilities)
        ids = scored_rows.row_ids(request_id, len(rows))
        assert scored_rows.wait_for(workspace.scored_rows, ids[-1])
        if labels is not None:
            assert monitoring.add_labels(workspace, pd.Series(labels, index=ids)) == len(ids)

    yield SimpleNamespace(name=name, workspace=workspace, score=score, run=run)
    keeping.close()


def tag_of(watched):
    version = registry.production_version(watched.name)
    return mlflow.MlflowClient().get_model_version(watched.name, version.version).tags["monitoring"]


def monitoring_runs(watched):
    return mlflow.search_runs(
        experiment_names=["monitoring"],
        filter_string=f"tags.model = '{watched.name}'",
        output_format="list",
    )


def test_healthy_day_is_logged_tagged_ok_and_passes(watched, promoted, capsys):
    rows, answers = stream(promoted, 0)
    watched.score("good", rows, answers["label"].tolist())
    report = monitoring.monitor(watched.workspace)
    monitoring.require_healthy(report)
    assert "No alert" in capsys.readouterr().out
    (run,) = monitoring_runs(watched)
    expected = accuracy_score(answers["label"], answers["prediction"])
    assert run.data.metrics["accuracy"] == pytest.approx(expected)
    assert run.data.metrics["labelled"] == 300
    assert {"f1_macro", "recall_low", "calibration_error"} <= set(run.data.metrics)
    assert run.info.status == "FINISHED"
    assert tag_of(watched).startswith("ok ")
    assert monitoring.alerts(watched.workspace).empty
    assert len(plots.periods(report).axes) == 4


def test_alert_is_in_the_table_the_tag_the_webhook_and_fails_a_batch_run(
    watched, promoted, hook, monkeypatch
):
    monkeypatch.setenv("ALERT_WEBHOOK", hook.url)
    hook.seen.clear()
    rows, answers = stream(promoted, 0, change=lambda rows: rows.assign(length=-rows["length"]))
    watched.score("bad", rows, answers["label"].tolist())
    report = monitoring.monitor(watched.workspace)
    table = monitoring.alerts(watched.workspace)
    assert {"accuracy", "f1_macro", "drift length"} <= set(table["metric"])
    assert (table["model"] == watched.name).all()
    assert tag_of(watched).startswith("alert ")
    assert "accuracy" in tag_of(watched)
    with pytest.raises(monitoring.AlertError, match="accuracy"):
        monitoring.require_healthy(report)
    (sent,) = hook.seen
    assert watched.name in sent["text"]
    assert {alert["metric"] for alert in sent["alerts"]} == set(table["metric"])
    again = monitoring.monitor(watched.workspace)
    assert again.current == report.current
    assert len(hook.seen) == 1
    pd.testing.assert_frame_equal(monitoring.alerts(watched.workspace), table)
    assert len(monitoring_runs(watched)) == 1


def test_labels_that_arrive_later_bring_the_period_up_to_date(watched, promoted):
    rows, answers = stream(promoted, 2)
    watched.score("first", rows, None)
    report = monitoring.monitor(watched.workspace)
    assert report.periods["labelled"].tolist() == [0]
    assert "accuracy" not in monitoring_runs(watched)[0].data.metrics
    ids = scored_rows.row_ids("first", len(rows))
    monitoring.add_labels(watched.workspace, pd.Series(answers["label"].tolist(), index=ids))
    monitoring.monitor(watched.workspace)
    (run,) = monitoring_runs(watched)
    assert run.data.metrics["labelled"] == 300
    assert "accuracy" in run.data.metrics


def test_version_that_was_deleted_is_left_out(watched, promoted, capsys):
    rows, _ = stream(promoted, 2)
    watched.score("old", rows, None)
    client = mlflow.MlflowClient()
    version = registry.production_version(watched.name).version
    client.delete_registered_model_alias(watched.name, registry.ALIAS)
    with pytest.warns(FutureWarning):
        client.transition_model_version_stage(watched.name, version, "Archived")
    client.delete_model_version(watched.name, version)
    report = monitoring.monitor(watched.workspace)
    assert report.periods.empty
    assert "has no reference" in capsys.readouterr().out


def test_label_that_is_no_class_is_said_and_left_out(watched, promoted, capsys):
    rows, answers = stream(promoted, 2)
    watched.score("odd", rows, ["hihg", *answers["label"].tolist()[1:]])
    report = monitoring.monitor(watched.workspace)
    assert report.periods["labelled"].tolist() == [299]
    assert "'hihg'" in capsys.readouterr().out


def test_webhook_that_does_not_answer_stops_nothing_and_is_not_shown(
    watched, promoted, monkeypatch, capsys
):
    monkeypatch.setenv("ALERT_WEBHOOK", "http://127.0.0.1:9/secret-path")
    rows, answers = stream(promoted, 1, change=longer)
    watched.score("bad", rows, None)
    assert monitoring.monitor(watched.workspace).current
    shown = capsys.readouterr().out
    assert "webhook was not reached" in shown
    assert "secret-path" not in shown


def test_rehearsal_finds_something_and_writes_nothing(watched, promoted):
    model = registry.load_production(watched.name)
    found = monitoring.rehearse({watched.name: model}, promoted.split)
    assert found["message"].str.contains("accuracy").any()
    assert found["message"].str.contains("drifted").any()
    assert monitoring_runs(watched) == []
    assert monitoring.alerts(watched.workspace).empty
    assert "monitoring" not in registry.production_version(watched.name).tags


@pytest.mark.slow
def test_command_ends_with_3_after_an_alert(tmp_path, promoted, running_server):
    running_server.connect()
    run = log_svm(promoted.split)
    put_in_production(SVM, run, promoted.split)
    workspace = open_workspace(tmp_path / "ws")
    keeping = scored_rows.Recorder(workspace.scored_rows)
    rows, answers = stream(promoted, 0, change=longer)
    served = SimpleNamespace(
        name=SVM,
        version=str(registry.production_version(SVM).version),
        labels=promoted.split.labels,
    )
    probabilities = answers.filter(like="probability_").to_numpy().tolist()
    keeping.write("cli", served, rows, answers["prediction"].tolist(), probabilities)
    keeping.close()
    labels = pd.DataFrame({"row_id": scored_rows.row_ids("cli", 300), "label": answers["label"]})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    account = {
        "MLFLOW_TRACKING_URI": running_server.url,
        "MLFLOW_TRACKING_USERNAME": credentials.NOTEBOOKS,
        "MLFLOW_TRACKING_PASSWORD": credentials.stored_secret(
            running_server.workspace, credentials.NOTEBOOKS
        ),
    }
    command = [sys.executable, "-m", "helpers.monitoring", "--workspace", str(workspace.root)]
    done = subprocess.run(
        [*command, "--labels", str(tmp_path / "labels.csv")],
        cwd=PROJECT_ROOT,
        env=clean_environment(**account),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "300 labels kept" in done.stdout
    assert "ALERT: model_svm_rbf" in done.stderr
