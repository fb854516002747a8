"""The scoring server at the address of the MLflow server, for the same users.

So the models can be asked at the public address: the free plan of ngrok has a single one.
"""

from contextlib import suppress
from urllib.parse import quote

import anyio
import requests
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helpers.server import credentials, http
from helpers.server.activity import SCORING_PATH
from helpers.server.processes import ServerError, ServerProcess, read_state
from helpers.server.visits import RejectedError, UnauthorizedError
from helpers.workspace import Workspace

TIMEOUT = 120  # seconds for the scoring server's answer


class ScoringProxy:
    """ASGI app that passes requests on to the workspace's scoring server."""

    def __init__(self, workspace: Workspace):
        self._workspace, self._session = workspace, http.local_session()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request as ASGI asks for it."""
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except RejectedError as rejection:
            response = rejection.response()
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        body = await http.read_body(request)
        if body is None:
            raise RejectedError(413, "error", "Send fewer rows per request.")
        process = None
        with suppress(ServerError):
            process = read_state(self._workspace.scoring)
        if process is None:
            message = "The scoring server does not run: python -m helpers.serving starts it."
            raise RejectedError(503, "error", message)
        stored = credentials.stored_secrets(self._workspace).get(credentials.SCORING)
        password = credentials.find_secret(credentials.SCORING_PASSWORD) or stored
        if password and not request.scope["signed_in"]:
            raise UnauthorizedError("Sign in to ask the models.")
        try:
            found = await anyio.to_thread.run_sync(self._ask, process, password, request, body)
        except requests.RequestException:
            raise RejectedError(502, "error", "The scoring server does not answer.") from None
        headers = {
            name: value
            for name, value in found.headers.items()
            if name.lower() == "content-type" or name.lower().startswith("x-")
        }
        return Response(found.content, found.status_code, headers)

    def _ask(
        self, process: ServerProcess, password: str | None, request: Request, body: bytes
    ) -> requests.Response:
        kept = ("content-type", "content-encoding")
        query = request.scope["query_string"].decode("latin-1")
        path = request.scope["path"].removeprefix(SCORING_PATH.rstrip("/"))
        return self._session.request(
            request.method,
            f"{process.url.replace('0.0.0.0', http.HOST)}{quote(path)}",
            params=query,
            data=body,
            headers={name: value for name, value in request.headers.items() if name in kept},
            auth=("client", password) if password else None,
            timeout=TIMEOUT,
        )
