"""The ngrok agent of the stand-in: commands, log lines, local API and exit codes of ngrok v3.

It is run as a script (``python -IS agent.py``), so that it starts in a fraction of a second, and
therefore uses nothing but the standard library.

To the cloud it speaks JSON lines over TCP. One connection is the session (``auth``, ``bind``,
``unbind``; the cloud sends ``open``); for each ``open``, the agent dials the upstream and makes a
further connection to the cloud, and then joins both byte by byte, as the real agent does.
"""

import json
import os
import re
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

VERSION = "3.39.1"
CLOUD = "NGROK_DOUBLE_CLOUD"
WEB_PORT = 4040
# How long the cloud may refuse connections before the agent takes it for gone. The real agent
# tries for ever; here the cloud is the test process, which does not come back.
CLOUD_GONE_AFTER = 1.5
RETRY_EVERY = 0.25
CALL_LIMIT = 10
METRICS = ("count", "gauge", "rate1", "rate5", "rate15", "p50", "p90", "p95", "p99")
ENDPOINT_FIELDS = {
    "name", "url", "upstream", "inspect", "pooling_enabled", "bindings", "traffic_policy",
    "description", "metadata", "agent_tls_termination",
}  # fmt: skip
TUNNEL_FIELDS = {
    "name", "addr", "proto", "domain", "hostname", "subdomain", "schemes", "inspect", "metadata",
    "basic_auth", "host_header", "request_header", "response_header", "traffic_policy",
    "compression", "circuit_breaker", "oauth", "ip_restriction", "pooling_enabled", "url",
}  # fmt: skip


class AgentError(Exception):
    """What ends the command, as its user reads it."""


class SessionError(Exception):
    """The cloud refused, or the session with it is lost."""


_stdout = threading.RLock()  # a signal may come while the main thread writes


def logfmt(value):
    """Write a value as ngrok's log does: quoted where it has to be."""
    text = "nil" if value is None else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s="]', text) or not text else text


def log(level, message, **fields):
    line = f"t={time.strftime('%Y-%m-%dT%H:%M:%S%z')} lvl={level} msg={logfmt(message)}"
    line += "".join(f" {name}={logfmt(value)}" for name, value in fields.items()) + "\n"
    with _stdout:
        try:
            sys.stdout.write(line)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read the log is gone; a Go program ends by SIGPIPE here.
            os._exit(1)


def print_errors(message):
    """Print an error the way ngrok does when a command ends."""
    lines = [line.rstrip() for line in message.strip().split("\n")]
    code = lines[-1] if lines[-1].startswith("ERR_NGROK_") else None
    lines += [f"https://ngrok.com/docs/errors/{code.lower()}"] if code else []
    sys.stderr.write("".join(f"ERROR:  {line}\n" for line in [*lines, ""]))
    sys.stderr.flush()


# --- the configuration file ---------------------------------------------------------------------


def default_config_path():
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "ngrok" / "ngrok.yml"
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "ngrok" / "ngrok.yml"


def setting_pattern(text, name):
    """Return how a setting of the agent is written in a file: nested in version 3."""
    indent = r"[ ]+" if is_version_3(text) else ""
    return re.compile(rf"^{indent}{name}:[ \t]*(.*?)[ \t]*(?:#.*)?$", re.MULTILINE)


def is_version_3(text):
    return re.search(r"^version:\s*['\"]?2", text, re.MULTILINE) is None


def read_setting(path, name):
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = setting_pattern(text, name).search(text)
    return match.group(1).strip("'\"") or None if match else None


def write_setting(path, name, value):
    """Set one setting of the agent in the file and leave every other line as it is.

    The block style that pyngrok's yaml.dump, ngrok and people write is understood; a file
    with ``agent: {...}`` in one line is refused.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.strip() in ("", "{}"):
        text = 'version: "3"\n'
    plain = re.fullmatch(r"[A-Za-z0-9_]*[A-Za-z_][A-Za-z0-9_]*", value)
    setting = f"{name}: {value if plain else json.dumps(value)}"
    if setting_pattern(text, name).search(text):
        text = setting_pattern(text, name).sub(
            lambda old: re.match(" *", old.group())[0] + setting, text
        )
    elif not is_version_3(text):
        text = text.rstrip("\n") + f"\n{setting}\n"
    elif block := re.search(r"^agent:(.*)$", text, re.MULTILINE):
        if block.group(1).strip() not in ("", "{}", "null", "~"):
            raise AgentError(f"Failed to read configuration file '{path}': agent: in one line")
        text = text[: block.start()] + f"agent:\n    {setting}" + text[block.end() :]
        text = _same_indent(text, setting)
    else:
        text = text.rstrip("\n") + f"\nagent:\n    {setting}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _same_indent(text, setting):
    """Give the new first line of a block the indent of the lines that follow it."""
    following = re.search(rf"^    {re.escape(setting)}\n( +)\S", text, re.MULTILINE)
    return text.replace(f"    {setting}", following.group(1) + setting, 1) if following else text


# --- the session with the cloud -----------------------------------------------------------------


def send_line(connection, message):
    connection.sendall(json.dumps(message).encode() + b"\n")


def dial(address):
    """Connect to an upstream; the error reads as Go's does: of the first address tried."""
    host, port = address
    try:
        return socket.create_connection((host, port), timeout=10), None
    except OSError as error:
        found = "[::1]" if host == "localhost" and socket.has_ipv6 else host
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        return None, f"dial tcp {found}:{port}: connect: {reason}"


def carry(source, target):
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def join(stream, upstream):
    """Carry bytes both ways until both directions have ended."""
    for connection in (stream, upstream):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    back = threading.Thread(target=carry, args=(upstream, stream), daemon=True)
    back.start()
    carry(stream, upstream)
    # An upstream may answer and close before it has read all; if the rest was left unread here,
    # the edge would see a reset instead of the answer.
    with suppress(OSError):
        while stream.recv(1 << 16):
            pass
    back.join()
    stream.close()
    upstream.close()


class Agent:
    """The session with the cloud, and the endpoints that run over it."""

    def __init__(self, token, cloud):
        self.token = token
        host, _, port = cloud.rpartition(":")
        self.cloud = (host, int(port))
        self.endpoints = {}
        self.status = "connecting"
        self.established = False
        self._lock = threading.Lock()  # of the session's connection and of what waits for answers
        self._connection = None
        self._waiting = {}

    def connect(self):
        """Open a session; raises SessionError where the cloud refuses it, OSError without one."""
        connection = socket.create_connection(self.cloud, timeout=CALL_LIMIT)
        send_line(connection, {"type": "auth", "token": self.token, "version": VERSION})
        lines = connection.makefile("r", encoding="utf-8")
        line = lines.readline()
        if not line:
            connection.close()
            raise ConnectionResetError("EOF")
        answer = json.loads(line)
        if "error" in answer:
            raise SessionError(f"authentication failed: {answer['error']}")
        connection.settimeout(None)
        with self._lock:
            self._connection = connection
        self.established = True
        self.status = "online"
        log("info", "client session established", obj="tunnels.session")
        log("info", "tunnel session started", obj="tunnels.session")
        return lines

    def run(self):
        """Hold the session and renew it when it is lost; ends when the cloud is gone or refuses."""
        try:
            lines = self.connect()
        except (OSError, ValueError) as error:
            raise SessionError(f"failed to dial ngrok server: {error}") from error
        while True:
            reason = self._serve(lines)
            self.status = "reconnecting"
            self._fail_waiting()
            log(
                "eror", "session closed, starting reconnect loop", obj="tunnels.session", err=reason
            )
            lines = self._reconnect()

    def _serve(self, lines):
        try:
            for line in lines:
                message = json.loads(line)
                if message["type"] == "open":
                    threading.Thread(target=self._stream, args=(message,), daemon=True).start()
                elif waiting := self._waiting.get(message["id"]):
                    waiting["answer"] = message
                    waiting["event"].set()
        except (OSError, ValueError) as error:
            return f"read tcp: {error}"
        return "read EOF from remote peer"

    def _reconnect(self):
        alive = time.monotonic()
        while True:
            try:
                lines = self.connect()
                break
            except ConnectionRefusedError as error:
                if time.monotonic() - alive > CLOUD_GONE_AFTER:
                    raise SessionError(f"failed to dial ngrok server: {error}") from error
                reason = error
            except (OSError, ValueError) as error:
                reason = error
                alive = time.monotonic()
            log("eror", "failed to reconnect session", obj="tunnels.session", err=reason)
            time.sleep(RETRY_EVERY)
        # The answers come over the lines that are not being read yet.
        threading.Thread(target=self._bind_again, daemon=True).start()
        return lines

    def _bind_again(self):
        for name, endpoint in list(self.endpoints.items()):
            try:
                self._call("bind", url=endpoint["url"])
            except SessionError as error:
                log("eror", "failed to rebind", obj="tunnels.session", name=name, err=error)

    def _fail_waiting(self):
        with self._lock:
            self._connection = None
            waiting, self._waiting = self._waiting, {}
        for one in waiting.values():
            one["event"].set()

    def _call(self, kind, **fields):
        number = secrets.token_hex(6)
        one = {"event": threading.Event(), "answer": {"error": "session closed"}}
        with self._lock:
            if self._connection is None:
                raise SessionError("session closed")
            self._waiting[number] = one
            try:
                send_line(self._connection, {"type": kind, "id": number, **fields})
            except OSError as error:
                raise SessionError("session closed") from error
        one["event"].wait(CALL_LIMIT)
        with self._lock:
            self._waiting.pop(number, None)
        if "error" in one["answer"]:
            raise SessionError(one["answer"]["error"])
        return one["answer"]

    def start_endpoint(self, name, url, upstream, **more):
        found = self._call("bind", url=url)
        parts = urlsplit(upstream)
        self.endpoints[name] = {
            "name": name, "url": found["url"], "upstream": upstream, "id": secrets.token_hex(16),
            "address": (parts.hostname, parts.port or 80), "conns": 0, "open": 0, **more,
        }  # fmt: skip
        log("info", "started tunnel", obj="tunnels", name=name, addr=upstream, url=found["url"])
        return self.endpoints[name]

    def stop_endpoint(self, name):
        endpoint = self.endpoints.pop(name)
        with suppress(SessionError):
            self._call("unbind", url=endpoint["url"])

    def _stream(self, message):
        """Join one stream of the edge to a new connection to the upstream."""
        endpoint = next((e for e in self.endpoints.values() if e["url"] == message["url"]), None)
        number = secrets.token_hex(6)
        upstream, problem = None, "no such endpoint"
        if endpoint:
            upstream, problem = dial(endpoint["address"])
        try:
            stream = socket.create_connection(self.cloud, timeout=CALL_LIMIT)
            answer = {"type": "stream", "stream": message["stream"], "problem": problem}
            send_line(stream, {**answer, "upstream": endpoint and endpoint["upstream"]})
        except OSError:
            if upstream:
                upstream.close()
            return
        if upstream is None:
            stream.close()
            where = "{}:{}".format(*endpoint["address"]) if endpoint else "unknown"
            log("warn", "failed to open private leg", id=number, privaddr=where, err=problem)
            return
        near = "{}:{}".format(*upstream.getpeername()[:2])
        log("info", "join connections", obj="join", id=number, l=near, r=message["client"])
        with self._lock:
            endpoint["conns"] += 1
            endpoint["open"] += 1
        join(stream, upstream)
        with self._lock:
            endpoint["open"] -= 1


# --- the local API ------------------------------------------------------------------------------


class ApiError(Exception):
    def __init__(self, status, code, message, **details):
        super().__init__(message)
        self.status = status
        self.body = {
            "error_code": code, "status_code": status, "msg": message, "details": details,
        }  # fmt: skip


def as_v3(endpoint):
    name = endpoint["name"]
    return {
        "name": name, "uri": f"/api/endpoints/{quote(name, safe=':@&=+$')}",
        "url": endpoint["url"], "upstream": {"url": endpoint["upstream"], "protocol": "http1"},
        "inspect": endpoint["inspect"], "pooling_enabled": False, "metrics": metrics(endpoint),
    }  # fmt: skip


def as_v2(endpoint):
    name = endpoint["name"]
    return {
        "name": name, "ID": endpoint["id"], "uri": f"/api/tunnels/{quote(name, safe=':@&=+$')}",
        "public_url": endpoint["url"], "proto": "https",
        "config": {"addr": endpoint["upstream"], "inspect": endpoint["inspect"]},
        "metrics": metrics(endpoint),
    }  # fmt: skip


def metrics(endpoint):
    connections = dict.fromkeys(METRICS, 0) | {
        "count": endpoint["conns"],
        "gauge": endpoint["open"],
    }
    http = {name: 0 for name in METRICS if name != "gauge"} | {"count": endpoint["conns"]}
    return {"conns": connections, "http": http}


def upstream_url(address):
    """Complete an upstream: a port, a host with a port, or a URL."""
    text = str(address)
    text = f"localhost:{text}" if text.isdigit() else text
    text = text if "://" in text else f"http://{text}"
    if urlsplit(text).scheme != "http" or not urlsplit(text).hostname:
        raise ValueError(f"only http upstreams are supported here, not {text}")
    return text


class Api(BaseHTTPRequestHandler):
    """The API at 127.0.0.1:4040."""

    protocol_version = "HTTP/1.1"
    agent = None  # set by start_web

    def log_message(self, *_):
        """Say nothing on stderr; the agent logs its requests itself."""

    def _handle(self):
        started, number = time.perf_counter(), secrets.token_hex(8)
        page = unquote(urlsplit(self.path).path)
        log("info", "start", pg=page, id=number)
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        try:
            status, body = self._answer(urlsplit(self.path).path.split("/")[1:], sent)
        except ApiError as error:
            status, body = error.status, error.body
            err = error.body["details"].get("err")
            log("warn", str(error), pg=page, id=number, err=err)
        data = b"" if body is None else json.dumps(body).encode() + b"\n"
        self.send_response(status)
        if body is not None:
            self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        spent = f"{(time.perf_counter() - started) * 1e3:.3f}ms"
        log("info", "end", pg=page, id=number, status=status, dur=spent)

    do_GET = do_POST = do_DELETE = do_PUT = _handle  # noqa: N815

    def _answer(self, parts, sent):
        shapes = {"endpoints": as_v3, "tunnels": as_v2}
        if parts == ["api", "status"] and self.command == "GET":
            legs = [{"region": "us", "latency": "1ms"}] if self.agent.status == "online" else []
            answer = {"status": self.agent.status, "agent_version": VERSION}
            return 200, {**answer, "session": {"legs": legs}, "uri": "/api/status"}
        if parts[:1] != ["api"] or len(parts) not in (2, 3) or parts[1] not in shapes:
            raise ApiError(404, 100, "resource not found", path=self.path)
        kind, shape = parts[1], shapes[parts[1]]
        if len(parts) == 2 and self.command == "GET":
            endpoints = [shape(one) for one in list(self.agent.endpoints.values())]
            return 200, {kind: endpoints, "uri": f"/api/{kind}"}
        if len(parts) == 2 and self.command == "POST":
            return 201, shape(self._create(kind, sent))
        if len(parts) == 2 or self.command not in ("GET", "DELETE"):
            raise ApiError(405, 101, "method not allowed", path=self.path)
        name = unquote(parts[2])
        if name not in self.agent.endpoints:
            raise ApiError(404, 100, f"{kind[:-1]} not found", name=name)
        if self.command == "GET":
            return 200, shape(self.agent.endpoints[name])
        self.agent.stop_endpoint(name)
        return 204, None

    def _create(self, kind, sent):
        try:
            options = json.loads(sent)
            wrong = set(options) - (ENDPOINT_FIELDS if kind == "endpoints" else TUNNEL_FIELDS)
            if wrong:
                where = "config.HTTPv2Tunnel" if kind == "tunnels" else "config.Endpoint"
                raise ValueError(f"field {sorted(wrong)[0]} not found in type {where}")
            name, url = options["name"], options.get("url") or ""
            if name in self.agent.endpoints:
                raise ValueError(f'The {kind[:-1]} "{name}" already exists')
            if kind == "endpoints":
                upstream = upstream_url(options["upstream"]["url"])
            else:
                upstream = upstream_url(options["addr"])
                url = url or options.get("domain") or options.get("hostname") or ""
                if options.get("proto", "http") != "http":
                    raise ValueError(f"unsupported protocol {options['proto']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(400, 102, f"invalid {kind[:-1]} configuration", err=str(error)) from None
        if not self.agent.established:
            problem = "a successful ngrok tunnel session has not yet been established"
            raise ApiError(503, 104, "ngrok is not yet ready to start tunnels", err=problem)
        try:
            return self.agent.start_endpoint(
                name, url, upstream, inspect=bool(options.get("inspect", True))
            )
        except SessionError as error:
            text = str(error)
            text = text if text == "session closed" else f"failed to start tunnel: {text}"
            raise ApiError(502, 103, "failed to start tunnel", err=text) from None


class WebServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64


def start_web(agent, address):
    """Serve the API; where the default port is taken, at the next free one."""
    host, _, port = (address or f"127.0.0.1:{WEB_PORT}").rpartition(":")
    handler = type("AgentApi", (Api,), {"agent": agent})
    for number in [int(port)] if address else range(WEB_PORT, WEB_PORT + 100):
        try:
            web = WebServer((host, number), handler)
            break
        except OSError as error:
            if address:
                raise AgentError(f"failed to listen on {address}: {error.strerror}") from None
            if number == WEB_PORT:
                log(
                    "warn", "can't bind default web address, trying alternatives",
                    obj="web", addr=f"{host}:{number}",
                )  # fmt: skip
    else:
        raise AgentError("failed to listen on any web address")
    host, port = web.server_address
    log("info", "starting web service", obj="web", addr=f"{host}:{port}", allow_hosts="[]")
    threading.Thread(target=web.serve_forever, daemon=True).start()


# --- commands -----------------------------------------------------------------------------------


def parse(arguments):
    """Split a command line into words and flags; ``--none`` and the like take no value."""
    words, flags, rest = [], {}, list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name in ("none", "all", "version", "v", "help", "h"):
            flags[name] = True
        elif name in ("config", "authtoken", "region", "log", "log-level", "log-format"):
            if not equals and not rest:
                raise AgentError(f"flag needs an argument: --{name}")
            flags[name] = value if equals else rest.pop(0)
        else:
            raise AgentError(f"unknown flag: --{name}")
    return words, flags


def stop(*_):
    log("info", "received stop request", obj="app", stopReq="{err:<nil> restart:false}")
    log("info", "session closing", obj="tunnels.session", err=None)
    os._exit(0)


def start(config, flags):
    log("info", "open config file", path=config, err=None if config.is_file() else "no such file")
    token = flags.get("authtoken") or os.environ.get("NGROK_AUTHTOKEN")
    agent = Agent(token or read_setting(config, "authtoken") or "", os.environ[CLOUD])
    start_web(agent, read_setting(config, "web_addr"))
    try:
        agent.run()
    except SessionError as error:
        for message, source in (
            ("failed to reconnect session", "tunnels.session"),
            ("session closing", "tunnels.session"),
            ("terminating with error", "app"),
        ):
            log("eror", message, obj=source, err=error)
        log("crit", "command failed", err=error)
        print_errors(str(error))
        os._exit(1)  # the API's threads may still be answering


def main(arguments):
    try:
        words, flags = parse(arguments)
        if "version" in flags or "v" in flags or words == ["version"]:
            print(f"ngrok version {VERSION}")
            return 0
        config = Path(flags.get("config") or default_config_path())
        if words[:1] == ["config"] and words[1:2] == ["check"]:
            if not config.is_file():
                raise AgentError(f"open {config}: no such file or directory")
            print(f"Valid configuration file at {config}")
        elif words[:1] == ["config"] and len(words) == 3 and words[1].startswith("add-"):
            kinds = {
                "add-authtoken": ("authtoken", "Authtoken"),
                "add-api-key": ("api_key", "API key"),
            }
            if words[1] not in kinds:
                raise AgentError(f'unknown command "{words[1]}" for "ngrok config"')
            name, title = kinds[words[1]]
            write_setting(config, name, words[2])
            print(f"{title} saved to configuration file: {config}")
        elif words == ["start"] and "none" in flags:
            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)
            start(config, flags)
        else:
            raise AgentError(f'unknown command "{" ".join(words)}" for "ngrok"')
    except AgentError as error:
        print_errors(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
