"""What a model was promoted with, as figures that hold no row of the table.

Counts of values, quantiles, and metrics: what the monitoring compares production with later.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from helpers.data import Split, most_telling
from helpers.models.evaluation import compute_metrics

REFERENCE = "monitoring/reference.json"  # artifact of the run of a version
MOST_COLUMNS = 200  # that are watched
MOST_VALUES = 100  # different numbers up to which each is counted; above, quantiles
QUANTILES = 201
BINS = 10  # of the confidence, for the calibration error


def calibration(y_true: ArrayLike, answer: pd.DataFrame, labels: Sequence) -> dict[str, float]:
    """Compute how well probabilities match how often the predictions are right.

    `answer` has ``prediction`` and ``probability_<label>``.

    Returns
    -------
    dict of str to float
        ``calibration_error``: mean distance of confidence and accuracy over ten bins of the
        confidence (ECE); ``overconfidence``: mean confidence minus accuracy.
    """
    confidence = answer[[f"probability_{label}" for label in labels]].max(axis=1).to_numpy()
    right = answer["prediction"].to_numpy() == np.asarray(y_true)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)
    return {
        "calibration_error": float(np.abs(gaps).sum() / len(right)),
        "overconfidence": float(confidence.mean() - right.mean()),
    }


def watched_columns(split: Split) -> list[str]:
    """Return the columns whose drift is watched: all, or of many the most telling, in order."""
    names = split.X_train.columns.tolist()
    if len(names) <= MOST_COLUMNS:
        return names
    numbers = most_telling(split.X_train[list(split.numeric)], split.y_train)
    watched = {*split.categorical[: MOST_COLUMNS // 2]}
    watched |= set(numbers[: MOST_COLUMNS - len(watched)])
    return [name for name in names if name in watched]


def make_reference(split: Split, answer: pd.DataFrame) -> dict:
    """Summarise the training rows and the answer to the test rows.

    Returns
    -------
    dict
        For JSON: ``columns``, ``predictions``, ``metrics`` and ``labels``.
    """
    metrics = compute_metrics(split.y_test, answer, split.labels)
    return {
        "labels": list(split.labels),
        "columns": {
            name: _summary(split.X_train[name], name in split.categorical)
            for name in watched_columns(split)
        },
        "predictions": _counts(answer["prediction"]),
        "metrics": {**metrics, **calibration(split.y_test, answer, split.labels)},
    }


def _counts(values: pd.Series) -> list:
    """Return [value as text, count] pairs; numbers as they are written in a CSV."""
    return [[level, int(count)] for level, count in levels(values).value_counts().items()]


def levels(values: pd.Series) -> pd.Series:
    """Return values as texts, the same for 3 and 3.0, for True and 1; missing ones are ''."""

    def text(value):
        kinds = bool, np.bool_, float, np.floating
        whole = isinstance(value, kinds) and float(value).is_integer()
        return str(int(value)) if whole else str(value)

    return values.map(text, na_action="ignore").astype(object).where(values.notna(), "")


def _summary(column: pd.Series, categorical: bool) -> dict:
    if categorical or column.dtype.kind not in "iuf":
        return {"kind": "levels", "counts": _counts(column)}
    known = column.dropna().astype("float64")
    rows = {"rows": len(known), "missing": len(column) - len(known)}
    values, counts = np.unique(known, return_counts=True)
    if len(values) <= MOST_VALUES:
        return {"kind": "values", **rows, "values": values.tolist(), "counts": counts.tolist()}
    quantiles = np.quantile(known, np.linspace(0, 1, QUANTILES))
    return {"kind": "quantiles", **rows, "values": quantiles.tolist()}
