"""Runs in MLflow: the connection to its server, how runs start and end, and how they are found."""

import getpass
import logging
import os
import platform
import signal
import socket
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlflow
import psutil
from mlflow.entities import Run, RunTag
from mlflow.exceptions import MlflowException

from helpers import server
from helpers.server import credentials, store
from helpers.workspace import Workspace, in_colab

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

# Tag of the runs of the workspace that this process is connected for: ``series``, its id.
_own: dict[str, str] = {}


# --- connecting -------------------------------------------------------------------------------


def connect(workspace: Workspace, keep: bool | None = None, close_runs: bool = True) -> str:
    """Connect MLflow to the team's server or to the workspace's own, and return its URI.

    Runs that this machine left open when it was interrupted are closed on the way, unless
    `close_runs` is False. `keep` is that of `helpers.server.start_server`.

    Raises
    ------
    helpers.server.processes.ServerError
        If the server does not answer or does not start.
    """
    uri = server.start(workspace, keep)
    # As everywhere, an empty variable (a secret that is not set) names no server.
    named = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    if not named:
        # MLflow sets the variable itself; here it means a server that the user named.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        os.environ[USER] = credentials.NOTEBOOKS
        os.environ[PASSWORD] = credentials.stored_secret(workspace, credentials.NOTEBOOKS)
    elif os.environ.get(USER) == credentials.NOTEBOOKS:
        # A team's server has users of its own.
        del os.environ[USER], os.environ[PASSWORD]
    _own["series"] = workspace.id
    _quiet()
    if close_runs:
        store.close_abandoned_runs(mlflow.MlflowClient())
    return uri


def _quiet() -> None:
    """Keep remarks out of the notebook that a reader can do nothing about."""
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    for name in ("mlflow.pyfunc", "mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Hint: Inferred schema contains integer column",
        "The specified dataset source can be interpreted in multiple ways",
    ):
        warnings.filterwarnings("ignore", message=message)


def user_name(name: str | None) -> str:
    """Return who acts: `name`, else the user of a team's server, else the system user."""
    signed_in = os.environ.get(USER)
    if name or (signed_in and signed_in != credentials.NOTEBOOKS):
        return name or signed_in
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # Containers may run under a number that has no name.
        return "unknown"


# --- starting and ending ----------------------------------------------------------------------


def open_experiment(name: str) -> str:
    """Return the id of an experiment, made if missing and restored if deleted."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another notebook made it between the two calls.
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


@cache
def _accelerator() -> str:
    """Return the name of the machine's GPU, or ``none``; the driver knows it without TensorFlow."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "none"
    return found.stdout.strip().replace("\n", ", ") or "none"


def process_tags() -> dict[str, str]:
    """Return the tags that say which process a run belongs to and what it ran on."""
    return {
        "process.host": socket.gethostname(),
        "process.pid": str(os.getpid()),
        "process.created": f"{psutil.Process().create_time():.2f}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "runtime": "colab" if in_colab() else "local",
        "accelerator": _accelerator(),
        **_own,
    }


def data_tags(manifest: dict) -> dict[str, str]:
    """Return the tags that say what a model was trained on, from the manifest of the split."""
    return {
        "data_source": manifest["source"],
        "data_digest": manifest["digest"],
        "split_digest": manifest["split_digest"],
        "synthetic_data": str(manifest["synthetic"]).lower(),
    }


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM, which papermill and Jupyter send to end a kernel, into an interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def start_run(
    experiment: str, run_name: str, manifest: dict | None = None, tags: dict | None = None
) -> Iterator[mlflow.ActiveRun]:
    """Start a run that is always closed: FINISHED, FAILED on an error, KILLED on an interrupt.

    Source and digest of the split with this `manifest` become tags, beside `tags`.
    """
    experiment_id = open_experiment(experiment)
    mlflow.end_run()
    every = {**process_tags(), **(data_tags(manifest) if manifest else {}), **(tags or {})}
    with (
        _terminated_as_interrupt(),
        mlflow.start_run(experiment_id=experiment_id, run_name=run_name, tags=every) as run,
    ):
        try:
            yield run
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise


# --- finding and keeping ----------------------------------------------------------------------


def latest_run(experiment: str, run_name: str, split_digest: str | None = None) -> Run | None:
    """Return the newest finished run of a name, where given of a split; None if there is none.

    On a server that several workspaces use, those of this one come first.
    """
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        return None
    query = f"attributes.status = 'FINISHED' and attributes.run_name = '{run_name}'"
    if split_digest:
        query += f" and tags.split_digest = '{split_digest}'"
    newest_first = ["attributes.start_time DESC"]
    runs = mlflow.MlflowClient().search_runs([found.experiment_id], query, order_by=newest_first)
    return max(runs, key=is_own, default=None)  # of equal ones the first


def is_own(run: Run) -> bool:
    """Tell whether a run belongs to the workspace that this process is connected for.

    Runs of older versions, which do not say where they belong, count as its own.
    """
    return {**_own, **run.data.tags}.items() >= _own.items()


def keep_run(client, experiment: str, run_name: str, keys: dict, tags: dict, metrics: dict):
    """Keep one finished run per workspace and `keys`, the tags that tell it from others.

    It is written only if its `tags`, all of them, changed.
    """
    experiment_id = open_experiment(experiment)
    # On a team's server another workspace has rows of its own to judge by.
    keys, tags = {**keys, **_own}, {**tags, **_own}
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in keys.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    if found and tags.items() <= found[0].data.tags.items():
        return
    run = found[0] if found else client.create_run(experiment_id, run_name=run_name)
    mlflow.log_metrics(metrics, run_id=run.info.run_id)
    client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in tags.items()])
    client.set_terminated(run.info.run_id)


def log_figure(figure, path: str) -> None:
    """Log a matplotlib figure as an artifact of the active run."""
    mlflow.log_figure(figure, path, save_kwargs={"dpi": 120})
