"""Compare the grid search with `GridSearchCV`: time, memory, and whether the scores are the same.

``python -m tests.benchmarks.grid_search compare [TABLE]`` searches the documented grid of 144 pairs
and 5 folds on the training rows of a table; default: the students' table of Kaggle in
``REAL_DATA_DIR``, else the bundled sample. ``python -m
tests.benchmarks.grid_search growth [TABLE] --plot FILE.png`` searches 9 pairs and 2 folds on 1,000
to 16,000 rows, which are rows of the table with a little noise.

Every search runs in a process of its own, one after the other, with nothing cached: seconds are
those of ``fit``, processor seconds and peak memory those of the process and all its workers, start
included. On a machine that does other things too, compare processor seconds.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import seaborn as sns
import sklearn
from matplotlib.figure import Figure
from sklearn.compose import make_column_transformer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from helpers import data
from helpers.models.search import KernelGridSearch
from helpers.workspace import open_workspace
from tests.conftest import split_table

METHODS = {"GridSearchCV": GridSearchCV, "KernelGridSearch": KernelGridSearch}
ROWS = (1000, 2000, 4000, 8000, 16000)


def default_table():
    """Return the path of the real table if ``REAL_DATA_DIR`` has it, else ``sample``."""
    path = Path(os.environ.get("REAL_DATA_DIR", ""), "kaggle_students.csv")
    return str(path) if path.is_file() else "sample"


def grow(X, y, n_rows, numeric, seed=0):
    """Draw rows with replacement, and move their numbers by a hundredth of their spread."""
    random = np.random.default_rng(seed)
    drawn = random.integers(len(X), size=n_rows)
    X, y = X.iloc[drawn].reset_index(drop=True), y.iloc[drawn].reset_index(drop=True)
    for name in numeric:
        X[name] = X[name] + random.normal(0, 0.01 * X[name].std(), n_rows)
    return X, y


def run_here(method, table, n_rows):
    """Search in this process and print what was measured; `n_rows` 0: the table as it is."""
    with tempfile.TemporaryDirectory() as folder:
        split = split_table(data.load_table(table, open_workspace(folder)))
    X, y = split.X_train, split.y_train
    exponents, folds = np.arange(-5, 7), 5
    if n_rows:
        X, y = grow(X, y, n_rows, X.columns.difference(split.categorical))
        exponents, folds = np.array([-4, 0, 4]), 2
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    preprocessing = make_column_transformer(
        (encoder, list(split.categorical)), remainder=StandardScaler()
    )
    search = METHODS[method](
        Pipeline([("preprocessing", preprocessing), ("svc", SVC(kernel="rbf"))]),
        {"svc__C": 2.0**exponents, "svc__gamma": 2.0**exponents},
        cv=StratifiedKFold(folds),
        refit=False,
        n_jobs=-1,
    )
    start = time.perf_counter()
    search.fit(X, y)
    seconds = time.perf_counter() - start
    scores = [search.cv_results_[f"split{fold}_test_score"].tolist() for fold in range(folds)]
    print(json.dumps({"seconds": seconds, "scores": scores, "best": search.best_params_}))


def _memory_of(process):
    """Return the bytes of a process and its children; what they share counts once."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(method, table, n_rows=0):
    """Search in a process of its own; return what it printed, processor seconds, peak bytes."""
    command = [sys.executable, "-m", "tests.benchmarks.grid_search", "run", method, table]
    before = _processor_seconds()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*command, "--rows", str(n_rows)], stdout=output)
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, _memory_of(watched))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
        if process.wait():
            raise SystemExit(f"{method} failed.")
        output.seek(0)
        found = json.loads(output.read().splitlines()[-1])
    return {**found, "processor": _processor_seconds() - before, "peak": peak}


def _machine():
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, "
        f"scikit-learn {sklearn.__version__}"
    )


def compare(table):
    """Print a Markdown table."""
    found = {method: measure(method, table) for method in METHODS}
    reference = found["GridSearchCV"]
    print(f"\n{Path(table).name}, 144 pairs, 5 folds, {_machine()}\n")
    print("| search | seconds | times as fast | processor seconds | ratio | peak GiB | best pair |")
    print("|---|---|---|---|---|---|---|")
    for method, each in found.items():
        print(
            f"| `{method}` | {each['seconds']:.1f} | {reference['seconds'] / each['seconds']:.1f} "
            f"| {each['processor']:.0f} | {reference['processor'] / each['processor']:.1f} "
            f"| {each['peak'] / 2**30:.2f} "
            f"| C {each['best']['svc__C']:g}, gamma {each['best']['svc__gamma']:g} |"
        )
    difference = np.abs(np.subtract(reference["scores"], found["KernelGridSearch"]["scores"]))
    print(f"\nLargest difference of the {difference.size} scores: {difference.max():g}")


def growth(table, plot):
    """Print and draw time and memory by rows."""
    found = {method: [] for method in METHODS}
    print(f"\n{Path(table).name}, 9 pairs, 2 folds, {_machine()}\n")
    print("| rows | " + " | ".join(f"`{method}`" for method in found) + " |")
    print("|---|" + "---|" * len(found))
    for n_rows in ROWS:
        cells = []
        for method, results in found.items():
            results.append(measure(method, table, n_rows))
            cells.append(f"{results[-1]['seconds']:.1f} s, {results[-1]['peak'] / 2**30:.2f} GiB")
        print(f"| {n_rows:,} | " + " | ".join(cells) + " |", flush=True)
    if plot:
        draw(found, plot)


def draw(found, path):
    """Draw time and memory by rows."""
    sns.set_theme(style="whitegrid")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, results in found.items():
        left.plot(ROWS, [each["seconds"] for each in results], marker="o", label=method)
        right.plot(ROWS, [each["peak"] / 2**30 for each in results], marker="o")
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds", title="Time")
    right.set(xscale="log", xlabel="rows", ylabel="GiB", title="Peak memory, all processes")
    for axes in (left, right):
        axes.set_xticks(ROWS, [f"{n_rows:,}" for n_rows in ROWS], minor=False)
        axes.minorticks_off()
    left.legend()
    figure.savefig(path, dpi=100)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    text = "`sample` or the path of a CSV file"
    each = commands.add_parser("compare")
    each.add_argument("table", nargs="?", default=default_table(), help=text)
    each = commands.add_parser("growth")
    each.add_argument("table", nargs="?", default=default_table(), help=text)
    each.add_argument("--plot", help="file for the picture")
    each = commands.add_parser("run")
    each.add_argument("method", choices=METHODS)
    each.add_argument("table")
    each.add_argument("--rows", type=int, default=0)
    options = parser.parse_args()
    if options.command == "compare":
        compare(options.table)
    elif options.command == "growth":
        growth(options.table, options.plot)
    else:
        run_here(options.method, options.table, options.rows)


if __name__ == "__main__":
    main()
