"""MLflow experiments, runs and what is logged with them; shared by notebooks 02 to 05."""

import getpass
import json
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import joblib
import mlflow
import numpy as np
import pandas as pd
import psutil
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from helpers import server
from helpers.display import silenced_libraries
from helpers.models import interface
from helpers.models.evaluation import compute_metrics
from helpers.models.interface import LiteNetwork
from helpers.server import credentials, processes
from helpers.workspace import ProjectError, in_colab

INTERFACE = Path(interface.__file__)
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
COMPARED_ROWS = 1000  # training rows on which a converted network must answer as before
TOLERANCE = 1e-5  # largest difference of a probability
WORKSPACE = "series"  # tag: the id of the workspace that a run belongs to
TRAINING_ROWS = "training_rows.txt"  # artifact: the hash of each row that a run was trained on


_workspace_id = None  # of the workspace that this process is connected for


class ModelError(ProjectError):
    """A model cannot be logged."""


# --- connecting -------------------------------------------------------------------------------


def connect(workspace, keep=None):
    """Connect MLflow to the team's server or to the workspace's own.

    Runs that this machine left open when it was interrupted are closed on the way.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    keep : bool, optional
        See `helpers.server.start_server`.

    Returns
    -------
    str
        The tracking URI: ``MLFLOW_TRACKING_URI`` where set, else the local server's address.

    Raises
    ------
    helpers.server.processes.ServerError
        If the server does not answer or does not start.
    """
    global _workspace_id
    uri, _workspace_id = server.start(workspace, keep), workspace.id
    # As everywhere, an empty variable (a secret that is not set) names no server.
    named = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    if named:
        _sign_out()
    else:
        # MLflow sets the variable itself; here it means a server that the user named.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        os.environ[USER] = credentials.NOTEBOOKS
        os.environ[PASSWORD] = credentials.stored_secret(workspace, credentials.NOTEBOOKS)
    _quiet()
    close_abandoned_runs()
    return uri


def _sign_out():
    """Forget the account of a workspace's server: a team's server has users of its own."""
    if os.environ.get(USER) == credentials.NOTEBOOKS:
        del os.environ[USER], os.environ[PASSWORD]


def _quiet():
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


def load_model(uri):
    """Load a model from the server as any client would.

    Parameters
    ----------
    uri : str
        Such as ``models:/model_svm_rbf@production``.

    Returns
    -------
    mlflow.pyfunc.PyFuncModel
    """
    with silenced_libraries():
        return mlflow.pyfunc.load_model(uri)


# --- runs -------------------------------------------------------------------------------------


def open_experiment(name):
    """Return the id of an experiment, made if missing and restored if deleted.

    Parameters
    ----------
    name : str

    Returns
    -------
    str
    """
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
def _accelerator():
    """Return the name of the machine's GPU, or ``none``; the driver knows it without TensorFlow."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip().replace("\n", ", ") or "none"


def _process_tags():
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
        **({WORKSPACE: _workspace_id} if _workspace_id else {}),
    }


def data_tags(manifest):
    """Return the tags that say what a model was trained on.

    Parameters
    ----------
    manifest : dict
        Of the split, see `helpers.data.Split`.

    Returns
    -------
    dict of str to str
    """
    return {
        "data_source": manifest["source"],
        "data_digest": manifest["digest"],
        "split_digest": manifest["split_digest"],
        "synthetic_data": str(manifest["synthetic"]).lower(),
    }


@contextmanager
def _terminated_as_interrupt():
    """Turn SIGTERM, which papermill and Jupyter send to end a kernel, into an interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def start_run(experiment, run_name, manifest=None, tags=None):
    """Start a run that is always closed: FINISHED, FAILED on an error, KILLED on an interrupt.

    Parameters
    ----------
    experiment : str
        Name of the experiment.
    run_name : str
    manifest : dict, optional
        Of the split; its source and digest become tags.
    tags : dict of str to str, optional
        More tags.

    Yields
    ------
    mlflow.ActiveRun
    """
    experiment_id = open_experiment(experiment)
    mlflow.end_run()
    every = {**_process_tags(), **(data_tags(manifest) if manifest else {}), **(tags or {})}
    run = mlflow.start_run(experiment_id=experiment_id, run_name=run_name, tags=every)
    with _terminated_as_interrupt():
        try:
            yield run
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise
        except BaseException:
            mlflow.end_run("FAILED")
            raise
        mlflow.end_run("FINISHED")


def log_child_runs(run, children, manifest):
    """Log finished runs below a run, such as the pairs of a search.

    Parameters
    ----------
    run : mlflow.ActiveRun
    children : sequence of tuple of (str, dict, dict)
        Name, parameters and metrics of each.
    manifest : dict
        Of the split; its source and digest become tags.
    """
    client = mlflow.MlflowClient()
    tags = {**_process_tags(), **data_tags(manifest), MLFLOW_PARENT_RUN_ID: run.info.run_id}
    # A millisecond before it: the newest run of the experiment is the parent.
    start = run.info.start_time - 1
    for name, params, metrics in children:
        child = client.create_run(run.info.experiment_id, start, tags, name).info.run_id
        now = int(time.time() * 1000)
        client.log_batch(
            child,
            [Metric(key, value, now, 0) for key, value in metrics.items()],
            [Param(key, str(value)) for key, value in params.items()],
        )
        client.set_terminated(child)


def keep_run(client, experiment, run_name, keys, tags, metrics):
    """Keep one finished run per set of keys and workspace; write only if its tags changed.

    Parameters
    ----------
    client : mlflow.MlflowClient
    experiment, run_name : str
    keys : dict of str to str
        Tags that tell the run from others.
    tags : dict of str to str
        All tags.
    metrics : dict of str to float

    Returns
    -------
    str
        Id of the run.
    """
    experiment_id = open_experiment(experiment)
    if _workspace_id:
        # On a team's server another workspace has rows of its own to judge by.
        keys, tags = {**keys, WORKSPACE: _workspace_id}, {**tags, WORKSPACE: _workspace_id}
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in keys.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    if found and tags.items() <= found[0].data.tags.items():
        return found[0].info.run_id
    run = found[0] if found else client.create_run(experiment_id, run_name=run_name)
    now = int(time.time() * 1000)
    client.log_batch(
        run.info.run_id,
        [Metric(key, value, now, 0) for key, value in metrics.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def close_abandoned_runs():
    """Mark runs as KILLED whose process on this machine is gone.

    Returns
    -------
    list of str
        Ids of the runs marked.
    """
    client = mlflow.MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if not experiments:
        return []
    here = socket.gethostname()
    running = client.search_runs(
        experiments,
        f"attributes.status = 'RUNNING' and tags.`process.host` = '{here}'",
        max_results=1000,
    )
    closed = []
    for run in running:
        tags = run.data.tags
        if not processes.is_running(int(tags["process.pid"]), float(tags["process.created"])):
            client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))
            closed.append(run.info.run_id)
    return closed


def latest_run(experiment, run_name, split_digest=None):
    """Return the newest finished run of a name, or None.

    On a server that several workspaces use, those of this one come first.

    Parameters
    ----------
    experiment, run_name : str
    split_digest : str, optional
        Only runs on this split.

    Returns
    -------
    mlflow.entities.Run or None
    """
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    query = f"attributes.status = 'FINISHED' and attributes.run_name = '{run_name}'"
    if split_digest:
        query += f" and tags.split_digest = '{split_digest}'"
    for own in ([f" and tags.{WORKSPACE} = '{_workspace_id}'"] if _workspace_id else []) + [""]:
        runs = client.search_runs(
            [found.experiment_id],
            query + own,
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if runs:
            return runs[0]
    return None


def is_own(run):
    """Tell whether a run belongs to the workspace that this process is connected for.

    Parameters
    ----------
    run : mlflow.entities.Run

    Returns
    -------
    bool
    """
    return run.data.tags.get(WORKSPACE, _workspace_id) == _workspace_id


# --- logging ----------------------------------------------------------------------------------


def log_figure(figure, path):
    """Log a figure as an artifact of the active run.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str
        Such as ``confusion_matrix/confusion_matrix.png``.
    """
    mlflow.log_figure(figure, path, save_kwargs={"dpi": 120})


def row_hashes(X):
    """Return a hash of each row, the same for the same values wherever they are read.

    Neither the order of the columns nor whether numbers are integers or floats matters: one
    missing value more turns a column of integers into one of floats.

    Parameters
    ----------
    X : pandas.DataFrame, shape (n_rows, n_columns)
        Features. Without the target: a row whose label was corrected is the same row.

    Returns
    -------
    pandas.Series, shape (n_rows,)
        16 hexadecimal digits each; with the index of `X`.
    """
    alike = {}
    for name in sorted(X.columns):
        number = X[name].dtype.kind in "biuf"
        # Adding zero makes -0.0, which equals 0.0 but has other bits, the same as 0.0.
        alike[name] = X[name].astype("float64") + 0.0 if number else X[name].astype(object)
    return pd.util.hash_pandas_object(pd.DataFrame(alike), index=False).map("{:016x}".format)


def training_rows(run_id):
    """Return the hashes of the rows that a run was trained on.

    Parameters
    ----------
    run_id : str

    Returns
    -------
    set of str or None
        See `row_hashes`; None if the run did not log them.
    """
    files = mlflow.MlflowClient().list_artifacts(run_id)
    if TRAINING_ROWS not in [file.path for file in files]:
        return None
    return set(mlflow.artifacts.load_text(f"runs:/{run_id}/{TRAINING_ROWS}").split())


def log_split(split):
    """Log the training and test rows as dataset inputs of the active run.

    The hashes of the training rows go with them: with these, the model can later be measured
    on rows of a grown or newly split table that it has not seen.

    Parameters
    ----------
    split : helpers.data.Split
    """
    mlflow.log_text("\n".join(row_hashes(split.X_train).unique()), TRAINING_ROWS)
    parts = {"training": (split.X_train, split.y_train), "testing": (split.X_test, split.y_test)}
    for context, (X, y) in parts.items():
        dataset = mlflow.data.from_pandas(
            X.assign(**{y.name: y}),
            source=_dataset_source(split.manifest["source"]),
            targets=y.name,
            name=f"{Path(split.manifest['source']).stem[:40]}-{context}",
        )
        _log_input(dataset, context)


def _log_input(dataset, context):
    """Log a dataset; again where another series on the same server logged it just then.

    MLflow looks whether the dataset is known and then adds it, in two steps: of two series that
    do so at once, a database such as PostgreSQL refuses one.
    """
    for wait in (0.2, 1.0, 0):
        try:
            mlflow.log_input(dataset, context=context)
        except MlflowException as error:
            if not wait or "unique" not in str(error).lower():
                raise
            time.sleep(wait)
        else:
            return


def _dataset_source(source):
    from helpers.data import SAMPLE, UCI_URL

    return {"uci": UCI_URL, "sample": str(SAMPLE)}.get(source, source)


def column_kinds(X):
    """Tell what a client may send in each column.

    Parameters
    ----------
    X : pandas.DataFrame

    Returns
    -------
    dict of str to {'number', 'boolean', 'text'}
    """
    kinds = {"b": "boolean", "O": "text"}
    return {name: kinds.get(dtype.kind, "number") for name, dtype in X.dtypes.items()}


def make_signature(columns, labels, header=None):
    """Make the signature of the model interface.

    MLflow's ``double`` refuses int64 and its ``long`` refuses floats, yet clients send either
    for the same column. So the signature asks for the columns by name, and the model itself
    checks that numbers are numbers and texts are texts.

    A column whose name in the CSV has blanks around it may come under either name, so MLflow
    lets both pass and the model says if there is neither.

    Parameters
    ----------
    columns : dict
        From `column_kinds`.
    labels : list
        Class labels.
    header : dict of str to str, optional
        Names as the CSV writes them, where they differ.

    Returns
    -------
    mlflow.models.ModelSignature
    """
    header = header or {}
    inputs = [ColSpec(AnyType(), name, required=name not in header) for name in columns]
    inputs += [ColSpec(AnyType(), raw, required=False) for raw in header.values()]
    label_type = DataType.string if isinstance(labels[0], str) else DataType.long
    outputs = [ColSpec(label_type, "prediction")]
    outputs += [ColSpec(DataType.double, f"probability_{label}") for label in labels]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _pinned(*names):
    return [f"{name}=={metadata.version(name)}" for name in names]


def save_parts(folder, split, preprocessing, model):
    """Write the fitted parts of a model where the model interface looks for them.

    Parameters
    ----------
    folder : pathlib.Path
    split : helpers.data.Split
    preprocessing : helpers.models.interface.TabularPreprocessor
    model : keras.Model or classifier of scikit-learn

    Raises
    ------
    ModelError
        If a network answers otherwise once it is converted.
    """
    interface = {
        "columns": column_kinds(split.X_train),
        "labels": split.labels,
        "preprocessing": preprocessing.to_dict(),
    }
    text = json.dumps(interface, indent=2, ensure_ascii=False)
    (folder / "interface.json").write_text(text, encoding="utf-8")
    if hasattr(model, "predict_proba"):
        joblib.dump(model, folder / "classifier.joblib", compress=3)
        return
    from helpers.models import cnn

    content = cnn.to_litert(model)
    rows = preprocessing.transform(split.X_train.head(COMPARED_ROWS)).astype("float32")
    gap = np.abs(LiteNetwork(content).predict_proba(rows) - model(rows).numpy()).max()
    if not gap <= TOLERANCE:
        raise ModelError(
            f"The network that was converted to LiteRT answers otherwise: a probability differs "
            f"by {gap:.2g}. Use layers that it knows, such as Conv1D, MaxPooling1D and Dense."
        )
    (folder / "network.tflite").write_bytes(content)
    model.save(folder / "network.keras")


def log_model(split, preprocessing, model):
    """Log a fitted model with the interface of the series in the active run.

    Parameters
    ----------
    split : helpers.data.Split
        Its training rows give signature and input example.
    preprocessing : helpers.models.interface.TabularPreprocessor
        Fitted.
    model : keras.Model or classifier of scikit-learn
        Fitted; takes preprocessed rows. A network is run by LiteRT, so that clients need no
        TensorFlow; the ``.keras`` file lies beside it.

    Returns
    -------
    mlflow.models.model.ModelInfo
        ``model_uri`` loads the model back.

    Raises
    ------
    ModelError
        If a network answers otherwise once it is converted.
    """
    columns = column_kinds(split.X_train)
    runs = "joblib" if hasattr(model, "predict_proba") else "ai-edge-litert"
    temporary = Path(tempfile.mkdtemp())
    folder = temporary / "parts"
    folder.mkdir()
    try:
        save_parts(folder, split, preprocessing, model)
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(INTERFACE),
            artifacts={"model": str(folder)},
            signature=make_signature(columns, split.labels, split.manifest.get("header")),
            input_example=split.X_train.head(3),
            pip_requirements=_pinned("mlflow", "pandas", "numpy", "scikit-learn", runs),
            metadata={"columns": columns, "labels": [str(label) for label in split.labels]},
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def user_name(name=None):
    """Return who acts: `name`, else the user of a team's server, else the system user."""
    signed_in = os.environ.get(USER)
    if name or (signed_in and signed_in != credentials.NOTEBOOKS):
        return name or signed_in
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # Containers may run under a number that has no name.
        return "unknown"


def evaluate_logged_model(model_info, split):
    """Load a logged model back and compute and log its metrics on the test rows.

    What is measured is the model that clients will load, not the objects in this notebook.

    Parameters
    ----------
    model_info : mlflow.models.model.ModelInfo
        From `log_model`.
    split : helpers.data.Split

    Returns
    -------
    metrics : dict of str to float
    answer : pandas.DataFrame
        The model's answer to the test rows.
    """
    from helpers import plots  # here: the scoring server, which needs none, starts sooner

    answer = load_model(model_info.model_uri).predict(split.X_test)
    metrics = compute_metrics(split.y_test, answer, split.labels)
    mlflow.log_metrics(metrics, model_id=model_info.model_id)
    title = f"Confusion matrix, {len(answer):,} test rows"
    figure = plots.confusion_matrix(split.y_test, answer["prediction"], split.labels, title)
    log_figure(figure, "confusion_matrix/confusion_matrix.png")
    return metrics, answer
