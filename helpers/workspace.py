"""Where things live: the workspace folder, Colab or local.

Every notebook starts here. This module imports no other helper and nothing heavy, so that
`helpers.colab` can use it before anything is installed.
"""

import hashlib
import os
import sys
import tempfile
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

DRIVE = Path("/content/drive")  # where Colab shows Google Drive
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


@dataclass(frozen=True)
class Workspace:
    """The folder that holds everything the series makes.

    Attributes
    ----------
    root : pathlib.Path
        The folder itself, absolute.
    """

    root: Path

    @property
    def id(self):
        """Name that tells this workspace's runs from others' on a team's server, 32 hex digits.

        Made when it is first asked for; its safe copy takes it to other machines.
        """
        path = self.root / "series"
        with suppress(FileExistsError), path.open("x", encoding="ascii") as file:
            file.write(uuid.uuid4().hex)
        return path.read_text(encoding="ascii")

    @property
    def data(self):
        """Folder of the prepared split (notebook 01)."""
        return self.root / "data"

    @property
    def tracking_db(self):
        """SQLite file of the local MLflow server."""
        return self.root / "tracking.db"

    @property
    def artifacts(self):
        """Folder of the local MLflow server's artifacts."""
        return self.root / "mlruns"

    @property
    def executed(self):
        """Folder of the notebooks executed by ``python -m helpers.run``."""
        return self.root / "executed"

    @property
    def search(self):
        """Folder of the finished parts of grid searches (notebook 03)."""
        return self.root / "search"

    @property
    def training(self):
        """Folder of the checkpoints of trainings that are not finished (notebook 02)."""
        return self.root / "training"

    @property
    def server(self):
        """Folder of the local MLflow server's log, lock, state and users."""
        return self.root / ".server"

    @property
    def scoring(self):
        """Folder of the scoring server's log, lock and state."""
        return self.root / ".scoring"

    @property
    def batch(self):
        """Folder of files to score, and scored, of notebook 05."""
        return self.root / "batch"

    @property
    def scored_rows(self):
        """SQLite file of what production was asked and answered, labels and alerts."""
        return self.root / "scored.db"

    @property
    def access_rules(self):
        """File that says under which names and to whom the server answers."""
        return self.server / "access.json"

    @property
    def activity(self):
        """File of who did what on the server; older ones end in ``.1``, ``.2`` and so on."""
        return self.server / "activity.jsonl"

    @property
    def passwords(self):
        """File of the passwords that were made here, readable by its owner only."""
        return self.root / "passwords.json"


def open_workspace(path=None):
    """Open the workspace, making its folders if they are missing.

    Parameters
    ----------
    path : str or path-like, optional
        Where; default: the environment variable ``WORKSPACE``, else ``./workspace``.

    Returns
    -------
    Workspace

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
def atomic_path(path):
    """Give a temporary path that takes the place of `path` only when the block succeeds.

    Parameters
    ----------
    path : pathlib.Path
        The file to write.

    Yields
    ------
    pathlib.Path
        A path in the same folder, to be written in the block.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(*paths):
    """Return the SHA-256 of the contents of files, in the order given (64 hex digits)."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def in_colab():
    """Tell whether this is a Colab runtime."""
    return "google.colab" in sys.modules


def is_interactive():
    """Tell whether a person can answer: a Jupyter or Colab front end, or a terminal.

    papermill and nbclient start every cell with ``allow_stdin`` off, front ends with it on
    (Jupyter messaging protocol, "execute_request").
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None:
        return sys.stdin is not None and sys.stdin.isatty()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return True
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin", False))


def is_batch():
    """Tell whether this is the kernel of a batch run, behind which there is no front end."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None and not is_interactive()
