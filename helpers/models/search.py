"""`GridSearchCV` for C and gamma of an RBF support vector machine, with kernels that are shared.

`GridSearchCV` preprocesses a fold and computes its kernel anew for every pair. Here a fold is
preprocessed once, its squared distances are computed once and its kernel once per gamma; the
values of C follow in rising order until the solution no longer changes. The scores in all cells
and folds are the same.
"""

import sys
import time
import warnings
from collections.abc import Callable
from itertools import product
from numbers import Real

import cloudpickle
import joblib
import numpy as np
import psutil
import sklearn
from sklearn.base import clone
from sklearn.metrics import check_scoring, euclidean_distances
from sklearn.model_selection import GridSearchCV, ParameterGrid, check_cv
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC
from sklearn.utils import _safe_indexing, check_array, column_or_1d, indexable
from sklearn.utils.parallel import Parallel, delayed

from helpers.display import progress

FURTHER = 3  # values that are added beyond an edge at a time
LIMITS = 2.0**-15, 2.0**15  # as far as the authors of LIBSVM advise to look (Hsu, Chang, Lin 2003)

# The workers of a cluster need scikit-learn, not this project.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _solve(place, Cs, distances: np.ndarray, y: np.ndarray, svc: SVC, scorer: Callable):
    """Fit and score one fold and gamma for all values of C, which rise.

    Two values of C with the same solution, bit by bit, mean that C did not bind on the solver's
    way there. It binds even less where C is larger, so that all larger ones have this solution
    too. (It is not enough that no coefficient of one solution equals C: some may have on the way.)
    """
    kernel = distances * -place[1]
    np.exp(kernel, out=kernel)
    n_train = kernel.shape[1]
    cells, solution = {}, None
    with sklearn.config_context(assume_finite=True):
        for C in Cs:
            start = time.perf_counter()
            svc = clone(svc).set_params(C=C, gamma=place[1]).fit(kernel[:n_train], y[:n_train])
            fitted = time.perf_counter()
            cells[C] = cell = {
                "test_scores": float(scorer(svc, kernel[n_train:], y[n_train:])),
                "fit_time": fitted - start,
                "score_time": time.perf_counter() - fitted,
            }
            if np.array_equal(svc.dual_coef_, solution):
                break
            solution = svc.dual_coef_
    known = {**cell, "fit_time": 0.0, "score_time": 0.0}
    return place, {C: cells.get(C, known) for C in Cs}


def _keep(key, place, Cs, cells):
    """Return `cells`, for `joblib.Memory` to keep; called without it, nothing is kept yet."""
    if cells is None:
        raise LookupError
    return cells


class KernelGridSearch(GridSearchCV):
    """Exhaustive search of C and gamma for an RBF `SVC` at the end of a pipeline.

    Kernels are shared where `param_grid` is one dict of numbers for C and gamma, there is one
    score, and neither sample weights nor groups nor training scores are asked for; an error in
    any fold then ends the search. Everything else is left to `GridSearchCV` itself, and so are,
    with a warning, kernels that do not fit into memory.

    Parameters
    ----------
    param_grid
        ``{"svc__C": values, "svc__gamma": values}``, or what else `GridSearchCV` takes.
    scoring
        As in `GridSearchCV`. Scorers see an `SVC` and a kernel in place of estimator and table.
    n_jobs
        Threads, or where ``joblib.parallel_config`` says: processes, workers of a Dask cluster.
    verbose, pre_dispatch, error_score, return_train_score
        Only for what is left to `GridSearchCV`.
    memory : path-like, optional
        Folder that keeps each finished fold and gamma: an interrupted search goes on from there.
    beyond_edges : bool
        Where the best pair lies on the edge of the grid, go on beyond it in the grid's own ratio
        until it lies inside or at `LIMITS`. Needs one dict of numbers, and one score.

    Attributes
    ----------
    n_grid_ : int
        Candidates of `param_grid`; they come first in ``cv_results_``.
    extensions_ : list of dict of str to list of float
        The values added in each step; ``cv_results_["extension"]`` has the number of each
        candidate's step, 0 for the grid.
    search_time_ : float
        Seconds, refit not counted.
    """

    def __init__(
        self,
        estimator,
        param_grid,
        *,
        scoring=None,
        n_jobs=None,
        refit=True,
        cv=None,
        verbose=0,
        pre_dispatch="2*n_jobs",
        error_score=np.nan,
        return_train_score=False,
        memory=None,
        beyond_edges=False,
    ):
        super().__init__(
            estimator,
            param_grid,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            pre_dispatch=pre_dispatch,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.memory = memory
        self.beyond_edges = beyond_edges

    def fit(self, X, y=None, **params):
        """Search the grid; with `refit`, fit the best pair on all rows."""
        if y is None or params or not self._shares_kernels():
            return super().fit(X, y, **params)
        X, y = indexable(X, column_or_1d(y))
        splits = list(check_cv(self.cv, y, classifier=True).split(X, y))
        if not self._fits_into_memory(splits):
            return super().fit(X, y)
        svc = clone(self.estimator[-1]).set_params(kernel="precomputed")
        self.scorer_ = check_scoring(svc, self.scoring)
        candidates, cells = [], []

        def evaluate_candidates(added):
            candidates.extend(added)
            cells.extend(self._evaluate(added, X, y, splits, svc))
            return self._format_results(candidates, len(splits), cells)

        results = self._run_search(evaluate_candidates)
        self.cv_results_, self.n_splits_, self.multimetric_ = results, len(splits), False
        self.best_index_ = results["rank_test_score"].argmin()
        self.best_score_ = results["mean_test_score"][self.best_index_]
        self.best_params_ = results["params"][self.best_index_]
        if self.refit:
            start = time.perf_counter()
            self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_).fit(X, y)
            self.refit_time_ = time.perf_counter() - start
            if hasattr(self.best_estimator_, "feature_names_in_"):
                self.feature_names_in_ = self.best_estimator_.feature_names_in_
        return self

    def _shares_kernels(self) -> bool:
        if not isinstance(self.estimator, Pipeline) or not isinstance(self.param_grid, dict):
            return False
        name, svc = self.estimator.steps[-1]
        gammas = self.param_grid.get(f"{name}__gamma", [])
        return (
            len(self.estimator) > 1
            and type(svc) is SVC
            and svc.kernel == "rbf"
            and svc.probability is not True
            and set(self.param_grid) == {f"{name}__C", f"{name}__gamma"}
            and len(gammas) > 0
            and all(isinstance(gamma, Real) and gamma >= 0 for gamma in gammas)
            and not isinstance(self.scoring, (list, tuple, set, dict))
            and not callable(self.refit)
            and not self.return_train_score
        )

    def _fits_into_memory(self, splits) -> bool:
        threads = joblib.effective_n_jobs(self.n_jobs)
        n_gammas = len(self.param_grid[f"{self.estimator.steps[-1][0]}__gamma"])
        # While the last parts of one fold run, the next ones are there already.
        at_once = min(len(splits), 2 + 2 * threads // n_gammas)
        rows, n_train = max((len(train) + len(test), len(train)) for train, test in splits)
        needed, free = 8 * rows * n_train * (at_once + threads), psutil.virtual_memory().available
        if needed > free / 2:
            warnings.warn(
                f"The kernels of {n_train:,} training rows need {needed / 2**30:.1f} GiB, more "
                f"than half of the {free / 2**30:.1f} GiB that are free: GridSearchCV goes on, "
                "which computes one for every fit and takes much longer. Fewer rows, a smaller "
                "grid or fewer threads (n_jobs) help.",
                stacklevel=3,
            )
        return needed <= free / 2

    def _preprocess(self, X, y: np.ndarray, train, test) -> tuple:
        """Return a fold's training and test rows as the `SVC` gets them, and their labels."""
        X_train, X_test = _safe_indexing(X, train), _safe_indexing(X, test)
        preprocessing = clone(self.estimator[:-1])
        rows = preprocessing.fit_transform(X_train, y[train]), preprocessing.transform(X_test)
        X_train, X_test = (check_array(X, accept_sparse="csr", dtype=np.float64) for X in rows)
        # libsvm solves class by class: it reads a kernel in that order faster.
        order = np.argsort(y[train], kind="stable")
        return X_train[order], X_test, np.concatenate([y[train][order], y[test]])

    def _evaluate(self, candidates, X, y: np.ndarray, splits, svc: SVC) -> list[dict]:
        """Return score and times of each candidate and fold."""
        name_of_C, name_of_gamma = sorted(self.param_grid)
        pairs = [(each[name_of_gamma], each[name_of_C]) for each in candidates]
        parts = {gamma: sorted({C for each, C in pairs if each == gamma}) for gamma, _ in pairs}
        # Functions and classes of a notebook count by their code, which joblib.hash leaves out.
        settings = cloudpickle.dumps((clone(self.estimator), self.scoring, sklearn.__version__))
        key = self.memory and joblib.hash((X, y, splits, settings))
        kept = joblib.Memory(self.memory, verbose=0).cache(_keep, ignore=["cells"])
        done, todo = {}, []
        for place in product(range(len(splits)), parts):
            try:
                done[place] = kept(key, place, parts[place[1]], None)
            except LookupError:
                todo.append(place)
        # Errors come up here, not in joblib's threads.
        folds = {fold: self._preprocess(X, y, *splits[fold]) for fold in {fold for fold, _ in todo}}

        def tasks():
            # joblib asks for the next part when it can use it: few folds' distances are there.
            for fold, (X_train, X_test, labels) in folds.items():
                between = euclidean_distances(X_test, X_train, squared=True)
                distances = np.concatenate([euclidean_distances(X_train, squared=True), between])
                for gamma, Cs in parts.items():
                    if (fold, gamma) in todo:
                        place = fold, gamma
                        yield delayed(_solve)(place, Cs, distances, labels, svc, self.scorer_)

        parallel = Parallel(self.n_jobs, prefer="threads", return_as="generator_unordered")
        total, known = len(pairs) * len(splits), sum(map(len, done.values()))
        if not todo:
            print(f"Grid search: all {total:,} fits are there from an earlier search.")
        left = "run the cell again, it goes on after {:,} of {:,} fits"
        with progress(
            total,
            "Grid search",
            "fit",
            lambda: left.format(bar.n, total),
            initial=known,
            disable=not todo,
        ) as bar:
            for place, cells in parallel(tasks()):
                done[place] = kept(key, place, parts[place[1]], cells)
                bar.update(len(cells))
        return [done[fold, gamma][C] for gamma, C in pairs for fold in range(len(splits))]

    def _run_search(self, evaluate_candidates: Callable) -> dict:
        """Search the grid, and what lies beyond its edges where the best pair is there."""
        start = time.perf_counter()
        grid, candidates = self.param_grid, list(ParameterGrid(self.param_grid))
        self.n_grid_, self.extensions_ = len(candidates), []
        results, steps = evaluate_candidates(candidates), [0] * len(candidates)
        while self.beyond_edges and (added := self._beyond(grid, results)):
            self.extensions_.append(added)
            grid = {name: [*values, *added.get(name, [])] for name, values in grid.items()}
            candidates = [each for each in ParameterGrid(grid) if each not in results["params"]]
            results = evaluate_candidates(candidates)
            steps += [len(self.extensions_)] * len(candidates)
        results["extension"] = np.array(steps)
        self.search_time_ = time.perf_counter() - start
        return results

    def _beyond(self, grid: dict, results: dict) -> dict[str, list[float]]:
        """Return further values of C and gamma where the best pair is on an edge, else nothing.

        Pairs that are as good, as all are on a plateau, count for the direction.
        """
        ranks = results["rank_test_score"]
        best = [results["params"][each] for each in np.flatnonzero(ranks == ranks.min())]
        # Where all pairs are as good, no gamma of the grid tells the rows apart, as on a table of
        # very many columns, whose rows are far from each other: go on until one does.
        added, on_edge = {}, len(best) == len(ranks)
        for name, values in grid.items():
            values = sorted(set(values))
            for edge, inner in (values[:2], values[:-3:-1]) if len(values) > 1 else ():
                further = [edge * (edge / inner) ** (k + 1) for k in range(FURTHER)]
                further = [value for value in further if LIMITS[0] <= value <= LIMITS[1]]
                if further and any(pair[name] == edge for pair in best):
                    added[name] = added.get(name, []) + further
                    on_edge |= best[0][name] == edge
        return added if on_edge else {}
