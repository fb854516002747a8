"""The rows that a run was trained on and tested with, and a hash of each."""

import time
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.data.dataset import Dataset
from mlflow.exceptions import MlflowException

from helpers.data import SAMPLE, UCI_URL, Split

TRAINING_ROWS = "training_rows.txt"  # artifact: the hash of each row that a run was trained on


def row_hashes(X: pd.DataFrame) -> pd.Series:
    """Return a hash of each row, the same for the same values wherever they are read.

    Neither the order of the columns nor whether numbers are integers or floats matters: one
    missing value more turns a column of integers into one of floats.

    Parameters
    ----------
    X : pandas.DataFrame, shape (n_rows, n_columns)
        Features. Without the target: a row whose label was corrected is the same row.

    Returns
    -------
    pandas.Series, shape (n_rows,)
        16 hexadecimal digits each; with the index of `X`.
    """
    alike = {}
    for name in sorted(X.columns):
        number = X[name].dtype.kind in "biuf"
        # Adding zero makes -0.0, which equals 0.0 but has other bits, the same as 0.0.
        alike[name] = X[name].astype("float64") + 0.0 if number else X[name].astype(object)
    return pd.util.hash_pandas_object(pd.DataFrame(alike), index=False).map("{:016x}".format)


def training_rows(run_id: str) -> set[str] | None:
    """Return the `row_hashes` that a run was trained on; None if it did not log them."""
    files = mlflow.MlflowClient().list_artifacts(run_id)
    if TRAINING_ROWS not in [file.path for file in files]:
        return None
    return set(mlflow.artifacts.load_text(f"runs:/{run_id}/{TRAINING_ROWS}").split())


def log_split(split: Split) -> None:
    """Log the training and test rows as dataset inputs of the active run.

    The hashes of the training rows go with them: with these, the model can later be measured
    on rows of a grown or newly split table that it has not seen.
    """
    mlflow.log_text("\n".join(row_hashes(split.X_train).unique()), TRAINING_ROWS)
    source = split.manifest["source"]
    parts = {"training": (split.X_train, split.y_train), "testing": (split.X_test, split.y_test)}
    for context, (X, y) in parts.items():
        dataset = mlflow.data.from_pandas(
            X.assign(**{y.name: y}),
            source={"uci": UCI_URL, "sample": str(SAMPLE)}.get(source, source),
            targets=y.name,
            name=f"{Path(source).stem[:40]}-{context}",
        )
        _log_input(dataset, context)


def _log_input(dataset: Dataset, context: str) -> None:
    """Log a dataset; again where another series on the same server logged it just then.

    MLflow looks whether the dataset is known and then adds it, in two steps: of two series that
    do so at once, a database such as PostgreSQL refuses one.
    """
    for wait in (0.2, 1.0):
        try:
            mlflow.log_input(dataset, context=context)
            return
        except MlflowException as error:
            if "unique" not in str(error).lower():
                raise
        time.sleep(wait)
    mlflow.log_input(dataset, context=context)
