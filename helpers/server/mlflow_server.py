"""The local MLflow server: one process per workspace, found or started on demand.

See `helpers.server.processes` for who may stop it, and `helpers.server.app` for what runs in it.
"""

import argparse
import os
import sys
from pathlib import Path

from helpers.server import credentials, store, users
from helpers.server.processes import ServerError, ServerProcess, Service, answers, read_state
from helpers.workspace import ProjectError, Workspace, open_workspace

PORT = 5000


def service(workspace: Workspace) -> Service:
    """Return the MLflow server of a workspace as a background service."""
    # A Colab secret can be read in the notebook only.
    password = credentials.find_secret(credentials.ADMIN_PASSWORD)
    return Service(
        "MLflow server",
        "helpers.server.app",
        workspace.root,
        workspace.server,
        {credentials.ADMIN_PASSWORD: password} if password else {},
    )


def start_server(workspace: Workspace, port: int = PORT, keep: bool | None = None) -> ServerProcess:
    """Find the workspace's server or start one; see `helpers.server.processes.Service.start`.

    Raises
    ------
    helpers.server.store.StoreError
        If none runs and a database is damaged.
    """
    if read_state(workspace.server) is None:
        for path, way_out in {
            workspace.tracking_db: "Move it to another folder and run this again: where there is "
            "a safe copy, a notebook that runs from the top fetches what was saved, else the "
            "server begins with an empty one.",
            workspace.server / "users.db": "Move it to another folder and run this again: the "
            "accounts are made anew; who made what on the server is then forgotten, and only "
            "admins change it.",
        }.items():
            store.check(path, way_out)
    return service(workspace).start(port, keep)


def stop_server(workspace: Workspace) -> bool:
    """Stop the workspace's server, whoever uses it; tell whether there was one."""
    return service(workspace).stop()


def start(workspace: Workspace, keep: bool | None = None, wait: bool = True) -> str:
    """Find the workspace's server or start it at port 5000, and wait until it answers.

    Its store is the workspace's SQLite file, its artifacts are in a folder beside it.

    Parameters
    ----------
    keep : bool, optional
        Whether it goes on after the last program that uses it; default: where a person is.
    wait : bool
        Whether to wait; without, the notebook goes on while the server starts.

    Returns
    -------
    str
        ``MLFLOW_TRACKING_URI`` where set, else the address of the local server.

    Raises
    ------
    helpers.server.processes.ServerError
        If it does not answer, or the one does not that ``MLFLOW_TRACKING_URI`` names.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        process = start_server(workspace, keep=keep)
        if wait:
            service(workspace).wait(process)
        return process.url
    if uri.startswith(("http://", "https://")) and not answers(uri, timeout=10):
        raise ServerError(
            f"No MLflow server answers at MLFLOW_TRACKING_URI = {uri}. Start it or correct the "
            "address; without the variable the notebooks start a server of their own."
        )
    return uri


def command_line(workspace: Workspace) -> str:
    """Return the command that shows the UI of a workspace, to be copied to a terminal."""
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return f"{python} -m helpers.server --workspace {workspace.root}"


def main(arguments: list[str] | None = None) -> int:
    """Start, find or stop the workspace's server from the command line."""
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
        process = start_server(workspace, options.port, keep=True)
        service(workspace).wait(process)
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"The MLflow UI is at {process.url}; stop it with: {command_line(workspace)} --stop")
    if users.read_rules(workspace.access_rules).sign_in:
        print(f"It was shown at a public address and asks for a password: {workspace.passwords}")
    return 0
