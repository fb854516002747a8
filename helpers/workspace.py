"""Where things live: the workspace folder, the settings, Colab or local.

Every notebook starts here. This module imports no other helper and nothing heavy, so that
`helpers.colab` can use it before anything is installed.
"""

import hashlib
import json
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
class Setting:
    """One parameter of the notebooks.

    Attributes
    ----------
    kind : type
        What the value must be; ``list`` also takes a JSON list or a comma-separated text, the
        only forms that the papermill command line can pass.
    description : str
        One line for the README's table of settings.
    environment : str or None
        Environment variable used when the parameter is None.
    optional : bool
        Whether None is a value of its own ("use the default").
    minimum, maximum : float or None
        Bounds of the value, or of each item of a list; both included.
    choices : tuple or None
        The only values allowed.
    excluded : tuple
        Values between the bounds that are not allowed.
    items : type
        What a list must hold: texts, or numbers, of which there must be one at least.
    """

    kind: type
    description: str
    environment: str | None = None
    optional: bool = False
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple | None = None
    excluded: tuple = ()
    items: type = str


SETTINGS = {
    "WORKSPACE": Setting(
        str, "folder for data, runs, models and executed notebooks", "WORKSPACE", optional=True
    ),
    "SEED": Setting(
        int,
        "governs the split (and with it the folds), the initial weights and the order of the rows",
        minimum=0,
        maximum=2**32 - 1,
    ),
    "DATA_SOURCE": Setting(str, "`auto`, `uci`, `sample`, or a path or URL of a CSV"),
    "TARGET": Setting(str, "name of the column to predict"),
    "CATEGORICAL": Setting(
        list, "columns whose numbers are codes (default: inferred)", optional=True
    ),
    "DROP": Setting(list, "columns to leave out, such as identifiers", optional=True),
    "TEST_SIZE": Setting(
        float, "share of the rows held out for the test", minimum=0.05, maximum=0.5
    ),
    "FILTERS": Setting(int, "filters of the convolution", minimum=1, maximum=1024),
    "KERNEL_SIZE": Setting(int, "neighbouring inputs seen by one filter", minimum=1, maximum=64),
    "L2": Setting(float, "weight penalty of the network", minimum=0, maximum=1),
    "LEARNING_RATE": Setting(
        float, "step size of Adam at the start; it falls along a cosine", minimum=1e-6, maximum=1
    ),
    "BATCH_SIZE": Setting(int, "rows per training step", minimum=1),
    "EPOCHS": Setting(int, "passes over the training rows; small tables get more", minimum=1),
    "VALIDATION_SIZE": Setting(
        float, "share of the training rows held out in the rehearsal", minimum=0.05, maximum=0.5
    ),
    "CLASS_WEIGHT_POWER": Setting(
        float, "0: no class weights, 1: balanced, between: milder", minimum=0, maximum=1
    ),
    "N_BINS": Setting(
        int,
        "quantile bins of the piecewise-linear codes of each number; 0: no codes",
        minimum=0,
        maximum=64,
    ),
    "C_EXPONENTS": Setting(list, "powers of two tried for C", minimum=-60, maximum=60, items=float),
    "GAMMA_EXPONENTS": Setting(
        list, "powers of two tried for gamma", minimum=-60, maximum=60, items=float
    ),
    "BEYOND_EDGES": Setting(
        bool,
        "go on beyond the grid where the best pair lies on its edge "
        "(default: on for tables other than the students')",
        optional=True,
    ),
    "CV_FOLDS": Setting(int, "folds of the cross-validation", minimum=2, maximum=20),
    "N_JOBS": Setting(int, "threads of the search; -1: one per core", minimum=-1, excluded=(0,)),
    "MIN_GAIN": Setting(
        float,
        "accuracy a candidate must have above the majority class",
        minimum=0,
        maximum=1,
    ),
    "MAX_LOSS": Setting(
        float,
        "macro F1 a candidate may be below the version in Production",
        minimum=0,
        maximum=1,
    ),
    "ALLOW_REPLACE": Setting(
        bool, "promote even where Production was trained on another kind of table"
    ),
    "MIN_ROBUSTNESS": Setting(
        float,
        "share of attacked rows whose answer must hold; 0: any",
        minimum=0,
        maximum=1,
    ),
    "ATTACKED_ROWS": Setting(
        int, "test rows on which robustness is measured; 0: not measured", minimum=0
    ),
    "REASON": Setting(str, "why the candidates are promoted, for the history"),
    "PROMOTED_BY": Setting(
        str, "who promotes, for the history (default: the user name)", optional=True
    ),
    "DEMO_TRAFFIC": Setting(bool, "send the test rows and their labels as a first day of traffic"),
    "PERIOD": Setting(
        str,
        "length of a period of the monitoring: hour, day, week or month",
        choices=("h", "D", "W", "M"),
    ),
    "DRIVE_FOLDER": Setting(
        str,
        "folder of the safe copy, also `MyDrive/…`; `off`: none (default in Colab: by USE_DRIVE)",
        "DRIVE_FOLDER",
        optional=True,
    ),
    "EXPOSE_UI": Setting(
        str,
        "show the MLflow UI at a public address; `auto`: where there is a token",
        choices=("auto", True, False),
    ),
}


def as_list(value):
    """Read a list given as a list, a JSON text or a comma-separated text."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _is_kind(value, kind):
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _within(value, low, high):
    # Written so that NaN, which is neither below nor above, is refused too.
    return (low is None or value >= low) and (high is None or value <= high)


def _checked_items(name, values, setting):
    low, high = setting.minimum, setting.maximum
    if setting.items is str:
        good, wanted = all(isinstance(item, str) for item in values), "a list of texts"
    else:
        with suppress(ValueError):
            values = [float(item) if isinstance(item, str) else item for item in values]
        numbers = all(_is_kind(item, float) and _within(item, low, high) for item in values)
        good = numbers and len(values) > 0
        wanted = f"a list of one or more numbers between {low:g} and {high:g}"
    if not good:
        raise ParameterError(f"{name} must be {wanted} ({setting.description}), not {values!r}.")
    return values


def _checked(name, value):
    setting = SETTINGS[name]
    if value is None and setting.environment and os.environ.get(setting.environment):
        value = os.environ[setting.environment]
    if value is None and setting.optional:
        return None
    if setting.kind is list:
        value = as_list(value)
    if setting.choices is not None:
        if value not in setting.choices:
            allowed = ", ".join(map(repr, setting.choices))
            raise ParameterError(
                f"{name} must be one of {allowed} ({setting.description}), not {value!r}."
            )
        return value
    wanted = {str: "a text", int: "a whole number", float: "a number", list: "a list"}
    if not _is_kind(value, setting.kind):
        raise ParameterError(
            f"{name} must be {wanted.get(setting.kind, 'True or False')} "
            f"({setting.description}), not {value!r}."
        )
    if setting.kind is list:
        return _checked_items(name, value, setting)
    low, high = setting.minimum, setting.maximum
    if not _within(value, low, high) or value in setting.excluded:
        bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        but = "".join(f" and not {each}" for each in setting.excluded)
        raise ParameterError(
            f"{name} must be {bounds}{but} ({setting.description}), not {value!r}."
        )
    if setting.kind is float:
        return float(value)
    return value


def check_parameters(**parameters):
    """Check the parameters of a notebook and fill in environment variables.

    Parameters
    ----------
    **parameters
        Names from `SETTINGS` with the values of the notebook's ``parameters`` cell.

    Returns
    -------
    dict
        The values to use: an explicit value wins over the environment variable, which wins
        over the default. Lists given as text are lists here.

    Raises
    ------
    ParameterError
        If a value is of the wrong type or out of bounds; names the parameter.
    """
    return {name: _checked(name, value) for name, value in parameters.items()}


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
    def series(self):
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
