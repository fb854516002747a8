"""The scoring server as a background process of a workspace."""

from helpers import registry, tracking
from helpers.server import credentials, processes
from helpers.serving.client import ScoringClient, connect
from helpers.workspace import Workspace

PORT = 5001


def service(workspace: Workspace, host: str = processes.HOST) -> processes.Service:
    """Return the scoring server of a workspace as a background service."""
    password = credentials.find_secret(credentials.SCORING_PASSWORD)
    if password is None and host != processes.HOST:
        # Nothing is on a network without one.
        password = credentials.stored_secret(workspace, credentials.SCORING)
    environment = {credentials.SCORING_PASSWORD: password} if password else {}
    return processes.Service(
        "scoring server",
        "helpers.serving.app",
        workspace.root,
        workspace.scoring,
        environment,
        ("--host", host),
        host,
    )


def start(
    workspace: Workspace, port: int = PORT, keep: bool | None = None, host: str = processes.HOST
) -> ScoringClient:
    """Find the workspace's scoring server or start it, and wait until it answers.

    Parameters
    ----------
    port : int
        Where to start; if something else is there, the next free port is taken and said.
    keep : bool, optional
        Whether it goes on after this process; default: where a person is.
    host : str
        Address to listen at; ``0.0.0.0`` takes requests of other machines, with a password.

    Raises
    ------
    helpers.workspace.MissingStepError
        If no model is in Production.
    ServingError
        If what is in Production cannot be served; says why.
    """
    tracking.connect(workspace, keep)
    registry.require_production()
    process = service(workspace, host)
    server = process.start(port, keep)
    process.wait(server)
    password = process.environment.get(credentials.SCORING_PASSWORD)
    return connect(server.url.replace("0.0.0.0", processes.HOST), password)


def stop(workspace: Workspace) -> bool:
    """Stop the workspace's scoring server, whoever uses it; tell whether there was one."""
    return service(workspace).stop()
