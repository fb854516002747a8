"""Exact grid search over C and gamma of an RBF support vector machine, with shared kernels.

`sklearn.model_selection.GridSearchCV` computes the RBF kernel of a fold anew for every pair of
C and gamma. Here the matrix of squared distances is made once per fold and the kernel once per
fold and gamma; all values of C share it. Where every dual coefficient stays below C the bound
no longer binds: the same solution is optimal for every larger C [1]_, so its scores are reused.
The scores are those of `GridSearchCV` on the same folds.

References
----------
.. [1] C.-C. Chang, C.-J. Lin (2011). LIBSVM: A library for support vector machines. *ACM TIST*
   2(3), 27. The dual problem's box constraint 0 <= alpha_i <= C is the only place of C.
"""

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from joblib import cpu_count
from scipy.stats import rankdata
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.metrics import check_scoring
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import ParameterGrid, check_cv
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm


class _KnownAnswers:
    """A fitted SVM that reads its kernel from a matrix already computed."""

    def __init__(self, model, kernel):
        self._model, self._kernel = model, kernel
        self.classes_ = model.classes_
        self._estimator_type = "classifier"

    def __sklearn_tags__(self):
        return self._model.__sklearn_tags__()

    def fit(self):
        """Exist, so that scorers take this for an estimator."""
        return self

    def predict(self, X):
        return self._model.predict(self._kernel)

    def decision_function(self, X):
        return self._model.decision_function(self._kernel)


class _Fold:
    """Squared distances of one fold, shared by all gammas."""

    def __init__(self, pipeline, X, y, train, test):
        preprocessing = clone(pipeline[:-1])
        inputs = preprocessing.fit_transform(_rows(X, train), y[train])
        test_inputs = preprocessing.transform(_rows(X, test))
        # libsvm takes the classes in pairs: rows of a class next to each other are read faster,
        # and in the same order as before, so that the solutions are the same.
        order = np.argsort(y[train], kind="stable")
        inputs = inputs[order]
        self.y_train, self.y_test = y[train][order], y[test]
        self.n_features, self.variance = inputs.shape[1], _variance(inputs)
        self.train = euclidean_distances(inputs, squared=True)
        self.test = euclidean_distances(test_inputs, inputs, squared=True)


def _rows(X, index):
    return X.iloc[index] if hasattr(X, "iloc") else X[index]


def _variance(inputs):
    return float(inputs.var()) if inputs.var() else 1.0


def _resolve_gamma(gamma, fold):
    """Return gamma as a number, as `sklearn.svm.SVC` would."""
    if gamma == "scale":
        return 1.0 / (fold.n_features * fold.variance)
    if gamma == "auto":
        return 1.0 / fold.n_features
    return gamma


class KernelGridSearch(MetaEstimatorMixin, BaseEstimator):
    """Grid search over C and gamma of a pipeline that ends in an RBF `SVC`.

    Parameters
    ----------
    estimator : sklearn.pipeline.Pipeline
        Preprocessing steps followed by an `sklearn.svm.SVC` with ``kernel='rbf'``. The
        preprocessing is fitted inside each fold.
    param_grid : dict
        ``{"C": sequence of float, "gamma": sequence of float}``.
    scoring : str or callable, optional
        A scikit-learn scorer that needs predictions or decision values; default: accuracy.
    cv : int or cross-validation generator
        As in `GridSearchCV`.
    refit : bool
        Fit the best pair on all rows afterwards.
    n_jobs : int, optional
        Threads; -1: one per core. libsvm releases Python's lock, so threads do not wait for
        each other and nothing is copied between processes.
    progress : bool
        Show a bar with the best mean score so far.

    Attributes
    ----------
    cv_results_ : dict of numpy.ndarray
        The keys of `GridSearchCV`: ``params``, ``param_<step>__C``, ``param_<step>__gamma``,
        ``split<k>_test_score``, ``mean_test_score``, ``std_test_score``, ``rank_test_score``,
        ``mean_fit_time``, ``std_fit_time`` (seconds).
    best_index_ : int
    best_params_ : dict
        Names of the pipeline's parameters: ``<step>__C``, ``<step>__gamma``.
    best_score_ : float
        Mean score of the best pair over the folds.
    best_estimator_ : sklearn.pipeline.Pipeline
        Only with ``refit=True``.
    n_fits_ : int
        Fits that were needed, of ``n_candidates * n_splits`` in all.
    search_time_ : float
        Seconds that the search took, without the refit.
    """

    def __init__(
        self,
        estimator,
        param_grid,
        *,
        scoring="accuracy",
        cv=5,
        refit=True,
        n_jobs=None,
        progress=False,
    ):
        self.estimator = estimator
        self.param_grid = param_grid
        self.scoring = scoring
        self.cv = cv
        self.refit = refit
        self.n_jobs = n_jobs
        self.progress = progress

    def _fit_and_score(self, fold, gamma, Cs):
        """Score every C of one fold and gamma; return scores, fit times and fits."""
        number = _resolve_gamma(gamma, fold)
        kernel = self._kernel("train", fold.train, number)
        test_kernel = self._kernel("test", fold.test, number)
        template = clone(self.estimator[-1]).set_params(kernel="precomputed")
        scorer = check_scoring(self.estimator, scoring=self.scoring)
        scores, times, fits = np.empty(len(Cs)), np.zeros(len(Cs)), 0
        loose = None
        for place in np.argsort(Cs):
            if loose is None:
                start = time.perf_counter()
                model = clone(template).set_params(C=Cs[place]).fit(kernel, fold.y_train)
                times[place] = time.perf_counter() - start
                fits += 1
                score = scorer(_KnownAnswers(model, test_kernel), test_kernel, fold.y_test)
                if model.class_weight is None and np.abs(model.dual_coef_).max() < Cs[place]:
                    loose = score
            scores[place] = score if loose is None else loose
        return scores, times, fits

    def _kernel(self, name, distances, gamma):
        """Return the RBF kernel in memory that this thread uses again and again.

        Fresh memory of this size comes from the operating system page by page, which takes
        longer than the computation.
        """
        buffer = getattr(self._memory, name, None)
        if buffer is None or buffer.shape != distances.shape:
            buffer = np.empty_like(distances)
            setattr(self._memory, name, buffer)
        np.multiply(distances, -gamma, out=buffer)
        return np.exp(buffer, out=buffer)

    def _search(self, X, y, splits):
        Cs, gammas = list(self.param_grid["C"]), list(self.param_grid["gamma"])
        scores = np.full((len(splits), len(Cs), len(gammas)), np.nan)
        times, self.n_fits_ = np.zeros_like(scores), 0
        threads = cpu_count() if self.n_jobs == -1 else (self.n_jobs or 1)
        bar = tqdm(
            total=scores.size,
            desc="Grid search",
            unit="fit",
            disable=not self.progress,
            mininterval=0.5,
            ncols=90,
        )
        pending = deque()
        with bar, ThreadPoolExecutor(threads) as pool:
            try:
                for number, (train, test) in enumerate(splits):
                    fold = _Fold(self.estimator, X, y, train, test)
                    tasks = {
                        pool.submit(self._fit_and_score, fold, gamma, Cs): place
                        for place, gamma in enumerate(gammas)
                    }
                    pending.append((number, tasks))
                    # Two folds at a time: no thread waits for the distances of the next fold,
                    # which are the largest things in memory.
                    if len(pending) == 2:
                        self._gather(*pending.popleft(), scores, times, bar)
                while pending:
                    self._gather(*pending.popleft(), scores, times, bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return scores, times

    def _gather(self, number, tasks, scores, times, bar):
        """Take in the results of one fold."""
        for task in as_completed(tasks):
            part, seconds, fits = task.result()
            scores[number, :, tasks[task]] = part
            times[number, :, tasks[task]] = seconds
            self.n_fits_ += fits
            bar.update(len(part))
        best = np.fmax.reduce(scores[: number + 1].mean(axis=0), axis=None)
        bar.set_postfix_str(f"best {best:.4f} after fold {number + 1}")

    def _collect(self, scores, times):
        """Lay the scores out as `GridSearchCV` does: C varies slowest."""
        step = self.estimator.steps[-1][0]
        names = {"C": f"{step}__C", "gamma": f"{step}__gamma"}
        grid = {names[key]: list(values) for key, values in self.param_grid.items()}
        params = list(ParameterGrid(grid))
        flat, seconds = (part.reshape(len(scores), -1) for part in (scores, times))
        # One row per pair in memory, as in scikit-learn: the same sums in the same order, so
        # that nearly equal means have the same order and the same pair wins.
        rows = np.ascontiguousarray(flat.T)
        means = np.average(rows, axis=1)
        # Where a scorer gave no number the pair comes last.
        known = means[~np.isnan(means)]
        comparable = np.nan_to_num(means, nan=known.min() - 1 if len(known) else 0)
        return {
            "mean_fit_time": seconds.mean(axis=0),
            "std_fit_time": seconds.std(axis=0),
            **{
                f"param_{name}": np.ma.array([pair[name] for pair in params])
                for name in names.values()
            },
            "params": params,
            **{f"split{number}_test_score": part for number, part in enumerate(flat)},
            "mean_test_score": means,
            "std_test_score": np.sqrt(np.average((rows - means[:, None]) ** 2, axis=1)),
            "rank_test_score": rankdata(-comparable, method="min").astype("int32"),
        }

    def fit(self, X, y):
        """Search the grid.

        Parameters
        ----------
        X : pandas.DataFrame or numpy.ndarray, shape (n_rows, n_columns)
        y : array-like, shape (n_rows,)

        Returns
        -------
        self
        """
        y = np.asarray(y)
        splits = list(check_cv(self.cv, y, classifier=True).split(X, y))
        start = time.perf_counter()
        self._memory = threading.local()
        scores, times = self._search(X, y, splits)
        del self._memory
        self.search_time_ = time.perf_counter() - start
        self.n_splits_ = len(splits)
        self.cv_results_ = self._collect(scores, times)
        self.best_index_ = int(self.cv_results_["rank_test_score"].argmin())
        self.best_params_ = self.cv_results_["params"][self.best_index_]
        self.best_score_ = float(self.cv_results_["mean_test_score"][self.best_index_])
        if self.refit:
            start = time.perf_counter()
            self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_)
            self.best_estimator_.fit(X, y)
            self.refit_time_ = time.perf_counter() - start
        return self

    @available_if(lambda self: self.refit)
    def predict(self, X):
        """Predict with the best pair.

        Parameters
        ----------
        X : pandas.DataFrame or numpy.ndarray, shape (n_rows, n_columns)

        Returns
        -------
        numpy.ndarray, shape (n_rows,)
        """
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_.predict(X)
