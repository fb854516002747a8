"""Notebook 03: what surrounds the grid search: checks, its results as a table, logging."""

import mlflow
import pandas as pd
from sklearn.model_selection import ParameterGrid

from helpers import plots, tracking
from helpers.data import Split
from helpers.display import notice
from helpers.models.search import KernelGridSearch
from helpers.workspace import ParameterError

N_CHILD_RUNS = 10  # best pairs that become runs of their own


def check_folds(split: Split, folds: int) -> None:
    """Check that every class has rows for every fold.

    Raises
    ------
    ParameterError
        If a class has fewer training rows than there are folds.
    """
    counts = split.y_train.value_counts()
    if counts.min() < folds:
        raise ParameterError(
            f"CV_FOLDS = {folds} needs {folds} training rows of each class, but the smallest "
            f"class, {counts.idxmin()!r}, has {counts.min()}. Use fewer folds."
        )


def _short(name):
    """Return ``C`` for ``svc__C``."""
    return name.rpartition("__")[2]


def results_table(search: KernelGridSearch) -> pd.DataFrame:
    """Return ``cv_results_`` as a table, the best pairs first.

    Returns
    -------
    pandas.DataFrame, shape (n_pairs, ...)
        ``C`` and ``gamma`` without the names of the pipeline's steps; ``extension`` is the step
        beyond the edges in which a pair was added, 0 for the grid.
    """
    table = pd.DataFrame(search.cv_results_).drop(columns="params")
    if "extension" not in table:
        table["extension"] = 0
    table = table.rename(columns=lambda name: _short(name) if name.startswith("param_") else name)
    return table.sort_values("rank_test_score", kind="stable").reset_index(drop=True)


def edges(search: KernelGridSearch) -> list[str]:
    """Tell which parameters win on the edge of what was tried, extensions included.

    Returns
    -------
    list of str
        ``C`` and ``gamma`` where the winner is the smallest or largest of several values.
    """
    tried = pd.DataFrame(search.cv_results_["params"])
    return [
        _short(name)
        for name, best in search.best_params_.items()
        if tried[name].nunique() > 1 and best in (tried[name].min(), tried[name].max())
    ]


def warn_on_edge(search: KernelGridSearch) -> None:
    """Say so if the winner lies on the edge of what was tried: a better pair may lie outside."""
    table, on_edge = results_table(search), edges(search)
    for name in on_edge:
        notice(
            f"The best {name} = {table[name][0]:g} lies on the edge of what was tried "
            f"({table[name].min():g} … {table[name].max():g}). A better value may lie outside: "
            f"widen {name.upper()}_EXPONENTS and search again.",
            level="warning",
        )


def log_search(search: KernelGridSearch, run: mlflow.ActiveRun, split: Split) -> None:
    """Log a search in its run, and the best pairs as runs below it.

    Parameters
    ----------
    search : KernelGridSearch
        Fitted, with accuracy as its only score.
    run : mlflow.ActiveRun
    split : helpers.data.Split
    """
    grid = pd.DataFrame(ParameterGrid(search.param_grid)).rename(columns=_short)
    table = results_table(search)
    mlflow.log_params(
        {
            "kernel": "rbf",
            **{_short(name): float(value) for name, value in search.best_params_.items()},
            **{
                f"grid_{name}": " ".join(f"{value:g}" for value in sorted(grid[name].unique()))
                for name in grid
            },
            "cv_folds": search.n_splits_,
            "edge": ", ".join(edges(search)) or "none",
        }
    )
    mlflow.log_metrics(
        {
            "cv_accuracy": search.best_score_,
            "cv_accuracy_std": search.cv_results_["std_test_score"][search.best_index_],
            "search_seconds": search.search_time_,
        }
    )
    tracking.log_figure(plots.grid_map(search), "grid_search/heat_map.png")
    mlflow.log_text(table.to_csv(index=False), "grid_search/cv_results.csv")
    children = [
        (
            f"C={row.C:g} gamma={row.gamma:g}",
            {"kernel": "rbf", "C": float(row.C), "gamma": float(row.gamma)},
            {
                "cv_accuracy": row.mean_test_score,
                "cv_accuracy_std": row.std_test_score,
                "fit_seconds": row.mean_fit_time,
            },
        )
        for row in table.head(N_CHILD_RUNS).itertuples()
    ]
    tracking.log_child_runs(run, children, split.manifest)
