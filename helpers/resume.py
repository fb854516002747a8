"""Which steps of the series are done and unchanged: ``python -m helpers.run --resume``."""

import ast
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from IPython.core.inputtransformer2 import TransformerManager

from helpers.series import MODELS, STEPS
from helpers.workspace import (
    PROJECT_ROOT,
    MissingStepError,
    ProjectError,
    Workspace,
    atomic_path,
    file_digest,
)

HELPERS = PROJECT_ROOT / "helpers"
# Whether the UI is public, and where everything is: no result depends on that.
NO_RESULT = ("EXPOSE_UI", "WORKSPACE", "DRIVE_FOLDER")


# --- what a step depends on -------------------------------------------------------------------


def imported_modules(code: str) -> set[str]:
    """Return the names of the modules and packages of `helpers` that Python code imports."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("helpers.")}


def _files(module: str) -> list[Path]:
    # All of a package: its servers run files that nothing imports.
    files = (HELPERS / module).rglob("*")
    found = [path for path in files if path.is_file() and path.suffix != ".pyc"]
    return sorted(found) or [HELPERS / f"{module}.py"]


def _files_behind(code: str) -> list[Path]:
    """Return the files of the helpers that code needs, those that they need included."""
    found, new = {}, imported_modules(code)
    while new:
        found |= {module: _files(module) for module in new}
        sources = [p.read_text("utf-8") for m in new for p in found[m] if p.suffix == ".py"]
        new = set().union(*map(imported_modules, sources)) - set(found)
    return [path for module in sorted(found) for path in found[module]]


def _code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join(map(TransformerManager().transform_cell, code))


def fingerprints(parameters: dict[str, dict]) -> dict[str, str]:
    """Digest what each step depends on: code, helpers, parameters, data, earlier steps.

    Parameters
    ----------
    parameters : dict of str to dict
        Those given, by number of the step.
    """
    digests = {}
    for number, step in STEPS.items():
        code = _code(step.path)
        own = {name: v for name, v in parameters[number].items() if name not in NO_RESULT}
        parts = [code, file_digest(*_files_behind(code)), json.dumps(own, sort_keys=True)]
        source = str(own.get("DATA_SOURCE", ""))
        if Path(source).is_file():
            parts.append(file_digest(source))
        parts += [digests[need] for need in step.needs]
        digests[number] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return digests


# --- what is done -----------------------------------------------------------------------------


class Record:
    """Which steps are done, kept in ``WORKSPACE/executed/state.json``."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.path = workspace.executed / "state.json"

    def read(self) -> dict[str, str | None]:
        """Return the fingerprints of the steps done, by number.

        Raises
        ------
        helpers.workspace.ProjectError
            If the file is damaged.
        """
        try:
            state = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            state = None
        if not isinstance(state, dict):
            raise ProjectError(
                f"{self.path} is damaged and stays as it is. Delete it, and every step runs again."
            )
        return state

    def set(self, number: str, fingerprint: str | None) -> None:
        """Note that a step is done, or with None that it is not."""
        self.workspace.locks.mkdir(exist_ok=True)
        # Others may run other steps meanwhile.
        with FileLock(self.workspace.locks / "state.lock"), atomic_path(self.path) as path:
            state = self.read() | {number: fingerprint}
            path.write_text(json.dumps(state, indent=2), encoding="utf-8")

    def reason_to_run(self, number: str, fingerprint: str) -> str | None:
        """Tell why a step with this fingerprint cannot be skipped; None if it can."""
        known = self.read().get(number)
        if known is None:
            return "not finished yet"
        if known != fingerprint:
            return "its notebook, helpers, parameters, data or an earlier step changed"
        return None if has_results(number, self.workspace) else "its results are gone"


def has_results(number: str, workspace: Workspace) -> bool:
    """Tell whether what a step makes is there: the split, its runs, or models in Production."""
    # Only here: they take MLflow along, for which notebook 01 need not wait.
    from helpers import registry, tracking
    from helpers.data import load_split

    try:
        split = load_split(workspace)
        if not STEPS[number].needs:
            return True
        tracking.connect(workspace, keep=False)
        trained = [model for model in MODELS.values() if model.step == number]
        if not trained:
            return all(map(registry.production_version, MODELS))
        digest = split.manifest["split_digest"]
        return all(tracking.latest_run(each.experiment, each.run_name, digest) for each in trained)
    except MissingStepError:
        return False


def steps_to_run(
    chosen: list[str], digests: dict[str, str], record: Record, report: Callable[[str], None]
) -> list[str]:
    """Leave out the steps that are done and unchanged; report why each runs or does not."""
    running = []
    for number in chosen:
        step = STEPS[number]
        again = [STEPS[need].name for need in step.needs if need in running]
        reason = record.reason_to_run(number, digests[number])
        if reason is None and again:
            reason = f"it needs {' and '.join(again)}"
        report(f"{step.name}: " + (f"runs, {reason}" if reason else "skipped, done and unchanged"))
        if reason:
            running.append(number)
    return running
