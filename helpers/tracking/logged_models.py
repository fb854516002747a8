"""Models in MLflow: what is logged with a model, and what the logged model is worth."""

import json
import tempfile
from importlib import metadata
from pathlib import Path

import joblib
import mlflow
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.pyfunc import PyFuncModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType

from helpers.data import Split
from helpers.display import silenced_libraries
from helpers.models import interface
from helpers.models.evaluation import compute_metrics
from helpers.models.interface import LiteNetwork, TabularPreprocessor
from helpers.tracking.runs import log_figure
from helpers.workspace import ProjectError

INTERFACE = Path(interface.__file__)
COMPARED_ROWS = 1000  # training rows on which a converted network must answer as before
TOLERANCE = 1e-5  # largest difference of a probability


class ModelError(ProjectError):
    """A model cannot be logged."""


def column_kinds(X: pd.DataFrame) -> dict[str, str]:
    """Tell what a client may send in each column: ``number``, ``boolean`` or ``text``."""
    kinds = {"b": "boolean", "O": "text"}
    return {name: kinds.get(dtype.kind, "number") for name, dtype in X.dtypes.items()}


def make_signature(columns: dict, labels: list, header: dict[str, str]) -> ModelSignature:
    """Make the signature of the model interface.

    MLflow's ``double``, which `infer_signature` gives, refuses int64 and its ``long`` refuses
    floats, yet clients send either for the same column. So the signature asks for the columns by
    name, and the model itself checks that numbers are numbers and texts are texts.

    A column whose name in the CSV has blanks around it may come under either name, so MLflow
    lets both pass and the model says if there is neither: `header` has such names, as the CSV
    writes them, by the names of `columns`.
    """
    inputs = [ColSpec(AnyType(), name, required=name not in header) for name in columns]
    inputs += [ColSpec(AnyType(), raw, required=False) for raw in header.values()]
    label_type = DataType.string if isinstance(labels[0], str) else DataType.long
    outputs = [ColSpec(label_type, "prediction")]
    outputs += [ColSpec(DataType.double, f"probability_{label}") for label in labels]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def save_parts(folder: Path, split: Split, preprocessing: TabularPreprocessor, model) -> None:
    """Write the fitted parts of a model where the model interface looks for them.

    Raises
    ------
    ModelError
        If a network answers otherwise once it is converted.
    """
    description = {
        "columns": column_kinds(split.X_train),
        "labels": split.labels,
        "preprocessing": preprocessing.to_dict(),
    }
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / "interface.json").write_text(text, encoding="utf-8")
    if hasattr(model, "predict_proba"):
        joblib.dump(model, folder / "classifier.joblib", compress=3)
        return
    from helpers.models import cnn  # here: it imports TensorFlow

    content = cnn.to_litert(model)
    rows = preprocessing.transform(split.X_train.head(COMPARED_ROWS)).astype("float32")
    gap = np.abs(LiteNetwork(content).predict_proba(rows) - model(rows).numpy()).max()
    if not gap <= TOLERANCE:
        raise ModelError(
            f"The network that was converted to LiteRT answers otherwise: a probability differs "
            f"by {gap:.2g}. Use layers that it knows, such as Conv1D, MaxPooling1D and Dense."
        )
    (folder / "network.tflite").write_bytes(content)
    model.save(folder / "network.keras")


def log_model(split: Split, preprocessing: TabularPreprocessor, model) -> ModelInfo:
    """Log a fitted model with the interface of the series in the active run.

    Parameters
    ----------
    split : helpers.data.Split
        Its training rows give signature and input example.
    preprocessing : helpers.models.interface.TabularPreprocessor
        Fitted.
    model : keras.Model or classifier of scikit-learn
        Fitted; takes preprocessed rows. A network is run by LiteRT, so that clients need no
        TensorFlow; the ``.keras`` file lies beside it.

    Raises
    ------
    ModelError
        If a network answers otherwise once it is converted.
    """
    columns = column_kinds(split.X_train)
    runtime = "joblib" if hasattr(model, "predict_proba") else "ai-edge-litert"
    packages = ("mlflow", "pandas", "numpy", "scikit-learn", runtime)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "parts"
        folder.mkdir()
        save_parts(folder, split, preprocessing, model)
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(INTERFACE),
            artifacts={"model": str(folder)},
            signature=make_signature(columns, split.labels, split.manifest.get("header", {})),
            input_example=split.X_train.head(3),
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in packages],
            metadata={"columns": columns, "labels": [str(label) for label in split.labels]},
        )


def load_model(uri: str) -> PyFuncModel:
    """Load a model, such as ``models:/model_svm_rbf@production``, as any client would."""
    with silenced_libraries():
        # Its warnings, of other versions of a library, take longer to find than the model to load.
        return mlflow.pyfunc.load_model(uri, suppress_warnings=True)


def evaluate_logged_model(model_info: ModelInfo, split: Split) -> tuple[dict, pd.DataFrame]:
    """Load a logged model back and compute and log its metrics on the test rows.

    What is measured is the model that clients will load, not the objects in this notebook.

    Returns
    -------
    metrics : dict of str to float
    answer : pandas.DataFrame
        The model's answer to the test rows.
    """
    from helpers import plots  # here: the scoring server, which needs none, starts sooner

    answer = load_model(model_info.model_uri).predict(split.X_test)
    metrics = compute_metrics(split.y_test, answer, split.labels)
    mlflow.log_metrics(metrics, model_id=model_info.model_id)
    title = f"Confusion matrix, {len(answer):,} test rows"
    figure = plots.confusion_matrix(split.y_test, answer["prediction"], split.labels, title)
    log_figure(figure, "confusion_matrix/confusion_matrix.png")
    return metrics, answer
