"""The local MLflow server: one process per workspace, found or started on demand.

The server belongs to whoever uses it. Every process that uses it holds a lease; a server that
batch runs started stops when the last lease is given back, one that a person started from a
notebook goes on, so that its UI can be looked at, until `stop_server`.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from helpers import access
from helpers.display import notice
from helpers.workspace import (
    PROJECT_ROOT,
    ProjectError,
    atomic_path,
    is_interactive,
    open_workspace,
)

HOST = "127.0.0.1"
PORT = 5000
START_TIMEOUT = 180  # seconds; a start takes about 10 on two cores


class ServerError(ProjectError):
    """The MLflow server does not start or does not answer."""


@dataclass(frozen=True)
class Server:
    """A running or starting MLflow server.

    Attributes
    ----------
    url : str
        Address of its UI and API.
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

    @property
    def answers(self):
        """Whether the server takes requests."""
        return answers(self.url)


def answers(url, timeout=2.0):
    """Tell whether an MLflow server answers at `url` within `timeout` seconds."""
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


def _state_path(workspace):
    return workspace.server / "state.json"


def _lock(workspace):
    workspace.server.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(workspace.server / "lock")


def _read_state(workspace):
    path = _state_path(workspace)
    if not path.is_file():
        return None
    server = Server(**json.loads(path.read_text(encoding="utf-8")))
    return server if server.alive else None


def _write_state(workspace, server):
    with atomic_path(_state_path(workspace)) as path:
        path.write_text(json.dumps(asdict(server)), encoding="utf-8")


def _listen(wanted):
    """Take the wanted port, or the next free one and say so.

    The socket is bound here and handed to the server: a port that was only looked at could be
    taken by another workspace's server until this one has started.
    """
    for port in range(wanted, min(wanted + 100, 65536)):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if os.name != "nt":
            # As servers do: a port whose last connections are still closing is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        if port != wanted:
            notice(f"Port {wanted} is taken; the MLflow server uses port {port} instead.")
        return listener
    raise ServerError(f"No free port between {wanted} and {wanted + 99} for the MLflow server.")


def _environment():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.getenv("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",
    }
    # A Colab secret can be read in the notebook only.
    password = access.find_secret(access.ADMIN_PASSWORD)
    return {**environment, **({access.ADMIN_PASSWORD: password} if password else {})}


def _launch(workspace, wanted, keep):
    listener = _listen(wanted)
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "helpers.server_app", "--workspace", str(workspace.root)]
    handed_on = {}
    if os.name == "nt":
        listener.close()
        command += ["--port", str(port)]
    else:
        command += ["--port", str(port), "--fd", str(listener.fileno())]
        handed_on = {"pass_fds": (listener.fileno(),)}
    with (workspace.server / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            cwd=workspace.root,
            # An interrupt of the notebook must not reach the server: the run is still to be
            # marked as failed there.
            start_new_session=True,
            **handed_on,
        )
    listener.close()
    created = psutil.Process(process.pid).create_time()
    return Server(f"http://{HOST}:{port}", process.pid, created, keep)


def start_server(workspace, port=PORT, keep=None):
    """Find the workspace's server or start one; do not wait until it answers.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    port : int
        Where to start; if something else is there, the next free port is taken and said.
    keep : bool, optional
        Whether it goes on after the last lease was given back; default: where a person is.

    Returns
    -------
    Server
    """
    keep = is_interactive() if keep is None else keep
    with _lock(workspace):
        server = _read_state(workspace)
        if server is None:
            server = _launch(workspace, port, keep)
        elif keep and not server.keep:
            server = Server(server.url, server.pid, server.created, True)
        _write_state(workspace, server)
        _take_lease(workspace)
    return server


def wait_until_ready(server, workspace, timeout=START_TIMEOUT):
    """Wait until a server answers.

    Parameters
    ----------
    server : Server
    workspace : helpers.workspace.Workspace
    timeout : float
        Seconds.

    Raises
    ------
    ServerError
        If it dies or does not answer in time; shows the end of its log.
    """
    end = time.monotonic() + timeout
    while not server.answers:
        if not server.alive or time.monotonic() > end:
            reason = "ended while starting" if not server.alive else f"is silent at {server.url}"
            log = workspace.server / "log.txt"
            last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
            raise ServerError(f"The MLflow server {reason}. The end of its log {log}:\n{last}")
        time.sleep(0.1)


def _lease_folder(workspace):
    return workspace.server / "leases"


def _take_lease(workspace):
    folder = _lease_folder(workspace)
    folder.mkdir(parents=True, exist_ok=True)
    lease = folder / str(os.getpid())
    if not lease.exists():
        lease.write_text(str(psutil.Process().create_time()), encoding="utf-8")
        atexit.register(release_server, workspace)


def _live_leases(workspace):
    live = []
    for lease in _lease_folder(workspace).iterdir():
        if is_running(int(lease.name), float(lease.read_text(encoding="utf-8"))):
            live.append(lease)
        else:
            lease.unlink()
    return live


def release_server(workspace):
    """Give this process's lease back; the last one stops a server that batch runs started.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    """
    if not workspace.server.is_dir():
        return
    with _lock(workspace):
        (_lease_folder(workspace) / str(os.getpid())).unlink(missing_ok=True)
        server = _read_state(workspace)
        if server is not None and not server.keep and not _live_leases(workspace):
            _stop(server)
            _state_path(workspace).unlink(missing_ok=True)


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


def stop_server(workspace):
    """Stop the workspace's server, whoever uses it.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace

    Returns
    -------
    bool
        Whether there was one.
    """
    with _lock(workspace):
        server = _read_state(workspace)
        if server is not None:
            _stop(server)
        _state_path(workspace).unlink(missing_ok=True)
    return server is not None


def prepare(workspace, keep=None):
    """Let the server start in the background while the notebook goes on.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    keep : bool, optional
        See `start_server`.

    Returns
    -------
    str
        ``MLFLOW_TRACKING_URI`` where set, else the address of the local server.

    Raises
    ------
    ServerError
        If ``MLFLOW_TRACKING_URI`` names a server that does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return start_server(workspace, keep=keep).url
    if uri.startswith(("http://", "https://")) and not answers(uri, timeout=10):
        raise ServerError(
            f"No MLflow server answers at MLFLOW_TRACKING_URI = {uri}. Start it or correct the "
            "address; without the variable the notebooks start a server of their own."
        )
    return uri


def connect(workspace, keep=None):
    """Return the address of a server that answers, as `prepare` does, after waiting for it."""
    uri = prepare(workspace, keep)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        wait_until_ready(start_server(workspace, keep=keep), workspace)
    return uri


def command_line(workspace):
    """Return the command that shows the UI of a workspace, to be copied to a terminal.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace

    Returns
    -------
    str
    """
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return f"{python} -m helpers.server --workspace {workspace.root}"


def main(arguments=None):
    """Start, find or stop the workspace's server from the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0, or 1 with a message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.server", description="The MLflow UI of a workspace."
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--stop", action="store_true", help="stop the server")
    options = parser.parse_args(arguments)
    try:
        workspace = open_workspace(options.workspace)
        if options.stop:
            print("Stopped." if stop_server(workspace) else "No server was running.")
            return 0
        server = start_server(workspace, options.port, keep=True)
        wait_until_ready(server, workspace)
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"The MLflow UI is at {server.url}; stop it with: {command_line(workspace)} --stop")
    if access.read_rules(workspace.access_rules).sign_in:
        print(f"It was shown at a public address and asks for a password: {workspace.passwords}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
