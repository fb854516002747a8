"""The gate in front of MLflow's app: who gets through, and a line of the log for each request.

It stands in front of MLflow, in the same process, for two reasons. The name under which a tunnel
shows the server is known only after the tunnel is open, and MLflow reads its allowed hosts once,
at the start: the gate reads them at every request. And MLflow lets every signed-in user create
experiments and registered models: the gate keeps readers from changing anything.
"""

import hashlib
from contextlib import nullcontext, suppress

import anyio
from cachetools import TTLCache
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helpers.server import credentials, http, users
from helpers.server.activity import ActivityLog, is_look, kind_of
from helpers.server.protected import Protected
from helpers.server.scoring_proxy import ScoringProxy
from helpers.server.visits import RejectedError, UnauthorizedError, Visit
from helpers.workspace import Workspace

MOST_DRAINED = 1_000_000  # bytes of a rejected request that are still read
DRAIN_TIMEOUT = 2  # seconds that this may take
MOST_OF_A_READER = 1_000_000  # bytes of a search
MOST_WRONG = 20  # wrong passwords of one user from one outside address, until a minute's pause
MOST_REMEMBERED = 10_000  # users and addresses whose wrong passwords are counted

# MLflow's assistant can run commands on the server's machine.
NOT_FROM_OUTSIDE = ("/ajax-api/3.0/mlflow/assistant", "/gateway", "/v1/traces", "/v1/metrics")
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host")


class Gate:
    """ASGI middleware in front of MLflow's app.

    Parameters
    ----------
    app : callable
        MLflow's ASGI app, with basic-auth.
    accounts : helpers.server.app.Accounts
    port : int
        Where the server listens.
    """

    def __init__(
        self, app: ASGIApp, accounts, protected: Protected, workspace: Workspace, port: int
    ):
        self._app, self._accounts, self._protected = app, accounts, protected
        self._rules = workspace.access_rules
        # What a browser shows; artifacts are handed on as they are, however large.
        text = GZipMiddleware(app, compresslevel=6)
        self._apps = {"page": text, "look": text, "prediction": ScoringProxy(workspace)}
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
            await anyio.to_thread.run_sync(self._protected.check, *change)
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
