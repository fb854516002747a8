"""`GridSearchCV` for C and gamma of an RBF support vector machine, with kernels that are shared.

`GridSearchCV` preprocesses a fold and computes its kernel anew for every pair. Here a fold is
preprocessed once, its squared distances are computed once and its kernel once per gamma; the
values of C follow in rising order until the solution no longer changes. Scorers, ranks and
``cv_results_`` are scikit-learn's own, and so are the scores in all cells and folds.
"""

import sys
import time
import warnings
from contextlib import suppress
from itertools import product
from numbers import Real

import cloudpickle
import joblib
import numpy as np
import psutil
import sklearn
from sklearn.base import clone
from sklearn.metrics import check_scoring
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GridSearchCV, ParameterGrid, check_cv
from sklearn.model_selection._validation import (
    _fit_and_score,
    _insert_error_scores,
    _warn_or_raise_about_fit_failures,
)
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC
from sklearn.utils import _safe_indexing, check_array, indexable
from sklearn.utils.parallel import Parallel, delayed

from helpers.display import progress
from helpers.workspace import ParameterError

FURTHER = 3  # values that are added beyond an edge at a time
LIMITS = 2.0**-15, 2.0**15  # as far as the authors of LIBSVM advise to look (Hsu, Chang, Lin 2003)

# The workers of a cluster need scikit-learn, not this project.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class _KernelSVC(SVC):
    """SVC on the rows `X` of `gram`, a kernel: views of it, where scikit-learn would copy."""

    gram = None  # shape (n_rows, n_train), training rows first

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = False
        return tags

    def fit(self, X, y):
        return super().fit(self.gram[X[0] : X[-1] + 1], y)

    def _validate_for_predict(self, X):
        return super()._validate_for_predict(self.gram[X[0] : X[-1] + 1])


def _distances(X_train, X_test):
    """Return the squared distances of all rows, test rows last, to the training rows."""
    pairs = (X_train, X_train), (X_test, X_train)
    return np.concatenate([euclidean_distances(*each, squared=True) for each in pairs])


def _solve(place, Cs, distances, y, svc, how):
    """Fit and score one fold and gamma for all values of C, which rise.

    Two values of C with the same solution, bit by bit, mean that C did not bind on the solver's
    way there. It binds even less where C is larger, so that all larger ones have this solution
    too. (It is not enough that no coefficient of one solution equals C: some may have on the way.)
    """
    kernel = distances * -place[1]
    np.exp(kernel, out=kernel)
    rows, cells, solution = np.arange(len(kernel)), {}, None
    train, test = np.split(rows, kernel.shape[1:])
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        for C in Cs:
            machine = clone(svc).set_params(C=C)
            machine.gram = kernel
            cell = _fit_and_score(machine, rows, y, train=train, test=test, **how)
            before, solution = solution, getattr(machine, "dual_coef_", None)
            cells[C] = cell
            if solution is not None and np.array_equal(solution, before):
                break
    known = {**cell, "fit_time": 0.0, "score_time": 0.0}
    return place, {C: cells.get(C, known) for C in Cs}


def _keep(key, place, Cs, cells):
    """Return `cells`, for `joblib.Memory` to keep; called without it, nothing is kept yet."""
    if cells is None:
        raise LookupError
    return cells


class KernelGridSearch(GridSearchCV):
    """Exhaustive search of C and gamma for an RBF `SVC`, alone or at the end of a pipeline.

    Whatever shared kernels cannot do is left to `GridSearchCV` itself: other estimators,
    parameters or kernels, ``gamma='scale'``, ``probability=True``, sample weights, and, with a
    warning, kernels that do not fit into memory. An error in the preprocessing ends the search.

    Parameters
    ----------
    estimator : sklearn.svm.SVC or sklearn.pipeline.Pipeline
    param_grid : dict or list of dict
        ``{"svc__C": values, "svc__gamma": values}``.
    scoring, n_jobs, refit, cv, verbose, pre_dispatch, error_score, return_train_score
        As in `GridSearchCV`. Scorers see an `SVC` and a kernel in place of estimator and table.
        Runs in threads, or where ``joblib.parallel_config`` says: processes, a Dask cluster.
    memory : path-like, optional
        Folder that keeps each finished fold and gamma: an interrupted search goes on from there.
    beyond_edges : bool
        Where the best pair lies on the edge of the grid, go on beyond it in the grid's own ratio
        until it lies inside or at `LIMITS`. Needs one dict of numbers as `param_grid`.

    Attributes
    ----------
    n_grid_ : int
        Candidates of `param_grid`; they come first in ``cv_results_``.
    extensions_ : list of dict of str to list of float
        The values added in each step. With `beyond_edges`, ``cv_results_["extension"]`` has the
        number of each candidate's step; 0: the grid.
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
        """Search the grid; with `refit`, fit the best pair on all rows.

        Parameters
        ----------
        X : pandas.DataFrame, numpy.ndarray or sparse matrix, shape (n_rows, n_columns)
        y : array-like, shape (n_rows,)
        **params
            ``groups`` for `cv`; what else `GridSearchCV.fit` takes is left to it.

        Returns
        -------
        self

        Raises
        ------
        helpers.workspace.ParameterError
            If the grid is empty or has values that are not finite numbers above 0.
        """
        self._check_grid()
        if y is None or not self._shares_kernels(params):
            return super().fit(X, y, **params)
        self._validate_params()
        self._svc()[0]._validate_params()
        scorers, metric = self._get_scorers()
        X, y = indexable(X, y)
        self._checked_cv_orig = check_cv(self.cv, y, classifier=True)
        splits = self._checked_cv_orig.split(X, y, params.get("groups"))
        splits = [(np.asarray(train), np.asarray(test)) for train, test in splits]
        if not self._fits_into_memory(splits):
            return super().fit(X, y, **params)
        self.n_splits_ = len(splits)
        candidates, cells, results = [], [], {}

        def evaluate_candidates(added):
            nonlocal results
            found = self._evaluate(added, X, y, splits, scorers)
            _warn_or_raise_about_fit_failures(found, self.error_score)
            if callable(self.scoring):
                _insert_error_scores(found, self.error_score)
            candidates.extend(added)
            cells.extend(found)
            results = self._format_results(candidates, len(splits), cells)
            return results

        self._run_search(evaluate_candidates)
        # What a callable returns is known only now.
        self.multimetric_ = isinstance(cells[0]["test_scores"], dict)
        if callable(self.scoring) and self.multimetric_:
            self._check_refit_for_multimetric(cells[0]["test_scores"])
            metric = self.refit
        if self.refit or not self.multimetric_:
            self.best_index_ = self._select_best_index(self.refit, metric, results)
            self.best_params_ = results["params"][self.best_index_]
            if not callable(self.refit):
                self.best_score_ = results[f"mean_test_{metric}"][self.best_index_]
        self.cv_results_, self.scorer_ = results, getattr(scorers, "_scorers", scorers)
        if self.refit:
            start = time.perf_counter()
            self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_).fit(X, y)
            self.refit_time_ = time.perf_counter() - start
            if hasattr(self.best_estimator_, "feature_names_in_"):
                self.feature_names_in_ = self.best_estimator_.feature_names_in_
        return self

    def _svc(self):
        """Return the last step, and the names of its C and gamma."""
        if isinstance(self.estimator, Pipeline):
            name, svc = self.estimator.steps[-1]
            return svc, f"{name}__C", f"{name}__gamma"
        return self.estimator, "C", "gamma"

    def _check_grid(self):
        grids = [self.param_grid] if isinstance(self.param_grid, dict) else self.param_grid
        if not any(grids):
            raise ParameterError("The grid is empty: it needs values of C and gamma.")
        for name, values in (item for grid in grids for item in grid.items()):
            short, values = name.rpartition("__")[2], np.atleast_1d(np.asarray(values, object))
            texts = ("scale", "auto") if short == "gamma" else ()
            if short in ("C", "gamma") and not (
                len(values)
                and all(
                    0 < value < np.inf if isinstance(value, Real) else value in texts
                    for value in values
                )
            ):
                raise ParameterError(
                    f"The grid's {short} must be finite numbers above 0, at least one, not "
                    f"{list(values)}. In the notebook they are 2 to the power of "
                    f"{short.upper()}_EXPONENTS, such as [-5, 0, 6]."
                )

    def _pairs(self, candidates):
        """Return gamma and C of each candidate."""
        svc, C, gamma = self._svc()
        return [(each.get(gamma, svc.gamma), each.get(C, svc.C)) for each in candidates]

    def _shares_kernels(self, params):
        svc, *names = self._svc()
        candidates = list(ParameterGrid(self.param_grid))
        return (
            type(svc) is SVC
            and svc.kernel == "rbf"
            and svc.probability is not True
            and set().union(*candidates) <= set(names)
            and all(isinstance(gamma, Real) for gamma, _ in self._pairs(candidates))
            and set(params) <= {"groups"}
            and not sklearn.get_config()["enable_metadata_routing"]
        )

    def _fits_into_memory(self, splits):
        threads = joblib.effective_n_jobs(self.n_jobs)
        gammas = len({gamma for gamma, _ in self._pairs(ParameterGrid(self.param_grid))})
        # While the last parts of one fold run, the next ones are there already.
        at_once = min(len(splits), 2 + 2 * threads // gammas)
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

    def _preprocess(self, X, y, train, test):
        """Return a fold's training and test rows as the `SVC` gets them, and their labels."""
        X_train, X_test = _safe_indexing(X, train), _safe_indexing(X, test)
        if isinstance(self.estimator, Pipeline) and len(self.estimator) > 1:
            preprocessing = clone(self.estimator[:-1])
            X_train = preprocessing.fit_transform(X_train, _safe_indexing(y, train))
            X_test = preprocessing.transform(X_test)
        rows = X_train, X_test
        X_train, X_test = (check_array(X, accept_sparse="csr", dtype=np.float64) for X in rows)
        # libsvm solves class by class: it reads a kernel in that order faster.
        order = np.argsort(np.ravel(y)[train], kind="stable")
        return X_train[order], X_test, _safe_indexing(y, np.concatenate([train[order], test]))

    def _evaluate(self, candidates, X, y, splits, scorers):
        """Return what `_fit_and_score` gives for each candidate and fold."""
        pairs = self._pairs(candidates)
        parts = {gamma: sorted({C for each, C in pairs if each == gamma}) for gamma, _ in pairs}
        svc = _KernelSVC(**{**self._svc()[0].get_params(), "kernel": "precomputed"})
        how = {
            "scorer": check_scoring(svc) if self.scoring is None else scorers,
            "verbose": 0,
            "fit_params": {},
            "score_params": {},
            "return_train_score": self.return_train_score,
            "return_n_test_samples": True,
            "return_times": True,
            "parameters": None,
            "error_score": self.error_score,
        }
        settings = self.estimator, self.scoring, self.return_train_score, self.error_score
        # Functions and classes of a notebook count by their code, which joblib.hash leaves out.
        settings = cloudpickle.dumps((clone(settings, safe=False), sklearn.__version__))
        key = self.memory and joblib.hash((X, y, splits, settings))
        kept = joblib.Memory(self.memory, verbose=0).cache(_keep, ignore=["cells"])
        places = list(product(range(len(splits)), parts))
        done = {}
        for place in places:
            with suppress(LookupError):
                done[place] = kept(key, place, parts[place[1]], None)
        todo = [place for place in places if place not in done]
        # Errors come up here, not in joblib's threads.
        folds = {fold: self._preprocess(X, y, *splits[fold]) for fold in {fold for fold, _ in todo}}

        def tasks():
            # joblib asks for the next part when it can use it: few folds' distances are there.
            for fold, (X_train, X_test, labels) in folds.items():
                distances = _distances(X_train, X_test)
                for gamma in [gamma for each, gamma in todo if each == fold]:
                    yield delayed(_solve)((fold, gamma), parts[gamma], distances, labels, svc, how)

        parallel = Parallel(
            self.n_jobs,
            prefer="threads",
            pre_dispatch=self.pre_dispatch,
            return_as="generator_unordered",
        )
        with progress(len(pairs) * len(splits), "Grid search", "fit") as bar:
            bar.update(sum(map(len, done.values())))
            for place, found in parallel(tasks()):
                done[place] = kept(key, place, parts[place[1]], found)
                bar.update(len(found))
        return [done[fold, gamma][C] for gamma, C in pairs for fold in range(len(splits))]

    def _run_search(self, evaluate_candidates):
        """Search the grid, and what lies beyond its edges where the best pair is there."""
        start = time.perf_counter()
        grid, candidates, steps = self.param_grid, list(ParameterGrid(self.param_grid)), []
        self.n_grid_, self.extensions_ = len(candidates), []
        while candidates:
            results = evaluate_candidates(candidates)
            steps += [len(self.extensions_)] * len(candidates)
            added = self._beyond(grid, results)
            if not added:
                break
            self.extensions_.append(added)
            grid = {name: [*values, *added.get(name, [])] for name, values in grid.items()}
            candidates = [each for each in ParameterGrid(grid) if each not in results["params"]]
        if self.beyond_edges:
            results["extension"] = np.array(steps)
        self.search_time_ = time.perf_counter() - start

    def _beyond(self, grid, results):
        """Return further values of C and gamma where the best pair is on an edge, else nothing.

        Pairs that are as good, as all are on a plateau, count for the direction.
        """
        metric = self.refit if isinstance(self.refit, str) else "score"
        ranks = results.get(f"rank_test_{metric}")
        if not self.beyond_edges or ranks is None or not isinstance(grid, dict):
            return {}
        winner = self._select_best_index(self.refit, metric, results)
        best = [results["params"][each] for each in np.flatnonzero(ranks == ranks[winner])]
        added, on_edge = {}, False
        for name in self._svc()[1:]:
            values = sorted({each for each in grid.get(name, []) if isinstance(each, Real)})
            for edge, inner in (values[:2], values[:-3:-1]) if len(values) > 1 else ():
                further = [edge * (edge / inner) ** (k + 1) for k in range(FURTHER)]
                further = [value for value in further if LIMITS[0] <= value <= LIMITS[1]]
                if further and any(pair[name] == edge for pair in best):
                    added[name] = added.get(name, []) + further
                    on_edge |= results["params"][winner][name] == edge
        return added if on_edge else {}
