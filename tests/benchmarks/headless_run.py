"""Measure the headless run of the series: time, and the largest memory of any process.

``python -m tests.benchmarks.headless_run [arguments of helpers.run]``: runs in a temporary
workspace, by default on the bundled sample with the full grid.
"""

import os
import subprocess
import sys
import tempfile
import time

import psutil

from helpers.workspace import PROJECT_ROOT

INTERVAL = 0.2  # seconds between two looks at the memory


def _memory(process):
    try:
        name = " ".join(process.cmdline()[1:4]) or process.name()
        return name, process.memory_info().rss
    except psutil.NoSuchProcess:
        return "", 0


def measure(arguments):
    """Run the series and watch it.

    Parameters
    ----------
    arguments : list of str
        Of ``python -m helpers.run``.

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
    seconds, peaks = measure(sys.argv[1:] or ["--data", "sample"])
    print(f"\n{seconds:.1f} s on {os.cpu_count()} cores")
    for name, peak in sorted(peaks.items(), key=lambda item: -item[1])[:5]:
        print(f"{peak / 2**30:6.2f} GiB  {name[:90]}")


if __name__ == "__main__":
    main()
