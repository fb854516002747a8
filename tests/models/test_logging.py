"""What is logged with a run of 02 or 03."""

import os
import platform
from pathlib import Path

import mlflow

from helpers import tracking
from helpers.server import credentials
from helpers.tracking.runs import USER


def test_empty_tracking_uri_names_no_server(tracking_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv(USER, raising=False)
    assert tracking.connect(tracking_server.workspace, keep=False) == tracking_server.url
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ[USER] == credentials.NOTEBOOKS


def test_run_says_what_it_ran_on_and_was_trained_on(logged, small_split):
    tags = logged.run.data.tags
    assert tags["python"] == platform.python_version()
    assert tags["platform"] == platform.platform()
    assert int(tags["cores"]) == os.cpu_count()
    assert tags["runtime"] == "local"
    assert tags["data_digest"] == small_split.manifest["digest"]
    assert tags["split_digest"] == small_split.manifest["split_digest"]
    assert tags["data_source"] == small_split.manifest["source"]
    assert tags["synthetic_data"] == "false"
    assert logged.run.info.status == "FINISHED"


def test_run_holds_the_documented_files(logged):
    files = {path.name for path in logged.folder.iterdir()}
    assert {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"} <= files
    picture = mlflow.artifacts.download_artifacts(
        f"runs:/{logged.run.info.run_id}/confusion_matrix/confusion_matrix.png"
    )
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
