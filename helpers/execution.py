"""Executing notebooks of the series with papermill, each as soon as those it needs are done."""

import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter

import psutil

from helpers.resume import Record
from helpers.series import STEPS, Step
from helpers.workspace import PROJECT_ROOT, ProjectError, Workspace, in_colab

Report = Callable[[str], None]  # takes a line for the person who waits


class NotebookFailedError(ProjectError):
    """A notebook of the series ended with an error."""


def execute(step: Step, parameters: dict, workspace: Workspace, position: int) -> None:
    """Execute one notebook into ``WORKSPACE/executed/``; `position` is its progress bar's line.

    Raises
    ------
    NotebookFailedError
        Names the notebook, the cell and the error. The executed notebook is kept, with the
        error at its top.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from papermill.exceptions import PapermillException, PapermillExecutionError

    output = workspace.executed / f"{step.name}.ipynb"
    # A cell with "!python -m helpers.run" has a terminal, too, but one without a cursor.
    in_cell = in_colab() or "JPY_PARENT_PID" in os.environ
    bar = {"desc": step.name, "position": position, "disable": in_cell or not sys.stderr.isatty()}
    try:
        papermill.execute_notebook(
            step.path,
            output,
            parameters={**parameters, "WORKSPACE": str(workspace.root)},
            kernel_name="python3",
            cwd=PROJECT_ROOT,
            progress_bar=bar,
        )
    # A kernel that dies is a RuntimeError.
    except (PapermillException, NoSuchKernel, RuntimeError) as error:
        place, what = step.name, f"{type(error).__name__}: {error}"
        if isinstance(error, PapermillExecutionError):
            first_line = error.source.strip().partition("\n")[0]
            place += f", cell {error.cell_index + 1} ({first_line[:70]})"
            what = f"{error.ename}: {error.evalue}"
        raise NotebookFailedError(
            f"{place}: {what}\nThe notebook as far as it got: {output}"
        ) from error


def _interrupt_kernels() -> None:
    for child in psutil.Process().children(recursive=True):
        try:
            # ipykernel_launcher, in Colab colab_kernel_launcher.
            if "kernel_launcher" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            continue


def run_steps(
    numbers: list[str],
    parameters: dict[str, dict],
    digests: dict[str, str],
    workspace: Workspace,
    report: Report,
    save: Callable[[], None],
) -> list[str]:
    """Execute steps, each as soon as those it needs are done; `save` follows each.

    Returns
    -------
    list of str
        Messages of the steps that failed; steps that need them are not run.
    """
    record, running, started, failures = Record(workspace), {}, [], []
    order = TopologicalSorter({n: set(STEPS[n].needs).intersection(numbers) for n in numbers})
    order.prepare()
    with ThreadPoolExecutor(len(STEPS) + 1) as pool:
        try:
            while order.is_active():
                for number in order.get_ready():
                    # What needs it is out of date from here on, even if this run ends before.
                    for each in (number, *(n for n in STEPS if number in STEPS[n].needs)):
                        record.set(each, None)
                    report(f"{STEPS[number].name}: started")
                    position = list(STEPS).index(number)
                    task = pool.submit(
                        execute, STEPS[number], parameters[number], workspace, position
                    )
                    running[task] = (number, time.monotonic())
                    started.append(number)
                if not running:
                    break
                if len(started) == len(numbers):
                    # What the summary needs takes seconds to import; the last step leaves time.
                    pool.submit(importlib.import_module, "helpers.registry")
                for task in wait(running, return_when=FIRST_COMPLETED).done:
                    number, start = running.pop(task)
                    name, seconds = STEPS[number].name, time.monotonic() - start
                    try:
                        task.result()
                    except NotebookFailedError as error:
                        failures.append(str(error))
                        report(f"{name}: FAILED after {seconds:.1f} s")
                        continue
                    record.set(number, digests[number])
                    order.done(number)
                    save()
                    report(f"{name}: done in {seconds:.1f} s")
        except KeyboardInterrupt:
            _interrupt_kernels()
            raise
    for number in numbers:
        if number not in started:
            report(f"{STEPS[number].name}: not run, it needs what failed")
    return failures
