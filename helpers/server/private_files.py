"""Files that only their owner may read."""

import json
import os
from pathlib import Path

from filelock import FileLock

from helpers.workspace import atomic_path


def private(path, flags):
    """Open a file so that only its owner may read it; an ``opener`` for `open`."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, content: dict) -> None:
    """Write JSON, whole or not at all, into a file that only its owner may read."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", opener=private) as file,
    ):
        json.dump(content, file, indent=2)


def private_lock(path: Path) -> FileLock:
    """Return the lock of that name; its folder is made if it is missing, closed to others."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(path)
