"""The ngrok agent, which holds a workspace's tunnel open, and the note of that tunnel."""

import atexit
import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests
from filelock import FileLock
from pyngrok import conf, installer, ngrok, process
from pyngrok.log import NgrokLog

from helpers.display import silenced_libraries
from helpers.server import processes, users
from helpers.server.http import local_session
from helpers.server.private_files import private, private_lock, write_private
from helpers.workspace import Workspace

PATIENCE = 12  # seconds for the agent to get through to ngrok


@dataclass(frozen=True)
class Tunnel:
    """An open tunnel, as noted in the workspace.

    Attributes
    ----------
    url : str
        Public address.
    port : int
        Port of the MLflow server that it shows.
    api_url : str
        Address of the ngrok agent's own API on this machine.
    pid, created
        Process of the agent and its start time (seconds since the epoch).
    """

    url: str
    port: int
    api_url: str
    pid: int
    created: float

    @property
    def host(self) -> str:
        """Name under which the tunnel shows the server."""
        return urlsplit(self.url).netloc

    @property
    def runs(self) -> bool:
        """Whether the agent's process exists."""
        return processes.is_running(self.pid, self.created)

    @property
    def alive(self) -> bool:
        """Whether the agent runs, and says that this address leads to the server's port."""
        if not self.runs:
            return False
        try:
            answer = local_session().get(f"{self.api_url}/api/endpoints", timeout=5).json()
        except (requests.RequestException, ValueError):
            return False
        return any(
            endpoint.get("url") == self.url
            and endpoint["upstream"]["url"] == f"http://localhost:{self.port}"
            for endpoint in answer["endpoints"] or []
        )


# --- the note ---------------------------------------------------------------------------------


def lock(workspace: Workspace) -> FileLock:
    """Return the lock to hold while a workspace's tunnel is opened, looked up or ended."""
    return private_lock(workspace.server / "tunnel.lock")


def _note(workspace: Workspace) -> Path:
    return workspace.server / "tunnel.json"


def read_tunnel(workspace: Workspace) -> Tunnel | None:
    """Return the tunnel that is noted in a workspace, or None."""
    note = _note(workspace)
    return Tunnel(**json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else None


def keep_tunnel(workspace: Workspace, tunnel: Tunnel) -> None:
    """Let the server answer under the tunnel's name, until this process ends."""
    users.change_rules(workspace, public=[tunnel.host])
    write_private(_note(workspace), asdict(tunnel))

    def end():
        if workspace.server.is_dir():
            with lock(workspace):
                if read_tunnel(workspace) == tunnel:
                    end_tunnel(workspace, tunnel)

    atexit.register(end)


def end_tunnel(workspace: Workspace, tunnel: Tunnel | None = None) -> None:
    """End this process's agent and that of a tunnel, whichever process started it."""
    ngrok.kill(_configuration())
    if tunnel is not None and tunnel.runs:
        agent = psutil.Process(tunnel.pid)
        agent.terminate()
        psutil.wait_procs([agent], timeout=5)
    # Nobody on this machine needs to sign in any more.
    users.change_rules(workspace, public=[], sign_in=False, without_password=False)
    _note(workspace).unlink(missing_ok=True)


def forget_dead_tunnel(workspace: Workspace) -> None:
    """Forget a tunnel whose agent is gone, as after a restart of the machine."""
    with lock(workspace):
        tunnel = read_tunnel(workspace)
        if tunnel is not None and not tunnel.runs:
            end_tunnel(workspace, tunnel)


# --- the agent --------------------------------------------------------------------------------


def _configuration(config_path: str | None = None, **options) -> conf.PyngrokConfig:
    configuration = conf.PyngrokConfig(
        config_path=config_path,
        # An interrupt of the notebook must not end the tunnel.
        start_new_session=True,
        **options,
    )
    # pyngrok would pass the token of the environment on in the agent's command line, which
    # everyone on the machine can read; the agent finds it in its configuration file.
    configuration.auth_token = None
    return configuration


@contextmanager
def token_set(token: str, domain: str | None, port: int) -> Iterator[conf.PyngrokConfig]:
    """Let pyngrok start its agent with a token, and the reserved domain if there is one.

    pyngrok's own function passes the token to a command that everyone on the machine can read,
    and writes it into the person's own configuration. This one makes a configuration that is
    gone after the block.
    """
    # What is left of an earlier agent of this process would keep the account's only session.
    ngrok.kill(_configuration())
    # pyngrok repeats the agent's complaints in its log, and the agent writes them to the error
    # stream: with the token in them. Here they become one message, without it.
    logging.getLogger("pyngrok").setLevel(logging.CRITICAL + 1)
    content = {"agent": {"authtoken": token}}
    if domain:
        # pyngrok takes this definition for a tunnel that is opened without a name.
        upstream = {"url": f"http://localhost:{port}"}
        definition = {"name": "pyngrok-default", "url": f"https://{domain}", "upstream": upstream}
        content["endpoints"] = [definition]
    before = conf.get_default()
    with silenced_libraries(), tempfile.TemporaryDirectory(prefix="ngrok-") as folder:
        path = Path(folder) / "ngrok.yml"
        with open(path, "w", encoding="utf-8", opener=private):
            pass
        installer.install_default_config(str(path), content)
        giving_up = threading.Timer(PATIENCE, _end_agent, [str(path)])

        def watch(log: NgrokLog) -> None:
            if "tunnel session started" in log.line:
                giving_up.cancel()

        configuration = _configuration(str(path), log_event_callback=watch)
        # A slow download is no agent that does not get through.
        ngrok.install_ngrok(configuration)
        conf.set_default(configuration)
        giving_up.start()
        try:
            yield configuration
        finally:
            giving_up.cancel()
            conf.set_default(before)


def _end_agent(config_path: str) -> None:
    """End an agent that never gets through.

    Without a network it retries for ever, and pyngrok waits for each line of its log, however
    long that takes.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if config_path in child.cmdline():
                child.kill()


def tunnel_of(configuration: conf.PyngrokConfig, url: str, port: int) -> Tunnel | None:
    """Return the tunnel of this process's agent, or None where none runs."""
    if not process.is_process_running(configuration.ngrok_path):
        return None
    agent = ngrok.get_ngrok_process(configuration)
    created = psutil.Process(agent.proc.pid).create_time()
    return Tunnel(url, port, agent.api_url, agent.proc.pid, created)
