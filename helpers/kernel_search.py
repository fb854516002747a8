"""Exact grid search over C and gamma of an RBF support vector machine, with shared kernels.

`sklearn.model_selection.GridSearchCV` preprocesses a fold and computes its RBF kernel anew for
every pair of C and gamma. Here a fold is preprocessed once, its squared distances are computed
once, and the kernel once per gamma; all values of C share it, and the steps that their solutions
have in common. This module is the search: candidates, threads or a cluster, finished parts,
``cv_results_``. What happens for one fold and gamma is in `helpers.kernel_parts`, the solver in
`helpers.smo`. The scores are those of `GridSearchCV` on the same folds.
"""

import hashlib
import json
import os
import tempfile
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import scipy.sparse as sp
import sklearn
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import GridSearchCV, ParameterGrid, check_cv
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC
from sklearn.utils import column_or_1d, indexable
from sklearn.utils.multiclass import check_classification_targets
from tqdm import tqdm

from helpers.kernel_parts import Work

LONG = 3600  # seconds above which an estimate is given in hours
FORMAT = 1  # of the kept parts; raised whenever scores would be computed in another way


class LargeSearchWarning(UserWarning):
    """The kernels do not fit into the memory budget: the search is exact, but takes long."""


def _solve(work, number, place):
    """Run a part of the search on a worker of a cluster."""
    return work.solve(number, place)


def _digest_data(X):
    """Return a digest of the contents of a table, the same in every process."""
    digest = hashlib.sha256()
    if hasattr(X, "iloc"):
        frame = X if isinstance(X, pd.DataFrame) else X.to_frame()
        digest.update(
            repr([(str(name), str(kind)) for name, kind in frame.dtypes.items()]).encode()
        )
        digest.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
    elif sp.issparse(X):
        matrix = X.tocsr()
        for part in (np.array(matrix.shape), matrix.indptr, matrix.indices, matrix.data):
            digest.update(np.ascontiguousarray(part).tobytes())
    else:
        array = np.asarray(X)
        if array.dtype == object:
            return _digest_data(pd.DataFrame(array.reshape(len(array), -1)))
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class _Kept:
    """Finished parts of a search in a folder whose name is a digest of all its inputs."""

    def __init__(self, folder, work):
        scorers = {name: joblib.hash(scorer) for name, scorer in work.scoring.items()}
        key = {
            "format": FORMAT,
            "scikit-learn": sklearn.__version__,
            "estimator": joblib.hash(clone(work.estimator)),
            "X": _digest_data(work.X),
            "y": _digest_data(work.y),
            "folds": joblib.hash([(np.asarray(a), np.asarray(b)) for a, b in work.splits]),
            "grid": repr(work.parts),
            "scoring": scorers,
            "train_scores": work.train_scores,
            "error_score": repr(work.error_score),
        }
        text = json.dumps(key, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, number, place):
        return self.folder / f"{number}-{place}.json"

    def read(self, number, place):
        """Return a finished part, or None."""
        try:
            return json.loads(self._path(number, place).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            # A machine that lost its power leaves an empty file: that part is done again.
            return None

    def write(self, number, place, cells):
        """Keep a part, whole or not at all."""
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(cells, file)
        os.replace(name, self._path(number, place))


@contextmanager
def _executor(client, threads):
    """Give something with ``submit``: threads of this process, or the workers of a cluster."""
    if client is None:
        pool, at_once = ThreadPoolExecutor(threads), {"wait": False, "cancel_futures": True}
    else:
        _send_helpers(client)
        # A part is pure: one whose worker dies is simply done by another.
        pool, at_once = client.get_executor(pure=False, retries=5), {"wait": False}
    try:
        yield pool
    except BaseException:
        pool.shutdown(**at_once)
        raise
    pool.shutdown()


def _send_helpers(client):
    """Bring this package to the workers, also to those that join later."""
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "helpers.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(package.glob("*.py")):
                file.write(path, f"{package.name}/{path.name}")
        client.upload_file(str(archive))


class KernelGridSearch(GridSearchCV):
    """Grid search over C and gamma of an RBF `SVC`, or of a pipeline that ends in one.

    Takes the place of `sklearn.model_selection.GridSearchCV`, with the same scores.

    Parameters
    ----------
    estimator : sklearn.svm.SVC or sklearn.pipeline.Pipeline
        An `SVC` with ``kernel='rbf'``, behind any preprocessing, which is fitted inside each
        fold. Its other settings (class weights, ``tol``, ...) hold.
    param_grid : dict or list of dict
        Values of C and gamma under the estimator's names, such as ``svc__C`` and ``svc__gamma``.
    scoring : str, callable, list or dict, optional
        As in `GridSearchCV`; default: accuracy. A scorer of one's own gets an object with
        ``predict``, ``decision_function`` and ``classes_`` (and ``predict_proba`` if the `SVC`
        has probabilities), and the preprocessed rows.
    n_jobs : int, optional
        Threads; -1: one per core. Without a value: one.
    refit : bool, str or callable
        As in `GridSearchCV`.
    cv : int, cross-validation generator or iterable, optional
        As in `GridSearchCV`.
    error_score : 'raise' or float
        Score of a fit that fails.
    return_train_score : bool
        Add the scores on the training rows to ``cv_results_``.
    memory_budget : int, optional
        Bytes for distances and kernels; default: half of what is free. Where they do not fit,
        fewer threads work at once; where not even one kernel fits, every fit computes its own
        from the rows, and a `LargeSearchWarning` says how long that will take.
    cache_dir : str or pathlib.Path, optional
        Folder that keeps each finished part (one fold and gamma). A search with the same data,
        folds, estimator, grid and scoring goes on from there; any other starts anew. Steps are
        told apart by their class and parameters: after a change of a class's code, empty it.
    client : distributed.Client, optional
        Search on the workers of that cluster; this package is brought to them.
    progress : bool
        Show a bar with the best mean score so far.

    Attributes
    ----------
    cv_results_ : dict of numpy.ndarray
        As in `GridSearchCV`. The time of a kernel is shared by the fits that use it.
    n_fits_, n_fits_saved_ : int
        Machines (one per pair of classes, candidate and fold) that libsvm solved, and those
        whose solution was known from a smaller C.
    solved_ : numpy.ndarray, shape (n_candidates,)
        Share of a candidate's machines that libsvm solved.
    n_parts_resumed_ : int
        Parts (one fold and gamma) that came from `cache_dir`.
    search_time_ : float
        Seconds that the search took, without the refit.

    See `GridSearchCV` for the others: ``best_params_``, ``best_score_``, ``best_index_``,
    ``best_estimator_``, ``scorer_``, ``multimetric_``, ``n_splits_``, ``refit_time_``.

    Raises
    ------
    ValueError
        If the estimator is not an RBF `SVC`, or the grid has other parameters.
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
        error_score=np.nan,
        return_train_score=False,
        memory_budget=None,
        cache_dir=None,
        client=None,
        progress=False,
    ):
        super().__init__(
            estimator,
            param_grid,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.memory_budget = memory_budget
        self.cache_dir = cache_dir
        self.client = client
        self.progress = progress

    def _candidates(self):
        """Return the candidates, and for each gamma its values of C and the candidates' places."""
        pipeline = isinstance(self.estimator, Pipeline)
        svc = self.estimator[-1] if pipeline else self.estimator
        if not isinstance(svc, SVC) or svc.kernel != "rbf":
            raise ValueError(
                f"KernelGridSearch needs an SVC with kernel='rbf', alone or at the end of a "
                f"pipeline, not {svc!r}. Use GridSearchCV for others."
            )
        prefix = f"{self.estimator.steps[-1][0]}__" if pipeline else ""
        params = list(ParameterGrid(self.param_grid))
        other = {name for each in params for name in each} - {f"{prefix}C", f"{prefix}gamma"}
        if other:
            raise ValueError(
                f"param_grid may have {prefix}C and {prefix}gamma, not {', '.join(sorted(other))}. "
                "Use GridSearchCV for others."
            )
        parts = {}
        for place, each in enumerate(params):
            gamma, C = each.get(f"{prefix}gamma", svc.gamma), each.get(f"{prefix}C", svc.C)
            parts.setdefault(gamma, []).append((C, place))
        return params, parts

    def _scorers(self):
        """Return the scorers by their names."""
        if isinstance(self.scoring, dict):
            named = self.scoring
        elif isinstance(self.scoring, (list, tuple, set)):
            named = {name: name for name in self.scoring}
        else:
            return {"score": check_scoring(self.estimator, self.scoring)}, False
        scorers = {name: check_scoring(self.estimator, each) for name, each in named.items()}
        return scorers, True

    def _search(self, work, kept):
        """Return the cells of every fold and gamma."""
        todo, done = [], {}
        for number in range(len(work.splits)):
            for place in range(len(work.parts)):
                cells = kept.read(number, place) if kept else None
                if cells is None:
                    todo.append((number, place))
                else:
                    done[number, place] = cells
        self.n_parts_resumed_ = len(done)
        wanted = joblib.effective_n_jobs(self.n_jobs or 1)
        fits, threads, folds_at_once = True, wanted, 2
        if self.client is None and todo:
            fits, threads, folds_at_once = work.plan(wanted)
        if not fits:
            self._warn_of_size(work, threads)
        bar = tqdm(
            total=sum(len(Cs) for _, Cs in work.parts) * len(work.splits),
            initial=sum(len(cells) for cells in done.values()),
            desc="Grid search",
            unit="fit",
            disable=not self.progress,
            mininterval=0.5,
            ncols=90,
        )
        with bar, _executor(self.client, threads) as pool:
            window = deque()
            shared = work
            if self.client is not None:
                shared = self.client.scatter(work, broadcast=True, hash=False)
                folds_at_once = len(work.splits)
            for number in range(len(work.splits)):
                places = [place for fold, place in todo if fold == number]
                window.append((number, self._submit(pool, shared, number, places)))
                # Two folds at a time: no thread waits for the last part of a fold, and no more
                # than two folds, the largest things in memory, are there.
                if len(window) == folds_at_once:
                    self._gather(work, *window.popleft(), done, kept, bar)
            while window:
                self._gather(work, *window.popleft(), done, kept, bar)
        return done

    def _submit(self, pool, work, number, places):
        return {pool.submit(_solve, work, number, place): place for place in places}

    def _gather(self, work, number, tasks, done, kept, bar):
        """Take in the results of one fold."""
        for task in as_completed(tasks):
            cells = task.result()
            done[number, tasks[task]] = cells
            if kept:
                kept.write(number, tasks[task], cells)
            bar.update(len(cells))
            bar.set_postfix_str(self._best_so_far(done), refresh=False)
        work.forget(number)

    def _best_so_far(self, done):
        """Return the best mean score over the folds that are there, as text."""
        scores = {}
        for (_, place), cells in done.items():
            for k, cell in enumerate(cells):
                if cell["test"]:
                    scores.setdefault((place, k), []).append(next(iter(cell["test"].values())))
        means = [np.mean(values) for values in scores.values()]
        return f"best {np.nanmax(means):.4f}" if np.isfinite(means).any() else ""

    def _warn_of_size(self, work, threads):
        seconds = work.estimate(threads)
        text = f"{seconds / 3600:.1f} h" if seconds > LONG else f"{seconds / 60:.0f} min"
        needed = sum(work.sizes()) / 2**30
        warnings.warn(
            f"The kernels of {len(work.splits[0][0]):,} training rows need {needed:.1f} GiB, more "
            f"than the memory budget of {work.memory_budget() / 2**30:.1f} GiB: every fit computes "
            f"its own. The search will take about {text} on {threads} threads. It takes less with "
            "fewer rows, a smaller grid or fewer folds, or with more memory (memory_budget).",
            LargeSearchWarning,
            stacklevel=4,
        )

    def _collect(self, params, parts, n_splits, done):
        """Lay the cells out by candidate and fold."""
        grid = np.empty((len(params), n_splits), dtype=object)
        for (number, place), cells in done.items():
            for (_, candidate), cell in zip(parts[place][1], cells, strict=True):
                grid[candidate, number] = cell
        return grid

    def _report_failures(self, grid):
        """Warn of failed fits and scores, as `GridSearchCV` does; if all fits failed, say why."""
        failed = [cell for cell in grid.ravel() if cell["error"]]
        fits = [cell["error"] for cell in failed if not cell["fitted"]]
        scores = [cell["error"] for cell in failed if cell["fitted"]]
        to = f"will be set to {self.error_score}"
        if len(fits) == grid.size:
            raise ValueError(
                f"All the {grid.size} fits failed.\nIt is very likely that your model is "
                f"misconfigured.\n{_each_once(fits)}"
            )
        if fits:
            text = f"{len(fits)} fits failed out of a total of {grid.size}.\nThe score on these "
            text += f"train-test partitions for these parameters {to}.\n{_each_once(fits)}"
            warnings.warn(text, FitFailedWarning, stacklevel=3)
        if scores:
            text = "Scoring failed. The score on this train-test partition for these parameters "
            warnings.warn(f"{text}{to}. Details:\n{_each_once(scores)}", UserWarning, stacklevel=3)

    def _metrics(self, grid, name):
        """Return the scores of each metric as arrays of shape (n_candidates, n_splits)."""
        known = next((cell[name] for cell in grid.ravel() if cell[name]), {"score": np.nan})
        return {
            metric: np.array(
                [
                    [cell[name][metric] if cell[name] else self.error_score for cell in row]
                    for row in grid
                ],
                dtype=float,
            )
            for metric in known
        }

    def _format(self, params, grid):
        """Return ``cv_results_``."""
        results = {}
        for name in ("fit_time", "score_time"):
            values = np.array([[cell[name] for cell in row] for row in grid])
            results[f"mean_{name}"] = values.mean(axis=1)
            results[f"std_{name}"] = values.std(axis=1)
        for name in sorted({name for each in params for name in each}):
            missing = [name not in each for each in params]
            values = [each.get(name) for each in params]
            kinds = {type(value) for value in values}
            kind = None if kinds <= {int, float} or len(kinds) == 1 else object
            results[f"param_{name}"] = np.ma.MaskedArray(values, mask=missing, dtype=kind)
        results["params"] = params
        for kind in ("test", "train") if self.return_train_score else ("test",):
            for metric, scores in self._metrics(grid, kind).items():
                results |= _summary(f"{kind}_{metric}", scores, ranked=kind == "test")
        return results

    def fit(self, X, y=None, *, groups=None):
        """Search the grid.

        Parameters
        ----------
        X : pandas.DataFrame, numpy.ndarray or sparse matrix, shape (n_rows, n_columns)
        y : array-like, shape (n_rows,)
        groups : array-like, shape (n_rows,), optional
            For cross-validation by groups.

        Returns
        -------
        self
        """
        params, by_gamma = self._candidates()
        scorers, self.multimetric_ = self._scorers()
        if self.multimetric_:
            self._check_refit(scorers)
        X, y, groups = indexable(X, y, groups)
        X = X if hasattr(X, "iloc") or sp.issparse(X) else np.asarray(X)
        if y is None:
            raise ValueError("KernelGridSearch requires y to be passed, but the target y is None.")
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        splits = list(check_cv(self.cv, y, classifier=True).split(X, y, groups))
        parts = [(gamma, [C for C, _ in places]) for gamma, places in by_gamma.items()]
        work = Work(
            self.estimator,
            X,
            labels,
            splits,
            parts,
            scorers,
            self.return_train_score,
            self.error_score,
            self.memory_budget,
        )
        kept = None if self.cache_dir is None else _Kept(self.cache_dir, work)
        start = time.perf_counter()
        done = self._search(work, kept)
        self.search_time_ = time.perf_counter() - start
        self.n_splits_ = len(splits)
        grid = self._collect(params, list(by_gamma.items()), len(splits), done)
        self._report_failures(grid)
        solved = np.array([[cell["solved"] for cell in row] for row in grid])
        asked = np.array([[cell["asked"] for cell in row] for row in grid])
        self.n_fits_, self.n_fits_saved_ = int(solved.sum()), int((asked - solved).sum())
        self.solved_ = solved.sum(axis=1) / np.maximum(asked.sum(axis=1), 1)
        self.cv_results_ = self._format(params, grid)
        if not self.multimetric_ and "rank_test_score" not in self.cv_results_:
            # A callable that returns several scores is known as such only now.
            self.multimetric_ = True
            self._check_refit(self._metrics(grid, "test"))
        self.scorer_ = scorers if len(scorers) > 1 or self.multimetric_ else scorers["score"]
        if isinstance(self.scorer_, dict) and callable(self.scoring):
            self.scorer_ = self.scoring
        self._choose()
        if self.refit:
            self._refit(X, y)
        return self

    def _check_refit(self, metrics):
        if self.refit is not False and not callable(self.refit) and self.refit not in metrics:
            raise ValueError(
                "For multi-metric scoring, the parameter refit must be set to a scorer key or a "
                f"callable to refit an estimator with the best parameter setting on the whole "
                f"data. If this is not needed, refit should be set to False explicitly. "
                f"{self.refit!r} was passed."
            )

    def _choose(self):
        """Choose the best candidate."""
        if self.multimetric_ and not self.refit:
            return
        metric = self.refit if self.multimetric_ else "score"
        if callable(self.refit):
            self.best_index_ = int(self.refit(self.cv_results_))
        else:
            self.best_index_ = int(self.cv_results_[f"rank_test_{metric}"].argmin())
            self.best_score_ = self.cv_results_[f"mean_test_{metric}"][self.best_index_]
        self.best_params_ = self.cv_results_["params"][self.best_index_]

    def _refit(self, X, y):
        """Fit the best candidate on all rows."""
        start = time.perf_counter()
        self.best_estimator_ = clone(self.estimator).set_params(**self.best_params_)
        self.best_estimator_.fit(X, y)
        self.refit_time_ = time.perf_counter() - start
        if hasattr(self.best_estimator_, "feature_names_in_"):
            self.feature_names_in_ = self.best_estimator_.feature_names_in_


def _each_once(errors):
    return "\n".join(f"{'-' * 80}\n{error}" for error in dict.fromkeys(errors))


def _summary(name, scores, ranked):
    """Return one score's entries of ``cv_results_``.

    The same sums in the same order as in scikit-learn, so that nearly equal means have the same
    order and the same candidate wins.
    """
    means = np.average(scores, axis=1)
    results = {f"split{number}_{name}": part for number, part in enumerate(scores.T)}
    results[f"mean_{name}"] = means
    results[f"std_{name}"] = np.sqrt(np.average((scores - means[:, None]) ** 2, axis=1))
    if not np.isfinite(means).all():
        warnings.warn(
            f"One or more of the {name.split('_')[0]} scores are non-finite: {means}",
            UserWarning,
            stacklevel=5,
        )
    if ranked:
        # Where a scorer gave no number the candidate comes last.
        worst = np.nanmin(means) - 1 if not np.isnan(means).all() else 0
        comparable = np.nan_to_num(means, nan=worst)
        results[f"rank_{name}"] = rankdata(-comparable, method="min").astype(np.int32)
    return results
