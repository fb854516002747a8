"""The interface of both models: raw columns in, prediction and probabilities out.

MLflow stores this file inside each logged model ("models from code") and runs it when a client
loads the model. It therefore imports nothing from this project, and what runs a network or reads
a classifier only where there is one.
"""

import json
import threading
from collections import Counter
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted, validate_data

FEW_ROWS = 100  # up to which looking up every value beats finding the different ones
MOST_ROWS = 1000  # that a network is asked at once; more would only take memory
NUMBERS = {int, float, bool, type(None)}
TRUTH = {"true": 1.0, "false": 0.0}


def _wrong_type(name, wanted, value):
    return MlflowException(
        f"Incompatible input type for column {name!r}: the model's signature asks for {wanted}, "
        f"but there is {value!r}. Correct the column and send the rows again.",
        error_code=INVALID_PARAMETER_VALUE,
    )


def _first_bad(column, bad):
    return column[bad].iloc[0]


def _require_finite(column):
    infinite = np.isinf(column)
    if infinite.any():
        raise _wrong_type(column.name, "finite numbers", _first_bad(column, infinite))
    return column


def _as_numbers(column):
    """Return a float64 copy of a column of integers, floats or booleans; missing is NaN."""
    if column.dtype.kind in "biuf":
        return _require_finite(column.astype("float64"))
    known = column.notna()
    good = column.map(lambda value: isinstance(value, (bool, int, float, np.number, np.bool_)))
    if (known & ~good).any():
        raise _wrong_type(column.name, "numbers", _first_bad(column, known & ~good))
    try:
        return _require_finite(column.where(known, np.nan).astype("float64"))
    except OverflowError:
        raise _wrong_type(column.name, "finite numbers", "a number of 309 digits or more") from None


def _as_truth(column):
    """Return 0.0 and 1.0 for booleans, 0 and 1, or the texts true and false."""
    texts = column.map(lambda value: TRUTH.get(str(value).strip().lower(), value))
    numbers = _as_numbers(texts.infer_objects().rename(column.name))
    bad = numbers.notna() & ~numbers.isin([0.0, 1.0])
    if bad.any():
        raise _wrong_type(column.name, "true or false", _first_bad(column, bad))
    return numbers


def _written(value):
    """Return a whole number as it is written in a CSV, anything else as it is."""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return str(int(value)) if float(value).is_integer() else value
    return value


def _as_texts(column):
    """Return an object column of texts; missing is None.

    Codes such as A1, 2 and 3 are texts, but where rows happen to have only 2 and 3, or these
    and gaps, pandas reads them as numbers.
    """
    column = column.astype(object).map(_written, na_action="ignore")
    known = column.notna()
    good = column.map(lambda value: isinstance(value, str))
    if (known & ~good).any():
        raise _wrong_type(column.name, "texts", _first_bad(column, known & ~good))
    return column.map(str.strip, na_action="ignore").where(known, None)


def _numbers_at_once(values):
    """Return an array of finite or missing numbers as float64, or None for any other.

    Column by column, the conversion takes longer than the model.
    """
    if values.dtype.kind == "O":
        if not set(map(type, values.ravel().tolist())) <= NUMBERS:
            return None
        try:
            values = values.astype("float64")
        except OverflowError:
            return None
    if values.dtype.kind not in "biuf":
        return None
    values = values.astype("float64")
    return values if np.isfinite(np.nansum(values)) else None


CONVERTERS = {"number": _as_numbers, "boolean": _as_truth, "text": _as_texts}


def convert(frame, columns):
    """Bring a client's rows into the order and types that the model was trained on.

    Parameters
    ----------
    frame : pandas.DataFrame, shape (n_rows, n_columns)
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
        If a column is missing or of another type; names the column.
    """
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise MlflowException(
            f"The column {twice[0]!r} is there more than once.", error_code=INVALID_PARAMETER_VALUE
        )
    given = {str(name).strip(): name for name in frame.columns}
    given |= {name: name for name in frame.columns}
    missing = [name for name in columns if name not in given]
    if missing:
        raise MlflowException(
            f"Model is missing inputs {missing}.", error_code=INVALID_PARAMETER_VALUE
        )
    names = [given[name] for name in columns]
    chosen = frame if list(frame.columns) == names else frame[names]
    if set(columns.values()) == {"number"}:
        values = _numbers_at_once(chosen.to_numpy())
        if values is not None:
            return pd.DataFrame(values, columns=list(columns), index=frame.index)
    return pd.DataFrame(
        {name: CONVERTERS[kind](frame[given[name]].rename(name)) for name, kind in columns.items()},
        index=frame.index,
    )


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
        """Learn levels, medians, scales and quantiles.

        Parameters
        ----------
        X : pandas.DataFrame or numpy.ndarray, shape (n_rows, n_columns)
        y : None
            Unused; part of scikit-learn's interface.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a categorical column is missing, or another one holds something else than finite
            numbers and gaps; names the column.
        """
        values = self._values(X, reset=True)
        names = self._names()
        missing = [name for name in self.categorical if name not in names]
        if missing:
            raise ValueError(f"There is no categorical column {missing[0]!r} in the table.")
        self._divide()
        learnt = [_frequent_levels(values[:, n], self.min_frequency) for n in self._categories]
        self.levels_ = [levels for levels, _ in learnt]
        self.pooled_ = [pooled for _, pooled in learnt]
        numbers = self._numbers(values)
        infinite = np.isinf(numbers).any(axis=0)
        if infinite.any():
            name = names[self._numeric[infinite.argmax()]]
            raise ValueError(f"The column {name!r} has infinite numbers. Leave these rows out.")
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

    def _codes(self, filled, numbers):
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

    def _divide(self):
        """Tell the positions of categories from those of numbers."""
        names = self._names()
        self._categories = [names.index(name) for name in self.categorical]
        self._numeric = [n for n in range(len(names)) if n not in set(self._categories)]

    def _place(self):
        """Derive from what was learnt which output belongs to what."""
        self._outputs, start = [], len(self.codes_)
        for levels, pooled in zip(self.levels_, self.pooled_, strict=True):
            other = start + len(levels) if pooled else -1
            self._outputs.append(({level: start + n for n, level in enumerate(levels)}, other))
            start += len(levels) + pooled
        self._n_outputs = start
        self._source = self.codes_[:, 0].astype(int)
        self._shift, self._scale, self._low, self._high = self.codes_.T[2:].copy()

    def _names(self):
        return list(getattr(self, "feature_names_in_", range(self.n_features_in_)))

    def _values(self, X, reset=False):
        """Return a table as one array, after scikit-learn's checks."""
        if isinstance(X, pd.DataFrame):
            # The checks of the names take longer than the rest for a single row.
            if reset or X.columns.tolist() != self._names():
                validate_data(self, X, reset=reset, skip_check_array=True)
            if reset and not len(X):
                raise ValueError("There are no rows to fit the preprocessing to.")
            return X.to_numpy()
        kind = object if len(self.categorical) else "float64"
        return validate_data(self, X, reset=reset, dtype=kind, ensure_all_finite="allow-nan")

    def _numbers(self, values):
        """Return the numeric columns as a float64 array; missing is NaN."""
        numbers = values[:, self._numeric]
        try:
            return numbers.astype("float64")
        except TypeError:  # pandas' own sign for missing
            return np.where(pd.isna(numbers), np.nan, numbers).astype("float64")
        except ValueError:
            texts = [any(isinstance(each, str) for each in column) for column in numbers.T]
            name = self._names()[self._numeric[texts.index(True)]] if any(texts) else "?"
            raise ValueError(
                f"The column {name!r} has texts. Name it in `categorical`, or correct it."
            ) from None

    def transform(self, X):
        """Return the inputs of a model.

        Parameters
        ----------
        X : pandas.DataFrame or numpy.ndarray, shape (n_rows, n_columns)
            The columns of `fit`, in their order.

        Returns
        -------
        numpy.ndarray, shape (n_rows, n_outputs), float64
        """
        check_is_fitted(self, "codes_")
        values = self._values(X)
        outputs = np.zeros((len(values), self._n_outputs))
        if self._categories:
            columns = zip(self._categories, self._outputs, strict=True)
            places = np.array([_look_up(values[:, n], *outputs) for n, outputs in columns]).T
            rows, columns = np.nonzero(places >= 0)
            outputs[rows, places[rows, columns]] = 1.0
        numbers = self._numbers(values)
        numbers = np.where(np.isnan(numbers), self.median_, numbers)
        scaled = (numbers[:, self._source] - self._shift) / self._scale
        outputs[:, : len(self._source)] = np.clip(scaled, self._low, self._high)
        return outputs

    def get_feature_names_out(self, input_features=None):
        """Return a name for each output, such as ``city_Porto``, ``city_other`` or ``age_bin1``.

        Parameters
        ----------
        input_features : sequence of str, optional
            Names of the columns, where `fit` saw none.

        Returns
        -------
        numpy.ndarray of str, shape (n_outputs,)
        """
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

    def to_dict(self):
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
    def from_dict(cls, content):
        """Make a fitted transformer from what `to_dict` returned.

        Parameters
        ----------
        content : dict

        Returns
        -------
        TabularPreprocessor
        """
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


def _key(value):
    """Return a value as a key; every sign for missing, some of which equal nothing, is None."""
    return None if pd.isna(value) else value


def _is_whole(value):
    return isinstance(value, (float, np.number)) and float(value).is_integer()


def _frequent_levels(column, min_frequency):
    """Return the levels of at least so many rows, in order, and whether there are others."""
    counts = Counter(map(_key, column.tolist()))
    levels = [level for level, count in counts.items() if count >= min_frequency]
    # Codes next to floats became floats, which would look strange in names of outputs.
    levels = [int(each) if _is_whole(each) else each for each in levels]
    order = sorted(levels, key=lambda level: (level is None, isinstance(level, str), level))
    return order, len(levels) < len(counts)


def _look_up(column, positions, other):
    """Return the output of each value of a categorical column; -1 for none."""
    if len(column) < FEW_ROWS:
        return [positions.get(_key(value), other) for value in column.tolist()]
    codes, different = pd.factorize(column, use_na_sentinel=False)
    return np.array([positions.get(_key(value), other) for value in different])[codes]


class LiteNetwork:
    """A network converted to LiteRT; any number of threads may ask it.

    Parameters
    ----------
    content : bytes
        From `tf.lite.TFLiteConverter`.
    """

    def __init__(self, content):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        # Without the delegate for large networks, and its remark on the error stream.
        kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._interpreter = Interpreter(
            model_content=content, num_threads=1, experimental_op_resolver_type=kernels
        )
        self._place = self._interpreter.get_input_details()[0]["index"]
        self._answer = self._interpreter.get_output_details()[0]["index"]
        self._n_rows, self._lock = None, threading.Lock()

    def predict_proba(self, inputs):
        """Return class probabilities.

        Parameters
        ----------
        inputs : numpy.ndarray, shape (n_rows, n_inputs)

        Returns
        -------
        numpy.ndarray, shape (n_rows, n_classes), float32
        """
        inputs = np.asarray(inputs, "float32")
        with self._lock:
            starts = range(0, len(inputs), MOST_ROWS)
            return np.concatenate([self._ask(inputs[n : n + MOST_ROWS]) for n in starts])

    def _ask(self, inputs):
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
        """Load the fitted parts.

        Parameters
        ----------
        context : mlflow.pyfunc.PythonModelContext
        """
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
        """Classify rows.

        Parameters
        ----------
        context : mlflow.pyfunc.PythonModelContext
        model_input : pandas.DataFrame, shape (n_rows, n_columns)
            The raw columns of the CSV, in any order.
        params : dict, optional
            Unused; part of MLflow's interface.

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

    def classify(self, rows):
        """Classify rows that are converted already, without the cost of a table.

        Parameters
        ----------
        rows : pandas.DataFrame, shape (n_rows, n_columns)
            From `convert`.

        Returns
        -------
        predictions : list
            Labels, shape (n_rows,).
        probabilities : numpy.ndarray, shape (n_rows, n_classes), float64
        """
        probabilities = np.zeros((0, len(self.labels)))
        if len(rows):
            inputs = self.preprocessing.transform(rows)
            probabilities = np.asarray(self.model.predict_proba(inputs), dtype="float64")
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        winners = probabilities.argmax(axis=1).tolist()
        return [self.labels[winner] for winner in winners], probabilities


mlflow.models.set_model(TabularClassifier())
