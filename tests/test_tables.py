"""Tables of other kinds than the students', through the whole series as a stranger would."""

import re
import threading
from contextlib import suppress

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from tests.series import ONE_PAIR, RUNS, connected, find_runs, run_series

pytestmark = pytest.mark.slow
MOST_MEMORY = 3 * 2**30


def shown(workspace, step):
    """Return all texts that a notebook of a run showed."""
    (path,) = (workspace / "executed").glob(f"{step}_*.ipynb")
    outputs = [
        output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])
    ]
    return str([output.get("text", "") or output.get("data", {}) for output in outputs])


def awkward_table(rows=3000):
    """A class of one row in a hundred, truths with gaps, days, persons, and repeated rows."""
    rng = np.random.default_rng(0)
    rare = np.arange(rows) < rows * 0.01
    frame = pd.DataFrame(
        {
            "person": np.arange(rows) + 100,
            "size": (rng.normal(size=rows) + 2.5 * rare).round(3),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 300, rows), "D"),
            "paid": rng.random(rows) < 0.3 + 0.5 * rare,
            "late": rng.random(rows) < 0.5,
            "Target": rare,
        }
    )
    frame["late"] = frame["late"].astype(object).where(rng.random(rows) < 0.9)
    return pd.concat([frame, frame[frame.index % 20 == 0]])


def wide_table(columns=2000, rows=600):
    rng = np.random.default_rng(0)
    high = rng.random(rows) < 0.5
    values = rng.normal(size=(rows, columns))
    values[:, :20] += high[:, None]
    frame = pd.DataFrame(values.round(3)).add_prefix("gene ")
    return frame.assign(Target=np.where(high, "high", "low"))


def long_table(rows=60_000, columns=11):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(rows, columns))
    frame = pd.DataFrame(values.round(3)).add_prefix("x")
    return frame.assign(Target=np.where(values[:, 0] + values[:, 1] > 0, "high", "low"))


def test_awkward_table_gets_two_models_into_production(tmp_path):
    awkward_table().to_csv(tmp_path / "awkward.csv", index=False)
    workspace = tmp_path / "ws"
    pairs = ("-p", "C_EXPONENTS", "2,4,6,8", "-p", "GAMMA_EXPONENTS", "[-6]")
    result = run_series(workspace, "--data", tmp_path / "awkward.csv", *pairs)
    assert result.returncode == 0, result.stdout + result.stderr
    first = shown(workspace, "01")
    assert "150 of 3,150 rows repeat an earlier one" in first
    for text in (first, result.stdout):
        assert "Put month, weekday into columns" in text
    assert "all values differ" not in first, "repeated persons are no identifiers"
    assert "judge by macro F1" in first
    assert "paid has drifted" in shown(workspace, "05"), "the rehearsal turns truths round"
    with connected(workspace) as client:
        for name in RUNS:
            (run,) = find_runs(client, name)
            assert run.data.metrics["recall_True"] > 0.3
            assert client.get_model_version_by_alias(name, "production").version == "1"


def test_two_thousand_columns_go_through_in_little_memory(tmp_path):
    wide_table().to_csv(tmp_path / "wide.csv", index=False)
    seen, done = [], threading.Event()

    def watch():
        me = psutil.Process()
        while not done.wait(0.5):
            with suppress(psutil.NoSuchProcess):
                seen.append(sum(each.memory_info().rss for each in me.children(recursive=True)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run_series(tmp_path / "ws", "--data", tmp_path / "wide.csv", "-p", "EPOCHS", "5")
    finally:
        done.set()
        watcher.join()
    assert result.returncode == 0, result.stdout + result.stderr
    assert max(seen) < MOST_MEMORY
    first = shown(tmp_path / "ws", "01")
    assert "2,001 columns: those with a remark and the most telling ones" in first
    assert "200 of 2000 columns watched" in shown(tmp_path / "ws", "05")


def test_sixty_thousand_rows_go_through(tmp_path):
    long_table().to_csv(tmp_path / "long.csv", index=False)
    settings = ("-p", "EPOCHS", "3", "-p", "BEYOND_EDGES", "False", *ONE_PAIR)
    result = run_series(tmp_path / "ws", "--data", tmp_path / "long.csv", *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    searched = shown(tmp_path / "ws", "03")
    assert re.search(r"Searched on (4,99|5,00)\d of 42,000 training rows", searched)
    with connected(tmp_path / "ws") as client:
        for name in RUNS:
            assert client.get_model_version_by_alias(name, "production").version == "1"
