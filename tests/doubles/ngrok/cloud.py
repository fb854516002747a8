"""The ngrok cloud of the stand-in: accounts, sessions of agents, the https edge, a proxy to it.

Everything runs in one asyncio loop in a thread. The edge ends TLS and speaks HTTP/1.1; each
request travels through a stream of its own: the edge asks the agent to open one, the agent dials
its upstream and connects back (see `agent`).
"""

import asyncio
import base64
import datetime
import hashlib
import html
import itertools
import json
import os
import re
import secrets
import shlex
import ssl
import string
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from . import agent as agent_script

HOST = "127.0.0.1"
SUFFIXES = (".ngrok-free.app", ".ngrok-free.dev", ".ngrok.app", ".ngrok.dev")
SKIP_WARNING = "ngrok-skip-browser-warning"
COOKIE = "abuse_interstitial"
# Not passed on by a proxy: https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1
HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
LIMIT = 256 * 1024  # of the head of a request or a response
LOST = (OSError, EOFError, asyncio.LimitOverrunError, ssl.SSLError, ValueError)

# The wording: https://ngrok.com/docs/errors and what agents logged
MESSAGES = {
    "4018": (
        "Usage of ngrok requires a verified account and authtoken.\n\n"
        "Sign up for an account: https://dashboard.ngrok.com/signup\n"
        "Install your authtoken: https://dashboard.ngrok.com/get-started/your-authtoken"
    ),
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
    "108": (
        "Your account is limited to {limit} simultaneous ngrok agent sessions.\n"
        "Run multiple endpoints at the same time from a single agent by defining them in your "
        "agent configuration file and running `ngrok start --all`.\n"
        "Read more about the agent configuration file: https://ngrok.com/docs/agent/config/ \n"
        "You can view your current agent sessions in the dashboard: "
        "https://dashboard.ngrok.com/agents. Upgrade to a paid plan to remove this limit:\n"
        "https://dashboard.ngrok.com/billing/choose-a-plan"
    ),
    "314": (
        "Only Personal, Pro, Enterprise, and Pay-as-you-go plans may bind custom hostnames.\n"
        "Failed to bind the custom hostname '{domain}' for the account '{account}'.\n"
        "This account is on the 'Free' plan.\n\n"
        "Upgrade to a paid plan at: https://dashboard.ngrok.com/billing/choose-a-plan"
    ),
    "319": (
        "You must reserve a custom hostname for your account before it can be used to create "
        "endpoints.\n"
        "Failed to create an endpoint with the domain '{domain}' for the account '{account}'.\n\n"
        "Reserve this name on your dashboard: https://dashboard.ngrok.com/domains/new"
    ),
    "320": (
        "This domain is reserved for another account.\n"
        "Failed to create an endpoint with the domain '{domain}' for the account '{account}'.\n\n"
        "If you have reserved this name, make sure that you are using an\n"
        "authtoken credential for the appropriate account.\n\n"
        "Reserve a name on your dashboard: https://dashboard.ngrok.com/domains/new"
    ),
    "326": (
        "Invalid character '{character}' in domain name. Valid domains may contain only a-z, A-Z, "
        "0-9, . * and - characters. Failed to create an endpoint with the domain '{domain}'."
    ),
    "332": "{protocol} is not a supported tunnel protocol",
    "334": (
        "The endpoint '{url}' is already online. Either\n"
        "1. stop your existing endpoint first, or\n"
        "2. start both endpoints with `--pooling-enabled` to load balance between them."
    ),
    "3004": "ngrok gateway error\nThe server returned an invalid or incomplete HTTP response.",
    "3200": "The endpoint {host} is offline.",
    "8012": (
        "Traffic was successfully tunneled to the ngrok agent, but the agent failed to establish "
        "a connection to the upstream web service at {upstream}. The error encountered was:\n\n"
        "{problem}"
    ),
}
WARNING = (
    "You are about to visit {host}, served by {address}. This website is served for free through "
    "ngrok.com. You should only visit this website if you trust whoever sent the link to you."
)
WARNING_BUTTON = """<p><button id="visit" onclick="visit()">Visit Site</button></p><script>
function visit() {
  document.cookie = "{cookie}={host}; path=/; max-age=604800; secure; samesite=none";
  location.reload();
}
</script>"""


def explain(code, **details):
    """Return an error the way it goes to agents: text, empty line, code."""
    text = MESSAGES[code].format(**details)
    return f"{text}\r\n\r\nERR_NGROK_{code}\r\n"


def make_token():
    """Return a new token that looks like ngrok's: 27 and 21 letters and digits."""
    letters = string.ascii_letters + string.digits
    parts = ["".join(secrets.choice(letters) for _ in range(n)) for n in (26, 21)]
    return f"2{parts[0]}_{parts[1]}"


@dataclass(frozen=True)
class Account:
    """An account of ngrok: its token, what it may call its own, how many agents may run."""

    name: str
    token: str
    domains: tuple
    free: bool = True
    max_sessions: int | None = 1

    @property
    def url(self):
        """The address of its first domain, which a free account always gets."""
        return f"https://{self.domains[0]}" if self.domains else None


def free_account(domain=None, *, max_sessions=1):
    """Return a free account: one constant domain, one agent, a warning page for browsers."""
    domain = domain or f"quietly-brave-{secrets.token_hex(4)}.ngrok-free.app"
    return Account(f"free-{secrets.token_hex(3)}", make_token(), (domain,), True, max_sessions)


def paid_account(*domains):
    """Return a paid account: its reserved domains, random ones, any number of agents."""
    return Account(f"paid-{secrets.token_hex(3)}", make_token(), domains, False, None)


@dataclass(frozen=True)
class Request:
    """A request that the edge answered, ``error`` where ngrok did so itself (``"3200"``, …)."""

    method: str
    host: str
    path: str
    status: int
    user_agent: str
    error: str | None = None


@dataclass(eq=False)
class _Session:
    """The session of one agent."""

    account: Account
    writer: asyncio.StreamWriter
    streams: dict = field(default_factory=dict)

    def send(self, message):
        self.writer.write(json.dumps(message).encode() + b"\n")


class NgrokCloud:
    """The cloud, as a context manager.

    Parameters
    ----------
    accounts : iterable of Account, optional
        By default one free account, which is then ``account``.

    Attributes
    ----------
    account : Account
        The first account.
    ca_file : str
        The certificate that clients have to trust.
    edge_spki : str
        What chromium's ``--ignore-certificate-errors-spki-list`` takes instead.
    proxy_url : str
        The forward proxy by which clients reach the endpoints.
    address : str
        Where agents connect (``NGROK_DOUBLE_CLOUD``).
    """

    def __init__(self, accounts=None):
        self.accounts = list(accounts) if accounts is not None else [free_account()]
        self._requests = []
        self._refused = []
        self._endpoints = {}  # host: session
        self._granted = {}  # random host: account
        self._sessions = []
        self._writers = set()
        self._closed_until = 0.0

    @property
    def account(self):
        return self.accounts[0]

    @property
    def endpoints(self):
        """The addresses that are online, as the edge sees it."""
        return [f"https://{host}" for host in list(self._endpoints)]

    @property
    def sessions(self):
        """The number of agents that are connected."""
        return len(self._sessions)

    @property
    def requests(self):
        """What the edge answered until now, oldest first."""
        return list(self._requests)

    @property
    def refused(self):
        """What the proxy was asked for that is no endpoint, like ``example.com:443``."""
        return list(self._refused)

    def add_account(self, account):
        """Make one more account known and return it."""
        self.accounts.append(account)
        self._call(self._certify)
        return account

    def drop(self, url):
        """Let the edge forget an endpoint, of which its agent learns nothing."""
        self._call(self._endpoints.pop, url.removeprefix("https://").rstrip("/"))

    def disconnect_agents(self, outage=0.0):
        """Cut all sessions and let none in again for some seconds; the agents try to."""

        def cut():
            self._closed_until = time.monotonic() + outage
            for session in list(self._sessions):
                self._forget(session)
                session.writer.transport.abort()

        self._call(cut)

    def environment(self):
        """Return the variables that a child process needs: agents, and clients of endpoints."""
        return {
            agent_script.CLOUD: self.address,
            "REQUESTS_CA_BUNDLE": self.ca_file,
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy"), self.proxy_url),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }

    @staticmethod
    def install(folder):
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
        self.ca_file = str(Path(self._folder.name) / "ca.pem")
        self._authority = _Authority(self.ca_file)
        self.edge_spki = self._authority.spki
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certify()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ngrok", daemon=True)
        self._thread.start()
        agents, edge, proxy = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.address = f"{HOST}:{agents}"
        self._edge_port = edge
        self.proxy_url = f"http://{HOST}:{proxy}"
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._folder.cleanup()

    def _call(self, function, *arguments):
        """Run a function in the loop's thread, so that nothing needs a lock."""

        async def run():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def _certify(self):
        names = [f"*{suffix}" for suffix in SUFFIXES]
        own = {d for one in self.accounts for d in one.domains if not d.endswith(SUFFIXES)}
        chain = Path(self._folder.name) / "edge.pem"
        self._authority.issue([*names, *sorted(own)], chain)
        self._tls.load_cert_chain(chain)

    async def _listen(self):
        self._servers = []
        for handler, tls in ((self._agent, None), (self._edge, self._tls), (self._proxy, None)):
            serve = self._guarded(handler)
            server = await asyncio.start_server(serve, HOST, 0, ssl=tls, limit=LIMIT, backlog=256)
            self._servers.append(server)
        return [server.sockets[0].getsockname()[1] for server in self._servers]

    def _guarded(self, handler):
        async def serve(reader, writer):
            self._writers.add(writer)
            try:
                keep_open = await handler(reader, writer)
            except LOST:
                keep_open = False
            if not keep_open:
                self._end(writer)

        return serve

    def _end(self, writer):
        self._writers.discard(writer)
        with suppress(*LOST):
            writer.close()

    async def _close(self):
        for server in self._servers:
            server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    # --- agents ---------------------------------------------------------------------------------

    async def _agent(self, reader, writer):
        line = await reader.readline()
        if not line or time.monotonic() < self._closed_until:
            return False
        first = json.loads(line)
        if first["type"] == "stream":
            for session in self._sessions:
                waiting = session.streams.pop(first["stream"], None)
                if waiting and not waiting.done():
                    waiting.set_result((reader, writer, first))
                    return True
            return False
        token = first["token"]
        account = next((one for one in self.accounts if one.token == token), None)
        running = sum(session.account == account for session in self._sessions)
        code = None
        if not token:
            code = "4018"
        elif not re.fullmatch(r"[0-9A-Za-z]{15,}_[0-9A-Za-z]{15,}", token):
            code = "105"
        elif account is None:
            code = "107"
        elif account.max_sessions is not None and running >= account.max_sessions:
            code = "108"
        if code:
            error = explain(code, token=token, limit=account and account.max_sessions)
            writer.write(json.dumps({"error": error}).encode() + b"\n")
            await writer.drain()
            return False
        session = _Session(account, writer)
        self._sessions.append(session)
        try:
            session.send({"session": f"ts_{secrets.token_hex(12)}"})
            while line := await reader.readline():
                message = json.loads(line)
                host = message["url"].removeprefix("https://").rstrip("/").lower()
                if message["type"] == "bind":
                    answer = self._bind(session, host)
                else:
                    answer = {}
                    if self._endpoints.get(host) is session:
                        del self._endpoints[host]
                session.send({"type": "done", "id": message["id"], **answer})
        finally:
            self._forget(session)
        return False

    def _forget(self, session):
        """Free a session and take its endpoints offline."""
        if session in self._sessions:
            self._sessions.remove(session)
        for host in [host for host, one in self._endpoints.items() if one is session]:
            del self._endpoints[host]
        for waiting in session.streams.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError("session closed"))

    def _bind(self, session, host):
        account = session.account
        if not host and account.free:
            host = account.domains[0]
        elif not host:
            host = f"{secrets.token_hex(6)}.ngrok.app"
            self._granted[host] = account
        details = {"domain": host, "account": account.name}
        owner = next((one for one in self.accounts if host in one.domains), self._granted.get(host))
        code = None
        if "://" in host:
            code, details = "332", {"protocol": host.partition("://")[0]}
        elif wrong := re.search(r"[^a-z0-9.*-]", host):
            code, details = "326", {**details, "character": wrong.group()}
        elif owner not in (account, None):
            code = "320"
        elif owner is None:
            code = "314" if account.free and not host.endswith(SUFFIXES) else "319"
        elif host in self._endpoints:
            code, details = "334", {"url": f"https://{host}"}
        if code:
            return {"error": explain(code, **details)}
        self._endpoints[host] = session
        return {"url": f"https://{host}"}

    async def _open(self, session, host, client):
        """Ask an agent for a stream to the upstream of an endpoint."""
        number = secrets.token_hex(8)
        waiting = session.streams[number] = self._loop.create_future()
        session.send({"type": "open", "stream": number, "url": f"https://{host}", "client": client})
        try:
            return await asyncio.wait_for(waiting, 30)
        finally:
            session.streams.pop(number, None)

    # --- the forward proxy ----------------------------------------------------------------------

    async def _proxy(self, reader, writer):
        head = await _read_head(reader)
        if head is None:
            return False
        method, target = head.first
        host, _, port = target.rpartition(":")
        known = {d for one in self.accounts for d in one.domains}
        if method != "CONNECT" or port != "443" or not (host in known or host.endswith(SUFFIXES)):
            self._refused.append(target)
            writer.write(
                b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            await writer.drain()
            return False
        edge_reader, edge_writer = await asyncio.open_connection(HOST, self._edge_port)
        self._writers.add(edge_writer)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            await asyncio.gather(_carry(reader, edge_writer), _carry(edge_reader, writer))
        finally:
            self._end(edge_writer)
        return False

    # --- the edge -------------------------------------------------------------------------------

    async def _edge(self, reader, writer):
        while head := await _read_head(reader):
            method, path = head.first
            host = re.sub(r":\d+$", "", head.get("host") or "").lower()
            body = _Body(head, reader)
            if "100-continue" in (head.get("expect") or "").lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            record = (method, host, path)
            exchange = _Exchange(record, head, body, writer)
            session = self._endpoints.get(host)
            if session is None:
                await self._answer(exchange, 404, "3200", explain("3200", host=host))
            elif session.account.free and _needs_warning(method, head, host):
                text = WARNING.format(host=host, address=HOST) + "\r\n\r\nERR_NGROK_6024\r\n"
                await self._answer(exchange, 200, "6024", text)
            else:
                await self._forward(exchange, session, host)
            if not exchange.keep:
                break
        return False

    def _record(self, exchange, status, error=None):
        agent = exchange.head.get("user-agent") or ""
        self._requests.append(Request(*exchange.record, status, agent, error))

    async def _answer(self, exchange, status, code, text, read_body=True):
        """Answer in ngrok's own name: a page, or plain text to who does not take HTML."""
        if read_body:
            async for _ in exchange.body:
                pass
        self._record(exchange, status, code)
        accept = exchange.head.get("accept") or "*/*"
        kind = "text/html" if re.search(r"text/html|text/\*|\*/\*", accept) else "text/plain"
        if kind == "text/html":
            text = _page(text, exchange.record[1] if code == "6024" else None)
        data = text.encode()
        names = {404: "Not Found", 200: "OK", 502: "Bad Gateway"}
        lines = [
            f"HTTP/1.1 {status} {names[status]}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(data)}",
            f"Ngrok-Error-Code: ERR_NGROK_{code}",
            "Referrer-Policy: no-referrer",
            *([] if exchange.keep else ["Connection: close"]),
        ]
        data = b"" if exchange.record[0] == "HEAD" else data
        exchange.writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + data)
        await exchange.writer.drain()

    async def _forward(self, exchange, session, host):
        peer = exchange.writer.get_extra_info("peername")
        try:
            reader, writer, first = await self._open(session, host, f"{peer[0]}:{peer[1]}")
        except (asyncio.TimeoutError, OSError):
            await self._answer(exchange, 404, "3200", explain("3200", host=host))
            return
        sender = None
        try:
            if first["problem"]:
                text = explain("8012", upstream=first["upstream"], problem=first["problem"])
                await self._answer(exchange, 502, "8012", text)
                return
            writer.write(_forwarded_head(exchange, peer[0], host))
            sender = asyncio.ensure_future(exchange.body.send(writer))
            try:
                head = await _read_head(reader)
                while head is not None and head.status < 200:
                    head = await _read_head(reader)
            except LOST:
                head = None
            if head is None:
                exchange.keep = False
                await self._answer(exchange, 502, "3004", explain("3004"), read_body=False)
            else:
                self._record(exchange, head.status)
                await _respond(exchange, head, reader, session.account.free)
            if not sender.done() or sender.exception():
                # Answered before the request was read: a client that still sends would not get
                # the answer if its connection was closed at once.
                exchange.keep = False
                sender.cancel()
                await asyncio.wait([sender])
                await exchange.body.discard()
        except LOST:
            # The client learns from an aborted connection that the answer is incomplete.
            exchange.keep = False
            exchange.writer.transport.abort()
        finally:
            if sender:
                sender.cancel()
            self._end(writer)


# --- HTTP/1.1 -----------------------------------------------------------------------------------


class _Head:
    """The first line and the fields of a request or a response."""

    def __init__(self, data):
        lines = data.decode("latin-1").split("\r\n")
        self.line = lines[0]
        self.fields = []
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if colon:
                self.fields.append((name.strip(), value.strip()))
        if self.line.startswith("HTTP/"):
            self.version, status, self.reason = (self.line.split(" ", 2) + [""])[:3]
            self.status = int(status)
        else:
            method, target, self.version = self.line.split(" ")
            self.first = (method, target)

    def get(self, name):
        values = [value for key, value in self.fields if key.lower() == name]
        return ", ".join(values) if values else None

    @property
    def persistent(self):
        return self.version == "HTTP/1.1" and "close" not in (self.get("connection") or "").lower()

    @property
    def chunked(self):
        return "chunked" in (self.get("transfer-encoding") or "").lower()

    def end_to_end(self, without=()):
        """Return the fields that a proxy passes on."""
        named = {one.strip().lower() for one in (self.get("connection") or "").split(",")}
        drop = HOP_BY_HOP | named | set(without)
        return [(name, value) for name, value in self.fields if name.lower() not in drop]


async def _read_head(reader):
    """Read the head of a message; None at the end of the connection."""
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise
        return None
    return _Head(data.lstrip(b"\r\n")[:-4])


class _Body:
    """A body as an asynchronous iterator of its data, however it is framed."""

    def __init__(self, head, reader, to_the_end=False):
        self.reader = reader
        self.chunked = head.chunked
        length = head.get("content-length")
        self.length = None if self.chunked or length is None else int(length)
        if self.length is None and not self.chunked and not to_the_end:
            self.length = 0

    async def __aiter__(self):
        if self.chunked:
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                while size:
                    data = await self._some(size)
                    size -= len(data)
                    yield data
                await self.reader.readline()
            while (await self.reader.readline()).strip():
                pass  # trailers
        elif self.length is None:
            while data := await self.reader.read(1 << 16):
                yield data
        else:
            while self.length:
                data = await self._some(self.length)
                self.length -= len(data)
                yield data

    async def _some(self, size):
        data = await self.reader.read(min(size, 1 << 16))
        if not data:
            raise EOFError("the connection ended within a body")
        return data

    async def discard(self):
        """Read what still comes of a body that nobody wants."""
        with suppress(asyncio.TimeoutError, *LOST):
            while await asyncio.wait_for(self.reader.read(1 << 16), 0.5):
                pass

    async def send(self, writer, chunked=None):
        """Write the body to the other side, in chunks where it came or has to go in chunks."""
        chunked = self.chunked if chunked is None else chunked
        async for data in self:
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()


class _Exchange:
    """A request that is being answered."""

    def __init__(self, record, head, body, writer):
        self.record = record
        self.head = head
        self.body = body
        self.writer = writer
        self.keep = head.persistent


def _write_head(line, fields):
    lines = [line, *(f"{name}: {value}" for name, value in fields), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _forwarded_head(exchange, client, host):
    """Return the request's head as the upstream gets it; ``Host`` stays as it is."""
    head = exchange.head
    before = head.get("x-forwarded-for")
    own = ("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "expect")
    fields = head.end_to_end(without=own) + [
        ("X-Forwarded-For", f"{before}, {client}" if before else client),
        ("X-Forwarded-Host", host),
        ("X-Forwarded-Proto", "https"),
    ]
    fields += [("Transfer-Encoding", "chunked")] if head.chunked else []
    return _write_head("{} {} HTTP/1.1".format(*head.first), fields)


async def _respond(exchange, head, reader, free):
    """Pass an upstream's response on to the client, piece by piece as it comes."""
    empty = exchange.record[0] == "HEAD" or head.status in (204, 304)
    body = _Body(head, reader, to_the_end=True)
    fields = head.end_to_end()
    chunked = False
    if not empty and body.length is None:
        chunked = exchange.head.version == "HTTP/1.1"
        exchange.keep = exchange.keep and chunked
        fields += [("Transfer-Encoding", "chunked")] if chunked else []
    fields += [("Ngrok-Agent-Ips", HOST)] if free else []
    fields += [] if exchange.keep else [("Connection", "close")]
    exchange.writer.write(_write_head(f"HTTP/1.1 {head.status} {head.reason}", fields))
    await exchange.writer.drain()
    if not empty:
        await body.send(exchange.writer, chunked)


async def _carry(reader, writer):
    with suppress(*LOST):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(*LOST):
        writer.close()


# --- pages --------------------------------------------------------------------------------------


def _needs_warning(method, head, host):
    """Tell whether a request gets the warning page: browsers do, whatever they ask for."""
    if method not in ("GET", "HEAD") or "Mozilla" not in (head.get("user-agent") or ""):
        return False
    cookies = [one.strip() for one in (head.get("cookie") or "").split(";")]
    return head.get(SKIP_WARNING) is None and f"{COOKIE}={host}" not in cookies


def _page(text, warned_host):
    """Return the page for a message; ``warned_host`` adds the button that lets a browser in."""
    *lines, code = text.strip().splitlines()
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
    button = ""
    if warned_host:
        button = WARNING_BUTTON.replace("{cookie}", COOKIE).replace("{host}", warned_host)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>ngrok</title></head>'
        f"<body>{paragraphs}{button}<p>({code})</p></body></html>"
    )


# --- certificates -------------------------------------------------------------------------------


class _Authority:
    """A certificate authority and the key of the edge, both made anew for each cloud."""

    _serial = itertools.count(1)

    def __init__(self, path):
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = self._named(f"ngrok double {os.getpid()}-{next(self._serial)}")
        self._edge_key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(*[False] * 5, True, True, False, False)
        self._certificate = self._sign(
            self._name,
            self._key.public_key(),
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (usage, True),
        )
        Path(path).write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))
        public = self._edge_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.spki = base64.b64encode(hashlib.sha256(public).digest()).decode()

    @staticmethod
    def _named(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def _sign(self, subject, public_key, *extensions):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
        )
        own = self._key.public_key()
        for extension, critical in (
            (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(own), False),
            *extensions,
        ):
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, names, path):
        """Write a certificate for the edge, with its key, to a file."""
        certificate = self._sign(
            self._named("ngrok edge"),
            self._edge_key.public_key(),
            (x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
        )
        key = self._edge_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.write_bytes(key + certificate.public_bytes(serialization.Encoding.PEM))
