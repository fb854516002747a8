"""Measure the headless run of the series: time, and the largest memory of any process.

``python -m tests.benchmarks.headless_run [arguments of helpers.run]``: runs in a temporary
workspace, by default on the bundled sample with the full grid. With ``--colab`` first, the same
also under Colab's kernel class, where no front end answers, with a copy in Drive.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from helpers.workspace import PROJECT_ROOT
from tests.doubles import colab

INTERVAL = 0.2  # seconds between two looks at the memory


def _memory(process):
    try:
        name = " ".join(process.cmdline()[1:4]) or process.name()
        return name, process.memory_info().rss
    except psutil.NoSuchProcess:
        return "", 0


def measure(arguments, environment=None):
    """Run the series and watch it.

    Parameters
    ----------
    arguments : list of str
        Of ``python -m helpers.run``.
    environment : dict of str to str, optional
        Default: this process's.

    Returns
    -------
    seconds : float
    peaks : dict of str to int
        Largest resident memory (bytes) by process.
    """
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.run", "--workspace", folder, *arguments],
            cwd=PROJECT_ROOT,
            env=environment,
        )
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            for member in [watched, *watched.children(recursive=True)]:
                name, memory = _memory(member)
                peaks[f"{member.pid} {name}"] = max(peaks.get(f"{member.pid} {name}", 0), memory)
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(process.returncode)
    return seconds, peaks


def main():
    """Run the command line."""
    in_colab, arguments = sys.argv[1:2] == ["--colab"], sys.argv[1:]
    arguments = arguments[in_colab:] or ["--data", "sample"]
    seconds, peaks = measure(arguments)
    print(f"\n{seconds:.1f} s on {os.cpu_count()} cores")
    for name, peak in sorted(peaks.items(), key=lambda item: -item[1])[:5]:
        print(f"{peak / 2**30:6.2f} GiB  {name[:90]}")
    if in_colab:
        with tempfile.TemporaryDirectory() as disk:
            environment = colab.set_up(Path(sys.executable), Path(disk), Path(disk))
            copy = ["-p", "DRIVE_FOLDER", f"{disk}/copy"]
            there, _ = measure([*arguments, *copy], environment)
            asked = Path(disk, colab.LOG).exists()
        print(f"\n{there:.1f} s in Colab, {there / seconds:.2f} times; a front end asked: {asked}")


if __name__ == "__main__":
    main()
