"""What runs inside the scoring server's process: the production models behind HTTP.

The protocol is that of MLflow's own scoring server (``/invocations``, ``/ping``, ``/version``)
[1]_; several models are told apart by their path, ``/models/<name>/invocations``.

References
----------
.. [1] https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/
"""

import csv
import hmac
import http
import io
import json
import logging
import sys
import tempfile
import threading
import time
import uuid
import warnings
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial

import anyio
import mlflow
import numpy as np
import pandas as pd
import sklearn
from mlflow.exceptions import MlflowException
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from helpers import registry, series, tracking
from helpers.data import CSV_OPTIONS
from helpers.models.interface import convert
from helpers.server import credentials, processes
from helpers.server.http import LOCAL_HOSTS, MOST_BYTES, basic_credentials, read_body
from helpers.serving.scored_rows import Recorder
from helpers.workspace import open_workspace

POLL = 2.0  # seconds between two looks at what is in Production
TRY_AGAIN = 30.0  # seconds until a version that did not load is tried again
FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
NO_ROWS = b'{"predictions": []}'

log = logging.getLogger("serving")


class BadRequestError(Exception):
    """A request that cannot be answered.

    Parameters
    ----------
    message : str
        What the client is told.
    status : int
    headers : dict, optional
        More headers of the answer.
    """

    def __init__(self, message, status=400, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class BadVersionError(Exception):
    """A version in Production cannot be served; the message says why."""


# --- reading requests -------------------------------------------------------------------------


def parse(body, content_type, columns):
    """Read the rows of a request.

    Parameters
    ----------
    body : bytes
    content_type : str
        ``application/json`` or ``text/csv``, with or without parameters.
    columns : dict of str to {'number', 'boolean', 'text'}
        The model's columns, for rows that come without names or types.

    Returns
    -------
    pandas.DataFrame

    Raises
    ------
    BadRequestError
        Says what is wrong with the body.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/csv":
        return _parse_csv(body, columns)
    if kind == "application/json":
        return _parse_json(body, columns)
    raise BadRequestError(
        f"Content-Type {kind or '(none)'!r} is not known here: send application/json or text/csv.",
        415,
    )


def _parse_csv(body, columns):
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequestError("The CSV is not UTF-8 text.") from None
    header = text.partition("\n")[0]
    separator = ";" if header.count(";") > header.count(",") else ","
    try:
        # Texts that look like numbers, such as 007, stay as they are.
        names = next(csv.reader([header], delimiter=separator), [])
        texts = {name: str for name in names if columns.get(name.strip()) == "text"}
        frame = pd.read_csv(io.StringIO(text), sep=separator, dtype=texts, **CSV_OPTIONS)
    except pd.errors.EmptyDataError:
        raise BadRequestError("The CSV is empty: send a header and rows.") from None
    except (ValueError, OverflowError, csv.Error) as error:
        raise BadRequestError(f"The CSV cannot be read: {str(error)[:200]}") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise BadRequestError("The CSV has rows with more fields than its header.")
    return frame


def _parse_json(body, columns):
    try:
        content = json.loads(body)
    except RecursionError:
        raise BadRequestError("The JSON is nested too deeply.") from None
    except ValueError as error:
        raise BadRequestError(f"The body is not JSON: {str(error)[:200]}") from None
    names = [name for name in FORMS if isinstance(content, dict) and name in content]
    if len(names) != 1 or set(content) - {*names, "params"}:
        raise BadRequestError(f"The JSON must be an object with exactly one of {', '.join(FORMS)}.")
    (form,) = names
    readers = {"dataframe_split": _from_split, "dataframe_records": _from_records}
    try:
        return readers.get(form, partial(_from_instances, columns=columns))(content[form])
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequestError(f"{form} cannot be read as rows: {str(error)[:200]}") from None


def _from_split(content):
    if not isinstance(content, dict) or not {"columns", "data"} <= set(content):
        raise BadRequestError("dataframe_split must have 'columns' and 'data'.")
    return _from_lists(content["data"], content["columns"])


def _from_lists(data, columns):
    if not isinstance(data, list) or not isinstance(columns, list):
        raise BadRequestError("Rows and column names must be lists.")
    if not all(isinstance(name, str) for name in columns):
        raise BadRequestError("Column names must be texts.")
    for number, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            size = f"{len(row)} values" if isinstance(row, list) else "no list"
            raise BadRequestError(f"Row {number} has {size}, but there are {len(columns)} columns.")
    kinds = {type(value) for row in data for value in row}
    if kinds <= {int, float, type(None)}:
        # As one array: column by column, making the table takes longer than the model.
        with suppress(OverflowError):
            values = np.array(data, dtype="float64").reshape(len(data), len(columns))
            return pd.DataFrame(values, columns=columns)
    return pd.DataFrame(data, columns=columns)


def _from_records(content):
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise BadRequestError("dataframe_records must be a list of objects, one per row.")
    return pd.DataFrame.from_records(content)


def _from_instances(content, columns):
    """Read ``instances`` (rows) or ``inputs`` (rows, or lists by column)."""
    if isinstance(content, dict):
        if not all(isinstance(values, list) for values in content.values()):
            content = {name: [value] for name, value in content.items()}
        if len({len(values) for values in content.values()}) > 1:
            raise BadRequestError("The columns have different numbers of values.")
        return pd.DataFrame(content)
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return pd.DataFrame.from_records(content)
    return _from_lists(content, list(columns))


# --- the models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """One version of a model, loaded.

    Attributes
    ----------
    name, version, run_id : str
    columns : dict of str to {'number', 'boolean', 'text'}
    labels : list
    classify : callable
        From converted rows to predictions and probabilities, see `helpers.models.interface`.
    since : str
        When it was loaded, ISO 8601, UTC.
    """

    name: str
    version: str
    run_id: str
    columns: dict
    labels: list
    classify: object = field(repr=False)
    since: str = ""

    def describe(self):
        """Return what clients may know, as a dict."""
        return {
            "name": self.name,
            "version": self.version,
            "run_id": self.run_id,
            "columns": self.columns,
            "labels": self.labels,
            "since": self.since,
        }


def load_served(name, version):
    """Load a version and make sure that it answers as the interface says.

    Parameters
    ----------
    name : str
    version : mlflow.entities.model_registry.ModelVersion

    Returns
    -------
    Served

    Raises
    ------
    BadVersionError
        If it does not load or answer.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = mlflow.artifacts.download_artifacts(
                f"models:/{name}/{version.version}", dst_path=folder
            )
            model = tracking.load_model(path)
            example = model.metadata.load_input_example(path)
        own = model.unwrap_python_model()
        # A version of before this shortcut answers through MLflow, which takes longer.
        classify = getattr(own, "classify", None) or partial(_classify_by_mlflow, model)
        _require_interface(model.predict(example), len(example), own.labels)
        # Not for its answer: whatever is done once, at the first call, is done here.
        classify(convert(example.head(1), own.columns))
    except registry.LOAD_ERRORS as error:
        # A file that was cut short may say nothing more.
        first_line = str(error).strip().partition("\n")[0][:300]
        reason = f"{type(error).__name__}: {first_line}"
        raise BadVersionError(reason) from error
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    number = str(version.version)
    return Served(name, number, version.run_id, own.columns, own.labels, classify, now)


def _classify_by_mlflow(model, rows):
    answer = model.predict(rows)
    return answer["prediction"].tolist(), answer.iloc[:, 1:].to_numpy("float64")


def _require_interface(answer, n_rows, labels):
    wanted = ["prediction", *(f"probability_{label}" for label in labels)]
    if list(answer.columns) != wanted or len(answer) != n_rows:
        raise ValueError(f"answers {list(answer.columns)}, not {wanted}")
    probabilities = answer[wanted[1:]].to_numpy("float64")
    if not np.allclose(probabilities.sum(axis=1), 1, atol=registry.SUM_TOLERANCE):
        raise ValueError("its probabilities do not sum to 1")


class Models:
    """The production models; looks now and then for new versions.

    A new version takes over between two requests; those that are being answered keep the one
    they began with. A version that does not load or answer is refused, and the one before stays.
    """

    def __init__(self):
        self.served, self.refused, self._retry = {}, {}, {}
        self._stop = threading.Event()

    def refresh(self):
        """Load what is new in Production; forget what is not there any more."""
        for name in series.MODELS:
            try:
                version = registry.production_version(name)
            except (MlflowException, OSError) as error:
                # Without the MLflow server production stays what it was.
                log.warning("MLflow does not answer: %s", str(error).splitlines()[0][:200])
                return
            if version is None:
                self.served.pop(name, None)
                self.refused.pop(name, None)
            elif self._is_new(name, str(version.version)):
                self._load(name, version)

    def _is_new(self, name, number):
        current = self.served.get(name)
        if current is not None and current.version == number:
            self.refused.pop(name, None)
            return False
        refused = self.refused.get(name)
        again = refused is None or refused["version"] != number
        return again or time.monotonic() > self._retry[name]

    def _load(self, name, version):
        number = str(version.version)
        try:
            self.served[name] = load_served(name, version)
        except BadVersionError as error:
            self.refused[name] = {"version": number, "reason": str(error)}
            self._retry[name] = time.monotonic() + TRY_AGAIN
            log.error("%s version %s is refused: %s", name, number, error)
        else:
            self.refused.pop(name, None)
            log.warning("%s version %s is served", name, number)

    def watch(self):
        """Refresh until `stop`; for a thread."""
        while not self._stop.wait(POLL):
            self.refresh()

    def stop(self):
        """End `watch`."""
        self._stop.set()

    def get(self, name=None):
        """Return a `Served` model by name; without one, the first.

        Raises
        ------
        BadRequestError
            404 for an unknown name, 503 where its production version is not served.
        """
        # A copy: `refresh` changes the original from another thread.
        served = dict(self.served)
        if name is None:
            name = next((each for each in series.MODELS if each in served), None)
        if name not in served:
            known = ", ".join(served) or "none"
            if name is None or name in series.MODELS:
                reason = self.refused.get(name, {}).get("reason", "nothing is in Production")
                message = f"No version of {name or 'any model'} is served: {reason}"
                raise BadRequestError(message, 503, {"Retry-After": "5"})
            raise BadRequestError(f"There is no model {name!r}. Served: {known}.", 404)
        return served[name]


# --- the application --------------------------------------------------------------------------


def _json(content, status=200, headers=None):
    return Response(json.dumps(content), status, headers, "application/json")


def _error(message, status, headers=None):
    content = {"error_code": http.HTTPStatus(status).name, "message": message}
    return _json(content, status, headers)


class Application:
    """Routes and answers.

    Parameters
    ----------
    models : Models
    recorder : helpers.serving.scored_rows.Recorder or None
    password : str or None
        Asked of every client but those of ``/ping``.
    hosts : sequence of str or None
        Names under which the server may be asked; None: any.
    """

    def __init__(self, models, recorder=None, password=None, hosts=LOCAL_HOSTS):
        self.models, self.recorder, self.password, self.hosts = models, recorder, password, hosts

    def starlette(self):
        """Return the ASGI application."""
        routes = [
            Route("/ping", self.ping),
            Route("/health", self.health),
            Route("/version", self.version),
            Route("/models", self.list_models),
            Route("/invocations", self.invocations, methods=["POST"]),
            Route("/models/{name}/ping", self.ping),
            Route("/models/{name}/version", self.version),
            Route("/models/{name}/invocations", self.invocations, methods=["POST"]),
        ]
        handlers = {HTTPException: _on_http_error, BadRequestError: _on_bad_request}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app):
        watching = threading.Thread(target=self.models.watch, name="watch", daemon=True)
        watching.start()
        yield
        self.models.stop()
        if self.recorder:
            await anyio.to_thread.run_sync(self.recorder.close)

    async def health(self, request):
        """Tell that the process answers, whatever it serves."""
        return PlainTextResponse("OK")

    async def ping(self, request):
        """Tell whether the models, or the one named, can be asked."""
        self._check_host(request)
        self.models.get(request.path_params.get("name"))
        return PlainTextResponse("OK")

    async def version(self, request):
        """Return MLflow's version, as its own scoring server does."""
        self._check_host(request)
        return PlainTextResponse(mlflow.__version__)

    async def list_models(self, request):
        """Tell what is served and what was refused."""
        self._admit(request)
        return _json(
            {
                "models": [each.describe() for each in dict(self.models.served).values()],
                "refused": self.models.refused,
                "not_recorded": self.recorder.dropped if self.recorder else None,
            }
        )

    async def invocations(self, request):
        """Answer rows with predictions and probabilities."""
        self._admit(request)
        served = self.models.get(request.path_params.get("name"))
        body = await _read_body(request)
        content_type = request.headers.get("content-type", "")
        request_id = uuid.uuid4().hex
        recorder = self.recorder if request.query_params.get("record") != "false" else None
        answer = await run_in_threadpool(_score, served, body, content_type, request_id, recorder)
        headers = {
            "X-Model-Name": served.name,
            "X-Model-Version": served.version,
            "X-Run-Id": served.run_id,
            "X-Request-Id": request_id,
        }
        return Response(answer, 200, headers, "application/json")

    def _check_host(self, request):
        # A page of another site may not reach this server under a name of its own.
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name not in self.hosts:
            raise BadRequestError("This server is not known under that name.", 403)

    def _admit(self, request):
        self._check_host(request)
        if self.password is None:
            return
        _, given = basic_credentials(request.headers.get("authorization", "")) or ("", "")
        if not hmac.compare_digest(given.encode(), self.password.encode()):
            challenge = {"WWW-Authenticate": 'Basic realm="scoring"'}
            raise BadRequestError("Sign in with the password of the models.", 401, challenge)


def _score(served, body, content_type, request_id, recorder):
    """Return the answer to the rows of a request, as JSON."""
    frame = parse(body, content_type, served.columns)
    if not len(frame) and not len(frame.columns):
        return NO_ROWS
    try:
        rows = convert(frame, served.columns)
        if not len(rows):
            return NO_ROWS
        predictions, probabilities = served.classify(rows)
    except MlflowException as error:
        raise BadRequestError(error.message) from None
    probabilities = probabilities.tolist()
    if recorder:
        recorder.write(request_id, served, rows, predictions, probabilities)
    names = ["prediction", *(f"probability_{label}" for label in served.labels)]
    records = [
        dict(zip(names, (prediction, *row), strict=True))
        for prediction, row in zip(predictions, probabilities, strict=True)
    ]
    return json.dumps({"predictions": records}).encode()


async def _read_body(request):
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequestError("Compressed requests are not taken; send the rows as they are.", 415)
    body = await read_body(request)
    if body is None:
        limit = MOST_BYTES // 2**20
        raise BadRequestError(f"More than {limit} MB at once. Send fewer rows per request.", 413)
    return body


async def _on_http_error(request, error):
    return _error(error.detail, error.status_code, error.headers)


async def _on_bad_request(request, error):
    return _error(str(error), error.status, error.headers)


# --- the process ------------------------------------------------------------------------------


def main(arguments=None):
    """Run the scoring server in this process until it is ended."""
    parser = processes.argument_parser("helpers.serving.app", main.__doc__)
    parser.add_argument("--no-record", action="store_true", help="keep no scored rows")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    # Threads of Python take turns; by default one waits up to 5 ms for its turn, as long as a
    # whole answer takes.
    sys.setswitchinterval(0.0005)
    # What reaches a model was checked by its interface.
    sklearn.set_config(assume_finite=True, skip_parameter_validation=True)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    workspace = open_workspace(options.workspace)
    tracking.connect(workspace, keep=False)
    models = Models()
    models.refresh()
    application = Application(
        models,
        None if options.no_record else Recorder(workspace.scored_rows),
        credentials.find_secret(credentials.SCORING_PASSWORD),
        LOCAL_HOSTS if options.host in LOCAL_HOSTS else None,
    )
    processes.serve(application.starlette(), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
