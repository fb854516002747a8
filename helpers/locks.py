"""One at a time: a step of a workspace belongs to whoever runs it until that process ends.

The locks are the operating system's: they go with the process, however it ends.
"""

import json
import os
import time
from collections.abc import Callable, Iterable

import psutil
from filelock import FileLock, Timeout

from helpers.series import STEPS
from helpers.workspace import ProjectError, Workspace, atomic_path

_held: dict[str, FileLock] = {}  # by path


class BusyError(ProjectError):
    """Somebody else runs a step."""


def hold(
    workspace: Workspace,
    numbers: Iterable[str],
    who: str,
    wait: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Take the locks of steps, and hold them until this process ends.

    What this process has already, or one that it was started by, counts as taken: a cell that is
    run again does not wait for itself, nor a notebook for the series that runs it.

    Parameters
    ----------
    who : str
        What others who come meanwhile are told.
    wait : bool
        Whether to wait for others, and `say` for whom.

    Raises
    ------
    BusyError
        If somebody else has one, and this is not to wait.
    """
    workspace.locks.mkdir(exist_ok=True)
    # In order: two who want the same steps never wait for each other.
    for number in sorted(numbers):
        path = workspace.locks / f"{number}.lock"
        # Not in the lock's own file, which Windows lets nobody else read.
        note = path.with_suffix(".json")
        if str(path) in _held:
            continue
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
            if holder.get("pid") in {parent.pid for parent in psutil.Process().parents()}:
                continue
            by = "{who} (process {pid}, since {since})".format(**holder) if holder else "another"
            busy = f"{STEPS[number].name} of {workspace.root} is being run by {by}"
            if not wait:
                raise BusyError(f"{busy}. Try again when that has ended.") from None
            say(f"{busy}: waiting until that has ended.")
            lock.acquire()
        _held[str(path)] = lock
        with atomic_path(note) as temporary:
            holder = {"who": who, "pid": os.getpid(), "since": time.strftime("%H:%M:%S")}
            temporary.write_text(json.dumps(holder), encoding="utf-8")
