"""The whole series, run headlessly as a user would, and the contracts of its results."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import joblib
import mlflow
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from sklearn.metrics import log_loss

from helpers import monitoring, registry
from helpers.data import load_split
from helpers.series import STEPS
from helpers.serving import scored_rows
from helpers.workspace import open_workspace
from tests.series import (
    METRICS,
    ONE_PAIR,
    RUNS,
    connected,
    files_below,
    find_runs,
    run_series,
    start_python,
    wait_for,
)

NAMES = list(RUNS)
QUICK = ("-p", "C_EXPONENTS", "[0, 1, 2]", "-p", "GAMMA_EXPONENTS", "[-6, -5, -4]")
QUICK += ("-p", "ATTACKED_ROWS", "15")
BARS = {"02": ["Training", "Training"], "03": ["Grid search"]}
LABELS = ["Dropout", "Enrolled", "Graduate"]


def processes_of(folder):
    """Return the command lines of processes that name a folder."""
    lines = (" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(folder) in line]


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory):
    """Run the series once, with a small grid, on the bundled sample."""
    folder = tmp_path_factory.mktemp("series")
    result = run_series(folder, "--data", "sample", "--html", *QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert wait_for(lambda: not processes_of(folder)), "a batch run leaves no server"
    if os.environ.get("KEEP_EXECUTED"):
        shutil.copytree(folder / "executed", os.environ["KEEP_EXECUTED"], dirs_exist_ok=True)
    return folder, result


@pytest.fixture(scope="module")
def client(sample_run):
    """Give a client of the server of that run's workspace."""
    with connected(sample_run[0]) as client:
        yield client


@pytest.fixture(scope="module")
def split(sample_run):
    return load_split(open_workspace(sample_run[0]))


def test_run_ends_with_both_models_in_production(sample_run):
    output = sample_run[1].stdout
    for name in NAMES:
        assert re.search(rf"{name} +0\.\d+ +0\.\d+ +\d\.\d+ .*version 1", output), output


def test_executed_notebooks_are_kept_complete_and_without_errors(sample_run):
    for step in STEPS.values():
        notebook = nbformat.read(sample_run[0] / "executed" / f"{step.name}.ipynb", 4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code)
        outputs = [output for cell in code for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert any("image/png" in output.get("data", {}) for output in outputs), step


def test_page_of_a_notebook_stands_alone_and_shows_each_bar_once(sample_run):
    for step in STEPS.values():
        page = (sample_run[0] / "executed" / f"{step.name}.html").read_text(encoding="utf-8")
        assert 'src="data:image/png;base64,' in page
        assert not re.search(r'<(?:script|img|link)[^>]+(?:src|href)="http', page)
        assert 'data-mime-type="application/vnd.jupyter.stderr"' not in page
        bars = re.findall(r"^(?:<pre>)?([A-Z][a-z ]+): +\d+%\|", page, re.MULTILINE)
        assert step.name[:2] not in BARS or bars == BARS[step.name[:2]]


def test_manifest_says_what_the_data_are(split):
    manifest = split.manifest
    assert manifest["source"] == "sample"
    assert manifest["synthetic"] is True
    assert manifest["rows"] == 4424
    assert manifest["classes"] == LABELS
    assert manifest["class_counts"] == {"Dropout": 1421, "Enrolled": 794, "Graduate": 2209}
    assert manifest["seed"] == 0
    assert len(split.X_test) == 1328
    assert len(split.categorical) == 9


@pytest.mark.parametrize("name", NAMES)
def test_run_is_logged_under_its_names_with_all_metrics_and_tags(client, name):
    (run,) = find_runs(client, name)
    assert run.info.status == "FINISHED"
    per_class = {f"{score}_{label}" for score in ("precision", "recall", "f1") for label in LABELS}
    assert set(run.data.metrics) >= METRICS | per_class
    assert run.data.tags["data_source"] == "sample"
    assert run.data.tags["synthetic_data"] == "true"
    assert re.fullmatch("[0-9a-f]{64}", run.data.tags["data_digest"])
    contexts = {tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags}
    assert contexts == {"training", "testing"}


@pytest.mark.parametrize("name", NAMES)
def test_candidate_was_attacked_and_its_reference_kept(client, name):
    (run,) = find_runs(client, name)
    assert 0 < run.data.metrics["robustness"] < 1
    assert run.data.metrics["robustness_rows"] == 15
    kept = [file.path for file in client.list_artifacts(run.info.run_id, "monitoring")]
    assert kept == [registry.REFERENCE]


@pytest.mark.parametrize("name", NAMES)
def test_demo_of_production_is_what_was_promoted_until_it_shifts(client, sample_run, name):
    (run,) = find_runs(client, name)
    workspace = open_workspace(sample_run[0])
    report = monitoring.monitor(workspace, demo=True)
    periods = report.periods[report.periods["model"] == name].reset_index()
    usual, shifted = periods[:6], periods[6:]
    for metric in ("accuracy", "recall_Dropout"):
        promoted = run.data.metrics[metric]
        assert usual[metric].mean() == pytest.approx(promoted, abs=0.05)
        assert usual[f"estimated_{metric}"].mean() == pytest.approx(promoted, abs=0.05)
    assert usual["alerts"].sum() == 0
    assert shifted["alerts"].sum() > 0
    assert shifted["estimated_accuracy"].max() < usual["estimated_accuracy"].min()
    assert "Gender" in report.groups[name].index.get_level_values("column")
    # Nothing of that is real.
    assert "monitoring" not in client.get_model_version(name, "1").tags
    assert client.get_experiment_by_name("monitoring") is None
    assert scored_rows.read_rows(workspace.scored_rows, name)[0].empty


def test_network_logs_its_losses_epoch_by_epoch(client):
    (run,) = find_runs(client, "model_conv_network")
    trained = int(run.data.params["epochs"])
    for metric in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
        steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
        assert sorted(steps) == list(range(1, trained + 1))
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert "learning_curves.png" in files


def test_svm_is_logged_with_the_parameters_of_the_model_itself(client):
    (run,) = find_runs(client, "model_svm_rbf")
    folder = mlflow.artifacts.download_artifacts("models:/model_svm_rbf@production")
    (path,) = Path(folder).rglob("classifier.joblib")
    svc = joblib.load(path).named_estimators_["svc"]
    assert run.data.params["kernel"] == svc.kernel == "rbf"
    assert float(run.data.params["C"]) == svc.C
    assert float(run.data.params["gamma"]) == svc.gamma


def search_table(run):
    """Return the table of all pairs that notebook 03 logs."""
    table = f"runs:/{run.info.run_id}/grid_search/cv_results.csv"
    return pd.read_csv(mlflow.artifacts.download_artifacts(table))


def test_grid_search_leaves_table_and_heat_map_whose_best_pair_is_the_models(client):
    (run,) = find_runs(client, "model_svm_rbf")
    files = {file.path for file in client.list_artifacts(run.info.run_id, "grid_search")}
    assert files == {"grid_search/heat_map.png", "grid_search/cv_results.csv"}
    results = search_table(run)
    assert len(results) == 9
    best = results.loc[results["mean_test_score"].idxmax()]
    assert float(run.data.params["C"]) == best["C"]
    assert float(run.data.params["gamma"]) == best["gamma"]
    folds = results[[f"split{fold}_test_score" for fold in range(5)]]
    assert np.allclose(folds.mean(axis=1), results["mean_test_score"])


@pytest.mark.parametrize("name", NAMES)
def test_production_is_stage_and_alias_of_version_1(client, name):
    version = client.get_model_version_by_alias(name, "production")
    assert (version.version, version.current_stage) == ("1", "Production")
    assert "SYNTHETIC" in version.description
    assert version.tags["synthetic_data"] == "true"
    assert version.run_id == find_runs(client, name)[0].info.run_id


@pytest.mark.parametrize("name", NAMES)
def test_production_model_answers_as_agreed_and_as_well_as_logged(client, split, name):
    model = mlflow.pyfunc.load_model(f"models:/{name}@production")
    answer, metrics = model.predict(split.X_test), find_runs(client, name)[0].data.metrics
    columns = [f"probability_{label}" for label in LABELS]
    assert list(answer.columns) == ["prediction", *columns]
    assert np.allclose(answer[columns].sum(axis=1), 1)
    assert set(answer["prediction"]) == set(LABELS)
    assert metrics["accuracy"] == pytest.approx((answer["prediction"] == split.y_test).mean())
    assert metrics["log_loss"] == pytest.approx(log_loss(split.y_test, answer[columns]), abs=1e-6)
    shuffled = split.X_test[split.X_test.columns[::-1]].astype("float64")
    pd.testing.assert_frame_equal(model.predict(shuffled), answer, atol=1e-6)
    assert model.metadata.get_input_schema().input_names() == list(split.X_test.columns)
    assert model.metadata.get_output_schema().input_names() == ["prediction", *columns]
    assert model.metadata.saved_input_example_info is not None


def test_search_is_one_run_with_its_best_pairs_below_it(client):
    experiment = client.get_experiment_by_name("svc_model").experiment_id
    search, *pairs = client.search_runs([experiment])
    assert search.info.run_name == "svm"
    assert len(pairs) == 9  # all of the small grid
    scores = {(each.data.params["C"], each.data.params["gamma"]): each for each in pairs}
    best = max(pairs, key=lambda each: each.data.metrics["cv_accuracy"])
    assert best.data.metrics["cv_accuracy"] == search.data.metrics["cv_accuracy"]
    winner = scores[search.data.params["C"], search.data.params["gamma"]]
    assert winner.data.metrics["cv_accuracy"] == search.data.metrics["cv_accuracy"]
    for each in pairs:
        assert each.data.tags["mlflow.parentRunId"] == search.info.run_id
        assert each.data.tags["data_digest"] == search.data.tags["data_digest"]
        assert each.info.status == "FINISHED"
    assert search.data.metrics["search_seconds"] > 0


@pytest.mark.slow
def test_rerun_promotes_version_2_archives_version_1_and_loses_nothing(sample_run):
    folder, _ = sample_run
    before = set(files_below(folder / "mlruns"))
    with connected(folder) as client:
        first = {name: find_runs(client, name)[0] for name in NAMES}
    result = run_series(folder, "--only", "02,03,04", *QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert before <= set(files_below(folder / "mlruns"))
    with connected(folder) as client:
        for name in NAMES:
            new, old = find_runs(client, name)
            assert old.info.run_id == first[name].info.run_id
            versions = client.search_model_versions(f"name = '{name}'")
            stages = {version.version: version.current_stage for version in versions}
            assert stages == {"1": "Archived", "2": "Production"}
            assert client.get_model_version_by_alias(name, "production").version == "2"
            assert client.get_model_version(name, "2").run_id == new.info.run_id
        network = find_runs(client, "model_conv_network")
        same = {
            metric: value for metric, value in network[0].data.metrics.items() if metric in METRICS
        }
        assert same == {metric: network[1].data.metrics[metric] for metric in same}
        history = registry.history("model_svm_rbf")
        assert history["from_version"].tolist() == ["1", None]
        assert registry.rollback("model_svm_rbf", "trying the way back").version == "1"
        assert client.get_model_version("model_svm_rbf", "2").current_stage == "Archived"


@pytest.mark.slow
def test_interrupted_run_leaves_no_open_run_and_resume_goes_on_elsewhere(tmp_path):
    folder, elsewhere = tmp_path / "ws", tmp_path / "elsewhere"
    arguments = ("--data", "sample", "--only", "01,02,03")
    arguments += ("-p", "DRIVE_FOLDER", str(tmp_path / "share"))
    process = start_python(
        *("-m", "helpers.run", "--workspace", folder, *arguments),
        stderr=subprocess.PIPE,
        # Where these tests run in the background of a shell, interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 180
    while len(list((folder / "search").rglob("output.pkl"))) < 8 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    with connected(folder) as client:
        experiments = [e.experiment_id for e in client.search_experiments()]
        statuses = {run.info.status for run in client.search_runs(experiments)}
    assert "RUNNING" not in statuses
    shutil.rmtree(folder)
    start = time.time()
    result = run_series(elsewhere, *arguments, "--resume")
    assert "Restored what was saved at" in result.stdout
    # A new machine has nothing that could be in the way.
    assert not (tmp_path / "share" / "aside").exists()
    assert "01_data_preparation: skipped, done and unchanged" in result.stdout
    assert "03_svm_grid_search: runs, not finished yet" in result.stdout
    assert result.returncode == 0, result.stderr
    with connected(elsewhere) as client:
        experiments = [e.experiment_id for e in client.search_experiments()]
        assert not client.search_runs(experiments, "attributes.status = 'RUNNING'")
    parts = [path.stat().st_mtime for path in (elsewhere / "search").rglob("output.pkl")]
    assert len(parts) == 60
    assert 8 <= sum(written < start for written in parts) < 60
    again = run_series(elsewhere, *arguments, "--resume")
    assert again.stdout.count("skipped, done and unchanged") == 3
    changed = run_series(elsewhere, *arguments, "--resume", "--only", "01,02", "-p", "EPOCHS", "2")
    assert "01_data_preparation: skipped, done and unchanged" in changed.stdout
    assert "02_cnn_training: runs, its notebook, helpers, parameters" in changed.stdout
    # The summary tells the models of this run from those of another.
    lines = {line.split()[0]: line for line in changed.stdout.splitlines() if "model_" in line}
    assert ["(earlier)" in lines[name] for name in NAMES] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("table", ["kaggle_students.csv", "uci697.csv"])
def test_series_runs_on_the_real_tables(tmp_path, real_data, table):
    full = table.startswith("kaggle")
    arguments = () if full else (*ONE_PAIR, "--only", "01,02,03,04")
    result = run_series(tmp_path, "--data", str(real_data / table), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    with connected(tmp_path) as client:
        for name, least in {"model_conv_network": 0.765, "model_svm_rbf": 0.77}.items():
            (run,) = find_runs(client, name)
            assert run.data.metrics["accuracy"] > least
            assert run.data.tags["synthetic_data"] == "false"
            version = client.get_model_version_by_alias(name, "production")
            assert "SYNTHETIC" not in version.description
        if full:
            (run,) = find_runs(client, "model_svm_rbf")
            assert len(search_table(run)) == 144
            params = run.data.params
            assert (float(params["C"]), float(params["gamma"])) == (2, 0.03125)


@pytest.mark.slow
def test_series_runs_on_any_table_with_other_target_and_categories(tmp_path):
    rng = np.random.default_rng(0)
    kinds = rng.choice(["red", "green", "blue"], 600)
    size = rng.normal(size=600)
    size[rng.random(600) < 0.5] = np.nan
    label = np.where(np.nan_to_num(size) + (kinds == "red") > 0.6, "1", "0")
    frame = pd.DataFrame({"colour": kinds, "size": size, "zone": rng.integers(1, 5, 600)})
    frame["id"] = [f"row-{number}" for number in range(600)]
    frame["label"] = label
    path = tmp_path / "own table.csv"
    frame.to_csv(path, index=False, sep=";", decimal=",")
    result = run_series(
        *(tmp_path / "ws", "--data", str(path), "-p", "TARGET", "label"),
        *("-p", "CATEGORICAL", '["zone"]', "-p", "DROP", "id", "-p", "EPOCHS", "10", *ONE_PAIR),
        *("-p", "ATTACKED_ROWS", "5"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    manifest = json.loads((tmp_path / "ws" / "data" / "manifest.json").read_text())
    assert manifest["categorical"] == ["colour", "zone"]
    # Rows with gaps in them went through notebook 05's requests, too.
    assert load_split(open_workspace(tmp_path / "ws")).X_test.head(3)["size"].isna().any()
    with connected(tmp_path / "ws") as client:
        experiment = client.get_experiment_by_name("svc_model").experiment_id
        newest, *_ = client.search_runs([experiment], "attributes.run_name = 'svm'")
        version = client.get_model_version_by_alias("model_svm_rbf", "production")
        assert version.run_id == newest.info.run_id
        for name in NAMES:
            answer = registry.load_production(name).predict(frame.drop(columns=["id", "label"]))
            assert set(answer["prediction"]) <= {0, 1}
            assert list(answer.columns[1:]) == ["probability_0", "probability_1"]
