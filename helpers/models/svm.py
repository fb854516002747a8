"""Notebook 03: what surrounds the grid search: a check, its results as a table, its edges."""

import pandas as pd

from helpers.display import notice
from helpers.models.search import KernelGridSearch
from helpers.workspace import ParameterError


def check_folds(y: pd.Series, folds: int) -> None:
    """Raise ParameterError if a class has fewer of the rows to search on than there are folds."""
    counts = y.value_counts()
    if counts.min() < folds:
        raise ParameterError(
            f"CV_FOLDS = {folds} needs {folds} rows of each class, but of the {len(y):,} rows to "
            f"search on the smallest class, {counts.idxmin()!r}, has {counts.min()}. Use fewer "
            "folds or, on a long table, more SEARCH_ROWS."
        )


def results_table(search: KernelGridSearch) -> pd.DataFrame:
    """Return ``cv_results_`` as a table, the best pairs first.

    ``C`` and ``gamma`` come without the names of the pipeline's steps; ``extension`` is the step
    beyond the edges in which a pair was added, 0 for the grid.
    """
    table = pd.DataFrame(search.cv_results_).drop(columns="params")
    table = table.rename(columns=lambda name: name.removeprefix("param_svc__"))
    return table.sort_values("rank_test_score", kind="stable").reset_index(drop=True)


def edges(search: KernelGridSearch) -> list[str]:
    """Tell which of ``C`` and ``gamma`` win on the edge of what was tried, extensions included."""
    tried = results_table(search)[["C", "gamma"]]
    smallest, largest = tried.min(), tried.max()
    return [
        name
        for name, best in tried.iloc[0].items()
        if smallest[name] < largest[name] and best in (smallest[name], largest[name])
    ]


def warn_on_edge(search: KernelGridSearch) -> None:
    """Say so if the winner lies on the edge of what was tried: a better pair may lie outside."""
    table = results_table(search)
    for name in edges(search):
        notice(
            f"The best {name} = {table[name][0]:g} lies on the edge of what was tried "
            f"({table[name].min():g} … {table[name].max():g}). A better value may lie outside: "
            f"widen {name.upper()}_EXPONENTS and search again.",
            level="warning",
        )
