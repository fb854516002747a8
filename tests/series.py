"""What the tests of the whole series share: running it, and looking at what it made."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlflow

from helpers import server, tracking
from helpers.workspace import PROJECT_ROOT, open_workspace

METRICS = {
    "accuracy",
    "f1_micro",
    "precision_micro",
    "recall_micro",
    "f1_macro",
    "precision_macro",
    "recall_macro",
    "log_loss",
    "roc_auc_ovr",
}
RUNS = {
    "model_conv_network": ("conv_network", "default_logistic"),
    "model_svm_rbf": ("svc_model", "svm"),
}
ONE_PAIR = ("-p", "C_EXPONENTS", "[1]", "-p", "GAMMA_EXPONENTS", "[-5]")


def wait_for(condition, seconds=60):
    """Wait until a condition holds; the limit only keeps a failing test from hanging."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def clean_environment(**changes):
    """Return this process's environment without settings of the series."""
    names = {"MLFLOW_TRACKING_URI", "WORKSPACE"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, **changes}


def run_series(workspace, *arguments, **environment):
    """Run ``python -m helpers.run`` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "helpers.run", "--workspace", str(workspace), *arguments],
        cwd=PROJECT_ROOT,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_notebook(name, output, *parameters, **environment):
    """Run one notebook with the plain papermill command line."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "papermill", f"notebooks/{name}.ipynb", str(output)),
            *("--no-progress-bar", *parameters),
        ],
        cwd=PROJECT_ROOT,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@contextmanager
def connected(folder):
    """Connect this process to a workspace's own server for the length of a block."""
    workspace = open_workspace(folder)
    try:
        tracking.connect(workspace, keep=False)
        yield mlflow.MlflowClient()
    finally:
        server.stop_server(workspace)


def find_runs(client, name):
    """Return the runs of a model, the newest first."""
    experiment, run_name = RUNS[name]
    found = client.get_experiment_by_name(experiment)
    return client.search_runs(
        [found.experiment_id],
        f"attributes.run_name = '{run_name}'",
        order_by=["attributes.start_time DESC"],
    )


def files_below(folder):
    """Return all files below a folder."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
