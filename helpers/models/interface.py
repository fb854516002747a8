"""What both models do with rows: raw columns in, prediction and probabilities out.

MLflow stores this file inside each logged model ("models from code") and runs it when a client
loads the model. That is why types, preprocessing, network and classifier are together here: it
imports nothing from this project, and what runs a network or reads a classifier only where there
is one.
"""

import json
import threading
from collections import Counter
from numbers import Real
from pathlib import Path
from reprlib import repr as shortened

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted, validate_data

MOST_ROWS = 1000  # that a network is asked at once; more would only take memory
TRUTH = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}


def _bad_input(text: str) -> MlflowException:
    return MlflowException(text, error_code=INVALID_PARAMETER_VALUE)


def _require(good: np.ndarray, table: pd.DataFrame, wanted: str) -> None:
    """Refuse the first value of a table that is not good, naming its column."""
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise _bad_input(
            f"Incompatible input type for column {table.columns[column]!r}: the model's signature "
            f"asks for {wanted}, but there is {shortened(table.iat[row, column])}. Correct the "
            "column and send the rows again."
        )


@np.vectorize(otypes=[bool])
def _is_number(value) -> bool:
    return isinstance(value, (Real, np.bool_))


@np.vectorize(otypes=["float64"])
def _float(value) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of 309 digits or more
        return np.inf


def _as_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return integers, floats and booleans as float64; missing is NaN."""
    values = table.to_numpy()
    if values.dtype.kind not in "biuf":
        missing = pd.isna(values)
        _require(missing | _is_number(values), table, "numbers")
        values = _float(np.where(missing, np.nan, values))
    values = values.astype("float64")
    _require(~np.isinf(values), table, "finite numbers")
    return pd.DataFrame(values, columns=table.columns, index=table.index)


def _as_truth(table: pd.DataFrame) -> pd.DataFrame:
    """Return 0.0 and 1.0 for booleans, 0 and 1, or the texts true and false; missing is NaN."""
    values = table.astype(object).map(lambda value: TRUTH.get(str(value).strip().lower()))
    _require((table.isna() | values.notna()).to_numpy(), table, "true or false")
    return values.astype("float64")


def _whole(value):
    """Return a number without a fraction as an integer, anything else as it is."""
    if isinstance(value, (float, np.number)) and float(value).is_integer():
        return int(value)
    return value


def _text(value):
    """Return a text without blanks around it, a whole number as a CSV has it; None: neither.

    Codes such as A1, 2 and 3 are texts, but where rows happen to have only 2 and 3, or these
    and gaps, pandas reads them as numbers.
    """
    if isinstance(value, str):
        return value.strip()
    whole = _whole(value)
    return str(whole) if isinstance(whole, int) and not isinstance(whole, bool) else None


def _as_texts(table: pd.DataFrame) -> pd.DataFrame:
    """Return texts as objects; missing is None."""
    texts = table.astype(object).map(_text)
    _require((table.isna() | texts.notna()).to_numpy(), table, "texts")
    return texts


CONVERTERS = {"number": _as_numbers, "boolean": _as_truth, "text": _as_texts}


def convert(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Bring a client's rows into the order and types that the model was trained on.

    Parameters
    ----------
    frame : shape (n_rows, n_columns)
        Raw columns in any order; more columns than the model knows are ignored. Blanks
        around names are, too, unless another column has the name without them.
    columns : dict of str to {'number', 'boolean', 'text'}
        The model's columns, in order.

    Returns
    -------
    pandas.DataFrame, shape (n_rows, len(columns))
        float64 and object columns.

    Raises
    ------
    mlflow.exceptions.MlflowException
        If a column is missing, twice there or of another type; names the column.
    """
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise _bad_input(f"The column {twice[0]!r} is there more than once.")
    given = {str(name).strip(): name for name in frame.columns}
    given |= {name: name for name in frame.columns}
    missing = [name for name in columns if name not in given]
    if missing:
        raise _bad_input(f"Model is missing inputs {missing}.")
    rows = frame
    if list(frame.columns) != list(columns):
        rows = frame[[given[name] for name in columns]].set_axis(list(columns), axis=1)
    kinds = set(columns.values())
    if len(kinds) == 1:
        return CONVERTERS[kinds.pop()](rows)
    blocks = [
        CONVERTERS[kind](rows[[name for name in columns if columns[name] == kind]])
        for kind in sorted(kinds)
    ]
    return pd.concat(blocks, axis=1)[list(columns)]


class TabularPreprocessor(TransformerMixin, BaseEstimator):
    """Turn the columns of a table into the inputs of a model.

    Numbers come first: missing values become the median, then zero mean and unit variance, cut
    off at ±`clip`, so that a few extreme values do not decide distances. Categories: one output
    per level; levels in fewer than `min_frequency` training rows share one output, which is also
    where levels go that were never seen. The same as scikit-learn's ``OneHotEncoder``,
    ``SimpleImputer`` and ``StandardScaler``, without their fixed cost, which for a single row is
    a hundred times that of the computation.

    Parameters
    ----------
    categorical : sequence of str or int
        Columns of categories: names in a DataFrame, positions in an array. All others are numbers.
    n_bins : int
        0, or the number of bins for piecewise-linear codes [1]_: after the numbers come, bin j by
        bin j, clip((x - q[j-1]) / (q[j] - q[j-1]), 0, 1) for each number x, with q the quantiles
        of its training values.
    min_frequency : int
        Training rows below which levels are pooled.
    clip : float
        Standard deviations at which numbers are cut off.

    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : numpy.ndarray of str
        Only if fitted on a DataFrame.
    levels_ : list of list
        Of each categorical column, those with an output of their own; None stands for missing.
    pooled_ : list of bool
        Whether there is an output for all other levels; else these have zeros everywhere.

    References
    ----------
    .. [1] Y. Gorishniy, I. Rubachev, A. Babenko (2022). *On Embeddings for Numerical Features in
       Tabular Deep Learning*. NeurIPS. arXiv:2203.05556
    """

    def __init__(self, categorical=(), n_bins=0, min_frequency=20, clip=2.0):
        self.categorical = categorical
        self.n_bins = n_bins
        self.min_frequency = min_frequency
        self.clip = clip

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = tags.input_tags.string = bool(len(self.categorical))
        return tags

    def fit(self, X, y=None):
        """Learn levels, medians, scales and quantiles from a DataFrame or array.

        Raises
        ------
        ValueError
            If a categorical column is missing, or another one holds something else than finite
            numbers and gaps.
        """
        values = self._values(X, reset=True)
        self._divide()
        categories, numbers = self._categories_of(values), self._numbers_of(values)
        assert_all_finite(numbers, allow_nan=True)
        learnt = [_frequent_levels(column, self.min_frequency) for column in categories]
        self.levels_ = [levels for levels, _ in learnt]
        self.pooled_ = [pooled for _, pooled in learnt]
        gaps = np.isnan(numbers)
        # A column without a single value is a constant.
        numbers[:, gaps.all(axis=0)] = 0.0
        self.median_ = np.nanmedian(numbers, axis=0)
        filled = np.where(gaps, self.median_, numbers)
        parts = [self._codes(*columns) for columns in zip(filled.T, numbers.T, strict=True)]
        # All numbers, then their codes bin by bin: so a convolution sees several columns at once.
        order = sorted((n, column) for column, part in enumerate(parts) for n in range(len(part)))
        codes = [[column, n, *parts[column][n]] for n, column in order]
        self.codes_ = np.array(codes).reshape(-1, 6)
        self._place()
        return self

    def _codes(self, filled: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return shift, scale, lowest and highest output of each output of a number."""
        spread = filled.std() if np.ptp(filled) > 0 else 0.0
        codes = [[filled.mean(), spread or 1.0, -self.clip, self.clip]]
        if self.n_bins:
            share = np.linspace(0, 1, self.n_bins + 1)
            edges = np.unique(np.quantile(numbers[~np.isnan(numbers)], share))
            codes += [
                [low, width, 0.0, 1.0] for low, width in zip(edges, np.diff(edges), strict=False)
            ]
        return np.array(codes)

    def _divide(self) -> None:
        """Tell the positions of categories from those of numbers."""
        names = self._names()
        self._categories = [names.index(name) for name in self.categorical]
        self._numeric = [n for n in range(len(names)) if n not in set(self._categories)]

    def _place(self) -> None:
        """Derive from what was learnt which output belongs to what."""
        self._outputs, start = [], len(self.codes_)
        for levels, pooled in zip(self.levels_, self.pooled_, strict=True):
            other = start + len(levels) if pooled else -1
            self._outputs.append(({level: start + n for n, level in enumerate(levels)}, other))
            start += len(levels) + pooled
        self._n_outputs = start
        self._source = self.codes_[:, 0].astype(int)
        self._shift, self._scale, self._low, self._high = self.codes_.T[2:].copy()

    def _names(self) -> list:
        return list(getattr(self, "feature_names_in_", range(self.n_features_in_)))

    def _values(self, X, reset: bool = False) -> np.ndarray:
        """Return a table as one array, after scikit-learn's checks."""
        # These take longer than the rest for a single row of a table with the right names.
        if isinstance(X, pd.DataFrame) and not reset and X.columns.tolist() == self._names():
            return X.to_numpy()
        kind = object if len(self.categorical) else "float64"
        return validate_data(self, X, reset=reset, dtype=kind, ensure_all_finite="allow-nan")

    def _categories_of(self, values: np.ndarray) -> list[list]:
        """Return the values of each categorical column; all signs for missing become None."""
        columns = values[:, self._categories].T
        return np.where(pd.isna(columns), None, columns).tolist()

    def _numbers_of(self, values: np.ndarray) -> np.ndarray:
        """Return the numeric columns as a float64 array; missing is NaN."""
        numbers = values[:, self._numeric]
        return np.where(pd.isna(numbers), np.nan, numbers).astype("float64")

    def transform(self, X) -> np.ndarray:
        """Return the inputs of a model for a table with the columns of `fit`, in their order.

        Returns
        -------
        numpy.ndarray, shape (n_rows, n_outputs), float64
        """
        check_is_fitted(self, "codes_")
        values = self._values(X)
        outputs = np.zeros((len(values), self._n_outputs))
        places = [
            [positions.get(value, other) for value in column]
            for column, (positions, other) in zip(
                self._categories_of(values), self._outputs, strict=True
            )
        ]
        places = np.array(places, int).reshape(len(places), len(values))
        columns, rows = np.nonzero(places >= 0)
        outputs[rows, places[columns, rows]] = 1.0
        numbers = self._numbers_of(values)
        numbers = np.where(np.isnan(numbers), self.median_, numbers)
        scaled = (numbers[:, self._source] - self._shift) / self._scale
        outputs[:, : len(self._source)] = np.clip(scaled, self._low, self._high)
        return outputs

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """Return a name for each output, such as ``city_Porto``, ``city_other`` or ``age_bin1``."""
        check_is_fitted(self, "codes_")
        names = _check_feature_names_in(self, input_features)
        made = []
        for column, number in self.codes_[:, :2].astype(int):
            name = names[self._numeric[column]]
            made.append(f"{name}_bin{number}" if number else name)
        for column, levels, pooled in zip(
            self._categories, self.levels_, self.pooled_, strict=True
        ):
            every = [*levels, "other"] if pooled else levels
            made += [f"{names[column]}_{level}" for level in every]
        return np.array(made, dtype=object)

    def to_dict(self) -> dict:
        """Return parameters and what was learnt, as JSON can hold it."""
        return {
            "parameters": {**self.get_params(), "categorical": list(self.categorical)},
            "columns": self._names(),
            "levels": self.levels_,
            "pooled": self.pooled_,
            "median": self.median_.tolist(),
            "codes": self.codes_.tolist(),
        }

    @classmethod
    def from_dict(cls, content: dict) -> "TabularPreprocessor":
        """Make a fitted transformer from what `to_dict` returned."""
        made = cls(**content["parameters"])
        made.n_features_in_ = len(content["columns"])
        if made.n_features_in_ and isinstance(content["columns"][0], str):
            made.feature_names_in_ = np.array(content["columns"], dtype=object)
        made.levels_, made.pooled_ = content["levels"], content["pooled"]
        made.median_ = np.array(content["median"])
        made.codes_ = np.array(content["codes"]).reshape(-1, 6)
        made._divide()
        made._place()
        return made


def _frequent_levels(column: list, min_frequency: int) -> tuple[list, bool]:
    """Return the levels of at least so many rows, in order, and whether there are others."""
    counts = Counter(column)
    # Codes next to floats became floats, which would look strange in names of outputs.
    levels = [_whole(level) for level, count in counts.items() if count >= min_frequency]
    order = sorted(levels, key=lambda level: (level is None, isinstance(level, str), level))
    return order, len(levels) < len(counts)


class LiteNetwork:
    """A network converted to LiteRT, from `tf.lite.TFLiteConverter`; threads may share it."""

    def __init__(self, content: bytes):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        # Without the delegate for large networks, and its remark on the error stream.
        kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._interpreter = Interpreter(
            model_content=content, num_threads=1, experimental_op_resolver_type=kernels
        )
        self._place = self._interpreter.get_input_details()[0]["index"]
        self._answer = self._interpreter.get_output_details()[0]["index"]
        self._n_rows, self._lock = None, threading.Lock()

    def predict_proba(self, inputs: np.ndarray) -> np.ndarray:
        """Return class probabilities, shape (n_rows, n_classes), float32."""
        inputs = np.asarray(inputs, "float32")
        with self._lock:
            starts = range(0, len(inputs), MOST_ROWS)
            return np.concatenate([self._ask(inputs[n : n + MOST_ROWS]) for n in starts])

    def _ask(self, inputs: np.ndarray) -> np.ndarray:
        if len(inputs) != self._n_rows:
            self._interpreter.resize_tensor_input(self._place, inputs.shape)
            self._interpreter.allocate_tensors()
            self._n_rows = len(inputs)
        self._interpreter.set_tensor(self._place, inputs)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._answer)


class TabularClassifier(mlflow.pyfunc.PythonModel):
    """A classifier of table rows, for `mlflow.pyfunc`.

    The folder given as the artifact ``model`` holds ``interface.json`` (columns, labels, fitted
    preprocessing) and either ``network.tflite`` or ``classifier.joblib``, a fitted scikit-learn
    classifier of preprocessed rows.
    """

    def load_context(self, context):
        """Load the fitted parts."""
        folder = Path(context.artifacts["model"])
        interface = json.loads((folder / "interface.json").read_text(encoding="utf-8"))
        self.columns = interface["columns"]
        self.labels = interface["labels"]
        self.preprocessing = TabularPreprocessor.from_dict(interface["preprocessing"])
        if (folder / "network.tflite").exists():
            self.model = LiteNetwork((folder / "network.tflite").read_bytes())
        else:
            import joblib

            self.model = joblib.load(folder / "classifier.joblib")

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """Classify rows with the raw columns of the CSV, in any order.

        Returns
        -------
        pandas.DataFrame, shape (n_rows, 1 + n_classes)
            ``prediction`` (the label as in the CSV) and ``probability_<label>`` per class,
            float64, each row summing to 1.
        """
        rows = convert(model_input, self.columns)
        predictions, probabilities = self.classify(rows)
        answer = {"prediction": np.asarray(predictions, np.asarray(self.labels).dtype)}
        for number, label in enumerate(self.labels):
            answer[f"probability_{label}"] = probabilities[:, number]
        return pd.DataFrame(answer, index=rows.index)

    def classify(self, rows: pd.DataFrame) -> tuple[list, np.ndarray]:
        """Return labels and probabilities of rows from `convert`, without the cost of a table.

        Probabilities have shape (n_rows, n_classes), float64.
        """
        probabilities = np.zeros((0, len(self.labels)))
        if len(rows):
            inputs = self.preprocessing.transform(rows)
            probabilities = np.asarray(self.model.predict_proba(inputs), dtype="float64")
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        winners = probabilities.argmax(axis=1).tolist()
        return [self.labels[winner] for winner in winners], probabilities


mlflow.models.set_model(TabularClassifier())
