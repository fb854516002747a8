"""The activity log of the MLflow server: who did what, and what was turned away.

The server process writes one JSON line per request (`ActivityLog`); notebooks read them back
(`read_activity`, `summarize_activity`).
"""

import json
import logging
import re
from logging.handlers import RotatingFileHandler
from pathlib import Path

from helpers.server.private_files import private
from helpers.workspace import Workspace

MAX_BYTES = 5_000_000  # of one file, some 25,000 requests
FILES = 5  # the current one and four older ones

SCORING_PATH = "/scoring/"  # below it: the scoring server
KINDS = ("page", "look", "change", "artifact", "prediction", "rejected")
OUTCOMES = {
    "ok": "answered",
    "error": "the server answered with an error",
    "sign-in": "no or wrong password",
    "host": "asked under a name that is not the server's",
    "origin": "a change sent by another site's page",
    "role": "the user's role does not allow it",
    "blocked": "not offered from outside this machine",
    "too many": "too many wrong passwords from one address",
}


# --- writing (in the server process) ----------------------------------------------------------


class _PrivateRotatingFile(RotatingFileHandler):
    """A rotating log file that only its owner may read."""

    def _open(self):
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=private)


class ActivityLog:
    """Writes requests to a rotating file."""

    def __init__(self, path: Path):
        self._logger = logging.Logger("activity")
        self._logger.addHandler(
            _PrivateRotatingFile(path, maxBytes=MAX_BYTES, backupCount=FILES - 1, encoding="utf-8")
        )

    def write(self, **request) -> None:
        """Write one request as a JSON line; control characters in it are escaped."""
        self._logger.info(json.dumps(request))


def kind_of(method: str, path: str) -> str:
    """Tell what a request is for: one of `KINDS`, but not 'rejected'."""
    if path.startswith(SCORING_PATH):
        return "prediction"
    if "/mlflow-artifacts/" in path or path.endswith(("get-artifact", "/artifacts/files")):
        return "artifact"
    if re.match(r"/(api|ajax-api)/|/graphql|/v1/|/gateway/", path):
        return "look" if is_look(method, path) else "change"
    return "page"


def is_look(method: str, path: str) -> bool:
    """Tell whether a request only looks.

    Reading is GET or HEAD, and those POST requests of MLflow's API and UI that carry a query:
    searches and GraphQL, whose schema in MLflow has no mutation that changes anything; and
    asking a model for predictions.
    """
    if method in ("GET", "HEAD", "OPTIONS"):
        return True
    if method == "POST" and path.startswith(SCORING_PATH) and path.endswith("/invocations"):
        return True
    last = path.rstrip("/").rsplit("/", 1)[-1]
    return method == "POST" and bool(re.fullmatch(r"search(-\w+)?|graphql|ui-telemetry", last))


# --- reading (in a notebook) ------------------------------------------------------------------


def read_activity(workspace: Workspace, last: int | None = None):
    """Return the requests to the workspace's server as a table, the newest last.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    last : int, optional
        Only so many of the newest requests.

    Returns
    -------
    pandas.DataFrame
        Columns ``time`` (UTC), ``user``, ``method``, ``path``, ``status``, ``duration``
        (milliseconds), ``address`` (as forwarded), ``host``, ``outcome`` (see `OUTCOMES`) and
        ``kind`` (see `KINDS`).
    """
    import pandas as pd

    path = workspace.activity
    older = [path.with_name(f"{path.name}.{number}") for number in range(FILES - 1, 0, -1)]
    lines = [
        json.loads(line)
        for file in (*older, path)
        if file.is_file()
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    names = ["time", "user", "method", "path", "status", "duration", "address", "host", "outcome"]
    table = pd.DataFrame(lines, columns=names)
    table["time"] = pd.to_datetime(table["time"], unit="s", utc=True).dt.floor("s")
    table["kind"] = [
        kind_of(line["method"], line["path"]) if line["outcome"] in ("ok", "error") else "rejected"
        for line in lines
    ]
    return table if last is None else table.tail(last)


def summarize_activity(activity):
    """Count requests by user: per kind, errors, and what was turned away and why.

    Parameters
    ----------
    activity : pandas.DataFrame
        From `read_activity`.

    Returns
    -------
    pandas.DataFrame
        One row per user; ``(none)`` is who gave no name.
    """
    import pandas as pd

    titles = {name: f"rejected: {name}" for name in OUTCOMES if name != "ok"}
    titles |= {"error": "errors", "too many": "too many sign-ins"}
    users = activity["user"].fillna("(none)")
    kinds = pd.crosstab(users, activity["kind"]).reindex(columns=KINDS[:-1], fill_value=0)
    outcomes = pd.crosstab(users, activity["outcome"]).reindex(columns=titles, fill_value=0)
    table = pd.concat([kinds, outcomes.rename(columns=titles)], axis=1)
    return table.rename_axis(index="user", columns=None)
