"""Compare ways to search the grid of C and gamma: time, memory, and whether the scores are exact.

``python -m tests.benchmarks.grid_search compare sample TABLE.csv`` searches the documented grid of
144 pairs and 5 folds on the training rows of each table. ``python -m tests.benchmarks.grid_search
growth sample --plot FILE.png`` searches a small grid on 1,000 to 16,000 rows, which are rows of
the table with a little noise. Every search runs in a process of its own, one after the other; the
memory is that of the process and all its workers, without what they share counted twice. Needs
``tests/benchmarks/requirements.txt``.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, StratifiedKFold

from helpers import data, svm
from helpers.display import new_figure
from helpers.kernel_parts import Work
from helpers.kernel_search import KernelGridSearch
from helpers.smo import Path
from helpers.workspace import open_workspace

METHODS = ("GridSearchCV", "scikit-learn-intelex", "HalvingGridSearchCV", "KernelGridSearch")
ROWS = (1000, 2000, 4000, 8000, 16000)
MEMORY = 12 * 2**30  # bytes of a free Colab machine


def load(table):
    """Return the split of a table, as notebook 01 makes it."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = open_workspace(folder)
        return data.split_table(data.load_table(table, workspace))


def grow(split, n_rows, seed=0):
    """Draw rows with replacement, and move their numbers by a hundredth of their spread."""
    random = np.random.default_rng(seed)
    drawn = random.integers(len(split.X_train), size=n_rows)
    X, y = split.X_train.iloc[drawn].reset_index(drop=True), split.y_train.iloc[drawn]
    for name in split.numeric:
        X[name] = X[name] + random.normal(0, 0.01 * X[name].std(), n_rows)
    return X, y.reset_index(drop=True)


def make_search(method, split, grid, folds):
    """Make one of the searches, unfitted."""
    pipeline = svm.make_pipeline(split)
    named = {f"svc__{name}": values for name, values in grid.items()}
    options = {"cv": StratifiedKFold(folds), "refit": False, "n_jobs": -1}
    if method == "KernelGridSearch":
        # Compiled once per machine, not once per search.
        Path(np.eye(2, dtype=np.float32), 1, np.ones(2)).solve(1.0)
        return KernelGridSearch(pipeline, named, **options)
    if method == "HalvingGridSearchCV":
        return HalvingGridSearchCV(pipeline, named, random_state=0, **options)
    if method == "scikit-learn-intelex":
        from sklearnex.svm import SVC

        pipeline.set_params(svc=SVC(kernel="rbf"))
    return GridSearchCV(pipeline, named, **options)


def run_here(method, table, n_rows, small):
    """Search in this process and print what was measured."""
    split = load(table)
    X, y = grow(split, n_rows) if n_rows else (split.X_train, split.y_train)
    grid = svm.make_grid([-1, 1, 3], [-6, -5, -3]) if small else svm.make_grid(*[range(-5, 7)] * 2)
    search = make_search(method, split, grid, 2 if small else 5)
    start = time.perf_counter()
    search.fit(X, y)
    seconds = time.perf_counter() - start
    means = search.cv_results_["mean_test_score"].tolist()
    print(json.dumps({"seconds": seconds, "means": means, "best": search.best_params_}))


def _memory_of(process):
    """Return the bytes of a process and its children."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure(method, table, n_rows=0, small=False):
    """Search in a process of its own; return seconds, peak bytes, means and the best pair."""
    command = [sys.executable, "-m", "tests.benchmarks.grid_search", "run", method, table]
    command += ["--rows", str(n_rows)] + (["--small"] if small else [])
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, _memory_of(watched))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
        if process.wait():
            raise SystemExit(f"{method} failed.")
        output.seek(0)
        return {**json.loads(output.read().splitlines()[-1]), "peak": peak}


def usable_methods():
    """Return the methods whose packages are here."""
    missing = {"scikit-learn-intelex"} if importlib.util.find_spec("sklearnex") is None else set()
    return [method for method in METHODS if method not in missing]


def compare(tables):
    """Print one Markdown table per data set."""
    for table in tables:
        print(f"\n{pathlib.Path(table).name}, 144 pairs, 5 folds, {os.cpu_count()} cores\n")
        print("| search | seconds | times as fast | peak GiB | largest difference of a mean |")
        print("|---|---|---|---|---|", flush=True)
        reference = None
        for method in usable_methods():
            found = measure(method, table)
            reference = reference or found
            same = len(found["means"]) == len(reference["means"])
            difference = (
                np.abs(np.subtract(found["means"], reference["means"])).max() if same else None
            )
            text = "other pairs left out" if difference is None else f"{difference:.2g}"
            speed = reference["seconds"] / found["seconds"]
            print(
                f"| `{method}` | {found['seconds']:.1f} | {speed:.1f} | "
                f"{found['peak'] / 2**30:.2f} | {text} |",
                flush=True,
            )


def kernels_need(n_rows, folds=2):
    """Return the bytes that this project's search uses for kernels, with two threads."""
    y = np.arange(n_rows) % 3
    splits = [(np.arange(n_rows - n_rows // folds), np.arange(n_rows // folds))]
    work = Work(svm.SVC(), None, y, splits, [], {}, False, "raise", None)
    distances, kernel = work.sizes()
    return distances + 2 * kernel


def growth(table, plot):
    """Print and draw time and memory by rows."""
    found = {method: [] for method in usable_methods()}
    print(
        f"\n{table}, 9 pairs, 2 folds, {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    print("| rows | " + " | ".join(f"`{method}`" for method in found) + " |")
    print("|---|" + "---|" * len(found))
    for n_rows in ROWS:
        cells = []
        for method, results in found.items():
            results.append(measure(method, table, n_rows, small=True))
            seconds, peak = results[-1]["seconds"], results[-1]["peak"] / 2**30
            cells.append(f"{seconds:.1f} s, {peak:.2f} GiB")
        print(f"| {n_rows:,} | " + " | ".join(cells) + " |", flush=True)
    print()
    for method, results in found.items():
        # Straight through the last two points: what grows with the rows.
        (first, second), rows = [each["peak"] for each in results[-2:]], ROWS[-2:]
        slope = (second - first) / (rows[1] - rows[0])
        limit = rows[1] + (MEMORY - second) / slope if slope > 0 else np.inf
        print(f"{method}: 12 GiB at about {limit:,.0f} rows if it grows on as between the last two")
    fitting = next(n for n in range(1000, 10**6, 1000) if kernels_need(n) > MEMORY / 2)
    print(f"KernelGridSearch: kernels fit into 6 GiB up to {fitting:,} rows, then plain rows")
    if plot:
        draw(found, plot)


def draw(found, path):
    """Draw time and memory by rows."""
    figure, (left, right) = new_figure(1, 2, width=9, height=3.4)
    for method, results in found.items():
        left.plot(ROWS, [each["seconds"] for each in results], marker="o", label=method)
        right.plot(ROWS, [each["peak"] / 2**30 for each in results], marker="o")
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds", title="Time")
    right.set(xscale="log", xlabel="rows", ylabel="GiB", title="Peak memory, all processes")
    for axes in (left, right):
        axes.set_xticks(ROWS, [f"{n_rows:,}" for n_rows in ROWS], minor=False)
        axes.minorticks_off()
    left.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("compare")
    each.add_argument("tables", nargs="+", help="`sample` or paths of CSV files")
    each = commands.add_parser("growth")
    each.add_argument("table")
    each.add_argument("--plot", help="file for the picture")
    each = commands.add_parser("run")
    each.add_argument("method", choices=METHODS)
    each.add_argument("table")
    each.add_argument("--rows", type=int, default=0)
    each.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.command == "compare":
        compare(options.tables)
    elif options.command == "growth":
        growth(options.table, options.plot)
    else:
        run_here(options.method, options.table, options.rows, options.small)


if __name__ == "__main__":
    main()
