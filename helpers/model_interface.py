"""The interface of both models: raw columns in, prediction and probabilities out.

MLflow stores this file inside each logged model ("models from code") and runs it when a client
loads the model. It therefore imports nothing from this project, and TensorFlow only where a
network is loaded.
"""

import json
import os
from pathlib import Path

import joblib
import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from scipy.special import expit

FEW_ROWS = 100  # up to which looking up every value beats finding the different ones
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


class FastPreprocessor:
    """A fitted preprocessor with the same results and little fixed cost.

    scikit-learn checks and copies its input once per step and column, which for a single row
    takes longer than the model. Here the codes of each category are looked up in a table that
    the fitted encoder itself has filled, and the numbers are computed with the fitted figures.

    Parameters
    ----------
    fitted : sklearn.compose.ColumnTransformer
        With the transformers ``categorical`` (one-hot) and ``numeric`` (impute, standardise, and
        a function), as the project's preprocessing makes it.
    columns : dict of str to {'number', 'boolean', 'text'}
    """

    def __init__(self, fitted, columns):
        self._width = max(part.stop for part in fitted.output_indices_.values())
        parts = {name: (part, list(names)) for name, part, names in fitted.transformers_}
        encoder, self._categorical = parts.get("categorical", (None, []))
        scaler, self._numeric = parts.get("numeric", (None, []))
        unknown = set(parts) - {"categorical", "numeric", "remainder"}
        if unknown:
            raise ValueError(f"unknown parts: {unknown}")
        order = list(columns)
        self._positions = [order.index(name) for name in self._numeric]
        self._tables = self._make_tables(encoder, columns) if self._categorical else []
        self._tables = [(order.index(name), *table) for name, table in self._tables]
        if self._numeric:
            (_, imputer), (_, standard), (_, last) = scaler.steps
            self._outputs = fitted.output_indices_["numeric"]
            self._median, self._last = imputer.statistics_, last
            self._mean, self._scale = standard.mean_, standard.scale_

    def _make_tables(self, encoder, columns):
        """Return each column and its first output, positions of levels, outputs of levels."""
        levels = [list(each) for each in encoder.categories_]
        most = max(map(len, levels)) + 1
        frame = {}
        for name, known in zip(self._categorical, levels, strict=True):
            # No level is called so; what the encoder makes of it, it makes of any new level.
            unseen = "\0" if columns[name] == "text" else -np.pi
            filled = pd.Series([*known, *[unseen] * (most - len(known))], dtype=object)
            frame[name] = filled if columns[name] == "text" else filled.astype("float64")
        outputs, tables, start = encoder.transform(pd.DataFrame(frame)), [], 0
        pooled = encoder.infrequent_categories_
        for name, known, rare in zip(self._categorical, levels, pooled, strict=True):
            width = len(known) if rare is None else len(known) - len(rare) + 1
            positions = {_key(level): number for number, level in enumerate(known)}
            table = outputs[: len(known) + 1, start : start + width]
            tables.append((name, (start, positions, np.ascontiguousarray(table))))
            start += width
        return tables

    def transform(self, rows):
        """Transform rows.

        Parameters
        ----------
        rows : pandas.DataFrame, shape (n_rows, n_columns)
            From `convert`.

        Returns
        -------
        numpy.ndarray, shape (n_rows, n_inputs), float64
        """
        values, outputs = rows.to_numpy(), np.empty((len(rows), self._width))
        for column, start, positions, table in self._tables:
            outputs[:, start : start + table.shape[1]] = _look_up(
                values[:, column], positions, table
            )
        if self._numeric:
            numbers = values[:, self._positions].astype("float64")
            numbers = np.where(np.isnan(numbers), self._median, numbers)
            numbers = (numbers - self._mean) / self._scale
            outputs[:, self._outputs] = self._last.func(numbers, **(self._last.kw_args or {}))
        return outputs


def _look_up(values, positions, table):
    """Return the outputs of each value; the last row of the table is that of new levels."""
    unseen = len(table) - 1
    if len(values) < FEW_ROWS:
        return table[[positions.get(_key(value), unseen) for value in values.tolist()]]
    codes, different = pd.factorize(values, use_na_sentinel=False)
    return table[np.array([positions.get(_key(value), unseen) for value in different])[codes]]


def _key(value):
    """Return a value as a key; NaN, which equals nothing, becomes None."""
    return None if value is None or value != value else value


def _probe(fitted, columns):
    """Return rows with every level, a level never seen, and gaps in every column."""
    parts = {name: (part, names) for name, part, names in fitted.transformers_}
    encoder, categorical = parts.get("categorical", (None, ()))
    levels = dict(zip(categorical, encoder.categories_, strict=True)) if encoder else {}
    n_rows = 3 + max((len(each) for each in levels.values()), default=0)
    numbers = np.linspace(-50, 50, n_rows) ** 3
    frame = {}
    for name, kind in columns.items():
        new = ["\0", None] if kind == "text" else [-np.pi, np.nan]
        values = [*levels[name], *new] if name in levels else [*numbers[:-1], np.nan]
        frame[name] = pd.Series((values * n_rows)[:n_rows], dtype=object)
        if kind != "text":
            frame[name] = frame[name].astype("float64")
    return pd.DataFrame(frame)


def make_fast(fitted, columns):
    """Return a preprocessor as a `FastPreprocessor`, or as it is where that is not the same.

    Parameters
    ----------
    fitted : sklearn.compose.ColumnTransformer
        Also one of other steps than those of `helpers.preprocessing`.
    columns : dict
        See `convert`.

    Returns
    -------
    FastPreprocessor or sklearn.compose.ColumnTransformer
    """
    try:
        fast, rows = FastPreprocessor(fitted, columns), _probe(fitted, columns)
        same = np.array_equal(fast.transform(rows), fitted.transform(rows))
    except (AttributeError, KeyError, TypeError, ValueError):
        return fitted
    return fast if same else fitted


def _load_classifier(path, columns):
    """Return a function from converted rows to class probabilities."""
    classifier = joblib.load(path)
    parts = getattr(classifier, "calibrated_classifiers_", [])
    steps = getattr(getattr(parts[0], "estimator", None), "steps", ()) if len(parts) == 1 else ()
    if len(steps) != 2:
        return classifier.predict_proba
    # The classifier averages over its parts, here a single one; asked directly, it does not
    # check the rows at every step on the way.
    (part,) = parts
    preprocessor, part.estimator = make_fast(steps[0][1], columns), steps[1][1]
    probabilities = part.predict_proba
    if isinstance(preprocessor, FastPreprocessor):
        probe = preprocessor.transform(_probe(steps[0][1], columns))
        fast = _calibrated(part)
        if fast and np.allclose(fast(probe), part.predict_proba(probe), rtol=0, atol=1e-12):
            probabilities = fast
    return lambda rows: probabilities(preprocessor.transform(rows))


def _calibrated(part):
    """Return the function from inputs to probabilities of a classifier with Platt's sigmoids.

    The same as the classifier's own, which spends most of its time on looking at what it is
    given; None where it is calibrated in another way or has two classes.
    """
    sigmoids = part.calibrators
    if len(sigmoids) < 3 or not all(hasattr(each, "a_") for each in sigmoids):
        return None
    slopes = np.array([each.a_ for each in sigmoids])
    offsets = np.array([each.b_ for each in sigmoids])

    def probabilities(inputs):
        scores = expit(-(slopes * part.estimator.decision_function(inputs) + offsets))
        total = scores.sum(axis=1, keepdims=True)
        return scores / total if total.all() else part.predict_proba(inputs)

    return probabilities


def _load_network(folder):
    """Return a function from a float32 array (n_rows, n_inputs) to class probabilities."""
    # TensorFlow's start-up remarks are of no use to a client.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    network = keras.saving.load_model(folder / "network.keras", compile=False)
    specification = tf.TensorSpec((None, network.input_shape[1]), tf.float32)
    # A traced function skips the fixed cost of `network.predict`, most of a short request.
    traced = tf.function(
        lambda inputs: network(inputs, training=False), input_signature=[specification]
    )
    return lambda inputs: traced(tf.constant(inputs, tf.float32)).numpy()


class TabularClassifier(mlflow.pyfunc.PythonModel):
    """A classifier of table rows, for `mlflow.pyfunc`.

    The folder given as the artifact ``model`` holds ``interface.json`` (columns and labels) and
    either ``classifier.joblib``, a fitted scikit-learn classifier with its preprocessing, or
    ``preprocessor.joblib`` and ``network.keras``.
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
        if (folder / "classifier.joblib").exists():
            self._probabilities = _load_classifier(folder / "classifier.joblib", self.columns)
        else:
            preprocessor = make_fast(joblib.load(folder / "preprocessor.joblib"), self.columns)
            network = _load_network(folder)
            self._probabilities = lambda frame: network(preprocessor.transform(frame))

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
            probabilities = np.asarray(self._probabilities(rows), dtype="float64")
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        winners = probabilities.argmax(axis=1).tolist()
        return [self.labels[winner] for winner in winners], probabilities


mlflow.models.set_model(TabularClassifier())
