"""Background processes of a workspace: found or started on demand, stopped when not needed.

A process belongs to whoever uses it. Every program that uses it holds a lease; one that batch
runs started stops when the last lease is given back, one that a person started from a notebook
goes on until it is stopped. The MLflow server (`helpers.server`) and the scoring server
(`helpers.serving`) are such processes.
"""

import argparse
import atexit
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from filelock import FileLock

from helpers.display import notice
from helpers.workspace import PROJECT_ROOT, ProjectError, atomic_path, is_interactive

HOST = "127.0.0.1"
STATE = "state.json"  # file in the folder of a service: its process
START_TIMEOUT = 180  # seconds; a start takes about 10 on two cores


class ServerError(ProjectError):
    """A server does not start or does not answer."""


@dataclass(frozen=True)
class Server:
    """A running or starting server.

    Attributes
    ----------
    url : str
        Its address.
    pid : int
    created : float
        Start time of the process, seconds since the epoch; tells it from a later process that
        was given the same number.
    keep : bool
        Whether it goes on after the last lease was given back.
    """

    url: str
    pid: int
    created: float
    keep: bool

    @property
    def alive(self):
        """Whether the process exists."""
        return is_running(self.pid, self.created)


def answers(url, timeout=2.0):
    """Tell whether ``/health`` at `url` says OK, or asks for a password, in `timeout` seconds."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout) as response:
            return response.status == 200 and response.read(16).strip() == b"OK"
    except urllib.error.HTTPError as error:
        # A server that asks for a password is there.
        return error.code == 401
    except (OSError, ValueError, http.client.HTTPException):
        return False


def is_running(pid, created):
    """Tell whether the process `pid` that started at `created` (seconds) still exists."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_state(folder):
    """Return the `Server` that runs, as noted in the folder of a service, or None."""
    path = folder / STATE
    if not path.is_file():
        return None
    server = Server(**json.loads(path.read_text(encoding="utf-8")))
    return server if server.alive else None


@dataclass(frozen=True)
class Service:
    """A server that each workspace can have one process of.

    Attributes
    ----------
    title : str
        What messages call it, such as ``MLflow server``.
    module : str
        Run with ``python -m``; takes ``--workspace``, ``--port`` and ``--fd``.
    root, folder : pathlib.Path
        Of the workspace, and of the service's log, lock, state and leases.
    environment : dict of str to str
        More variables for the process.
    arguments : tuple of str
        More arguments for the process.
    host : str
        Address to listen at.
    """

    title: str
    module: str
    root: Path
    folder: Path
    environment: dict = field(default_factory=dict, compare=False)
    arguments: tuple = ()
    host: str = HOST

    def start(self, port, keep=None):
        """Find the process or start one, and take a lease; do not wait until it answers.

        Parameters
        ----------
        port : int
            Where to start; if something else is there, the next free port is taken and said.
        keep : bool, optional
            Whether it goes on after the last lease was given back; default: where a person is.

        Returns
        -------
        Server
        """
        keep = is_interactive() if keep is None else keep
        with self._lock():
            server = self.read()
            if server is None:
                server = self._launch(port, keep)
            elif keep and not server.keep:
                server = replace(server, keep=True)
            with atomic_path(self._state) as path:
                path.write_text(json.dumps(asdict(server)), encoding="utf-8")
            self._take_lease()
        return server

    def read(self):
        """Return the `Server` that runs, or None."""
        return read_state(self.folder)

    def wait(self, server, timeout=START_TIMEOUT):
        """Wait until a server answers.

        Parameters
        ----------
        server : Server
        timeout : float
            Seconds.

        Raises
        ------
        ServerError
            If it dies or does not answer in time; shows the end of its log.
        """
        end = time.monotonic() + timeout
        while not answers(server.url):
            if not server.alive or time.monotonic() > end:
                silent = f"is silent at {server.url}"
                reason = silent if server.alive else "ended while starting"
                log = self.folder / "log.txt"
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                last = "\n".join(lines[-8:])
                raise ServerError(f"The {self.title} {reason}. The end of its log {log}:\n{last}")
            time.sleep(0.1)

    def release(self):
        """Give this process's lease back; the last one stops a server that batch runs started."""
        if not self.folder.is_dir():
            return
        with self._lock():
            (self._leases / str(os.getpid())).unlink(missing_ok=True)
            server = self.read()
            if server is not None and not server.keep and not self._live_leases():
                _stop(server)
                self._state.unlink(missing_ok=True)

    def stop(self):
        """Stop the process, whoever uses it; tell whether there was one."""
        with self._lock():
            server = self.read()
            if server is not None:
                _stop(server)
            self._state.unlink(missing_ok=True)
        return server is not None

    @property
    def _state(self):
        return self.folder / STATE

    @property
    def _leases(self):
        return self.folder / "leases"

    def _lock(self):
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileLock(self.folder / "lock")

    def _take_lease(self):
        self._leases.mkdir(parents=True, exist_ok=True)
        lease = self._leases / str(os.getpid())
        if not lease.exists():
            lease.write_text(str(psutil.Process().create_time()), encoding="utf-8")
            atexit.register(self.release)

    def _live_leases(self):
        live = []
        for lease in self._leases.iterdir():
            if is_running(int(lease.name), float(lease.read_text(encoding="utf-8"))):
                live.append(lease)
            else:
                lease.unlink()
        return live

    def _launch(self, wanted, keep):
        listener = self._listen(wanted)
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", self.module, "--workspace", str(self.root)]
        command += ["--port", str(port), *self.arguments]
        handed_on = {}
        if os.name == "nt":
            listener.close()
        else:
            command += ["--fd", str(listener.fileno())]
            handed_on = {"pass_fds": (listener.fileno(),)}
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self.root,
                # An interrupt of the notebook must not reach the server: the run is still to be
                # marked as failed there.
                start_new_session=True,
                **handed_on,
            )
        listener.close()
        created = psutil.Process(process.pid).create_time()
        return Server(f"http://{self.host}:{port}", process.pid, created, keep)

    def _environment(self):
        path = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.getenv("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **self.environment}

    def _listen(self, wanted):
        """Take the wanted port, or the next free one and say so.

        The socket is bound here and handed to the server: a port that was only looked at could
        be taken by another workspace's server until this one has started.
        """
        for port in range(wanted, min(wanted + 100, 65536)):
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            if os.name != "nt":
                # As servers do: a port whose last connections are still closing is free.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self.host, port))
                listener.listen(128)
            except OSError:
                listener.close()
                continue
            if port != wanted:
                notice(f"Port {wanted} is taken; the {self.title} uses port {port} instead.")
            return listener
        raise ServerError(f"No free port between {wanted} and {wanted + 99} for the {self.title}.")


def argument_parser(module, description):
    """Return a parser of what a `Service` starts its process with.

    Parameters
    ----------
    module, description : str

    Returns
    -------
    argparse.ArgumentParser
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--fd", type=int, help="number of a socket that listens there already")
    return parser


def serve(app, options):
    """Serve an application in this process until it is ended.

    Parameters
    ----------
    app : callable
        ASGI application.
    options : argparse.Namespace
        From `argument_parser`.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
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
    uvicorn.Server(config).run(sockets=sockets)


def _stop(server):
    try:
        process = psutil.Process(server.pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        _signal(member, "terminate")
    end = time.monotonic() + 10
    while any(_exists(member) for member in family) and time.monotonic() < end:
        time.sleep(0.05)
    for member in family:
        if _exists(member):
            _signal(member, "kill")


def _exists(process):
    """Tell whether a process runs; one that ended but was not reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process, action):
    try:
        getattr(process, action)()
    except psutil.NoSuchProcess:
        return
