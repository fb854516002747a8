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

TRUTH = {"true": 1.0, "false": 0.0}


def _wrong_type(name, wanted, value):
    return MlflowException(
        f"Incompatible input type for column {name!r}: the model's signature asks for {wanted}, "
        f"but there is {value!r}. Correct the column and send the rows again.",
        error_code=INVALID_PARAMETER_VALUE,
    )


def _first_bad(column, bad):
    return column[bad].iloc[0]


def _as_numbers(column):
    """Return a float64 copy of a column of integers, floats or booleans; missing is NaN."""
    if column.dtype.kind in "biuf":
        return column.astype("float64")
    known = column.notna()
    good = column.map(lambda value: isinstance(value, (bool, int, float, np.number, np.bool_)))
    if (known & ~good).any():
        raise _wrong_type(column.name, "numbers", _first_bad(column, known & ~good))
    return pd.to_numeric(column.where(known, np.nan)).astype("float64")


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
    given = {str(name).strip(): name for name in frame.columns}
    given |= {name: name for name in frame.columns}
    missing = [name for name in columns if name not in given]
    if missing:
        raise MlflowException(
            f"Model is missing inputs {missing}.", error_code=INVALID_PARAMETER_VALUE
        )
    return pd.DataFrame(
        {name: CONVERTERS[kind](frame[given[name]].rename(name)) for name, kind in columns.items()},
        index=frame.index,
    )


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
            self._probabilities = joblib.load(folder / "classifier.joblib").predict_proba
        else:
            preprocessor = joblib.load(folder / "preprocessor.joblib")
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
        probabilities = np.zeros((0, len(self.labels)))
        if len(rows):
            probabilities = np.asarray(self._probabilities(rows), dtype="float64")
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        winners = probabilities.argmax(axis=1)
        answer = {"prediction": np.asarray(self.labels)[winners]}
        for number, label in enumerate(self.labels):
            answer[f"probability_{label}"] = probabilities[:, number]
        return pd.DataFrame(answer, index=rows.index)


mlflow.models.set_model(TabularClassifier())
