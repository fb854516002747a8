"""Run the series of notebooks headlessly with papermill: ``python -m helpers.run``.

Executes the notebooks, those that do not need each other side by side, writes them to
``WORKSPACE/executed/`` and ends with a table of what was trained and what is in Production. Exit
code 0; 1 with the notebook, the cell and the error; 2 for a wrong command line; 130 after an
interrupt.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from helpers import server
from helpers.colab import safe_copy
from helpers.display import STDERR
from helpers.execution import Report, run_steps
from helpers.locks import hold
from helpers.pages import write_pages
from helpers.resume import Record, fingerprints, steps_to_run
from helpers.series import MODELS, STEPS
from helpers.server import credentials, users
from helpers.settings import (
    check_parameters,
    declared_parameters,
    distribute,
    help_text,
    read_value,
)
from helpers.workspace import ProjectError, Workspace, open_workspace

MOST_REMARKS = 10  # on columns; notebook 01 has them all
SUMMARY = ("accuracy", "f1_macro", "log_loss")


def summarize(workspace: Workspace, done: set[str]) -> str:
    """Return a short table: what is trained, its metrics, and what is in Production.

    `done` are the steps that this run has done; a model of another step is an earlier run's.
    """
    from helpers import registry, tracking

    uri = tracking.connect(workspace, keep=False)
    heads = f"{'accuracy':>9}{'macro F1':>9}{'log loss':>9}  {'newest run':<44}in Production"
    lines = [f"{'model':<20}{heads}"]
    for name, model in MODELS.items():
        run = tracking.latest_run(model.experiment, model.run_name)
        if run is None:
            lines.append(f"{name:<20}{'not trained yet':>27}")
            continue
        shown = "".join(f"{run.data.metrics[key]:>9.4f}" for key in SUMMARY)
        version = registry.production_version(name)
        place = f"version {version.version}" if version else "–"
        title = run.info.run_id + ("" if model.step in done else " (earlier)")
        lines.append(f"{name:<20}{shown}  {title:<44}{place}")
    team = os.environ.get("MLFLOW_TRACKING_URI")
    lines.append(f"Look at it: {uri if team else server.command_line(workspace)}")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run",
        description="Run the series of notebooks headlessly.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument(
        "--data", metavar="SOURCE", help="auto, uci, sample, or a path or URL of a CSV"
    )
    parser.add_argument(
        *("-p", "--parameter"),
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks, from the list below; may be repeated",
    )
    parser.add_argument("--only", metavar="NN,NN", help="numbers of the notebooks to run")
    parser.add_argument(
        "--no-wait", action="store_true", help="end where somebody else runs one of the notebooks"
    )
    parser.add_argument("--resume", action="store_true", help="skip what is done and unchanged")
    parser.add_argument(
        "--html", action="store_true", help="write the executed notebooks as HTML, too"
    )
    options = parser.parse_args()
    for name in ("workspace", "data", "only"):
        if getattr(options, name) == "":
            # Such as a variable of a CI that is not set.
            parser.error(f"--{name}: the value is empty; give one, or leave --{name} out")
    only = options.only.split(",") if options.only else list(STEPS)
    for number in only:
        if number not in STEPS:
            parser.error(f"--only: there is no notebook {number!r}; choose from {', '.join(STEPS)}")
    options.only = [number for number in STEPS if number in only]
    return options


def _parameters(options: argparse.Namespace) -> dict:
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


def _check_first(options: argparse.Namespace, parameters: dict, report: Report) -> None:
    """Refuse what would fail later, before anything is written or started.

    Settings of the environment are read, and a table that is named as its notebook reads it.
    """
    users.users_of_environment()
    users.is_open_to_all()
    declared = declared_parameters()
    names = ("DATA_SOURCE", "TARGET", "CATEGORICAL", "DROP", "TEST_SIZE")
    names += ("GROUPS", "ALARM_CLASS")
    given = {name: parameters.get(name, declared[name].default) for name in names}
    checked = check_parameters(**given).values()
    source, target, categorical, drop, test_size, columns, alarm_class = checked
    # What is resumed may be done and need its source no more; a local file costs nothing.
    remote = source == "uci" or "://" in source
    if "01" in options.only and source != "auto" and not (options.resume and remote):
        # Only here: it takes pandas along.
        from helpers import data

        table = data.load_table(source, None, target, categorical, drop)
        data.distinct_rows(table, test_size)
        if columns or alarm_class:
            from helpers.registry import groups

            groups.check_columns(columns, table.features.columns)
            groups.alarm_label(sorted(table.labels.unique()), alarm_class)
        remarks = data.remarks(table)
        for name, remark in remarks[remarks != ""].head(MOST_REMARKS).items():
            report(f"{name}: {remark}")


def _run(options: argparse.Namespace) -> int:
    start = time.monotonic()

    def report(line):
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    parameters = _parameters(options)
    by_step = distribute(parameters)
    _check_first(options, parameters, report)
    workspace = open_workspace(options.workspace or parameters.get("WORKSPACE"))
    hold(workspace, options.only, "python -m helpers.run", not options.no_wait, report)
    save = safe_copy.start(workspace, parameters.get("DRIVE_FOLDER"), "helpers.run").save
    # Not before: on a new machine the file would be work that the copy does not have.
    _separate_kernel_messages(workspace)
    # The first notebook logs nothing.
    with_models = any(STEPS[number].needs for number in options.only)
    if with_models:
        server.start(workspace, keep=False, wait=False)
    digests, numbers = fingerprints(by_step), options.only
    if options.resume:
        numbers = steps_to_run(numbers, digests, Record(workspace), report)
    expose = parameters.get("EXPOSE_UI", "auto")
    with _exposed_ui(workspace, expose, report) if with_models else nullcontext():
        try:
            failures = run_steps(numbers, by_step, digests, workspace, report, save)
            state = Record(workspace).read()
            done = {number for number in numbers if state.get(number) == digests[number]}
            if options.html:
                write_pages(workspace, options.only)
        finally:
            # After an interrupt, too: what was finished until then, and which runs were not.
            save()
    if with_models:
        print(f"\n{summarize(workspace, done)}", flush=True)
    for failure in failures:
        print(f"\nFAILED: {failure}", file=sys.stderr, flush=True)
    return 1 if failures else 0


@contextmanager
def _exposed_ui(workspace: Workspace, expose, report: Report) -> Iterator[None]:
    """Show the UI at a public address for the whole run, where that is wanted.

    The notebooks find this tunnel; one that a notebook opens ends with its kernel.
    """
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


def _separate_kernel_messages(workspace: Workspace) -> None:
    """Send what kernels and libraries write to the error stream to a file of its own.

    TensorFlow and Jupyter write start-up remarks there that nobody can act on; this process
    keeps the terminal for progress and errors.
    """
    # Another run of other steps may write there, too.
    log = (workspace.executed / "kernels.log").open("ab")
    log.truncate(0)
    sys.stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
    os.dup2(log.fileno(), STDERR)


def _as_interrupt(number, frame):
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line; 1 if a notebook or a setting failed, 130 after an interrupt."""
    options = _parse()
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
