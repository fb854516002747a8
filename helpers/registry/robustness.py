"""How few small changes to a row flip a model's answer.

The attack is the Jacobian-based saliency map method [1]_ of the Adversarial Robustness Toolbox
[2]_: step by step it changes the two columns that promise most. It sees the model as a client
does, so it works on any; its gradients are differences of answers to changed rows. Columns stay
within their observed range and whole numbers stay whole; categories are left alone.

References
----------
.. [1] N. Papernot et al. (2016). *The Limitations of Deep Learning in Adversarial Settings*.
   IEEE EuroS&P. arXiv:1511.07528
.. [2] M.-I. Nicolae et al. (2018). *Adversarial Robustness Toolbox*. arXiv:1807.01069
"""

import json
import logging
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from helpers.display import progress

N_ROWS = 30  # test rows that are attacked
STEP = 0.05  # of a column's observed range, per step
LARGEST = 0.1  # of a column's observed range, in all
MOST_COLUMNS = 6  # changed columns up to which a flip counts


@dataclass(frozen=True)
class Robustness:
    """What the attack achieved.

    Attributes
    ----------
    n_rows : int
        Rows attacked: test rows that the model classifies correctly.
    columns : numpy.ndarray, shape (n_rows,), float64
        Columns that had to be changed to flip the answer; NaN where none of the attacks did.
    flips : pandas.Series
        By column: share of the flips in which it was changed.
    asked : int
        Rows that were to be attacked.
    """

    n_rows: int
    columns: np.ndarray
    flips: pd.Series
    asked: int

    def to_json(self):
        """Return everything as a JSON text."""
        columns = [None if np.isnan(each) else int(each) for each in self.columns]
        content = {"n_rows": self.n_rows, "columns": columns, "asked": self.asked}
        return json.dumps({**content, "flips": self.flips.to_dict()}, indent=2)

    @classmethod
    def from_json(cls, text):
        """Read what `to_json` wrote."""
        content = json.loads(text)
        columns = np.array(content["columns"], dtype="float64")
        return cls(content["n_rows"], columns, pd.Series(content["flips"]), content["asked"])

    @property
    def flip_rate(self):
        """Share of the rows whose answer flipped."""
        return float(np.mean(~np.isnan(self.columns)))

    @property
    def one_column_rate(self):
        """Share of the rows whose answer flipped by a change of one column."""
        return float(np.mean(self.columns == 1))

    def flipped(self) -> pd.Series:
        """Return the share of answers flipped, by the number of columns changed at most."""
        numbers = range(1, MOST_COLUMNS + 1)
        return pd.Series({number: np.mean(self.columns <= number) for number in numbers})

    def metrics(self):
        """Return the metrics to log, a dict of str to float."""
        values = {
            "robustness": 1 - self.flip_rate,
            "robustness_one_column": 1 - self.one_column_rate,
            "robustness_rows": float(self.n_rows),
        }
        if self.flip_rate:
            values["robustness_median_columns"] = float(np.nanmedian(self.columns))
        return values


@cache
def _toolbox():
    """Import the toolbox, which takes seconds, where it is used."""
    logging.getLogger("art").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # It names libraries that it could use and that are not here.
        warnings.simplefilter("ignore")
        from art.attacks.evasion import SaliencyMapMethod
        from art.estimators import BaseEstimator
        from art.estimators.classification.classifier import ClassGradientsMixin, ClassifierMixin

    class Changes(ClassGradientsMixin, ClassifierMixin, BaseEstimator):
        """One row of a table; the inputs are how far each column goes up and down."""

        estimator_params = BaseEstimator.estimator_params

        def __init__(self, probabilities, n_inputs, n_classes):
            super().__init__(model=None, clip_values=(0.0, LARGEST))
            self._probabilities, self._n_inputs = probabilities, n_inputs
            self.nb_classes = n_classes

        @property
        def input_shape(self):
            return (self._n_inputs,)

        def predict(self, x, **kwargs):
            return self._probabilities(x)

        def class_gradient(self, x, label=None, **kwargs):
            """Difference of a class's probability for one step in each input."""
            (changes,), target = x, int(np.ravel(label)[0])
            steps = np.minimum(changes + STEP * np.eye(self._n_inputs), LARGEST)
            answers = self._probabilities(np.vstack([changes, steps]))[:, target]
            return (answers[1:] - answers[0])[None, None, :]

        def fit(self, x, y, **kwargs):
            """Do nothing: the model is trained already."""

    return SaliencyMapMethod, Changes


class _Row:
    """A row, its columns that may change, and how far."""

    def __init__(self, row, columns, low, high, whole, predict):
        self.columns, self.predict, self.others = columns, predict, row.drop(columns=columns)
        self.low, self.high, self.whole = low, high, whole
        start = row[columns].to_numpy("float64")[0]
        # A gap is no value that could be changed a little; the middle stands for it.
        self.start = np.where(np.isnan(start), (low + high) / 2, start)

    def apply(self, changes):
        """Return the values of the columns after changes, shape (n, n_columns)."""
        up, down = np.split(np.atleast_2d(changes), 2, axis=1)
        values = self.start + (up - down) * (self.high - self.low)
        values = np.where(self.whole, np.round(values), values)
        return np.clip(values, np.minimum(self.low, self.start), np.maximum(self.high, self.start))

    def answer(self, values):
        """Return the probabilities for values of the columns."""
        others = self.others.iloc[np.zeros(len(values), dtype=int)].reset_index(drop=True)
        return self.predict(pd.concat([pd.DataFrame(values, columns=self.columns), others], axis=1))

    def probabilities(self, changes):
        """Return the probabilities after changes."""
        return self.answer(self.apply(changes))

    def undo(self, values, answer):
        """Take back every change that the flip does not need."""
        values = values.copy()
        for number in np.argsort(np.abs(values - self.start) / (self.high - self.low)):
            tried = values.copy()
            tried[number] = self.start[number]
            if self.answer(tried[None]).argmax() != answer:
                values = tried
        return values != self.start


def measure(model, split, n_rows=N_ROWS, seed=0):
    """Attack some test rows and count the columns that had to be changed.

    Parameters
    ----------
    model : mlflow.pyfunc.PyFuncModel
    split : helpers.data.Split
        Ranges are those of its training rows.
    n_rows : int
        Rows to attack, out of those classified correctly.
    seed : int
        Chooses the rows.

    Returns
    -------
    Robustness or None
        None where no numeric column can change.
    """
    columns = _columns(split)
    if not columns:
        return None
    attack, changes = _toolbox()
    names = [f"probability_{label}" for label in split.labels]
    own = model.unwrap_python_model()

    def predict(rows):
        # Without MLflow's checks, which take longer than the model for a few rows.
        return own.predict(None, rows)[names].to_numpy()

    right = own.predict(None, split.X_test)["prediction"].to_numpy() == split.y_test.to_numpy()
    chosen = np.flatnonzero(right)
    chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:n_rows])
    ranges = split.X_train[columns]
    limits = (ranges.min().to_numpy("float64"), ranges.max().to_numpy("float64"))
    whole = np.array([ranges[name].dtype.kind in "iu" for name in columns])
    counts, flips = np.full(len(chosen), np.nan), np.zeros(len(columns))
    bar = progress(iterable=chosen, total=len(chosen), desc="Attacking", unit="row")
    for number, position in enumerate(bar):
        frame = split.X_test.iloc[[position]].reset_index(drop=True)
        row = _Row(
            frame.astype(dict.fromkeys(columns, "float64")), columns, *limits, whole, predict
        )
        if np.isnan(row.start).any():
            row.start = np.where(np.isnan(row.start), np.mean(limits, axis=0), row.start)
        changed = _flip(row, attack, changes)
        if changed is not None and changed.sum() <= MOST_COLUMNS:
            counts[number] = changed.sum()
            flips += changed
    flipped = max(1, int(np.sum(~np.isnan(counts))))
    return Robustness(len(chosen), counts, pd.Series(flips / flipped, columns), n_rows)


def _columns(split):
    """Return the numeric columns in which a small change makes a difference."""
    ranges = split.X_train[list(split.numeric)].select_dtypes("number")
    spread = ranges.max() - ranges.min()
    whole = pd.Series({name: ranges[name].dtype.kind in "iu" for name in ranges})
    kept = (spread > 0) & ~(whole & (spread * LARGEST < 1))
    return [name for name in ranges if kept[name]]


def _flip(row, attack, changes):
    """Return which columns a flip needs, or None if the attack does not succeed."""
    before = row.answer(row.start[None])[0]
    best, second = np.argsort(before)[::-1][:2]
    inputs = np.zeros((1, 2 * len(row.columns)), dtype="float32")
    estimator = changes(row.probabilities, inputs.shape[1], len(before))
    gamma = MOST_COLUMNS / inputs.shape[1]
    method = attack(estimator, theta=STEP, gamma=min(1.0, gamma), batch_size=1, verbose=False)
    found = method.generate(inputs, y=np.array([second]))
    values = row.apply(found)[0]
    if row.answer(values[None]).argmax() == best:
        return None
    return row.undo(values, best)


def robustness_table(results):
    """Return the metrics of several models as a table.

    Parameters
    ----------
    results : dict of str to Robustness

    Returns
    -------
    pandas.DataFrame
        One row per model.
    """
    rows = {name: result.metrics() for name, result in results.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model").round(3)
