"""The ngrok cloud of the stand-in: accounts, sessions of agents, the https edge, a proxy to it.

Everything runs in one asyncio loop in a thread. uvicorn is the edge: it ends TLS and speaks
HTTP/1.1. Its application forwards each request to the endpoint's upstream over a connection of
its own.
"""

import asyncio
import datetime
import html
import json
import re
import secrets
import shlex
import socket
import string
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import h11
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from . import agent as agent_script

HOST = "127.0.0.1"
# Endpoints can have these names, and the reserved domains of accounts are under the last one.
SUFFIXES = (".ngrok-free.app", ".ngrok.app", ".example.com")
COOKIE = "abuse_interstitial"
# Not passed on by a proxy: https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
SET_BY_EDGE = {b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"expect"}

# The wording: https://ngrok.com/docs/errors and what agents logged
MESSAGES = {
    "105": (
        "The authtoken you specified does not look like a proper ngrok authtoken.\n"
        "Your authtoken: {token}\n"
        "Instructions to install your authtoken are on your ngrok dashboard:\n"
        "https://dashboard.ngrok.com/get-started/your-authtoken"
    ),
    "107": (
        "The authtoken you specified is properly formed, but it is invalid.\n"
        "Your authtoken: {token}\n"
        "This usually happens when:\n"
        "    - You reset your authtoken\n"
        "    - Your authtoken was for a team account that you were removed from\n"
        "    - You are using ngrok link and this credential was explicitly revoked\n\n"
        "Go to your ngrok dashboard and double check that your authtoken is correct:\n"
        "https://dashboard.ngrok.com/get-started/your-authtoken"
    ),
    "319": (
        "You must reserve a custom hostname for your account before it can be used to create "
        "endpoints.\n"
        "Failed to create an endpoint with the domain '{domain}'.\n\n"
        "Reserve this name on your dashboard: https://dashboard.ngrok.com/domains/new"
    ),
    "334": (
        "The endpoint '{url}' is already online. Either\n"
        "1. stop your existing endpoint first, or\n"
        "2. start both endpoints with `--pooling-enabled` to load balance between them."
    ),
    "3004": "ngrok gateway error\nThe server returned an invalid or incomplete HTTP response.",
    "3200": "The endpoint {host} is offline.",
    "8012": (
        "Traffic successfully made it to the ngrok agent, but the agent failed to establish a "
        "connection to the upstream web service at {upstream}. The error encountered was:\n\n"
        "{problem}"
    ),
    "6024": (
        "You are about to visit {host}, served by 127.0.0.1. This website is served for free "
        "through ngrok.com. You should only visit this website if you trust whoever sent the link "
        "to you."
    ),
}
WARNING_BUTTON = """<p><button id="visit" onclick="visit()">Visit Site</button></p><script>
function visit() {
  document.cookie = "{cookie}={host}; path=/; max-age=604800; secure; samesite=none";
  location.reload();
}
</script>"""


def explain(code: str, **details: object) -> str:
    """Return an error the way it goes to agents: text, empty line, code."""
    return f"{MESSAGES[code].format(**details)}\r\n\r\nERR_NGROK_{code}\r\n"


def make_token() -> str:
    """Return a new token that looks like ngrok's: 27 and 21 letters and digits."""
    letters = string.ascii_letters + string.digits
    parts = ["".join(secrets.choice(letters) for _ in range(n)) for n in (26, 21)]
    return f"2{parts[0]}_{parts[1]}"


@dataclass(frozen=True)
class Account:
    """An account of ngrok: its token, its reserved domain, and its plan.

    A free one has a warning page for browsers.
    """

    token: str
    domain: str
    free: bool

    @property
    def url(self) -> str:
        return f"https://{self.domain}"


def free_account() -> Account:
    """Return a free account: its endpoints always get its one constant domain."""
    domain = f"quietly-brave-{secrets.token_hex(4)}.ngrok-free.app"
    return Account(make_token(), domain, True)


def paid_account(domain: str) -> Account:
    """Return a paid account: a reserved domain and random ones."""
    return Account(make_token(), domain, False)


@dataclass(frozen=True)
class _Endpoint:
    session: str
    account: Account
    upstream: str


class NgrokCloud:
    """The cloud, with one free account, as a context manager.

    Attributes
    ----------
    account : Account
        The free account.
    ca_file : str
        The certificate that clients have to trust.
    proxy_url : str
        The forward proxy by which clients reach the endpoints.
    """

    def __init__(self):
        self.account = free_account()
        self._accounts = [self.account]
        self._sessions = {}  # number: account
        self._endpoints = {}  # host: endpoint

    @property
    def endpoints(self) -> list[str]:
        """The addresses that are online, as the edge sees it."""
        return [f"https://{host}" for host in list(self._endpoints)]

    def add_account(self, account: Account) -> Account:
        """Make one more account known and return it."""
        self._accounts.append(account)
        return account

    def drop(self, url: str) -> None:
        """Let the edge forget an endpoint, of which its agent learns nothing."""
        del self._endpoints[urlsplit(url).hostname]

    def environment(self) -> dict[str, str]:
        """Return the variables that a child process needs: agents, and clients of endpoints."""
        return {
            agent_script.CLOUD: self._address,
            "REQUESTS_CA_BUNDLE": self.ca_file,
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy"), self.proxy_url),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }

    def machine(self, folder: Path, account: Account | None = None) -> dict[str, str]:
        """Return the variables of a machine with the agent, in `folder`, and a token."""
        token, agent = (account or self.account).token, str(self.install(folder))
        return {**self.environment(), "PYNGROK_NGROK_PATH": agent, "NGROK_AUTHTOKEN": token}

    @staticmethod
    def install(folder: Path) -> Path:
        """Write the executable ``ngrok`` into a folder and return its path.

        A line of shell starts it, because the line that names an interpreter must be short and
        without spaces. It runs as the same process.
        """
        path = Path(folder) / "ngrok"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-IS", str(Path(agent_script.__file__).resolve())]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
        return path

    # --- start and end --------------------------------------------------------------------------

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ngrok-double-")
        self.ca_file = str(_write_certificate(Path(self._folder.name) / "edge.pem"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ngrok", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._folder.cleanup()

    async def _start(self):
        listener = socket.create_server((HOST, 0))
        self._edge_port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._edge,
            ssl_certfile=self.ca_file,
            interface="asgi3",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=600,
        )
        self._edge_server = uvicorn.Server(config)
        self._edge_task = asyncio.create_task(self._edge_server.serve(sockets=[listener]))
        agents = await asyncio.start_server(_until_closed(self._agent), HOST, 0)
        proxy = await asyncio.start_server(_until_closed(self._proxy), HOST, 0)
        self._servers = [agents, proxy]
        self._address = "{}:{}".format(*agents.sockets[0].getsockname())
        self.proxy_url = "http://{}:{}".format(*proxy.sockets[0].getsockname())

    async def _stop(self):
        self._edge_server.should_exit = self._edge_server.force_exit = True
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task(), self._edge_task}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._edge_task, 2)

    # --- agents ---------------------------------------------------------------------------------

    async def _agent(self, reader, writer):
        """Answer an agent: a token opens a session, which lasts as long as its connection."""
        question = json.loads(await reader.readline())
        answer = self._open(question["token"]) if "token" in question else self._bind(**question)
        writer.write(json.dumps(answer).encode() + b"\n")
        session = answer.get("session")
        try:
            await reader.read()
        finally:
            if session:
                del self._sessions[session]
                for host in [h for h, one in self._endpoints.items() if one.session == session]:
                    del self._endpoints[host]

    def _open(self, token: str) -> dict:
        account = next((one for one in self._accounts if one.token == token), None)
        if not re.fullmatch(r"[0-9A-Za-z]{15,}_[0-9A-Za-z]{15,}", token):
            return {"error": explain("105", token=token)}
        if account is None:
            return {"error": explain("107", token=token)}
        number = secrets.token_hex(12)
        self._sessions[number] = account
        return {"session": number}

    def _bind(self, session: str, url: str, upstream: str) -> dict:
        account = self._sessions[session]
        host = url.removeprefix("https://")
        if not host:
            host = account.domain if account.free else f"{secrets.token_hex(6)}.ngrok.app"
        elif host != account.domain:
            return {"error": explain("319", domain=host)}
        if host in self._endpoints:
            return {"error": explain("334", url=f"https://{host}")}
        self._endpoints[host] = _Endpoint(session, account, upstream)
        return {"url": f"https://{host}"}

    # --- the forward proxy ----------------------------------------------------------------------

    async def _proxy(self, reader, writer):
        method, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split(" ", 2)
        host, _, port = target.rpartition(":")
        if method != "CONNECT" or port != "443" or not host.endswith(SUFFIXES):
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            return
        edge_reader, edge_writer = await asyncio.open_connection(HOST, self._edge_port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_carry(reader, edge_writer), _carry(edge_reader, writer))

    # --- the edge -------------------------------------------------------------------------------

    async def _edge(self, scope, receive, send):
        request = Request(scope)
        host = request.headers["host"].lower().removesuffix(":443")
        endpoint = self._endpoints.get(host)
        if endpoint is None:
            page = _page(request, 404, "3200", host=host)
        elif endpoint.account.free and _needs_warning(request, host):
            page = _page(request, 200, "6024", host=host)
        else:
            upstream = urlsplit(endpoint.upstream)
            address = (upstream.hostname, upstream.port)
            try:
                connected = await asyncio.to_thread(socket.create_connection, address)
            except OSError as error:
                page = _page(request, 502, "8012", upstream=endpoint.upstream, problem=error)
            else:
                with connected:
                    await _forward(request, host, endpoint, connected, receive, send)
                return
        async for _ in _body(receive):
            pass
        await page(scope, receive, send)


def _until_closed(handler):
    """Let a handler of connections end without a word when its connection or the cloud ends."""

    async def serve(reader, writer):
        with suppress(asyncio.CancelledError, OSError, EOFError):
            await handler(reader, writer)
        writer.close()

    return serve


async def _body(receive):
    """Iterate over what is left of a request's body."""
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _forward(request, host, endpoint, upstream, receive, send):
    """Pass a request on, and what the upstream answers, piece by piece as it comes."""
    # With asyncio's streams, an answer that came before the request was read could get lost.
    upstream.setblocking(False)
    loop = asyncio.get_running_loop()
    connection = h11.Connection(h11.CLIENT)

    async def write(event):
        with suppress(OSError):
            await loop.sock_sendall(upstream, connection.send(event))

    async def pass_body():
        async for data in _body(receive):
            await write(h11.Data(data))
        await write(h11.EndOfMessage())

    async def next_event():
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await loop.sock_recv(upstream, 1 << 16))
        return event

    async def read_rest():
        # A client that still sends would not get the answer if its connection was closed.
        with suppress(OSError):
            upstream.shutdown(socket.SHUT_RDWR)
        await asyncio.wait([sender])

    await write(_forwarded_head(request, host))
    sender = asyncio.create_task(pass_body())
    try:
        try:
            while isinstance(head := await next_event(), h11.InformationalResponse):
                pass
        except (OSError, h11.RemoteProtocolError):
            await read_rest()
            await _page(request, 502, "3004")(request.scope, receive, send)
            return
        headers = [(name, value) for name, value in head.headers if name not in HOP_BY_HOP]
        headers += [(b"ngrok-agent-ips", HOST.encode())] if endpoint.account.free else []
        await send({"type": "http.response.start", "status": head.status_code, "headers": headers})
        while isinstance(part := await next_event(), h11.Data):
            await send({"type": "http.response.body", "body": bytes(part.data), "more_body": True})
        await read_rest()
        await send({"type": "http.response.body"})
    finally:
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)


def _forwarded_head(request: Request, host: str) -> h11.Request:
    """Return the request's head as the upstream gets it; ``Host`` stays as it is."""
    query = request.scope["query_string"]
    headers = [
        (name, value) for name, value in request.headers.raw if name not in HOP_BY_HOP | SET_BY_EDGE
    ]
    before = request.headers.getlist("x-forwarded-for")
    headers += [
        ("X-Forwarded-For", ", ".join([*before, request.client.host])),
        ("X-Forwarded-Host", host),
        ("X-Forwarded-Proto", "https"),
    ]
    if "transfer-encoding" in request.headers:
        headers.append(("Transfer-Encoding", "chunked"))
    target = request.scope["raw_path"] + (b"?" + query if query else b"")
    return h11.Request(method=request.method, target=target, headers=headers)


async def _carry(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def _needs_warning(request: Request, host: str) -> bool:
    """Tell whether a request gets the warning page: browsers do, whatever they ask for."""
    return (
        request.method in ("GET", "HEAD")
        and "Mozilla" in request.headers.get("user-agent", "")
        and "ngrok-skip-browser-warning" not in request.headers
        and request.cookies.get(COOKIE) != host
    )


def _page(request: Request, status: int, code: str, **details: object) -> Response:
    """Return what ngrok answers itself: a page, or plain text to who does not take HTML."""
    text = explain(code, **details)
    headers = {"Ngrok-Error-Code": f"ERR_NGROK_{code}", "Referrer-Policy": "no-referrer"}
    if not re.search(r"text/html|text/\*|\*/\*", request.headers.get("accept", "*/*")):
        return PlainTextResponse(text, status, headers)
    body = "".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines() if line)
    if code == "6024":
        body += WARNING_BUTTON.replace("{cookie}", COOKIE).replace("{host}", details["host"])
    return HTMLResponse(f"<!DOCTYPE html><title>ngrok</title><body>{body}</body>", status, headers)


def _write_certificate(path: Path) -> Path:
    """Write the edge's key and certificate, which signs itself and which clients have to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ngrok double {path.parent.name}")])
    now = datetime.datetime.now(datetime.timezone.utc)
    hosts = x509.SubjectAlternativeName([x509.DNSName(f"*{suffix}") for suffix in SUFFIXES])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(hosts, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return path
