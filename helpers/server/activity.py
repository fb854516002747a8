"""The activity log of the MLflow server: who did what, and what was turned away.

The server process writes one JSON line per request (`ActivityLog`); notebooks read them back
(`read_activity`, `summarize_activity`). What users did and what came from others lies in files
of their own: whoever is not signed in pushes no user's line out.
"""

import asyncio
import json
import logging
import os
import re
from logging.handlers import RotatingFileHandler
from pathlib import Path

from helpers.display import notice
from helpers.server.private_files import private
from helpers.workspace import Workspace

MAX_BYTES = 5_000_000  # of one file, some 25,000 requests
FILES = 5  # the current one and four older ones
NOT_SIGNED_IN = "not_signed_in.jsonl"  # beside the users' file
# Bytes of a text in a line; a name or a path can be as long as a request's header.
LONGEST = {"user": 200, "method": 20, "path": 600, "address": 80, "host": 200}
REPEATS = 10  # seconds in which equal requests from outside become one line
MOST_DIFFERENT = 200  # lines in that time; what is more is counted in one
MOST_USERS = 10  # shown in tables and pictures; the rest is added up
OTHERS = "(others)"
NOBODY = "(none)"  # who gave no name

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
        with open(self.baseFilename, "ab+", opener=private) as file:
            # A line that a full disk or the machine's end cut off stays a line of its own.
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
                file.write(b"\n")
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=private)


class ActivityLog:
    """Writes requests to rotating files: users' to one, all others' to a second one.

    Of those, equal ones (but for their path) become one line every `REPEATS` seconds: the first
    request's, then one with the number of the rest.
    """

    def __init__(self, path: Path):
        self._users, self._others = (
            _PrivateRotatingFile(file, maxBytes=MAX_BYTES, backupCount=FILES - 1, encoding="utf-8")
            for file in (path, path.with_name(NOT_SIGNED_IN))
        )
        self._repeats = {}  # by what is equal in them: the line to be written, or None

    def write(self, signed_in: bool = True, **request) -> None:
        """Note one request; control characters in it are escaped.

        Parameters
        ----------
        signed_in : bool
            Whether a user sent it.
        **request
            Columns of `read_activity`.
        """
        line = {
            name: _cut(value, LONGEST[name]) if value and name in LONGEST else value
            for name, value in request.items()
        }
        if signed_in:
            _write_to(self._users, line)
        else:
            self._sum_up(line)

    def _sum_up(self, line: dict) -> None:
        if not self._repeats:
            asyncio.get_running_loop().call_later(REPEATS, self.flush)
        same = tuple(line[name] for name in ("user", "method", "outcome", "address", "host"))
        if same not in self._repeats and len(self._repeats) >= MOST_DIFFERENT:
            same, line = line["outcome"], line | {"user": OTHERS, "address": "", "host": ""}
        if same not in self._repeats:
            self._repeats[same] = None
            _write_to(self._others, line)
            return
        before = self._repeats[same] or {"first": line["time"], "count": 0}
        self._repeats[same] = line | {"first": before["first"], "count": before["count"] + 1}

    def flush(self) -> None:
        """Write what was only counted so far."""
        for line in filter(None, self._repeats.values()):
            _write_to(self._others, line)
        self._repeats.clear()


def _write_to(file: logging.Handler, line: dict) -> None:
    file.handle(logging.makeLogRecord({"msg": json.dumps(line)}))


def _cut(text: str, size: int) -> str:
    """Cut a text so that it takes at most `size` bytes in a line."""
    text = text[:size]
    while len(json.dumps(text)) > size:
        text = text[: len(text) * 9 // 10]
    return text


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


def read_activity(workspace: Workspace):
    """Return the requests to the workspace's server as a table, the newest last.

    Returns
    -------
    pandas.DataFrame
        Columns ``time`` (UTC), ``user``, ``method``, ``path``, ``status``, ``duration``
        (milliseconds), ``address`` (as forwarded), ``host``, ``outcome`` (see `OUTCOMES`),
        ``count`` (of equal requests of people who were not signed in; ``first`` is then the time
        of the first, ``time`` of the last) and ``kind`` (see `KINDS`).
    """
    import pandas as pd

    lines = [
        line
        for path in (workspace.activity, workspace.activity.with_name(NOT_SIGNED_IN))
        for file in (*(Path(f"{path}.{number}") for number in range(FILES - 1, 0, -1)), path)
        if file.is_file()
        for line in _read_lines(file)
    ]
    names = ["time", "user", "method", "path", "status", "duration", "address", "host", "outcome"]
    table = pd.DataFrame(lines, columns=[*names, "first", "count"])
    table = table.sort_values("time", kind="stable", ignore_index=True)
    table["count"] = table["count"].fillna(1).astype(int)
    for name in ("first", "time"):
        times = table[name].fillna(table["time"]).astype(float)
        table[name] = pd.to_datetime(times, unit="s", utc=True).dt.floor("s")
    table["kind"] = [
        kind_of(method, path) if outcome in ("ok", "error") else "rejected"
        for method, path, outcome in table[["method", "path", "outcome"]].itertuples(index=False)
    ]
    return table


def _read_lines(file: Path) -> list[dict]:
    """Read the lines of a file that can be read; say so if one cannot."""
    lines, damaged = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and {"time", "method", "path", "outcome"} <= line.keys():
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        notice(
            f"{damaged} of {damaged + len(lines)} lines of {file} are damaged and left out here; "
            "the file stays as it is. To be rid of this message, move it to another folder.",
            "warning",
        )
    return lines


def summarize_activity(activity):
    """Count requests by user: per kind, errors, and what was turned away and why, if any was.

    Parameters
    ----------
    activity : pandas.DataFrame
        From `read_activity`.

    Returns
    -------
    pandas.DataFrame
        One row for each of the `MOST_USERS` with most requests, one for all others; ``(none)``
        is who gave no name.
    """
    import pandas as pd

    titles = {name: f"rejected: {name}" for name in OUTCOMES if name != "ok"}
    titles |= {"error": "errors", "too many": "too many sign-ins"}
    kinds = count_by_user(activity, "kind").reindex(columns=KINDS[:-1], fill_value=0)
    outcomes = count_by_user(activity, "outcome").reindex(columns=titles, fill_value=0)
    table = pd.concat([kinds, outcomes.rename(columns=titles)], axis=1)
    table = table.loc[:, table.any()]
    return table.rename_axis(index="user", columns=None)


def count_by_user(activity, column: str):
    """Count requests by user and the values of a column, for the table and the picture.

    Returns
    -------
    pandas.DataFrame
        The users with most requests, the busiest first, at last ``(others)``.
    """
    import pandas as pd

    users = activity["user"].fillna(NOBODY)
    count = activity.get("count", pd.Series(1, activity.index))
    # Whoever was answered comes first: a stranger's many tries hide no user.
    answered = count.where(activity["kind"] != "rejected", 0)
    amounts = pd.DataFrame({"answered": answered, "all": count}).groupby(users).sum()
    amounts = amounts.sort_values(["answered", "all"], ascending=False, kind="stable")
    shown = amounts.index[amounts.index != OTHERS][:MOST_USERS]
    users = users.where(users.isin(shown), OTHERS)
    counts = count.groupby([users, activity[column]]).sum().unstack(fill_value=0)
    return counts.reindex([name for name in (*shown, OTHERS) if name in counts.index])
