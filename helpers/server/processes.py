"""Background processes of a workspace: found or started on demand, stopped when not needed.

A process belongs to whoever uses it. Every program that uses it holds a lease; one that batch
runs started stops when the last lease is given back, or soon after its holder was killed; one that
a person started from a notebook goes on until it is stopped. The MLflow server (`helpers.server`)
and the scoring server (`helpers.serving`) are such processes.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import requests

from helpers.display import notice
from helpers.server.http import HOST
from helpers.server.private_files import private_lock, write_private
from helpers.workspace import PROJECT_ROOT, ProjectError, is_interactive

STATE = "state.json"  # file in the folder of a service: its process
LOG = "log.txt"  # beside it: what the process prints
START_TIMEOUT = 180  # seconds; a start takes about 10 on two cores
LOOK_EVERY = 5  # seconds, for whether anybody is left


_kept = []  # locks that this process holds to its end


class ServerError(ProjectError):
    """A server does not start or does not answer."""


@dataclass(frozen=True)
class ServerProcess:
    """The process of a service, running or starting.

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
    def alive(self) -> bool:
        """Whether the process exists."""
        return is_running(self.pid, self.created)


def answers(url: str, timeout: float = 2.0) -> bool:
    """Tell whether ``/health`` at `url` says OK, or asks for a password, in `timeout` seconds."""
    try:
        answer = requests.get(f"{url.rstrip('/')}/health", timeout=timeout)
    except requests.RequestException:
        return False
    # A server that asks for a password is there.
    return answer.status_code == 401 or (answer.status_code, answer.text.strip()) == (200, "OK")


def is_running(pid: int, created: float) -> bool:
    """Tell whether the process `pid` that started at `created` (seconds) still exists."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_state(folder: Path) -> ServerProcess | None:
    """Return the process that runs, as noted in the folder of a service, or None.

    Raises
    ------
    ServerError
        If the note is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        process = ServerProcess(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise ServerError(
            f"{path} is damaged, so nobody knows whether this server runs. Restart the machine "
            "or end the server's process, delete the file, and run this again."
        ) from None
    return process if process.alive else None


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
    environment: dict[str, str] = field(default_factory=dict, compare=False)
    arguments: tuple[str, ...] = ()
    host: str = HOST

    def start(self, port: int, keep: bool | None = None) -> ServerProcess:
        """Find the process or start one, and take a lease; do not wait until it answers.

        Parameters
        ----------
        port : int
            Where to start; if something else is there, the next free port is taken and said.
        keep : bool, optional
            Whether it goes on after the last lease was given back; default: where a person is.
        """
        keep = is_interactive() if keep is None else keep
        with self._lock():
            process = read_state(self.folder) or self._launch(port, keep)
            process = replace(process, keep=process.keep or keep)
            write_private(self.folder / STATE, asdict(process))
            self._take_lease()
        return process

    def wait(self, process: ServerProcess, timeout: float = START_TIMEOUT) -> None:
        """Wait until a process answers, for `timeout` seconds.

        Raises
        ------
        ServerError
            If it dies or does not answer in time; shows the end of its log.
        """
        end = time.monotonic() + timeout
        while not answers(process.url):
            alive = process.alive
            if not alive or time.monotonic() > end:
                reason = f"is silent at {process.url}" if alive else "ended while starting"
                log = self.folder / LOG
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                last = "\n".join(lines[-8:])
                raise ServerError(f"The {self.title} {reason}. The end of its log {log}:\n{last}")
            time.sleep(0.1)

    def stop(self) -> bool:
        """Stop the process, whoever uses it; tell whether there was one."""
        with self._lock():
            return self._stop()

    def wait_until_abandoned(self) -> None:
        """In the server's own process: wait until batch runs started it and none of them is left.

        From then on nobody finds it, and who wants one waits until this process is gone.
        """
        while True:
            time.sleep(LOOK_EVERY)
            with self._lock() as lock:
                process = read_state(self.folder)
                if process is not None and not process.keep and not self._is_leased():
                    (self.folder / STATE).unlink()
                    lock.acquire()  # once more: it goes with the process
                    _kept.append(lock)
                    return

    def _release(self) -> None:
        """Give this process's lease back; the last one stops a server that batch runs started."""
        if not self.folder.is_dir():
            return
        with self._lock():
            (self._leases / str(os.getpid())).unlink(missing_ok=True)
            process = read_state(self.folder)
            if process is not None and not process.keep and not self._is_leased():
                self._stop()

    def _stop(self) -> bool:
        process = read_state(self.folder)
        (self.folder / STATE).unlink(missing_ok=True)
        if process is None:
            return False
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family = [parent, *parent.children(recursive=True)]
            for end in (psutil.Process.terminate, psutil.Process.kill):
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        end(member)
                _, family = psutil.wait_procs(family, timeout=10)
        return True

    @property
    def _leases(self) -> Path:
        return self.folder / "leases"

    def _lock(self):
        return private_lock(self.folder / "lock")

    def _take_lease(self) -> None:
        self._leases.mkdir(exist_ok=True)
        lease = self._leases / str(os.getpid())
        if not lease.exists():
            lease.write_text(str(psutil.Process().create_time()), encoding="utf-8")
            atexit.register(self._release)

    def _is_leased(self) -> bool:
        """Tell whether a process that exists has a lease; those of others are removed."""
        for lease in self._leases.iterdir():
            if is_running(int(lease.name), float(lease.read_text(encoding="utf-8"))):
                return True
            lease.unlink()
        return False

    def _launch(self, wanted: int, keep: bool) -> ServerProcess:
        listener = self._listen(wanted)
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", self.module, "--workspace", str(self.root)]
        command += ["--port", str(port), "--log", str(self.folder / LOG), *self.arguments]
        handed_on = {}
        if os.name == "nt":
            listener.close()
        else:
            command += ["--fd", str(listener.fileno())]
            handed_on = {"pass_fds": (listener.fileno(),)}
        path = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.getenv("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **self.environment}
        with (self.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                cwd=self.root,
                # An interrupt of the notebook must not reach the server: the run is still to be
                # marked as failed there.
                start_new_session=True,
                **handed_on,
            )
        listener.close()
        created = psutil.Process(process.pid).create_time()
        # Whoever stops it waits until it is gone, which it is not before it was reaped here.
        threading.Thread(target=process.wait, daemon=True).start()
        return ServerProcess(f"http://{self.host}:{port}", process.pid, created, keep)

    def _listen(self, wanted: int) -> socket.socket:
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
