"""Run the series of notebooks headlessly with papermill.

``python -m helpers.run [--workspace DIR] [--data SOURCE] [-p NAME VALUE]... [--only 02,03]
[--resume]``: executes the notebooks, those that do not need each other side by side, writes
them to ``WORKSPACE/executed/`` and ends with a table of what was trained and what is in
Production. Exit code 0; 1 with the notebook, the cell and the error; 2 for a wrong command
line; 130 after an interrupt.
"""

import argparse
import difflib
import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil

from helpers import server
from helpers.display import STDERR
from helpers.series import MODELS, STEPS
from helpers.server import credentials
from helpers.settings import SETTINGS, check_parameters
from helpers.workspace import (
    PROJECT_ROOT,
    ParameterError,
    ProjectError,
    atomic_path,
    file_digest,
    open_workspace,
)

SUMMARY = ("accuracy", "f1_macro", "log_loss")


# Whether the UI is public, and where the copy is: no result depends on that.
NO_RESULT = ("EXPOSE_UI", "DRIVE_FOLDER")


class NotebookFailedError(ProjectError):
    """A notebook of the series ended with an error."""


# --- parameters -------------------------------------------------------------------------------


def read_value(text):
    """Read a value of the command line: JSON, True, False, None, or else a text.

    Parameters
    ----------
    text : str

    Returns
    -------
    object
    """
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def declared_parameters(step):
    """Return the names in a notebook's ``parameters`` cell.

    Parameters
    ----------
    step : Step

    Returns
    -------
    set of str
    """
    import papermill

    return set(papermill.inspect_notebook(step.path))


def distribute(parameters, steps):
    """Give each notebook those parameters that it declares.

    Parameters
    ----------
    parameters : dict
    steps : dict of str to Step

    Returns
    -------
    dict of str to dict
        Parameters by number of the step.

    Raises
    ------
    ParameterError
        If no notebook has a parameter of that name, or its value cannot be used.
    """
    declared = {number: declared_parameters(step) for number, step in steps.items()}
    every = set().union(*declared.values())
    for name in parameters:
        if name not in every:
            close = difflib.get_close_matches(name.upper(), every, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ParameterError(
                f"No notebook has a parameter {name}.{hint} There are: {', '.join(sorted(every))}."
            )
    check_parameters(**{name: value for name, value in parameters.items() if name in SETTINGS})
    return {
        number: {name: value for name, value in parameters.items() if name in names}
        for number, names in declared.items()
    }


# --- what is done already ---------------------------------------------------------------------


def _source_of_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return json.dumps([(cell["cell_type"], "".join(cell["source"])) for cell in cells])


def fingerprints(parameters):
    """Digest what each step depends on: notebook, helpers, parameters, data, earlier steps.

    Parameters
    ----------
    parameters : dict of str to dict
        From `distribute`, for all steps.

    Returns
    -------
    dict of str to str
    """
    helpers = file_digest(*sorted(Path(__file__).parent.rglob("*.py")))
    digests = {}
    for number, step in STEPS.items():
        own = parameters.get(number, {})
        own = {name: value for name, value in own.items() if name not in NO_RESULT}
        parts = [_source_of_cells(step.path), helpers, json.dumps(own, sort_keys=True)]
        source = str(own.get("DATA_SOURCE", ""))
        if source and Path(source).is_file():
            parts.append(file_digest(source))
        parts += [digests[need] for need in step.needs]
        digests[number] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return digests


class Record:
    """Which steps are done, kept in ``WORKSPACE/executed/state.json``.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    """

    def __init__(self, workspace):
        self.workspace = workspace
        self.path = workspace.executed / "state.json"
        self._lock = threading.Lock()

    def read(self):
        """Return the fingerprints of the steps done, by number."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}

    def set(self, number, fingerprint):
        """Note that a step is done, or with None that it is not."""
        with self._lock:
            state = self.read()
            state[number] = fingerprint
            with atomic_path(self.path) as path:
                path.write_text(json.dumps(state, indent=2), encoding="utf-8")

    def reason_to_run(self, number, fingerprint):
        """Tell why a step cannot be skipped, or None if it can.

        Parameters
        ----------
        number : str
        fingerprint : str
            Of what the step depends on now.

        Returns
        -------
        str or None
        """
        known = self.read().get(number)
        if known is None:
            return "not finished yet"
        if known != fingerprint:
            return "its notebook, parameters, data or an earlier step changed"
        if not _has_results(number, self.workspace):
            return "its results are gone"
        return None


def _has_results(number, workspace):
    from helpers import registry, tracking
    from helpers.data import load_split
    from helpers.workspace import MissingStepError

    try:
        split = load_split(workspace)
        if number == "01":
            return True
        tracking.connect(workspace, keep=False)
        if number in ("04", "05"):
            return all(registry.production_version(name) for name in MODELS)
        digest = split.manifest["split_digest"]
        return all(
            tracking.latest_run(model.experiment, model.run_name, digest)
            for model in MODELS.values()
            if model.step == number
        )
    except MissingStepError:
        return False


def select_steps(only, resume, digests, record, report):
    """Choose the steps to run.

    Parameters
    ----------
    only : list of str or None
        Numbers asked for.
    resume : bool
        Leave out what is done and unchanged.
    digests : dict of str to str
        From `fingerprints`.
    record : Record
    report : callable
        Takes the lines that say what is skipped and why the others run.

    Returns
    -------
    list of str
    """
    chosen = [number for number in STEPS if not only or number in only]
    if not resume:
        return chosen
    running = []
    for number in chosen:
        reason = record.reason_to_run(number, digests[number])
        again = [STEPS[need].name for need in STEPS[number].needs if need in running]
        if reason is None and again:
            reason = f"it needs {' and '.join(again)}"
        if reason is None:
            report(f"{STEPS[number].name}: skipped, done and unchanged")
        else:
            report(f"{STEPS[number].name}: runs, {reason}")
            running.append(number)
    return running


# --- running ----------------------------------------------------------------------------------


def _describe_failure(name, error):
    """Name the notebook, the cell and the error."""
    from papermill.exceptions import PapermillExecutionError

    if not isinstance(error, PapermillExecutionError):
        return f"{name}: {type(error).__name__}: {error}"
    first_line = next((line for line in error.source.splitlines() if line.strip()), "")
    return (
        f"{name}, cell {error.cell_index + 1} ({first_line.strip()[:70]}): "
        f"{error.ename}: {error.evalue}"
    )


def execute(step, parameters, workspace, position=0):
    """Execute one notebook into ``WORKSPACE/executed/``.

    Parameters
    ----------
    step : Step
    parameters : dict
    workspace : helpers.workspace.Workspace
    position : int
        Line of its progress bar.

    Raises
    ------
    NotebookFailedError
        Names the notebook, the cell and the error. The executed notebook is kept, with the
        error at its top.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError

    bar = {"desc": step.name, "position": position, "disable": not sys.stderr.isatty()}
    output = workspace.executed / f"{step.name}.ipynb"
    try:
        papermill.execute_notebook(
            step.path,
            output,
            parameters={**parameters, "WORKSPACE": str(workspace.root)},
            kernel_name="python3",
            cwd=PROJECT_ROOT,
            progress_bar=bar,
        )
    except (
        PapermillException,
        PapermillExecutionError,
        DeadKernelError,
        NoSuchKernel,
        RuntimeError,
    ) as error:
        message = _describe_failure(step.name, error)
        raise NotebookFailedError(f"{message}\nThe notebook as far as it got: {output}") from error


def _interrupt_kernels():
    for child in psutil.Process().children(recursive=True):
        try:
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            continue


def run_steps(numbers, parameters, digests, workspace, report, save):
    """Execute steps, each as soon as those it needs are done.

    Parameters
    ----------
    numbers : list of str
    parameters : dict of str to dict
    digests : dict of str to str
    workspace : helpers.workspace.Workspace
    report : callable
    save : callable
        Called after each step that is done.

    Returns
    -------
    list of str
        Messages of the steps that failed; steps that need them are not run.
    """
    record, failures = Record(workspace), []
    waiting, running, done = list(numbers), {}, set(STEPS) - set(numbers)
    with ThreadPoolExecutor(len(STEPS) + 1) as pool:
        try:
            while waiting or running:
                for number in [n for n in waiting if set(STEPS[n].needs) <= done]:
                    waiting.remove(number)
                    # What needs it is out of date from here on, even if this run ends before.
                    for each in (number, *(n for n in STEPS if number in STEPS[n].needs)):
                        record.set(each, None)
                    report(f"{STEPS[number].name}: started")
                    task = pool.submit(
                        execute, STEPS[number], parameters[number], workspace, int(number) - 1
                    )
                    running[task] = (number, time.monotonic())
                if not running:
                    break
                if not waiting:
                    # What the summary needs takes seconds to import; the last step leaves time.
                    pool.submit(importlib.import_module, "helpers.registry")
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for task in finished:
                    number, start = running.pop(task)
                    seconds = time.monotonic() - start
                    if task.exception() is None:
                        record.set(number, digests[number])
                        done.add(number)
                        save()
                        report(f"{STEPS[number].name}: done in {seconds:.1f} s")
                    elif isinstance(task.exception(), NotebookFailedError):
                        failures.append(str(task.exception()))
                        report(f"{STEPS[number].name}: FAILED after {seconds:.1f} s")
                    else:
                        raise task.exception()
        except KeyboardInterrupt:
            _interrupt_kernels()
            raise
    for number in waiting:
        report(f"{STEPS[number].name}: not run, it needs what failed")
    return failures


# --- the end ----------------------------------------------------------------------------------


def summarize(workspace):
    """Say what is trained, its metrics, and what is in Production.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace

    Returns
    -------
    str
        A short table.
    """
    from helpers import registry, tracking

    uri = tracking.connect(workspace, keep=False)
    heads = f"{'accuracy':>9}{'macro F1':>9}{'log loss':>9}  {'newest run':<34}in Production"
    lines = [f"{'model':<20}{heads}"]
    for name, model in MODELS.items():
        run = tracking.latest_run(model.experiment, model.run_name)
        if run is None:
            lines.append(f"{name:<20}{'not trained yet':>27}")
            continue
        shown = "".join(f"{run.data.metrics[key]:>9.4f}" for key in SUMMARY)
        version = registry.production_version(name)
        place = f"version {version.version}" if version else "–"
        lines.append(f"{name:<20}{shown}  {run.info.run_id:<34}{place}")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        lines.append(f"Look at it: {uri}")
    else:
        lines.append(f"Look at it: {server.command_line(workspace)}")
    return "\n".join(lines)


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run", description="Run the series of notebooks headlessly."
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument(
        "--data", metavar="SOURCE", help="auto, uci, sample, or a path or URL of a CSV"
    )
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks; may be repeated",
    )
    parser.add_argument("--only", metavar="NN,NN", help="numbers of the notebooks to run")
    parser.add_argument("--resume", action="store_true", help="skip what is done and unchanged")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",") if options.only else None
    for number in options.only or []:
        if number not in STEPS:
            parser.error(f"--only: there is no notebook {number!r}; choose from {', '.join(STEPS)}")
    return options


def _parameters(options):
    parameters = {name: read_value(value) for name, value in options.parameter}
    if options.data:
        parameters["DATA_SOURCE"] = options.data
    source = parameters.get("DATA_SOURCE")
    if isinstance(source, str) and Path(source).is_file():
        # Notebooks run in the project's folder, not where the command was given.
        parameters["DATA_SOURCE"] = str(Path(source).resolve())
    folder = check_parameters(DRIVE_FOLDER=parameters.get("DRIVE_FOLDER"))["DRIVE_FOLDER"]
    if folder and folder != "off" and not folder.startswith("MyDrive/"):
        parameters["DRIVE_FOLDER"] = str(Path(folder).expanduser().resolve())
    return parameters


def _run(options):
    start = time.monotonic()

    def report(line):
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    parameters = _parameters(options)
    workspace = open_workspace(options.workspace or parameters.pop("WORKSPACE", None))
    every = distribute(parameters, STEPS)
    _separate_kernel_messages(workspace)
    save = _start_copy(workspace, parameters.get("DRIVE_FOLDER"))
    with_models = not options.only or set(options.only) != {"01"}
    if with_models:
        server.prepare(workspace, keep=False)
    digests = fingerprints(every)
    numbers = select_steps(options.only, options.resume, digests, Record(workspace), report)
    with _exposed_ui(workspace, parameters, report) if with_models else nullcontext():
        try:
            failures = run_steps(numbers, every, digests, workspace, report, save)
        finally:
            # After an interrupt, too: what was finished until then, and which runs were not.
            save()
    if with_models:
        print(f"\n{summarize(workspace)}", flush=True)
    for failure in failures:
        print(f"\nFAILED: {failure}", file=sys.stderr, flush=True)
    return 1 if failures else 0


def _start_copy(workspace, folder):
    """Bring the workspace up to its safe copy, where there is one; return how to save it."""
    if folder is None:
        return lambda: None
    # Only here: it takes pandas along.
    from helpers.colab import safe_copy

    return safe_copy.start(workspace, folder, "helpers.run").save


@contextmanager
def _exposed_ui(workspace, parameters, report):
    """Show the UI at a public address for the whole run, where that is wanted.

    The notebooks find this tunnel; one that a notebook opens ends with its kernel.
    """
    expose = parameters.get("EXPOSE_UI", "auto")
    if not expose or credentials.find_secret(credentials.NGROK_TOKEN) is None:
        yield
        return
    from helpers.server import tunnel

    def show():
        try:
            report(str(tunnel.show_ui(workspace, expose, keep=False)))
        except ProjectError as error:
            # The notebook that asks for it will fail with the same message.
            report(f"The MLflow UI is not public: {error}")

    opening = threading.Thread(target=show)
    opening.start()
    try:
        yield
    finally:
        opening.join()


def _separate_kernel_messages(workspace):
    """Send what kernels and libraries write to the error stream to a file of its own.

    TensorFlow and Jupyter write start-up remarks there that nobody can act on; this process
    keeps the terminal for progress and errors.
    """
    log = (workspace.executed / "kernels.log").open("wb")
    sys.stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
    os.dup2(log.fileno(), STDERR)


def _as_interrupt(number, frame):
    raise KeyboardInterrupt


def main(arguments=None):
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0; 1 if a notebook or a setting failed; 130 after an interrupt.
    """
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        return _run(options)
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Go on with the same command and --resume.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
