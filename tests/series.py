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

SCORES = ("f1", "precision", "recall")
METRICS = {f"{score}_{average}" for score in SCORES for average in ("micro", "macro")}
METRICS |= {"accuracy", "log_loss", "roc_auc_ovr"}
# The names of the deployment document, on which other programs rely.
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


def start_python(*arguments, **options):
    """Start Python in the project's folder; what goes in and comes out are texts."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, **{"cwd": PROJECT_ROOT, **pipes, **options})


def run_module(*arguments, **environment):
    """Run a module of Python, named by the first argument, to its end."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_series(workspace, *arguments, **environment):
    """Run ``python -m helpers.run`` as a user would."""
    return run_module("helpers.run", "--workspace", workspace, *arguments, **environment)


def run_notebook(name, output, *parameters, **environment):
    """Run one notebook with the plain papermill command line."""
    place = (f"notebooks/{name}.ipynb", output, "--no-progress-bar")
    return run_module("papermill", *place, *parameters, **environment)


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
    number = client.get_experiment_by_name(experiment).experiment_id
    # MLflow gives the newest first.
    return client.search_runs([number], f"attributes.run_name = '{run_name}'")


def files_below(folder):
    """Return all files below a folder."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())
