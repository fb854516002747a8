"""Where things live: the workspace folder, Colab or local.

Every notebook starts here. This module imports no other helper and nothing heavy, so that
`helpers.colab` can use it before anything is installed.
"""

import hashlib
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

DRIVE = Path("/content/drive")  # where Colab shows Google Drive
PATIENCE = 5  # seconds for Colab's page to answer
PROJECT_ROOT = Path(__file__).resolve().parent.parent


class ProjectError(Exception):
    """An error with one clear message for the person at the keyboard.

    Jupyter shows the message alone, without a traceback through the helpers: what went wrong
    and the way out are both in the message.
    """

    def _render_traceback_(self):
        return [f"{type(self).__name__}: {self}"]


class ParameterError(ProjectError):
    """A parameter or setting has a value that cannot be used."""


class WorkspaceError(ProjectError):
    """The workspace folder cannot be used."""


class MissingStepError(ProjectError):
    """A notebook was started before the one that makes what it reads."""


class Workspace:
    """The folder that holds everything the series makes: where each thing is in it.

    Parameters
    ----------
    root : pathlib.Path
        The folder itself, absolute.
    """

    def __init__(self, root: Path):
        self.root = root
        self.data = root / "data"  # the prepared split (notebook 01)
        self.training = root / "training"  # backups of unfinished trainings (notebook 02)
        self.search = root / "search"  # finished parts of grid searches (notebook 03)
        self.batch = root / "batch"  # files to score, and scored (notebook 05)
        self.executed = root / "executed"  # notebooks executed by `python -m helpers.run`
        self.locks = root / ".locks"  # of the steps: who runs each
        # The local MLflow server.
        self.tracking_db = root / "tracking.db"  # SQLite
        self.artifacts = root / "mlruns"
        self.server = root / ".server"  # its log, lock, state and users
        self.access_rules = self.server / "access.json"  # its names, and who may do what
        self.activity = self.server / "activity.jsonl"  # who did what; older: .1, .2 and so on
        self.passwords = root / "passwords.json"  # made here; readable by its owner only
        # The scoring server.
        self.scoring = root / ".scoring"  # its log, lock and state
        self.scored_rows = root / "scored.db"  # SQLite: questions, answers, labels, alerts

    @property
    def id(self) -> str:
        """Name that tells this workspace's runs from others' on a team's server, 32 hex digits.

        Made when it is first asked for; its safe copy takes it to other machines.
        """
        path = self.root / "series"
        with suppress(FileExistsError), path.open("x", encoding="ascii") as file:
            file.write(uuid.uuid4().hex)
        return path.read_text(encoding="ascii")


def open_workspace(path: str | os.PathLike | None = None) -> Workspace:
    """Open the workspace, making its folders if they are missing.

    Without a path it is where the environment variable ``WORKSPACE`` says, else in
    ``./workspace``.

    Raises
    ------
    ParameterError
        If `path` is neither a text nor a path.
    WorkspaceError
        If the folder cannot be made or written to, or is in Google Drive.
    """
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise ParameterError(
            f"WORKSPACE must be the path of a folder, not {path!r}. A folder whose name is a "
            "number can be given as './2024'."
        )
    root = Path(path or os.environ.get("WORKSPACE") or "workspace").expanduser().resolve()
    if in_colab() and root.is_relative_to(DRIVE):
        raise WorkspaceError(
            f"The workspace {root} is in Google Drive, where MLflow's database gets damaged. Leave "
            f"WORKSPACE as it is and write DRIVE_FOLDER = {str(root)!r}: the work is done on this "
            "machine's disk and saved there after each step."
        )
    workspace = Workspace(root)
    try:
        if not root.exists():
            root.mkdir(parents=True)
            # It holds passwords and rows: where it lies in a repository they are not committed.
            (root / ".gitignore").write_text("*\n", encoding="ascii")
        for folder in (root, workspace.data, workspace.artifacts, workspace.executed):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise WorkspaceError(
            f"The workspace {root} is not writable ({error.strerror}). Choose another folder "
            "with the parameter or environment variable WORKSPACE."
        ) from None
    return workspace


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path that takes the place of `path` only when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(*paths: str | os.PathLike) -> str:
    """Return the SHA-256 of the contents of files, in the order given (64 hex digits)."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def in_colab() -> bool:
    """Tell whether this is a Colab runtime: one of its kernels, or a program started there."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def _shell():
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def kernel():
    """Return the kernel that this code runs in; None outside a notebook."""
    return getattr(_shell(), "kernel", None)


def is_interactive() -> bool:
    """Tell whether a person can answer: a Jupyter or Colab front end, or a terminal.

    papermill and nbclient start every cell with ``allow_stdin`` off, front ends with it on
    (Jupyter messaging protocol, "execute_request").
    """
    if kernel():
        return bool(kernel().get_parent("shell").get("content", {}).get("allow_stdin", False))
    return _shell() is not None or (sys.stdin is not None and sys.stdin.isatty())


def is_batch() -> bool:
    """Tell whether this is the kernel of a batch run, behind which there is no front end."""
    return kernel() is not None and not is_interactive()


def colab_front_end() -> bool:
    """Tell whether Colab's own page is behind this kernel: its secrets, its port proxy.

    Kernels of batch runs (papermill, google-colab-cli) have none and are not asked. Other front
    ends, such as that of VS Code, leave the question unanswered; it is put once in a cell.
    """
    if not in_colab() or kernel() is None or is_batch():
        return False
    return _page_answers(kernel().get_parent("shell")["header"]["msg_id"])


@lru_cache(maxsize=1)
def _page_answers(cell: str) -> bool:
    from google.colab import errors, output

    try:
        return output.eval_js("1", timeout_sec=PATIENCE) == 1
    except errors.Error:
        return True  # an answer, too
