"""What runs inside the MLflow server's process: MLflow's basic-auth app behind a gate.

The gate decides who gets through and writes the activity log; MLflow's own app does the rest.
It stands in front of MLflow, in the same process, for three reasons. The name under which a
tunnel shows the server is known only after the tunnel is open, and MLflow reads its allowed
hosts once, at the start: the gate reads them at every request. MLflow lets every signed-in user
create experiments and registered models: the gate keeps readers from changing anything. And one
process that imports MLflow starts in half the time of the chain that ``mlflow server`` starts
(the command line, then uvicorn).
"""

import base64
import binascii
import hashlib
import hmac
import logging
import os
import secrets
import sys
import time
import warnings
from collections import deque
from functools import partial
from urllib.parse import quote, urlsplit

import anyio
import requests

from helpers.server import credentials, processes, store, users
from helpers.server.activity import SCORING_PATH, ActivityLog, is_look
from helpers.workspace import open_workspace

HOST = "127.0.0.1"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
REMEMBER = 60  # seconds for which a checked password is not checked again
MOST_DRAINED = 1_000_000  # bytes of a rejected request that are still read
MOST_FORWARDED = 64 * 2**20  # bytes of a request that is passed on to the scoring server
SCORING_TIMEOUT = 120  # seconds for its answer
MOST_WRONG = 20  # wrong passwords of one user from one outside address within a minute
MOST_REMEMBERED = 10_000  # users and addresses whose wrong passwords are counted

# MLflow's assistant can run commands on the server's machine.
NOT_FROM_OUTSIDE = ("/ajax-api/3.0/mlflow/assistant", "/gateway", "/v1/traces", "/v1/metrics")


class RejectedError(Exception):
    """A request that does not get through.

    Parameters
    ----------
    status : int
        Of the answer.
    outcome : str
        For the activity log, see `helpers.server.activity.OUTCOMES`.
    message : str
        What the client is told.
    headers : iterable of (bytes, bytes)
        More headers of the answer.
    """

    def __init__(self, status, outcome, message, headers=()):
        super().__init__(message)
        self.status, self.outcome, self.message = status, outcome, message
        self.headers = list(headers)


def _unauthorized(message):
    challenge = (b"www-authenticate", b'Basic realm="mlflow"')
    return RejectedError(401, "sign-in", message, [challenge])


class RulesFile:
    """The rules, read again whenever their file changes.

    Parameters
    ----------
    path : pathlib.Path
    """

    def __init__(self, path):
        self._path, self._stamp, self._rules = path, None, users.CLOSED

    def __call__(self):
        """Return the `helpers.server.users.AccessRules` of this moment."""
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        except FileNotFoundError:
            stamp = "none"
        if stamp != self._stamp:
            self._rules, self._stamp = users.read_rules(self._path), stamp
        return self._rules


class Passwords:
    """Checks passwords against MLflow's user store, each only once in a while.

    Parameters
    ----------
    store : mlflow.server.auth.sqlalchemy_store.SqlAlchemyStore
    """

    def __init__(self, store):
        self._store, self._known, self._key = store, {}, secrets.token_bytes(32)

    def _digest(self, user, password):
        return hmac.digest(self._key, f"{user}\0{password}".encode(), hashlib.sha256)

    def _check(self, user, password):
        if not self._store.authenticate_user(user, password):
            return None
        return "admin" if self._store.get_user(user).is_admin else "other"

    def knows(self, user, password):
        """Tell whether this password was found right a short while ago."""
        return self._known.get(self._digest(user, password), (0, None))[0] > time.monotonic()

    async def role(self, user, password):
        """Return 'admin' or 'other', or None if the password is wrong."""
        digest = self._digest(user, password)
        role = self._known.get(digest, (0, None))[1]
        if not self.knows(user, password):
            # Hashing a password takes some 50 ms, on purpose.
            role = await anyio.to_thread.run_sync(self._check, user, password)
            if role is not None:
                self._known[digest] = (time.monotonic() + REMEMBER, role)
        return role


class Gate:
    """ASGI middleware in front of MLflow's app.

    Parameters
    ----------
    app : callable
        MLflow's ASGI app, with basic-auth.
    port : int
        Where the server listens.
    rules : callable
        Returns the `helpers.server.users.AccessRules` of this moment.
    passwords : Passwords
    notebooks : bytes
        Authorization header of the notebooks' account, with which requests of this machine
        pass MLflow while no sign-in is asked of them.
    log : helpers.server.activity.ActivityLog
    scoring : callable
        ASGI app for paths below ``/scoring/``.
    """

    def __init__(self, app, port, rules, passwords, notebooks, log, scoring):
        self.app, self.port, self.rules, self.passwords = app, port, rules, passwords
        self.notebooks, self.log, self.scoring = notebooks, log, scoring
        self._wrong = {}

    async def __call__(self, scope, receive, send):
        """Handle one request as ASGI asks for it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = Headers(scope["headers"])
        if scope["path"] == "/health" and self._is_local_name(headers.host):
            await self.app({**scope, "headers": self._inner(headers, None)}, receive, send)
            return
        start, entry = time.perf_counter(), Entry(scope, headers)
        answer = entry.watch(send)
        try:
            inner = await self._admit(scope, headers, entry)
        except RejectedError as rejection:
            entry.outcome = rejection.outcome
            await _drain(receive)
            await _answer(answer, rejection)
        else:
            app = self.scoring if scope["path"].startswith(SCORING_PATH) else self.app
            signed_in = headers.get(b"authorization") is not None
            await app({**scope, "headers": inner, "signed_in": signed_in}, receive, answer)
        finally:
            # A page's scripts and styles, and "are you there?", say nothing about who did what.
            if not (
                scope["path"] == "/health"
                or (scope["path"].startswith("/static-files/") and entry.status < 400)
            ):
                self.log.write(**entry.line(time.perf_counter() - start))

    def _is_local_name(self, host):
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        name, port = (name, port) if name else (host, "")
        return name in LOCAL_HOSTS and port in ("", str(self.port))

    async def _admit(self, scope, headers, entry):
        """Return the headers for MLflow, or raise what speaks against it."""
        rules, method, path = self.rules(), scope["method"], scope["path"]
        local = self._is_local_name(headers.host) or headers.host in rules.private
        if headers.count(b"host") != 1 or not (local or headers.host in rules.public):
            message = "Invalid Host header: this server is not known under that name."
            raise RejectedError(403, "host", message)
        if method not in ("GET", "HEAD", "OPTIONS") and not self._is_own(headers, rules):
            raise RejectedError(403, "origin", "Cross-origin request blocked.")
        # A request that a proxy forwarded was not made on this machine, whatever its host says.
        outside = not local or (headers.forwarded and not rules.private)
        open_to_it = rules.without_password if outside else not rules.sign_in
        authorization = headers.get(b"authorization")
        if authorization is None and not open_to_it:
            raise _unauthorized("Sign in to see this MLflow server.")
        if authorization is None:
            entry.user, authorization = users.LOCAL if not outside else None, self.notebooks
        else:
            await self._check_user(authorization, outside, rules, scope, entry)
        if outside and path.startswith(NOT_FROM_OUTSIDE):
            raise RejectedError(403, "blocked", "Only offered on the server's own machine.")
        return self._inner(headers, authorization)

    async def _check_user(self, authorization, outside, rules, scope, entry):
        user, password = _decoded(authorization)
        entry.user = user[:100]
        wrong = self._recent_mistakes(entry.address, user)
        if outside and len(wrong) >= MOST_WRONG and not self.passwords.knows(user, password):
            message = "Too many wrong passwords. Wait a minute."
            raise RejectedError(429, "too many", message, [(b"retry-after", b"60")])
        role = await self.passwords.role(user, password)
        if role is None:
            wrong.append(time.monotonic())
            raise _unauthorized("Wrong user name or password.")
        reader = role != "admin" and rules.roles.get(user, "reader") == "reader"
        if reader and not is_look(scope["method"], scope["path"]):
            message = f"{user} is a reader here: readers see everything and change nothing."
            raise RejectedError(403, "role", message)

    def _recent_mistakes(self, address, user):
        """Return when this user's password was wrong from this address in the last minute."""
        if len(self._wrong) > MOST_REMEMBERED:
            self._wrong.clear()
        wrong = self._wrong.setdefault((address, user), deque())
        while wrong and wrong[0] < time.monotonic() - 60:
            wrong.popleft()
        return wrong

    def _is_own(self, headers, rules):
        """Tell whether a change comes from no page, or from a page of this server."""
        if headers.get(b"sec-fetch-site") == b"cross-site":
            return False
        origin = headers.get(b"origin")
        if origin is None:
            return True
        host = urlsplit(origin.decode("latin-1")).netloc
        return self._is_local_name(host) or host in (*rules.public, *rules.private)

    def _inner(self, headers, authorization):
        """Name the host that MLflow's own check knows; the gate has checked the real one."""
        kept = [
            (name, value)
            for name, value in headers.raw
            if name not in (b"host", b"origin", b"authorization")
        ]
        kept.append((b"host", f"{HOST}:{self.port}".encode()))
        if authorization is not None:
            kept.append((b"authorization", authorization))
        return kept


class Scoring:
    """ASGI app that passes requests on to the workspace's scoring server.

    So the models can be asked at the public address of the MLflow server, by the same users:
    the free plan of ngrok has a single address.

    Parameters
    ----------
    find : callable
        Returns the address of the scoring server, or None, and its password, or None.
    """

    def __init__(self, find):
        self._find, self._session = find, users.local_session()

    async def __call__(self, scope, receive, send):
        """Handle one request as ASGI asks for it."""
        body, size, more = [], 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            if size <= MOST_FORWARDED:
                body.append(message.get("body", b""))
            more = message.get("more_body", False)
        if size > MOST_FORWARDED:
            await _answer(send, RejectedError(413, "error", "Send fewer rows per request."))
            return
        url, password = self._find()
        if url is None:
            message = "The scoring server does not run: python -m helpers.serving starts it."
            await _answer(send, RejectedError(503, "error", message))
            return
        if password and not scope["signed_in"]:
            await _answer(send, _unauthorized("Sign in to ask the models."))
            return
        try:
            found = await anyio.to_thread.run_sync(self._ask, url, password, scope, b"".join(body))
        except requests.RequestException:
            await _answer(send, RejectedError(502, "error", "The scoring server does not answer."))
            return
        headers = [
            (name.lower().encode(), value.encode("latin-1"))
            for name, value in found.headers.items()
            if name.lower() == "content-type" or name.lower().startswith("x-")
        ]
        headers.append((b"content-length", str(len(found.content)).encode()))
        await send({"type": "http.response.start", "status": found.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": found.content})

    def _ask(self, url, password, scope, body):
        kept = (b"content-type", b"content-encoding")
        query = scope["query_string"].decode("latin-1")
        path = scope["path"].removeprefix(SCORING_PATH.rstrip("/"))
        return self._session.request(
            scope["method"],
            f"{url}{quote(path)}" + (f"?{query}" if query else ""),
            data=body,
            headers={name.decode(): value for name, value in scope["headers"] if name in kept},
            auth=("client", password) if password else None,
            timeout=SCORING_TIMEOUT,
        )


class Headers:
    """The headers of a request.

    Parameters
    ----------
    raw : list of (bytes, bytes)
    """

    def __init__(self, raw):
        self.raw = raw

    def get(self, name):
        """Return the first value of a header, or None."""
        return next((value for key, value in self.raw if key == name), None)

    def count(self, name):
        """Return how often a header is there."""
        return sum(key == name for key, _ in self.raw)

    @property
    def host(self):
        """The name under which the server was asked, in small letters."""
        return (self.get(b"host") or b"").decode("latin-1").lower()

    @property
    def forwarded(self):
        """Whether a proxy says that it passed the request on."""
        return any(
            key in (b"forwarded", b"x-forwarded-for", b"x-forwarded-host") for key, _ in self.raw
        )


class Entry:
    """One line of the activity log in the making.

    Parameters
    ----------
    scope : dict
        Of the ASGI request.
    headers : Headers
    """

    def __init__(self, scope, headers):
        self.user, self.status, self.outcome = None, 500, None
        self.method, self.path = scope["method"], scope["path"][:500]
        self.host = headers.host[:200]
        # The last address is the one that the nearest proxy added; those before it may be lies.
        forwarded = (headers.get(b"x-forwarded-for") or b"").decode("latin-1").split(",")[-1]
        self.address = forwarded.strip()[:60] or (scope.get("client") or ("?",))[0]

    def watch(self, send):
        """Return a `send` that notes the status on its way."""

        async def watched(message):
            if message["type"] == "http.response.start":
                self.status = message["status"]
            await send(message)

        return watched

    def line(self, seconds):
        """Return the fields of the line."""
        return {
            "time": round(time.time(), 3),
            "user": self.user,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration": round(1000 * seconds, 1),
            "address": self.address,
            "host": self.host,
            "outcome": self.outcome or self._mlflow_outcome(),
        }

    def _mlflow_outcome(self):
        known = {401: "sign-in", 403: "role"}
        return known.get(self.status, "ok" if self.status < 400 else "error")


def _decoded(authorization):
    """Read a Basic Authorization header (RFC 7617)."""
    scheme, _, credentials = authorization.partition(b" ")
    try:
        text = base64.b64decode(credentials.strip(), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        text = ""
    if scheme.lower() != b"basic" or ":" not in text:
        raise _unauthorized("Sign in with a user name and a password.")
    user, _, password = text.partition(":")
    return user, password


def basic(user, password):
    """Return a Basic Authorization header (RFC 7617)."""
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


async def _drain(receive):
    """Read what belongs to a rejected request, up to a limit.

    A connection that is closed with unread bytes in it may lose the answer on its way.
    """
    left, more = MOST_DRAINED, True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message.get("more_body", False)


async def _answer(send, rejection):
    body = rejection.message.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"),
        *rejection.headers,
    ]
    await send({"type": "http.response.start", "status": rejection.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --- the process ------------------------------------------------------------------------------


def _configure_mlflow(workspace):
    """Set what ``mlflow server --app-name basic-auth`` sets before it starts its workers."""
    config = workspace.server / "basic_auth.ini"
    users = (workspace.server / "users.db").as_posix()
    config.write_text(
        "[mlflow]\n"
        # Whoever is signed in may change what is there; the gate keeps readers from it.
        "default_permission = EDIT\n"
        f"database_uri = sqlite:///{users}\n"
        f"admin_username = {credentials.ADMIN}\n"
        f"auth_cache_ttl_seconds = {REMEMBER}\n",
        encoding="utf-8",
    )
    os.environ.update(
        MLFLOW_AUTH_CONFIG_PATH=str(config),
        MLFLOW_AUTH_ADMIN_PASSWORD=credentials.password_of(workspace, credentials.ADMIN),
        MLFLOW_FLASK_SERVER_SECRET_KEY=credentials.stored_secret(workspace, "cookie key"),
        # The job workers serve features of language-model evaluation; they only cost time here.
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        MLFLOW_DISABLE_TELEMETRY="true",
        _MLFLOW_SGI_NAME="uvicorn",
    )
    # Settings of the user's own MLflow clients are not meant for this server.
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_SERVER_ALLOWED_HOSTS",
        "MLFLOW_AUTH_ADMIN_USERNAME",
    ):
        os.environ.pop(name, None)


def _keep_password(store, user, password, admin=False):
    """Make an account, or give it today's password."""
    if not store.has_user(user):
        store.create_user(user, password, is_admin=admin)
    elif not store.authenticate_user(user, password):
        store.update_user(user, password=password)


def create_app(workspace, port):
    """Make the app: MLflow with basic-auth on the workspace's store, behind the gate.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    port : int

    Returns
    -------
    Gate
    """
    _configure_mlflow(workspace)
    import mlflow.server as mlflow_server

    store.prepare(workspace.tracking_db)
    store_uri = f"sqlite:///{workspace.tracking_db.as_posix()}"
    os.environ[mlflow_server.BACKEND_STORE_URI_ENV_VAR] = store_uri
    os.environ[mlflow_server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[mlflow_server.ARTIFACTS_DESTINATION_ENV_VAR] = workspace.artifacts.as_uri()
    os.environ[mlflow_server.SERVE_ARTIFACTS_ENV_VAR] = "true"
    mlflow_server.handlers.initialize_backend_stores(store_uri, None, "mlflow-artifacts:/")
    from mlflow.server import auth

    logging.getLogger("mlflow.server.auth").setLevel(logging.ERROR)
    app = auth.create_app()
    password = credentials.password_of(workspace, credentials.NOTEBOOKS)
    _keep_password(auth.store, credentials.NOTEBOOKS, password, admin=True)
    _keep_password(
        auth.store, credentials.ADMIN, os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"], admin=True
    )
    return Gate(
        app,
        port,
        RulesFile(workspace.access_rules),
        Passwords(auth.store),
        basic(credentials.NOTEBOOKS, password),
        ActivityLog(workspace.activity),
        Scoring(partial(_find_scoring, workspace)),
    )


def _find_scoring(workspace):
    """Return address and password of the workspace's scoring server, each None without one."""
    server = processes.read_state(workspace.scoring)
    if server is None:
        return None, None
    url = server.url.replace("0.0.0.0", HOST)
    return url, credentials.find_secret(credentials.SCORING_PASSWORD) or credentials.known_secret(
        workspace, credentials.SCORING
    )


def main(arguments=None):
    """Run the server in this process until it is ended."""
    options = processes.argument_parser("helpers.server.app", main.__doc__).parse_args(arguments)
    warnings.simplefilter("ignore")
    processes.serve(create_app(open_workspace(options.workspace), options.port), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
