"""Parts that all tests share: a workspace, small and real tables, a running MLflow server."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from helpers import data, server, tracking
from helpers.workspace import open_workspace
from tests.doubles.ngrok import NgrokCloud

URI = "MLFLOW_TRACKING_URI"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Count what needs a run of the whole series among the slow tests, and group the tests.

    Tests run in two processes. A file goes to one of them as a whole, and so do files whose
    tests share a server of their folder or a run of the series.
    """
    for item in items:
        group = item.path.name
        fixtures = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]
        if any(fixture.scope == "package" for fixture in fixtures):
            group = item.path.parent.name
        if "sample_run" in item.fixturenames:
            group = "sample_run"
            item.add_marker("slow")
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("alone") and "PYTEST_XDIST_WORKER" in os.environ:
            reason = "needs port 5000 for itself: python -m pytest -m alone -n 0"
            item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(scope="session", autouse=True)
def _no_team_server():
    """Keep the session's fixtures away from a server that the environment names."""
    before = os.environ.pop(URI, None)
    yield
    os.environ.pop(URI, None)
    if before is not None:
        os.environ[URI] = before


@pytest.fixture(autouse=True)
def _no_tracking_uri(_no_team_server):
    """Start and leave each test without the variable, which MLflow sets itself."""
    ngrok = ("NGROK_AUTHTOKEN", "NGROK_DOMAIN", "UI_USERS", "ALLOW_UI_WITHOUT_PASSWORD")
    for name in (URI, "WORKSPACE", *ngrok):
        os.environ.pop(name, None)
    yield
    os.environ.pop(URI, None)


def split_table(table, test_size=0.3, seed=0):
    """Split a table as notebook 01 does."""
    X, y = data.distinct_rows(table, test_size)
    parts = train_test_split(X, y, test_size=test_size, stratify=y, random_state=seed)
    parts = data.with_repeated(table, *parts[:2])
    return data.make_split(table, *parts, test_size, seed)


def split_frame(frame, seed=0, categorical=("course",)):
    """Read and split a frame as notebook 01 does a CSV of it."""
    content = frame.to_csv(index=False).encode()
    table = data.read_table(content, "a table", categorical=list(categorical))
    return split_table(table, 0.3, seed)


@pytest.fixture
def workspace(tmp_path):
    return open_workspace(tmp_path / "ws")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 60 MB, and what mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", f"{options},size=60m", "tmpfs", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if shutil.which("mount") is None or not mount("rw"):
        pytest.skip("no disk can be mounted here")
    yield folder, mount
    subprocess.run(["umount", "--lazy", folder], check=True)


def make_small_frame(rows=150, seed=0):
    """Make a learnable table: 3 numbers, a text category, an integer code, 3 classes."""
    random = np.random.default_rng(seed)
    labels = np.array(["high", "low", "middle"])[np.arange(rows) % 3]
    level = pd.Series(labels).map({"low": 0.0, "middle": 1.5, "high": 3.0}).to_numpy()
    shift = (level / 1.5).astype(int)
    frame = pd.DataFrame(
        {
            "length": (level + random.normal(0, 0.7, rows)).round(4),
            "width": (10 - 2 * level + random.normal(0, 2.0, rows)).round(3),
            "age": random.integers(18, 60, rows),
            "city": np.array(["Faro", "Lisboa", "Porto"])[
                np.where(random.random(rows) < 0.6, shift, random.integers(0, 3, rows))
            ],
            "course": np.array([33, 171, 9254])[
                np.where(random.random(rows) < 0.5, shift, random.integers(0, 3, rows))
            ],
            "Target": labels,
        }
    )
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


@pytest.fixture(scope="session")
def small_frame():
    """A fresh copy of the small table at each call; ``rows`` and ``seed`` can be chosen."""
    return make_small_frame


@pytest.fixture
def small_csv(tmp_path):
    """Write the small table as a CSV: ``small_csv(name, rows=…, seed=…, **to_csv options)``."""

    def write(name="small.csv", rows=150, seed=0, **options):
        path = tmp_path / name
        make_small_frame(rows, seed).to_csv(path, **{"index": False, **options})
        return path

    return write


@pytest.fixture(scope="session")
def small_split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_split")
    path = folder / "small.csv"
    make_small_frame().to_csv(path, index=False)
    table = data.load_table(str(path), open_workspace(folder / "ws"), categorical=["course"])
    return split_table(table)


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real tables, which are not part of the project."""
    folder = os.environ.get("REAL_DATA_DIR")
    if not folder:
        pytest.skip("set REAL_DATA_DIR to the folder of kaggle_students.csv and uci697.csv")
    for name in ("kaggle_students.csv", "uci697.csv"):
        if not Path(folder, name).is_file():
            pytest.skip(f"no {name} in REAL_DATA_DIR = {folder}")
    return Path(folder)


@pytest.fixture(scope="session")
def running_server(tmp_path_factory, _no_team_server):
    """A real MLflow server: ``workspace``, ``url``, and ``connect()`` for fixtures of any scope."""
    ws = open_workspace(tmp_path_factory.mktemp("tracking") / "ws")
    # Port 5000 is left to the notebooks that make it public.
    server.start_server(ws, port=5300, keep=False)
    url = tracking.connect(ws, keep=False)

    def connect():
        # Other tests sign in at servers of their own.
        assert tracking.connect(ws, keep=False) == url

    yield SimpleNamespace(workspace=ws, url=url, connect=connect)
    server.stop_server(ws)


@pytest.fixture(scope="module")
def cloud():
    """A stand-in for ngrok's cloud, with one free account."""
    with NgrokCloud() as cloud:
        yield cloud


@pytest.fixture
def tracking_server(running_server):
    """The running server, with this process connected to it."""
    running_server.connect()
    yield running_server
    running_server.connect()
    mlflow.end_run("KILLED")


@pytest.fixture(scope="session")
def big_split(tmp_path_factory):
    """The small table with enough rows to measure drift on."""
    folder = tmp_path_factory.mktemp("big_split")
    path = folder / "big.csv"
    make_small_frame(1500).to_csv(path, index=False)
    table = data.load_table(str(path), open_workspace(folder / "ws"), categorical=["course"])
    return split_table(table)
