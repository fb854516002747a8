"""Exact grid search over C and gamma of an RBF support vector machine, with shared kernels.

`sklearn.model_selection.GridSearchCV` preprocesses a fold and computes its RBF kernel anew for
every pair of C and gamma. Here a fold is preprocessed once, its squared distances are computed
once, and the kernel once per gamma; all values of C share it. libsvm takes the classes two at a
time [1]_, so each pair of classes is solved by itself, and no longer once C does not bind: where
no dual coefficient meets its bound and twice the bound gives the same solution bit by bit, libsvm
never touched the bound, and every larger C gives that solution too. libsvm itself solves, and
releases Python's lock meanwhile, so that threads share everything and nothing is copied. The
scores are those of `GridSearchCV` on the same folds.

References
----------
.. [1] C.-C. Chang, C.-J. Lin (2011). LIBSVM: A library for support vector machines. *ACM TIST*
   2(3), 27. One-against-one: section 7; C only as the bound 0 <= alpha_i <= C: section 2.1.
"""

import hashlib
import json
import os
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
import sklearn
from scipy.stats import rankdata
from sklearn.base import clone
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import accuracy_score, check_scoring
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GridSearchCV, ParameterGrid, check_cv
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC
from sklearn.utils import check_array, column_or_1d, indexable
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if

# What `SVC.decision_function` uses; there is no public way to it from the machines of the pairs.
from sklearn.utils.multiclass import _ovr_decision_function, check_classification_targets
from tqdm import tqdm

SLICE = 1024  # rows whose distances or kernel are computed at a time
AS_SVC = {"dtype": np.float64, "order": "C", "accept_sparse": "csr"}  # as `SVC` takes its rows
LONG = 3600  # seconds above which an estimate is given in hours
FORMAT = 1  # of the kept parts; raised whenever scores would be computed in another way


class LargeSearchWarning(UserWarning):
    """The kernels do not fit into the memory budget: the search is exact, but takes long."""


class _Answers:
    """What a fitted SVM answers for rows whose answers are known already."""

    _estimator_type = "classifier"

    def __init__(self, tags, classes, predictions, decisions, probabilities=None):
        self._tags, self.classes_ = tags, classes
        self._predictions, self._decisions = predictions, decisions
        self._probabilities = probabilities

    def __sklearn_tags__(self):
        return self._tags

    def fit(self):
        """Exist, so that scorers take this for an estimator."""
        return self

    def predict(self, X):
        return self._predictions

    def decision_function(self, X):
        return self._decisions

    @available_if(lambda self: self._probabilities is not None)
    def predict_proba(self, X):
        return self._probabilities

    @available_if(lambda self: self._probabilities is not None)
    def predict_log_proba(self, X):
        return np.log(self._probabilities)

    def score(self, X, y):
        return accuracy_score(y, self._predictions)


def _take(X, index):
    return X.iloc[index] if hasattr(X, "iloc") else X[index]


def _squared_distances(A, B):
    """Return the squared distances of all rows, without a second matrix of that size."""
    distances = np.empty((A.shape[0], B.shape[0]))
    for first in range(0, A.shape[0], SLICE):
        part = slice(first, first + SLICE)
        distances[part] = euclidean_distances(A[part], B, squared=True)
    return distances


def _variance(inputs):
    """Return the variance over all entries, as `SVC` computes it for ``gamma='scale'``."""
    if sp.issparse(inputs):
        return inputs.multiply(inputs).mean() - inputs.mean() ** 2
    return inputs.var()


class _Fold:
    """One fold, preprocessed: rows in order of their class, and their squared distances."""

    def __init__(self, preprocessing, svc, X, y, train, test, shared):
        inputs, self._test_rows, self._shared = _take(X, train), _take(X, test), shared
        self._fitted = None if preprocessing is None else clone(preprocessing)
        if self._fitted is not None:
            inputs = self._fitted.fit_transform(inputs, y[train])
        inputs = check_array(inputs, **AS_SVC)
        self.n_features, self.variance = inputs.shape[1], _variance(inputs)
        # libsvm puts the rows of a class next to each other, in the order in which they come:
        # doing so first changes no solution, and lets a pair of classes be two slices.
        order = np.argsort(y[train], kind="stable")
        self.inputs = inputs[order]
        self.y_train, self.y_test = y[train][order], y[test]
        self.classes, codes = np.unique(self.y_train, return_inverse=True)
        if len(self.classes) < 2:
            raise ValueError(
                f"The number of classes has to be greater than one; got {len(self.classes)} class"
            )
        weights = compute_class_weight(svc.class_weight, classes=self.classes, y=self.y_train)
        self.weights = np.asarray(weights, dtype=np.float64)
        ends = np.cumsum(np.bincount(codes))
        self.slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self.pairs = list(combinations(range(len(self.classes)), 2))
        self._lock, self.test_inputs = threading.Lock(), None
        self.distances = self.test_distances = None
        if shared:
            self.distances = _squared_distances(self.inputs, self.inputs)
            np.fill_diagonal(self.distances, 0)

    def prepare_test(self):
        """Preprocess the test rows; apart from the rest, as they alone may be unusable."""
        with self._lock:
            if self.test_inputs is None:
                inputs = self._test_rows
                if self._fitted is not None:
                    inputs = self._fitted.transform(inputs)
                inputs = check_array(inputs, **AS_SVC)
                if self._shared:
                    self.test_distances = _squared_distances(inputs, self.inputs)
                self.test_inputs = inputs

    def gamma(self, gamma):
        """Return gamma as a number, as `sklearn.svm.SVC` would."""
        if gamma == "scale":
            return 1.0 / (self.n_features * self.variance) if self.variance else 1.0
        if gamma == "auto":
            return 1.0 / self.n_features
        return float(gamma)

    def kernel_rows(self, name, part, gamma, buffer):
        """Return rows of the kernel between the rows asked for and all training rows."""
        rows, stored = {
            "test": (self.test_inputs, self.test_distances),
            "train": (self.inputs, self.distances),
        }[name]
        if stored is None:
            part = euclidean_distances(rows[part], self.inputs, squared=True)
        else:
            part = stored[part]
        return _kernel(part, gamma, buffer("rows", part.shape))


def _kernel(distances, gamma, out):
    np.multiply(distances, -gamma, out=out)
    return np.exp(out, out=out)


class _Machine:
    """The machine of one pair of classes: its solution for one C after the other."""

    def __init__(self, fold, pair, template, gamma, buffer):
        self.a, self.b = (fold.slices[code] for code in pair)
        first, second = self.a.stop - self.a.start, self.b.stop - self.b.start
        self.first = first
        self.size = first + second
        self.codes = np.repeat(pair, [first, second])
        self.weights = np.repeat(fold.weights[list(pair)], [first, second])
        weights = {code: fold.weights[code] for code in pair}
        self.model = clone(template).set_params(class_weight=weights)
        if fold.distances is None:
            stack = sp.vstack if sp.issparse(fold.inputs) else np.concatenate
            self.rows = stack([fold.inputs[self.a], fold.inputs[self.b]])
            self.rows = self.rows.tocsr() if sp.issparse(self.rows) else self.rows
            self.model.set_params(kernel="rbf", gamma=gamma)
        else:
            self.rows = buffer("pair", (self.size, self.size))
            places = [(self.a, slice(0, first)), (self.b, slice(first, None))]
            for source, target in places:
                for other, column in places:
                    np.multiply(
                        fold.distances[source, other], -gamma, out=self.rows[target, column]
                    )
            np.exp(self.rows, out=self.rows)
            self.model.set_params(kernel="precomputed")
        self.solution, self.C, self.final = None, None, False

    def solve(self, C):
        """Return the coefficients of all rows and the intercept; say whether libsvm ran."""
        if self.final:
            return self.solution, False
        # The rows were checked when the fold was made.
        with sklearn.config_context(assume_finite=True):
            model = self.model.set_params(C=C).fit(self.rows, self.codes)
        dual = model.dual_coef_
        coefficients = np.zeros(self.size)
        coefficients[model.support_] = dual.toarray()[0] if sp.issparse(dual) else dual[0]
        solution = coefficients, float(model.intercept_[0])
        if self.solution is not None:
            same = solution[1] == self.solution[1] and np.array_equal(
                coefficients, self.solution[0]
            )
            self.final = same and bool((np.abs(coefficients) < self.C * self.weights).all())
        self.solution, self.C = solution, C
        return solution, True


class _Work:
    """All that is needed to score a part of the search: one fold and one gamma, every C.

    Threads share one such object; each worker of a cluster has a copy of its own.
    """

    def __init__(self, estimator, X, y, splits, parts, scoring, train_scores, error_score, budget):
        self.estimator, self.X, self.y, self.splits = estimator, X, y, splits
        self.parts = parts  # [(gamma, [C, ...]), ...]
        self.scoring, self.train_scores, self.error_score = scoring, train_scores, error_score
        self.budget = budget
        self._prepare()

    def _prepare(self):
        self._folds, self._locks = OrderedDict(), {}
        self._lock, self._memory = threading.Lock(), threading.local()

    def __getstate__(self):
        left_here = ("_folds", "_locks", "_lock", "_memory")
        return {name: value for name, value in vars(self).items() if name not in left_here}

    def __setstate__(self, state):
        vars(self).update(state)
        self._prepare()

    @property
    def svc(self):
        return self.estimator[-1] if isinstance(self.estimator, Pipeline) else self.estimator

    @property
    def _preprocessing(self):
        steps = isinstance(self.estimator, Pipeline) and len(self.estimator) > 1
        return self.estimator[:-1] if steps else None

    @property
    def whole(self):
        """Whether all classes must be solved at once: libsvm's own probabilities ask for it."""
        return self.svc.probability is True

    def sizes(self):
        """Return the bytes of the largest fold's distances and of what one thread needs."""
        distances = kernel = 0
        for train, test in self.splits:
            counts = np.sort(np.unique(self.y[train], return_counts=True)[1])
            largest = len(train) if self.whole else int(counts[-2:].sum())
            cache = min(self.svc.cache_size * 2**20, 4 * largest**2)
            chunk = 8 * min(SLICE, max(len(train), len(test))) * len(train)
            distances = max(distances, 8 * len(train) * (len(train) + len(test)))
            kernel = max(kernel, 8 * largest**2 + cache + chunk)
        return distances, kernel

    def memory_budget(self):
        """Return the bytes that this process may use for kernels: default half of what is free."""
        return self.budget or psutil.virtual_memory().available // 2

    def plan(self, threads):
        """Return whether kernels fit, for how many threads, and for how many folds at once."""
        distances, kernel = self.sizes()
        budget = self.memory_budget()
        fitting = int((budget - distances) // kernel)
        if fitting < 1:
            return False, threads, 1
        threads = min(threads, fitting)
        return True, threads, 2 if 2 * distances + threads * kernel <= budget else 1

    def fold(self, number):
        """Return a fold; the last two are kept, and each is made by one thread only."""
        with self._lock:
            lock = self._locks.setdefault(number, threading.Lock())
        with lock:
            if number not in self._folds:
                fold = _Fold(
                    self._preprocessing,
                    self.svc,
                    self.X,
                    self.y,
                    *self.splits[number],
                    shared=self.plan(1)[0],
                )
                with self._lock:
                    self._folds[number] = fold
                    while len(self._folds) > 2:
                        self._folds.popitem(last=False)
            with self._lock:
                return self._folds[number]

    def forget(self, number):
        """Give the memory of a fold back."""
        with self._lock:
            self._folds.pop(number, None)

    def _buffer(self, name, shape):
        """Return memory that this thread uses again and again.

        Fresh memory of this size comes from the operating system page by page, which takes
        longer than computing a kernel.
        """
        size = int(np.prod(shape))
        buffer = getattr(self._memory, name, None)
        if buffer is None or buffer.size < size:
            buffer = np.empty(size)
            setattr(self._memory, name, buffer)
        return buffer[:size].reshape(shape)

    def solve(self, number, place):
        """Score every C of one fold and gamma.

        Parameters
        ----------
        number, place : int
            The fold and the gamma.

        Returns
        -------
        dict
            A list with one entry per C for each of ``test`` and ``train`` (dict of scores, None
            where the fit failed), ``fit_time`` and ``score_time`` (seconds), ``solved`` and
            ``asked`` (machines of pairs of classes), ``error`` (text or None).
        """
        gamma, Cs = self.parts[place]
        cells = [
            {"test": None, "train": None, "fit_time": 0.0, "score_time": 0.0, "error": None}
            | {"fitted": False, "solved": 0, "asked": 0}
            for _ in Cs
        ]
        solve = self._solve_whole if self.whole else self._solve_pairs
        start = time.perf_counter()
        with self._attempt(*cells):
            solve(self.fold(number), gamma, Cs, cells)
        # Distances and kernels belong to all values of C alike.
        shared = time.perf_counter() - start
        shared -= sum(cell["fit_time"] + cell["score_time"] for cell in cells)
        for cell in cells:
            cell["fit_time"] += max(shared, 0.0) / len(cells)
        return cells

    @contextmanager
    def _attempt(self, *cells):
        """Note a failure in the cells that it belongs to, so that the others go on.

        That is what `error_score` is for, here as in `GridSearchCV`.
        """
        try:
            yield
        except Exception:
            if self.error_score == "raise":
                raise
            for cell in cells:
                cell["error"] = cell["error"] or traceback.format_exc()

    @contextmanager
    def _timed(self, name, *cells):
        start = time.perf_counter()
        yield
        for cell in cells:
            cell[name] += (time.perf_counter() - start) / len(cells)

    @property
    def _names(self):
        return ("test", "train") if self.train_scores else ("test",)

    def _solve_pairs(self, fold, gamma, Cs, cells):
        number = fold.gamma(gamma)
        template = clone(self.svc).set_params(gamma=gamma)
        coefficients = np.zeros((len(fold.pairs), len(fold.y_train), len(Cs)))
        intercepts = np.zeros((len(fold.pairs), len(Cs)))
        for k, pair in enumerate(fold.pairs):
            machine = _Machine(fold, pair, template, number, self._buffer)
            for place in np.argsort(Cs, kind="stable"):
                cell = cells[place]
                cell["asked"] += 1
                with self._timed("fit_time", cell), self._attempt(cell):
                    (solution, intercept), ran = machine.solve(Cs[place])
                    cell["solved"] += ran
                    intercepts[k, place] = intercept
                    coefficients[k, machine.a, place] = solution[: machine.first]
                    coefficients[k, machine.b, place] = solution[machine.first :]
        for cell in cells:
            cell["fitted"] = cell["error"] is None
        for name in self._names:
            with self._timed("score_time", *cells), self._attempt(*cells):
                decisions = self._decide(fold, name, number, coefficients, intercepts)
                for cell, values in zip(cells, decisions, strict=True):
                    self._score(fold, name, cell, *self._answer(fold, values))

    def _decide(self, fold, name, gamma, coefficients, intercepts):
        """Return the decision values per C, row and pair; positive for the pair's second class."""
        if name == "test":
            fold.prepare_test()
        n_rows = len(fold.y_test if name == "test" else fold.y_train)
        n_pairs, _, n_Cs = coefficients.shape
        decisions = np.empty((n_Cs, n_rows, n_pairs))
        for start in range(0, n_rows, SLICE):
            part = slice(start, start + SLICE)
            kernel = fold.kernel_rows(name, part, gamma, self._buffer)
            for k, pair in enumerate(fold.pairs):
                values = intercepts[k] + sum(
                    kernel[:, fold.slices[code]] @ coefficients[k, fold.slices[code]]
                    for code in pair
                )
                decisions[:, part, k] = values.T
        return decisions

    def _answer(self, fold, decisions):
        """Return predictions and decision values as `SVC` gives them."""
        n_classes = len(fold.classes)
        if n_classes == 2:
            return fold.classes[(decisions[:, 0] >= 0).astype(int)], decisions[:, 0]
        shape = self.svc.decision_function_shape
        ovr = _ovr_decision_function(decisions > 0, decisions, n_classes)
        if self.svc.break_ties and shape == "ovr":
            winners = ovr.argmax(axis=1)
        else:
            votes = np.zeros((len(decisions), n_classes), dtype=int)
            for k, (a, b) in enumerate(fold.pairs):
                second = decisions[:, k] >= 0
                votes[:, b] += second
                votes[:, a] += ~second
            winners = votes.argmax(axis=1)
        return fold.classes[winners], ovr if shape == "ovr" else -decisions

    def _solve_whole(self, fold, gamma, Cs, cells):
        number = fold.gamma(gamma)
        rows, fixed = fold.inputs, {"kernel": "rbf", "gamma": number}
        if fold.distances is not None:
            rows = _kernel(fold.distances, number, self._buffer("pair", fold.distances.shape))
            fixed = {"kernel": "precomputed"}
        for C, cell in zip(Cs, cells, strict=True):
            cell["asked"] = len(fold.pairs)
            with self._timed("fit_time", cell), self._attempt(cell):
                model = clone(self.svc).set_params(C=C, gamma=gamma).set_params(**fixed)
                model.fit(rows, fold.y_train)
                cell["solved"], cell["fitted"] = cell["asked"], True
            for name in self._names if cell["fitted"] else ():
                with self._timed("score_time", cell), self._attempt(cell):
                    asked = rows if name == "train" else self._test_rows(fold, number)
                    answers = (
                        getattr(model, method)(asked)
                        for method in ("predict", "decision_function", "predict_proba")
                    )
                    self._score(fold, name, cell, *answers)

    def _test_rows(self, fold, gamma):
        """Return the test rows as a machine of all classes takes them."""
        fold.prepare_test()
        if fold.test_distances is None:
            return fold.test_inputs
        shape = fold.test_distances.shape
        return _kernel(fold.test_distances, gamma, self._buffer("rows", shape))

    def _score(self, fold, name, cell, predictions, decisions, probabilities=None):
        if cell["error"] is not None:
            return
        tags = self.estimator.__sklearn_tags__()
        model = _Answers(tags, fold.classes, predictions, decisions, probabilities)
        y_true = fold.y_test if name == "test" else fold.y_train
        rows = fold.test_inputs if name == "test" else fold.inputs
        with self._attempt(cell):
            scores = {}
            for metric, scorer in self.scoring.items():
                score = scorer(model, rows, y_true)
                scores |= score if isinstance(score, dict) else {metric: score}
            cell[name] = {metric: float(score) for metric, score in scores.items()}

    def estimate(self, threads):
        """Return the seconds that the search will take where every fit computes its own kernel.

        Two samples of the rows are fitted with the grid's middle pair, and the growth between
        them is carried on to all rows.
        """
        train = self.splits[0][0]
        gamma, Cs = self.parts[len(self.parts) // 2]
        rows = np.random.default_rng(0).permutation(train)
        times = []
        for n_rows in (500, 1000):
            few = rows[: min(n_rows, len(rows) // 2 * (n_rows // 500))]
            held_out, kept = few[: len(few) // 5], few[len(few) // 5 :]
            fold = _Fold(
                self._preprocessing, self.svc, self.X, self.y, kept, held_out, shared=False
            )
            fold.prepare_test()
            model = clone(self.svc).set_params(C=sorted(Cs)[len(Cs) // 2], gamma=fold.gamma(gamma))
            start = time.perf_counter()
            model.fit(fold.inputs, fold.y_train).predict(fold.test_inputs)
            times.append((len(few), time.perf_counter() - start))
        (small, short), (large, long) = times
        growth = np.clip(np.log(long / short) / np.log(large / small), 2, 3)
        fits = sum(len(Cs) for _, Cs in self.parts) * len(self.splits)
        return long * (len(train) / (0.8 * large)) ** growth * fits / threads


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
        pool = ThreadPoolExecutor(threads)
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
    else:
        _send_helpers(client)
        # A part is pure: one whose worker dies is simply done by another.
        with client.get_executor(pure=False, retries=5) as pool:
            yield pool


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
        folds, estimator, grid and scoring goes on from there; any other starts anew.
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
        wanted = joblib.cpu_count() if self.n_jobs == -1 else max(self.n_jobs or 1, 1)
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
        work = _Work(
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
