"""The gate in front of MLflow's app: who gets through, and a line of the log for each request.

It stands in front of MLflow, in the same process, for two reasons. The name under which a tunnel
shows the server is known only after the tunnel is open, and MLflow reads its allowed hosts once,
at the start: the gate reads them at every request. And MLflow lets every signed-in user create
experiments and registered models: the gate keeps readers from changing anything.
"""

import hashlib
import time
from contextlib import nullcontext, suppress
from urllib.parse import quote

import anyio
import requests
from cachetools import TTLCache
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helpers.server import credentials, http, users
from helpers.server.activity import SCORING_PATH, ActivityLog, is_look, kind_of
from helpers.server.processes import ServerError, ServerProcess, read_state
from helpers.server.protected import ForbiddenError, Protected
from helpers.workspace import Workspace

SHORT_ANSWER = 500  # bytes; what is shorter is not compressed
MOST_DRAINED = 1_000_000  # bytes of a rejected request that are still read
DRAIN_TIMEOUT = 2  # seconds that this may take
MOST_OF_A_READER = 1_000_000  # bytes of a search
SCORING_TIMEOUT = 120  # seconds for the scoring server's answer
MOST_WRONG = 20  # wrong passwords of one user from one outside address, until a minute's pause
MOST_REMEMBERED = 10_000  # users and addresses whose wrong passwords are counted

# MLflow's assistant can run commands on the server's machine.
NOT_FROM_OUTSIDE = ("/ajax-api/3.0/mlflow/assistant", "/gateway", "/v1/traces", "/v1/metrics")
# Where Colab shows a frame: in an output of its page, whose host is another one each time.
COLAB_FRAMES = (
    "frame-ancestors 'self' https://colab.research.google.com https://*.googleusercontent.com"
)
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host")


class RejectedError(HTTPException):
    """A request that does not get through; `outcome` is one of `activity.OUTCOMES`."""

    def __init__(self, status: int, outcome: str, message: str, **headers: str):
        super().__init__(status, message, {"x-content-type-options": "nosniff", **headers})
        self.outcome = outcome

    def response(self) -> Response:
        """Return what the client is told."""
        return PlainTextResponse(self.detail, self.status_code, self.headers)


class UnauthorizedError(RejectedError):
    """A request without the sign-in that it needs."""

    def __init__(self, message: str):
        super().__init__(401, "sign-in", message, **{"www-authenticate": 'Basic realm="mlflow"'})


class Visit:
    """A request at the gate, and what becomes of it: one line of the activity log."""

    in_colab = False  # whether it came by Colab's port proxy, or may have come by it

    def __init__(self, scope: Scope):
        self.start = time.perf_counter()
        self.method, self.path = scope["method"], scope["path"]
        self.headers = Headers(scope=scope)
        self.host = self.headers.get("host", "").lower()
        # The last address is the one that the nearest proxy added; those before it may be lies.
        forwarded = ",".join(self.headers.getlist("x-forwarded-for")).split(",")[-1]
        self.address = forwarded.strip()[:60] or (scope.get("client") or ("?",))[0]
        self.user, self.status, self.outcome = None, 500, None
        self.signed_in = self.is_reader = self.is_admin = self.is_read = False

    def listen(self, receive: Receive) -> Receive:
        """Return a `receive` that notes when all of the request was read."""

        async def noted() -> Message:
            message = await receive()
            self.is_read = not message.get("more_body", False)
            return message

        return noted

    def watch(self, send: Send) -> Send:
        """Return a `send` that notes the status on its way, and says who may frame the page."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                if self.in_colab:
                    # Browsers then pay no heed to MLflow's own X-Frame-Options, SAMEORIGIN.
                    MutableHeaders(scope=message)["content-security-policy"] = COLAB_FRAMES
            await send(message)

        return watched

    @property
    def is_telling(self) -> bool:
        """Whether it says who did what; a page's scripts and "are you there?" do not."""
        is_script = self.path.startswith("/static-files/") and self.status < 400
        return self.path != "/health" and not is_script

    def line(self) -> dict:
        """Return the fields of the line."""
        # 404 is an answer like any other: notebooks ask whether a version is there.
        of_mlflow = {401: "sign-in", 403: "role", 404: "ok"}.get(
            self.status, "ok" if self.status < 400 else "error"
        )
        return {
            "time": round(time.time(), 3),
            "user": self.user,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration": round(1000 * (time.perf_counter() - self.start), 1),
            "address": self.address,
            "host": self.host,
            "outcome": self.outcome or of_mlflow,
        }


class Gate:
    """ASGI middleware in front of MLflow's app.

    Parameters
    ----------
    app : callable
        MLflow's ASGI app, with basic-auth.
    accounts : helpers.server.app.Accounts
    protected : helpers.server.protected.Protected
    workspace : helpers.workspace.Workspace
    port : int
        Where the server listens.
    """

    def __init__(
        self, app: ASGIApp, accounts, protected: Protected, workspace: Workspace, port: int
    ):
        self._app, self._accounts, self._protected = app, accounts, protected
        self._rules = workspace.access_rules
        # What a browser shows; artifacts are handed on as they are, however large.
        text = GZipMiddleware(_join_short_answers(app), SHORT_ANSWER, compresslevel=6)
        self._apps = {"page": text, "look": text, "prediction": Scoring(workspace)}
        self._log = ActivityLog(workspace.activity)
        # Requests of this machine pass MLflow with it while no sign-in is asked of them.
        password = credentials.stored_secret(workspace, credentials.NOTEBOOKS)
        self._notebooks = http.basic_header(credentials.NOTEBOOKS, password)
        self._address = f"{http.HOST}:{port}"
        self._local = {name for host in http.LOCAL_HOSTS for name in (host, f"{host}:{port}")}
        # Wrong passwords by address and user, forgotten a minute after the last one.
        self._wrong = TTLCache(MOST_REMEMBERED, ttl=60)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request as ASGI asks for it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            self._log.flush()
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        visit = Visit(scope)
        if visit.path == "/health" and visit.host in self._local:
            await self._app(self._inner(scope, None), receive, send)
            return
        receive, answer = visit.listen(receive), visit.watch(send)
        try:
            authorization = await self._admit(visit)
            kind = kind_of(visit.method, visit.path)
            received = await self._check(visit, kind, Request(scope, receive))
        except ClientDisconnect:
            visit.outcome = "error"
        except RejectedError as rejection:
            visit.outcome = rejection.outcome
            if not visit.is_read:
                await _drain(Request(scope, receive))
            await rejection.response()(scope, receive, answer)
        else:
            app = self._apps.get(kind, self._app)
            looks = is_look(visit.method, visit.path) and not visit.is_admin
            with self._protected.looking() if looks else nullcontext():
                await app(self._inner(scope, authorization), received, answer)
        finally:
            if visit.is_telling:
                self._log.write(visit.signed_in, **visit.line())

    async def _check(self, visit: Visit, kind: str, request: Request) -> Receive:
        """Let a request through as it came, or raise what it must not do.

        Files are handed on while they arrive; all else is read first, up to a limit.
        """
        body, receive = b"", request.receive
        if kind not in ("artifact", "prediction"):
            body = await http.read_body(
                request, MOST_OF_A_READER if visit.is_reader else http.MOST_BYTES
            )
            if body is None:
                raise RejectedError(413, "error", "Send less in one request.")
            receive = _again(body, request.receive)
        if not is_look(visit.method, visit.path):
            query = request.scope["query_string"].decode("latin-1")
            change = (visit.method, visit.path, query, body, visit.is_admin)
            try:
                await anyio.to_thread.run_sync(self._protected.check, *change)
            except ForbiddenError as error:
                outcome = "role" if error.status == 403 else "error"
                raise RejectedError(error.status, outcome, str(error)) from None
        return receive

    async def _admit(self, visit: Visit) -> str:
        """Return the Authorization header for MLflow, or raise what speaks against the request."""
        rules, headers = users.read_rules(self._rules), visit.headers
        local = visit.host in self._local or visit.host in rules.private
        if len(headers.getlist("host")) != 1 or not (local or visit.host in rules.public):
            message = "Invalid Host header: this server is not known under that name."
            raise RejectedError(403, "host", message)
        if visit.method not in ("GET", "HEAD", "OPTIONS") and not self._is_own(headers, rules):
            raise RejectedError(403, "origin", "Cross-origin request blocked.")
        # A request that a proxy forwarded was not made on this machine, whatever its host says.
        forwarded = any(name in headers for name in FORWARDED)
        outside = not local or (forwarded and not rules.private)
        visit.in_colab = not outside and bool(rules.private)
        authorization = headers.get("authorization")
        if authorization is not None:
            await self._sign_in(visit, outside, rules)
        elif rules.without_password if outside else not rules.sign_in:
            visit.user, authorization = None if outside else users.LOCAL, self._notebooks
            visit.signed_in, visit.is_admin = not outside, True
        else:
            raise UnauthorizedError("Sign in to see this MLflow server.")
        if outside and visit.path.startswith(NOT_FROM_OUTSIDE):
            raise RejectedError(403, "blocked", "Only offered on the server's own machine.")
        return authorization

    def _is_own(self, headers: Headers, rules: users.AccessRules) -> bool:
        """Tell whether a change comes from no page, or from a page of this server."""
        if "cross-site" in headers.get("sec-fetch-site", "").lower():
            return False
        own = (*self._local, *rules.public, *rules.private)
        origins = headers.getlist("origin")
        return all(origin.lower().partition("://")[2] in own for origin in origins)

    async def _sign_in(self, visit: Visit, outside: bool, rules: users.AccessRules) -> None:
        given = http.basic_credentials(visit.headers["authorization"])
        if given is None:
            raise UnauthorizedError("Sign in with a user name and a password.")
        user, _ = given
        visit.user = user
        # As long as a name may be, what is kept of it is short.
        key = hashlib.blake2b(f"{visit.address} {user}".encode(), digest_size=16).digest()
        tried = self._wrong.get(key, 0) >= MOST_WRONG
        if outside and tried and not self._accounts.remembers(*given):
            message = "Too many wrong passwords. Wait a minute."
            raise RejectedError(429, "too many", message, **{"retry-after": "60"})
        account = await anyio.to_thread.run_sync(self._accounts.authenticate, *given)
        if account is None:
            self._wrong[key] = self._wrong.get(key, 0) + 1
            raise UnauthorizedError("Wrong user name or password.")
        visit.signed_in, visit.is_admin = True, account.is_admin
        visit.is_reader = not account.is_admin and rules.roles.get(user, "reader") == "reader"
        if visit.is_reader and not is_look(visit.method, visit.path):
            message = f"{user} is a reader here: readers see everything and change nothing."
            raise RejectedError(403, "role", message)

    def _inner(self, scope: Scope, authorization: str | None) -> Scope:
        """Name the host that MLflow's own check knows; the gate has checked the real one."""
        headers = MutableHeaders(raw=list(scope["headers"]))
        signed_in = "authorization" in headers
        del headers["origin"], headers["authorization"]
        headers["host"] = self._address
        if authorization is not None:
            headers["authorization"] = authorization
        return {**scope, "headers": headers.raw, "signed_in": signed_in}


def _join_short_answers(app: ASGIApp) -> ASGIApp:
    """Let an app send a short answer as one message, which says to `GZipMiddleware` how short.

    Flask's answers come in parts, and those of an unknown length are compressed.
    """

    async def joining(scope: Scope, receive: Receive, send: Send) -> None:
        short, body = False, b""

        async def join(message: Message) -> None:
            nonlocal short, body
            if message["type"] == "http.response.start":
                length = Headers(raw=message["headers"]).get("content-length", SHORT_ANSWER)
                short = int(length) < SHORT_ANSWER
            elif short:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                message = {**message, "body": body}
            await send(message)

        await app(scope, receive, join)

    return joining


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, then what comes after it."""
    messages = [{"type": "http.request", "body": body}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


async def _drain(request: Request) -> None:
    """Read what belongs to a rejected request, up to a limit.

    A connection that is closed with unread bytes in it may lose the answer on its way.
    """
    left = MOST_DRAINED
    with suppress(ClientDisconnect), anyio.move_on_after(DRAIN_TIMEOUT):
        async for part in request.stream():
            left -= len(part)
            if left <= 0:
                return


class Scoring:
    """ASGI app that passes requests on to the workspace's scoring server.

    So the models can be asked at the public address of the MLflow server, by the same users:
    the free plan of ngrok has a single address.
    """

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
            timeout=SCORING_TIMEOUT,
        )
