"""The attack by which robustness is measured: it changes a row until the answer flips.

It is the Jacobian-based saliency map method [1]_ of the Adversarial Robustness Toolbox
[2]_: step by step it changes the two columns that promise most. It sees the model as a client
does, so it works on any; its gradients are differences of answers to changed rows. Columns stay
within their observed range and whole numbers stay whole; categories are left alone, and of many
columns all but the most telling ones.

References
----------
.. [1] N. Papernot et al. (2016). *The Limitations of Deep Learning in Adversarial Settings*.
   IEEE EuroS&P. arXiv:1511.07528
.. [2] M.-I. Nicolae et al. (2018). *Adversarial Robustness Toolbox*. arXiv:1807.01069
"""

import logging
import warnings

import numpy as np
import pandas as pd
from mlflow.pyfunc import PyFuncModel

from helpers import tracking
from helpers.data import Split, most_telling
from helpers.display import progress
from helpers.models.interface import convert
from helpers.registry.robustness import MOST_COLUMNS, Robustness

with warnings.catch_warnings():
    # The toolbox names libraries that it could use and that are not here.
    warnings.simplefilter("ignore")
    from art.attacks.evasion import SaliencyMapMethod
    from art.estimators import BaseEstimator
    from art.estimators.classification.classifier import ClassGradientsMixin, ClassifierMixin

logging.getLogger("art").setLevel(logging.ERROR)

STEP = 0.05  # of a column's observed range, per step
LARGEST = 0.1  # of a column's observed range, in all
MOST_ATTACKED = 30  # columns, the most telling ones: each costs two answers per step


class _Row(ClassGradientsMixin, ClassifierMixin, BaseEstimator):
    """A row as a classifier of the toolbox; its inputs: how far each column goes up and down."""

    estimator_params = BaseEstimator.estimator_params

    def __init__(self, row: pd.DataFrame, limits: pd.DataFrame, answer, n_classes: int):
        super().__init__(model=None, clip_values=(0.0, LARGEST))
        self.nb_classes, self._answer = n_classes, answer
        self._columns, self._row = limits.index, row
        self._low, self._high = limits["low"].to_numpy(), limits["high"].to_numpy()
        self._whole = limits["whole"].to_numpy()
        start = row[limits.index].astype("float64").to_numpy()[0]
        # A gap is no value that could be changed a little; the middle stands for it.
        self._start = np.where(np.isnan(start), (self._low + self._high) / 2, start)

    @property
    def input_shape(self):
        return (2 * len(self._columns),)

    def fit(self, x, y, **kwargs):
        """Do nothing: the model is trained already."""

    def predict(self, x, **kwargs):
        return self._probabilities(self._values(x))

    def class_gradient(self, x, label=None, **kwargs):
        """Difference of a class's probability for one step in each input."""
        (changes,), target = x, int(np.ravel(label)[0])
        steps = np.minimum(changes + STEP * np.eye(len(changes)), LARGEST)
        answers = self.predict(np.vstack([changes, steps]))[:, target]
        return (answers[1:] - answers[0])[None, None, :]

    def _values(self, changes):
        """Return the values of the columns after changes, shape (n, n_columns)."""
        up, down = np.split(changes, 2, axis=1)
        values = self._start + (up - down) * (self._high - self._low)
        values = np.where(self._whole, np.round(values), values)
        low, high = np.minimum(self._low, self._start), np.maximum(self._high, self._start)
        return np.clip(values, low, high)

    def _probabilities(self, values):
        rows = self._row.iloc[np.zeros(len(values), dtype=int)].reset_index(drop=True)
        # In place: a table put together from columns is slow where there are very many.
        rows.loc[:, self._columns] = values
        return self._answer(rows)

    def flip(self) -> np.ndarray | None:
        """Return which columns a flip needs, or None if the attack does not succeed."""
        best, second = np.argsort(self._probabilities(self._start[None])[0])[::-1][:2]
        inputs = np.zeros((1, *self.input_shape), dtype="float32")
        gamma = min(1.0, MOST_COLUMNS / inputs.size)
        method = SaliencyMapMethod(self, theta=STEP, gamma=gamma, batch_size=1, verbose=False)
        values = self._values(method.generate(inputs, y=np.array([second])))[0]
        if self._probabilities(values[None]).argmax() == best:
            return None
        # Take back every change that the flip does not need, the smallest first.
        for number in np.argsort(np.abs(values - self._start) / (self._high - self._low)):
            tried = values.copy()
            tried[number] = self._start[number]
            if self._probabilities(tried[None]).argmax() != best:
                values = tried
        return values != self._start


def measure(model: PyFuncModel, split: Split, n_rows: int) -> Robustness | None:
    """Attack some of the test rows that a model classifies correctly, at most `n_rows`.

    Returns None where no numeric column can change.
    """
    limits = _limits(split)
    if limits.empty:
        return None
    names = [f"probability_{label}" for label in split.labels]
    own = model.unwrap_python_model()

    def answer(rows):
        # Without MLflow's checks, which take longer than the model for a few rows.
        return own.predict(None, rows)[names].to_numpy()

    right = own.predict(None, split.X_test)["prediction"].to_numpy() == split.y_test.to_numpy()
    chosen = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(right))[:n_rows])
    # As the models see them: numbers are floats, which may be changed.
    rows = convert(split.X_test, tracking.column_kinds(split.X_train))
    counts, flips = np.full(len(chosen), np.nan), np.zeros(len(limits))
    bar = progress(iterable=chosen, total=len(chosen), desc="Attacking", unit="row")
    for number, position in enumerate(bar):
        row = rows.iloc[[position]]
        changed = _Row(row, limits, answer, len(names)).flip()
        if changed is not None and changed.sum() <= MOST_COLUMNS:
            counts[number] = changed.sum()
            flips += changed
    flipped = max(1, np.sum(~np.isnan(counts)))
    return Robustness(counts, pd.Series(flips / flipped, limits.index))


def _limits(split: Split) -> pd.DataFrame:
    """Return the range of each numeric column in which a small change makes a difference.

    Columns ``low``, ``high``, and ``whole`` for whole numbers.
    """
    rows = split.X_train[list(split.numeric)].select_dtypes("number")
    whole = [rows[name].dtype.kind in "iu" for name in rows]
    limits = pd.DataFrame({"low": rows.min(), "high": rows.max(), "whole": whole})
    limits = limits.astype({"low": "float64", "high": "float64", "whole": bool})
    spread = limits["high"] - limits["low"]
    limits = limits[(spread > 0) & ~(limits["whole"] & (spread * LARGEST < 1))]
    if len(limits) <= MOST_ATTACKED:
        return limits
    telling = most_telling(rows[limits.index], split.y_train, MOST_ATTACKED)
    return limits[limits.index.isin(telling)]
