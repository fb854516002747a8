"""The MLflow server of a workspace: started, protected, watched, shown at a public address."""

from helpers.server.mlflow_server import (
    PORT,
    command_line,
    main,
    service,
    start,
    start_server,
    stop_server,
)
from helpers.server.processes import ServerError, answers
from helpers.server.users import hand_on_secrets

__all__ = [
    "PORT",
    "ServerError",
    "answers",
    "command_line",
    "hand_on_secrets",
    "main",
    "service",
    "start",
    "start_server",
    "stop_server",
]
