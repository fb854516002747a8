"""The local MLflow server: one process per workspace, found or started on demand.

See `helpers.server.processes` for who may stop it, and `helpers.server.app` for what runs in it.
"""

import argparse
import os
import sys
from pathlib import Path

from helpers.server import credentials, users
from helpers.server.processes import START_TIMEOUT, ServerError, Service, answers
from helpers.workspace import ProjectError, open_workspace

PORT = 5000


def _service(workspace):
    # A Colab secret can be read in the notebook only.
    password = credentials.find_secret(credentials.ADMIN_PASSWORD)
    environment = {credentials.ADMIN_PASSWORD: password} if password else {}
    return Service(
        "MLflow server", "helpers.server.app", workspace.root, workspace.server, environment
    )


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
    helpers.server.processes.Server
    """
    return _service(workspace).start(port, keep)


def wait_until_ready(server, workspace, timeout=START_TIMEOUT):
    """Wait until a server answers.

    Parameters
    ----------
    server : helpers.server.processes.Server
    workspace : helpers.workspace.Workspace
    timeout : float
        Seconds.

    Raises
    ------
    helpers.server.processes.ServerError
        If it dies or does not answer in time; shows the end of its log.
    """
    _service(workspace).wait(server, timeout)


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
    return _service(workspace).stop()


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


def start(workspace, keep=None):
    """Find the workspace's server or start it at port 5000, and wait until it answers.

    Its store is the workspace's SQLite file, its artifacts are in a folder beside it.

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
    helpers.server.processes.ServerError
        If it does not answer.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return prepare(workspace, keep)
    server = start_server(workspace, keep=keep)
    wait_until_ready(server, workspace)
    return server.url


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
    if users.read_rules(workspace.access_rules).sign_in:
        print(f"It was shown at a public address and asks for a password: {workspace.passwords}")
    return 0
