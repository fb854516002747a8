"""The ngrok agent of the stand-in: what pyngrok needs of the commands, log and API of ngrok v3.

It is run as a script (``python -IS agent.py``), so that it starts in a fraction of a second, and
therefore uses nothing but the standard library.

To the cloud it speaks JSON lines over TCP. One connection is the session, which lasts as long as
the agent; each endpoint is asked for over a connection of its own. The cloud forwards requests to
the upstream of an endpoint itself, which it can because both are on the same machine.
"""

import argparse
import json
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CLOUD = "NGROK_DOUBLE_CLOUD"
WEB_PORTS = range(4040, 4140)


class RefusedError(Exception):
    """The cloud refused, in its own words."""


def log(level: str, message: str, **fields: object) -> None:
    """Write a line the way ngrok does: values are quoted where they have to be."""

    def quoted(value: object) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if re.search(r'[\s="]|^$', text) else text

    line = {"t": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "lvl": level, "msg": message, **fields}
    try:
        print(*(f"{name}={quoted(value)}" for name, value in line.items()), flush=True)
    except BrokenPipeError:
        # Whoever read the log is gone; a Go program ends by SIGPIPE here.
        os._exit(1)


def print_errors(message: str) -> None:
    """Print an error the way ngrok does when a command ends."""
    lines = [line.rstrip() for line in message.strip().split("\n")]
    if lines[-1].startswith("ERR_NGROK_"):
        lines.append(f"https://ngrok.com/docs/errors/{lines[-1].lower()}")
    sys.stderr.write("".join(f"ERROR:  {line}\n" for line in [*lines, ""]))


def read_token(path: Path) -> str:
    """Return the token of a configuration file as pyngrok writes it."""
    found = re.search(r"^ +authtoken: *(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1).strip("'\" ") if found else ""


class Agent:
    """The session with the cloud, once there is one, and the endpoints that belong to it."""

    def __init__(self):
        self.endpoints = []
        self.connected = False

    def connect(self, token: str) -> None:
        """Open the session; without a network try for ever, at ever longer intervals."""
        pause = 0.25
        while not self.connected:
            try:
                self._session, answer = self._ask(token=token)
            except OSError as error:
                log("eror", "failed to reconnect session", obj="csess", err=f"dial tcp: {error}")
                time.sleep(pause)
                pause = min(2 * pause, 30)
            else:
                self._number, self.connected = answer["session"], True

    @staticmethod
    def _ask(**message):
        host, port = os.environ[CLOUD].split(":")
        lines = socket.create_connection((host, int(port))).makefile("rw", encoding="utf-8")
        lines.write(json.dumps(message) + "\n")
        lines.flush()
        answer = json.loads(lines.readline())
        if "error" in answer:
            raise RefusedError(answer["error"])
        return lines, answer

    def start_endpoint(self, name: str, url: str, upstream: str) -> dict:
        lines, answer = self._ask(session=self._number, url=url, upstream=upstream)
        lines.close()
        endpoint = {"name": name, "url": answer["url"], "uri": f"/api/endpoints/{name}",
                    "upstream": {"url": upstream, "protocol": "http1"}}  # fmt: skip
        self.endpoints.append(endpoint)
        log("info", "started tunnel", obj="tunnels", name=name, addr=upstream, url=answer["url"])
        return endpoint

    def wait(self) -> None:
        """Wait for the end of the session. The real agent would reconnect."""
        self._session.readline()


class Api(BaseHTTPRequestHandler):
    """The part of the API at 127.0.0.1:4040 that lists endpoints and starts them."""

    protocol_version = "HTTP/1.1"
    agent: Agent

    def log_message(self, *_):
        """Say nothing on stderr."""

    def do_GET(self):
        if self.path == "/api/endpoints":
            self._answer(200, {"endpoints": self.agent.endpoints, "uri": self.path})
        else:
            self._not_found()

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/api/endpoints":
            self._not_found()
            return
        if not self.agent.connected:
            message = "ngrok is not yet ready to start tunnels"
            why = {"err": "a successful ngrok tunnel session has not yet been established"}
            answer = {"error_code": 104, "status_code": 503, "msg": message, "details": why}
            self._answer(503, answer)
            return
        upstream = sent["upstream"]["url"]
        try:
            endpoint = self.agent.start_endpoint(sent["name"], sent.get("url", ""), upstream)
            self._answer(201, endpoint)
        except RefusedError as error:
            message, details = "failed to start tunnel", {"err": f"failed to start tunnel: {error}"}
            log("warn", message, **details)
            answer = {"error_code": 103, "status_code": 502, "msg": message, "details": details}
            self._answer(502, answer)

    def _not_found(self) -> None:
        details = {"path": self.path}
        self._answer(404, {"status_code": 404, "msg": "Not Found", "details": details})

    def _answer(self, status: int, body: dict) -> None:
        log("info", "end", pg=self.path, status=status)
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def start_web(agent: Agent) -> None:
    """Serve the API; where the default port is taken, at the next free one."""
    ThreadingHTTPServer.daemon_threads = True
    for port in WEB_PORTS:
        try:
            web = ThreadingHTTPServer(
                ("127.0.0.1", port), type("AgentApi", (Api,), {"agent": agent})
            )
            break
        except OSError:
            continue
    threading.Thread(target=web.serve_forever, daemon=True).start()
    log("info", "starting web service", obj="web", addr=f"127.0.0.1:{port}", allow_hosts="[]")


def main() -> int:
    """``ngrok start --none``, with the flags that pyngrok passes."""
    parser = argparse.ArgumentParser(prog="ngrok")
    parser.add_argument("command", choices=["start"])
    parser.add_argument("--none", action="store_true", required=True)
    parser.add_argument("--log", choices=["stdout"])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--authtoken")
    options = parser.parse_args()
    agent = Agent()
    start_web(agent)
    try:
        agent.connect(options.authtoken or read_token(options.config))
    except RefusedError as error:
        message = f"authentication failed: {error}"
        log("eror", "failed to reconnect session", obj="tunnels.session", err=message)
        log("crit", "command failed", err=message)
        print_errors(message)
        return 1
    log("info", "client session established", obj="tunnels.session")
    log("info", "tunnel session started", obj="tunnels.session")
    agent.wait()
    return 1


if __name__ == "__main__":
    sys.exit(main())
