"""What runs inside the scoring server's process: the production models behind HTTP.

The protocol is that of MLflow's own scoring server (``/invocations``, ``/ping``, ``/version``)
[1]_; several models are told apart by their path, ``/models/<name>/invocations``.

References
----------
.. [1] https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/
"""

import gc
import hmac
import http
import json
import logging
import sys
import threading
import uuid
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain

import anyio
import mlflow
import numpy as np
import pandas as pd
import sklearn
from mlflow.exceptions import MlflowException
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from helpers import tracking
from helpers.models.interface import convert
from helpers.server import credentials, own_process
from helpers.server.http import LOCAL_HOSTS, MOST_BYTES, basic_credentials, read_body
from helpers.serving.inputs import parse
from helpers.serving.models import LoadedModel, Models
from helpers.serving.process import service
from helpers.serving.recorder import Recorder
from helpers.serving.scored_rows import DEMO
from helpers.workspace import open_workspace

LONG = 2**20  # bytes of a request that takes long
LONG_AT_ONCE = 2  # such requests that are scored at the same time
RECORD = {"true": True, "1": True, "false": False, "0": False}  # values of the query's ``record``


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
        self._long = anyio.CapacityLimiter(LONG_AT_ONCE)

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
        handlers = {HTTPException: _on_http_error, ClientDisconnect: _on_gone_client}
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
        recording = await anyio.to_thread.run_sync(self.recorder.state)
        return JSONResponse(
            {
                "models": [each.describe() for each in list(self.models.loaded.values())],
                "refused": self.models.refused,
                "not_recorded": self.recorder.dropped,
                "recording": recording,
            }
        )

    async def invocations(self, request: Request) -> Response:
        """Answer rows with predictions and probabilities."""
        self._admit(request)
        model = self.models.get(request.path_params.get("name"))
        recorder = self.recorder if _is_recorded(request) else None
        body = await _read_body(request)
        content_type = request.headers.get("content-type", "")
        request_id = DEMO * ("demo" in request.query_params) + uuid.uuid4().hex
        # A few long ones must not take all threads.
        answer = await anyio.to_thread.run_sync(
            *(score, model, body, content_type, request_id, recorder),
            limiter=self._long if len(body) > LONG else None,
        )
        headers = {
            "X-Model-Name": model.name,
            "X-Model-Version": model.version,
            "X-Run-Id": model.run_id,
            "X-Request-Id": request_id,
        }
        if len(body) <= LONG:
            return Response(b"".join(answer), 200, headers, "application/json")
        # In pieces: as a whole it would be copied, and copied again.
        headers["Content-Length"] = str(sum(map(len, answer)))
        return StreamingResponse(_in_pieces(answer), 200, headers, "application/json")

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
) -> list[bytes]:
    """Return the answer to the rows of a request, as JSON in pieces.

    Raises
    ------
    starlette.exceptions.HTTPException
        If the rows cannot be read or are not those of the model.
    """
    names = ["prediction", *(f"probability_{label}" for label in model.labels)]
    answer, scored, n_rows = [], [], 0
    try:
        for table in parse(body, content_type, model.columns):
            rows = convert(table, model.columns)
            predictions, probabilities = model.classify(rows)
            records = [
                dict(zip(names, (prediction, *row), strict=True))
                for prediction, row in zip(predictions, probabilities.tolist(), strict=True)
            ]
            answer.append((", " * bool(answer) + json.dumps(records)[1:-1]).encode())
            if recorder:
                scored.append((rows, predictions, probabilities))
                n_rows += len(rows)
                if n_rows > recorder.most_rows:
                    recorder.dropped += 1
                    recorder, scored = None, []
    except MlflowException as error:
        raise HTTPException(400, error.message) from None
    if scored:
        tables, predictions, probabilities = zip(*scored, strict=True)
        rows = pd.concat(tables) if len(tables) > 1 else tables[0]
        predictions = list(chain.from_iterable(predictions))
        recorder.write(request_id, model, rows, predictions, np.concatenate(probabilities))
    return [b'{"predictions": [', *answer, b"]}"]


async def _in_pieces(answer: list[bytes]) -> AsyncIterator[bytes]:
    for piece in answer:
        yield piece


def _is_recorded(request: Request) -> bool:
    given = request.query_params.get("record", "true")
    if given.strip().lower() not in RECORD:
        raise HTTPException(400, f"record must be true or false, not {given[:20]!r}.")
    return RECORD[given.strip().lower()]


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


async def _on_gone_client(request: Request, error: ClientDisconnect) -> Response:
    # Part of a body is no request; nobody reads this answer.
    return Response(status_code=400)


def main() -> None:
    """Run the scoring server in this process until it is ended."""
    options = own_process.argument_parser("helpers.serving.app", main.__doc__).parse_args()
    warnings.simplefilter("ignore")
    # Threads of Python take turns; by default one waits up to 5 ms for its turn, as long as a
    # whole answer takes.
    sys.setswitchinterval(0.0005)
    # What reaches a model was checked by its interface.
    sklearn.set_config(assume_finite=True, skip_parameter_validation=True)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    workspace = open_workspace(options.workspace)
    tracking.connect(workspace, keep=False, close_runs=False)
    models = Models()
    models.refresh()
    application = Application(
        models,
        Recorder(workspace.scored_rows),
        credentials.find_secret(credentials.SCORING_PASSWORD),
        LOCAL_HOSTS if options.host in LOCAL_HOSTS else None,
    )
    # What is there now stays. Without this the garbage collector looks through all of it, the
    # libraries', whenever a long request made many objects, and every other request waits.
    gc.freeze()
    own_process.serve(application.starlette(), options, service(workspace))


if __name__ == "__main__":
    main()
