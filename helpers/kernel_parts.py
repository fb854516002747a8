"""One part of a grid search: a fold and a gamma, scored for every C.

A fold is preprocessed once, and its squared distances are computed once; from them comes the
kernel of a gamma, which all values of C share. libsvm takes the classes two at a time [1]_, so
each pair of classes is a machine of its own, and no longer solved where its solution is known.
Threads share all of this, as neither numpy nor the solver holds Python's lock.

References
----------
.. [1] C.-C. Chang, C.-J. Lin (2011). LIBSVM: A library for support vector machines. *ACM TIST*
   2(3), 27. One-against-one: section 7.
"""

import threading
import time
import traceback
from collections import OrderedDict
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import psutil
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.pipeline import Pipeline
from sklearn.utils import check_array
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.metaestimators import available_if

# What `SVC.decision_function` uses; there is no public way to it from the machines of the pairs.
from sklearn.utils.multiclass import _ovr_decision_function

from helpers.smo import Path

SLICE = 1024  # rows whose distances or kernel are computed at a time
AS_SVC = {"dtype": np.float64, "order": "C", "accept_sparse": "csr"}  # as `SVC` takes its rows


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


class Fold:
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


def _fill_kernel(distances, gamma, out, buffer):
    """Compute a kernel in single precision, as libsvm rounds it; each half from the other."""
    n_rows = len(distances)
    parts = [slice(start, min(start + SLICE, n_rows)) for start in range(0, n_rows, SLICE)]
    for number, rows in enumerate(parts):
        for columns in parts[number:]:
            block = distances[rows, columns]
            values = _kernel(block, gamma, buffer("rows", block.shape))
            out[rows, columns] = values
            out[columns, rows] = values.T
    return out


class _KernelMachine:
    """The machine of one pair of classes, solved from the kernel for one C after the other."""

    def __init__(self, fold, pair, svc, gamma, kernel, buffer):
        a, b = (fold.slices[code] for code in pair)
        first = a.stop - a.start
        size = first + b.stop - b.start
        own = buffer("pair", (size, size), np.float32)
        for rows, into in ((a, slice(0, first)), (b, slice(first, size))):
            own[into, :first], own[into, first:] = kernel[rows, a], kernel[rows, b]
        weights = np.repeat(fold.weights[list(pair)], [first, size - first])
        self._path = Path(own, first, weights, svc.tol, svc.shrinking)

    def solve(self, C):
        """Return the coefficients of all rows, the intercept, and whether it was solved anew."""
        return self._path.solve(C)


class _RowsMachine:
    """The machine of one pair of classes, solved by libsvm from the rows themselves."""

    def __init__(self, fold, pair, svc, gamma, kernel, buffer):
        a, b = (fold.slices[code] for code in pair)
        stack = sp.vstack if sp.issparse(fold.inputs) else np.concatenate
        self._rows = stack([fold.inputs[a], fold.inputs[b]])
        if sp.issparse(self._rows):
            self._rows = self._rows.tocsr()
        self._codes = np.repeat(pair, [a.stop - a.start, b.stop - b.start])
        weights = {code: fold.weights[code] for code in pair}
        self._model = clone(svc).set_params(gamma=gamma, class_weight=weights)

    def solve(self, C):
        """Return the coefficients of all rows, the intercept, and whether it was solved anew."""
        model = self._model.set_params(C=C).fit(self._rows, self._codes)
        dual = model.dual_coef_
        coefficients = np.zeros(len(self._codes))
        coefficients[model.support_] = dual.toarray()[0] if sp.issparse(dual) else dual[0]
        return coefficients, float(model.intercept_[0]), True


class Work:
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
        self._checked = set()

    def __getstate__(self):
        left_here = ("_folds", "_locks", "_lock", "_memory", "_checked")
        return {name: value for name, value in vars(self).items() if name not in left_here}

    def __setstate__(self, state):
        vars(self).update(state)
        self._prepare()

    @property
    def svc(self):
        """The support vector machine at the end of the estimator."""
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
            # Rounded to 4 bytes there is the whole kernel and that of a pair of classes; for all
            # classes at once libsvm has its own rounded copy.
            pair = 2 * len(train) ** 2 if self.whole else int(counts[-2:].sum()) ** 2
            chunk = 8 * min(SLICE, max(len(train), len(test))) * len(train)
            distances = max(distances, 8 * len(train) * (len(train) + len(test)))
            kernel = max(kernel, 4 * (len(train) ** 2 + pair) + chunk)
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
                fold = Fold(
                    self._preprocessing,
                    self.svc,
                    self.X,
                    self.y,
                    *self.splits[number],
                    shared=self.plan(1)[0] and (self.whole or self.svc.max_iter == -1),
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

    def _buffer(self, name, shape, kind=np.float64):
        """Return memory that this thread uses again and again.

        Fresh memory of this size comes from the operating system page by page, which takes
        longer than computing a kernel.
        """
        size = int(np.prod(shape))
        buffer = getattr(self._memory, name, None)
        if buffer is None or buffer.size < size:
            buffer = np.empty(size, kind)
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
        machines, kernel = _RowsMachine, None
        if fold.distances is not None:
            kernel = self._buffer("kernel", fold.distances.shape, np.float32)
            _fill_kernel(fold.distances, number, kernel, self._buffer)
            machines = _KernelMachine
        order = np.argsort(Cs, kind="stable")
        for place in order:
            with self._attempt(cells[place]):
                self._check(Cs[place], gamma)
        coefficients = np.zeros((len(fold.pairs), len(fold.y_train), len(Cs)))
        intercepts = np.zeros((len(fold.pairs), len(Cs)))
        for k, pair in enumerate(fold.pairs):
            machine = machines(fold, pair, self.svc, number, kernel, self._buffer)
            a, b = (fold.slices[code] for code in pair)
            first = a.stop - a.start
            for place in order:
                cell = cells[place]
                if cell["error"] is None:
                    with self._timed("fit_time", cell), self._attempt(cell):
                        solution, intercepts[k, place], solved = machine.solve(Cs[place])
                        coefficients[k, a, place] = solution[:first]
                        coefficients[k, b, place] = solution[first:]
                        cell["asked"] += 1
                        cell["solved"] += solved
        for cell in cells:
            cell["fitted"] = cell["error"] is None
        for name in self._names:
            with self._timed("score_time", *cells), self._attempt(*cells):
                decisions = self._decide(fold, name, number, coefficients, intercepts)
                for cell, values in zip(cells, decisions, strict=True):
                    self._score(fold, name, cell, *self._answer(fold, values))

    def _check(self, C, gamma):
        """Raise what `SVC` raises for settings that it does not take."""
        if (C, gamma) not in self._checked:
            settings = {"C": C, "gamma": gamma, "class_weight": None}
            clone(self.svc).set_params(**settings).fit([[0.0], [1.0]], [0, 1])
            self._checked.add((C, gamma))

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
        by_class = np.asarray(train)[np.argsort(self.y[train], kind="stable")]
        many = np.append(by_class[:: max(1, len(train) // 1000)], by_class[-1])
        gamma, Cs = self.parts[len(self.parts) // 2]
        middle, times = sorted(Cs)[len(Cs) // 2], []
        for few in (np.append(many[::2], many[-1]), many):
            fold = Fold(self._preprocessing, self.svc, self.X, self.y, few, few[::4], shared=False)
            fold.prepare_test()
            model = clone(self.svc).set_params(C=middle, gamma=fold.gamma(gamma))
            start = time.perf_counter()
            model.fit(fold.inputs, fold.y_train).predict(fold.test_inputs)
            times.append((len(few), time.perf_counter() - start))
        (small, short), (large, long) = times
        growth = np.clip(np.log(long / short) / np.log(large / small), 2, 3)
        fits = sum(len(Cs) for _, Cs in self.parts) * len(self.splits)
        return long * (len(train) / large) ** growth * fits / threads
