"""In the process of a service itself: what its command line says, and serving until its end."""

import argparse
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn

from helpers.server.connections import Connection, RotatingStream
from helpers.server.http import HOST
from helpers.server.processes import Service


def argument_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of what a `Service` starts its process with."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--log", type=Path, help="file for what it prints; rotates")
    parser.add_argument("--fd", type=int, help="number of a socket that listens there already")
    return parser


def serve(
    app, options: argparse.Namespace, service: Service, on_end: Callable[[], None] = bool
) -> None:
    """Serve an ASGI application in this process until it is ended, or abandoned.

    Parameters
    ----------
    app : callable
    options : argparse.Namespace
        From `argument_parser`.
    service : Service
        What this is the process of.
    on_end : callable
        Called before it ends.
    """

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            on_end()
            await super().shutdown(sockets)

    if options.log:
        sys.stdout = sys.stderr = RotatingStream(options.log)
    config = uvicorn.Config(
        app,
        http=Connection,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        # Forwarded addresses are read by the application; uvicorn would put them in the place of
        # this machine's.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    sockets = None if options.fd is None else [socket.socket(fileno=options.fd)]
    server = Server(config)

    def end_when_abandoned():
        service.wait_until_abandoned()
        server.should_exit = True

    threading.Thread(target=end_when_abandoned, daemon=True).start()
    server.run(sockets=sockets)
