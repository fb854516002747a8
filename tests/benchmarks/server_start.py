"""How long until the protected MLflow server answers, beside ``mlflow server`` itself.

``python -m tests.benchmarks.server_start`` starts each kind in turn, in a fresh folder and again
in the same one, and prints the medians and their ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from helpers import server
from helpers.server import processes
from helpers.workspace import open_workspace

PORT = 5600


def _end(process):
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)


def start_mlflow(folder, *options):
    """Start ``mlflow server`` and return the seconds until it answers."""
    config = folder / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
        "admin_username = admin\n"
    )
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a long password",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(PORT), *options]
    command += ["--backend-store-uri", f"sqlite:///{folder}/tracking.db"]
    start = time.perf_counter()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    while not processes.answers(f"http://127.0.0.1:{PORT}", timeout=1):
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    _end(process)
    return seconds


def start_ours(folder):
    """Start the workspace's server and return the seconds until it answers."""
    workspace = open_workspace(folder)
    start = time.perf_counter()
    started = server.start_server(workspace, PORT, keep=False)
    while not processes.answers(started.url):
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    server.stop_server(workspace)
    return seconds


KINDS = {
    "this project: protected, one process": start_ours,
    "mlflow server --app-name basic-auth": lambda folder: start_mlflow(
        folder, "--app-name", "basic-auth"
    ),
    "mlflow server --app-name basic-auth --workers 1": lambda folder: start_mlflow(
        folder, "--app-name", "basic-auth", "--workers", "1"
    ),
    "mlflow server --workers 1 (no password)": lambda folder: start_mlflow(
        folder, "--workers", "1"
    ),
}


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    seconds = {name: ([], []) for name in KINDS}
    for _ in range(options.repeats):
        for name, start in KINDS.items():
            with tempfile.TemporaryDirectory() as folder:
                for measured in seconds[name]:
                    measured.append(start(Path(folder)))
    first = [statistics.median(times) for times in seconds[next(iter(KINDS))]]
    print(f"{'':50}{'first start':>14}{'later start':>14}   ({os.cpu_count()} cores)")
    for name, (fresh, again) in seconds.items():
        new, old = statistics.median(fresh), statistics.median(again)
        ratios = f"{new / first[0]:6.1f} x {old / first[1]:6.1f} x"
        print(f"{name:50}{new:12.1f} s{old:12.1f} s {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
