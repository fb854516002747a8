"""What runs inside the scoring server's process: the production models behind HTTP.

The protocol is that of MLflow's own scoring server (``/invocations``, ``/ping``, ``/version``)
[1]_; several models are told apart by their path, ``/models/<name>/invocations``.

References
----------
.. [1] https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/
"""

import hmac
import http
import json
import logging
import sys
import threading
import uuid
import warnings
from collections.abc import Sequence
from contextlib import asynccontextmanager

import anyio
import mlflow
import sklearn
from mlflow.exceptions import MlflowException
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from helpers import tracking
from helpers.models.interface import convert
from helpers.server import credentials, processes
from helpers.server.http import LOCAL_HOSTS, MOST_BYTES, basic_credentials, read_body
from helpers.serving.inputs import parse
from helpers.serving.models import LoadedModel, Models
from helpers.serving.process import service
from helpers.serving.scored_rows import Recorder
from helpers.workspace import open_workspace


class Application:
    """Routes and answers.

    Parameters
    ----------
    password : str or None
        Asked of every client but those of ``/ping``.
    hosts : sequence of str or None
        Names under which the server may be asked; None: any.
    """

    def __init__(
        self,
        models: Models,
        recorder: Recorder,
        password: str | None = None,
        hosts: Sequence[str] | None = LOCAL_HOSTS,
    ):
        self.models, self.recorder, self.password, self.hosts = models, recorder, password, hosts

    def starlette(self) -> Starlette:
        """Return the ASGI application."""
        protocol = [
            Route("/ping", self.ping),
            Route("/version", self.version),
            Route("/invocations", self.invocations, methods=["POST"]),
        ]
        routes = [
            Route("/health", self.health),
            Route("/models", self.list_models),
            Mount("/models/{name}", routes=protocol),
            *protocol,
        ]
        handlers = {HTTPException: _on_http_error}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette):
        threading.Thread(target=self.models.watch, name="watch", daemon=True).start()
        yield
        self.models.stop()
        await anyio.to_thread.run_sync(self.recorder.close)

    async def health(self, request: Request) -> Response:
        """Tell that the process answers, whatever it serves."""
        return PlainTextResponse("OK")

    async def ping(self, request: Request) -> Response:
        """Tell whether the models, or the one named, can be asked."""
        self._check_host(request)
        self.models.get(request.path_params.get("name"))
        return PlainTextResponse("OK")

    async def version(self, request: Request) -> Response:
        """Return MLflow's version, as its own scoring server does."""
        self._check_host(request)
        return PlainTextResponse(mlflow.__version__)

    async def list_models(self, request: Request) -> Response:
        """Tell what is served and what was refused."""
        self._admit(request)
        return JSONResponse(
            {
                "models": [each.describe() for each in list(self.models.loaded.values())],
                "refused": self.models.refused,
                "not_recorded": self.recorder.dropped,
            }
        )

    async def invocations(self, request: Request) -> Response:
        """Answer rows with predictions and probabilities."""
        self._admit(request)
        model = self.models.get(request.path_params.get("name"))
        body = await _read_body(request)
        content_type = request.headers.get("content-type", "")
        request_id = uuid.uuid4().hex
        recorder = self.recorder if request.query_params.get("record") != "false" else None
        answer = await run_in_threadpool(score, model, body, content_type, request_id, recorder)
        headers = {
            "X-Model-Name": model.name,
            "X-Model-Version": model.version,
            "X-Run-Id": model.run_id,
            "X-Request-Id": request_id,
        }
        return Response(answer, 200, headers, "application/json")

    def _check_host(self, request: Request) -> None:
        # A page of another site may not reach this server under a name of its own.
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name not in self.hosts:
            raise HTTPException(403, "This server is not known under that name.")

    def _admit(self, request: Request) -> None:
        self._check_host(request)
        if self.password is None:
            return
        _, given = basic_credentials(request.headers.get("authorization", "")) or ("", "")
        if not hmac.compare_digest(given.encode(), self.password.encode()):
            challenge = {"WWW-Authenticate": 'Basic realm="scoring"'}
            raise HTTPException(401, "Sign in with the password of the models.", challenge)


def score(
    model: LoadedModel, body: bytes, content_type: str, request_id: str, recorder: Recorder | None
) -> bytes:
    """Return the answer to the rows of a request, as JSON.

    Raises
    ------
    starlette.exceptions.HTTPException
        If the rows cannot be read or are not those of the model.
    """
    frame = parse(body, content_type, model.columns)
    if not len(frame):
        return b'{"predictions": []}'
    try:
        rows = convert(frame, model.columns)
        predictions, probabilities = model.classify(rows)
    except MlflowException as error:
        raise HTTPException(400, error.message) from None
    probabilities = probabilities.tolist()
    if recorder:
        recorder.write(request_id, model, rows, predictions, probabilities)
    names = ["prediction", *(f"probability_{label}" for label in model.labels)]
    records = [
        dict(zip(names, (prediction, *row), strict=True))
        for prediction, row in zip(predictions, probabilities, strict=True)
    ]
    return json.dumps({"predictions": records}).encode()


async def _read_body(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Compressed requests are not taken; send the rows as they are.")
    body = await read_body(request)
    if body is None:
        limit = MOST_BYTES // 2**20
        raise HTTPException(413, f"More than {limit} MB at once. Send fewer rows per request.")
    return body


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    code = http.HTTPStatus(error.status_code).name
    content = {"error_code": code, "message": error.detail}
    return JSONResponse(content, error.status_code, error.headers)


def main() -> None:
    """Run the scoring server in this process until it is ended."""
    options = processes.argument_parser("helpers.serving.app", main.__doc__).parse_args()
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
        Recorder(workspace.scored_rows),
        credentials.find_secret(credentials.SCORING_PASSWORD),
        LOCAL_HOSTS if options.host in LOCAL_HOSTS else None,
    )
    processes.serve(application.starlette(), options, service(workspace))


if __name__ == "__main__":
    main()
