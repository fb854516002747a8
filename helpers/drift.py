"""What a model was promoted with, as figures, and how far today's rows are from it.

The reference holds no row of the table: counts of values, quantiles, and metrics. The tests are
SciPy's: two-sample Kolmogorov-Smirnov for numbers, chi-squared for categories and predicted
classes, with false discoveries over all columns controlled after Benjamini and Hochberg [1]_.

References
----------
.. [1] Y. Benjamini, Y. Hochberg (1995). *Controlling the False Discovery Rate*. JRSS B 57(1),
   289-300. doi:10.1111/j.2517-6161.1995.tb02031.x
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from helpers.evaluation import compute_metrics

MOST_VALUES = 100  # different numbers up to which each is counted; above, quantiles
QUANTILES = 201
MOST_SAMPLED = 2_000  # numbers that stand for the reference in a test
RARE = 5  # expected rows below which levels are pooled, as the chi-squared test asks for
BINS = 10  # of the confidence, for the calibration error


@dataclass(frozen=True)
class DriftRule:
    """When a column counts as drifted: surely (`p_value`) and by much (`effect`).

    Attributes
    ----------
    p_value : float
        Largest adjusted p-value.
    effect : float
        Smallest Kolmogorov-Smirnov distance (numbers), Cramér's V (categories) or difference
        of the shares of missing numbers, each 0 to 1.
    """

    p_value: float = 0.001
    effect: float = 0.15


# --- the reference ----------------------------------------------------------------------------


def calibration(y_true, answer, labels):
    """Compute how well probabilities match how often the predictions are right.

    Parameters
    ----------
    y_true : array-like, shape (n_rows,)
    answer : pandas.DataFrame
        ``prediction`` and ``probability_<label>``.
    labels : sequence

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


def make_reference(split, answer):
    """Summarise the training rows and the answer to the test rows.

    Parameters
    ----------
    split : helpers.data.Split
    answer : pandas.DataFrame
        The model's answer to the test rows.

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
            for name in split.X_train.columns
        },
        "predictions": _counts(answer["prediction"]),
        "metrics": {**metrics, **calibration(split.y_test, answer, split.labels)},
    }


def _counts(values):
    """Return [value as text, count] pairs; numbers as they are written in a CSV."""
    return [[level, int(count)] for level, count in _levels(values).value_counts().items()]


def _levels(values):
    """Return values as texts that are the same for 3 and 3.0; missing ones are ''."""

    def text(value):
        whole = isinstance(value, (float, np.floating)) and float(value).is_integer()
        return str(int(value)) if whole else str(value)

    return values.map(text, na_action="ignore").astype(object).where(values.notna(), "")


def _summary(column, categorical):
    if categorical or column.dtype.kind not in "iuf":
        return {"kind": "levels", "counts": _counts(column)}
    known = column.dropna().astype("float64")
    rows = {"rows": len(known), "missing": len(column) - len(known)}
    values, counts = np.unique(known, return_counts=True)
    if len(values) <= MOST_VALUES:
        return {"kind": "values", **rows, "values": values.tolist(), "counts": counts.tolist()}
    quantiles = np.quantile(known, np.linspace(0, 1, QUANTILES))
    return {"kind": "quantiles", **rows, "values": quantiles.tolist()}


def _sample(summary):
    """Return numbers distributed as those that were summarised."""
    if summary["kind"] == "values":
        counts = np.asarray(summary["counts"], dtype="float64")
        scale = min(1.0, MOST_SAMPLED / max(counts.sum(), 1))
        return np.repeat(summary["values"], np.round(counts * scale).astype(int))
    n_rows = min(summary["rows"], MOST_SAMPLED)
    positions = (np.arange(n_rows) + 0.5) / n_rows
    return np.interp(positions, np.linspace(0, 1, QUANTILES), summary["values"])


# --- the tests --------------------------------------------------------------------------------


def _compare_levels(counts, values):
    """Return p-value and Cramér's V of levels today against a reference."""
    now = _levels(values).value_counts()
    before = pd.Series({str(level): count for level, count in counts}, dtype="float64")
    table = pd.DataFrame({"before": before, "now": now}).fillna(0.0)
    share = table.sum(axis=1) / table.to_numpy().sum()
    rare = share * table.sum().min() < RARE
    pooled = table[rare].sum()
    table = table[~rare]
    if pooled.sum():
        table.loc["other levels"] = pooled
    if len(table) < 2:
        return 1.0, 0.0
    counted = table.to_numpy().round().astype(int)
    return stats.chi2_contingency(counted).pvalue, stats.contingency.association(counted)


def _compare_numbers(summary, values):
    """Return test, effect and p-value of numbers today against a reference.

    Numbers that are missing more or less often than before are drift, too; the larger of the
    two effects counts.
    """
    sample, known = _sample(summary), values.dropna().astype("float64")
    found = [_compare_gaps(summary, len(known), len(values) - len(known))]
    if len(known) and len(sample):
        result = stats.ks_2samp(sample, known, method="asymp")
        found.append(("Kolmogorov-Smirnov", float(result.statistic), float(result.pvalue)))
    return max(found, key=lambda each: each[1])


def _compare_gaps(summary, n_known, n_missing):
    """Return test, effect (difference of the shares) and p-value of missing numbers."""
    before, now = (summary["rows"], summary["missing"]), (n_known, n_missing)
    counted = np.array([before, now])
    if not counted.sum(axis=0).all():
        return "missing values", 0.0, 1.0
    effect = abs(before[1] / sum(before) - now[1] / sum(now))
    return "missing values", float(effect), float(stats.chi2_contingency(counted).pvalue)


def column_drift(reference, rows, rule=None):
    """Test every column for drift.

    Parameters
    ----------
    reference : dict
        From `make_reference`.
    rows : pandas.DataFrame, shape (n_rows, n_columns)
        What production was asked.
    rule : DriftRule, optional

    Returns
    -------
    pandas.DataFrame
        Index ``column``; ``test``, ``effect``, ``p_value`` (adjusted) and ``drifted``, the
        largest effect first.
    """
    rule, found = rule or DriftRule(), {}
    for name, summary in reference["columns"].items():
        if summary["kind"] == "levels":
            p_value, effect = _compare_levels(summary["counts"], rows[name])
            found[name] = ("chi-squared", effect, p_value)
        else:
            found[name] = _compare_numbers(summary, rows[name])
    table = pd.DataFrame.from_dict(found, orient="index", columns=["test", "effect", "p_value"])
    table["p_value"] = stats.false_discovery_control(table["p_value"])
    table["drifted"] = (table["p_value"] < rule.p_value) & (table["effect"] >= rule.effect)
    return table.rename_axis("column").sort_values("effect", ascending=False)


def prediction_shift(reference, predictions, rule=None):
    """Test whether the predicted classes are spread as on the test rows.

    Parameters
    ----------
    reference : dict
        From `make_reference`.
    predictions : pandas.Series, shape (n_rows,)
    rule : DriftRule, optional

    Returns
    -------
    dict
        ``effect`` (Cramér's V), ``p_value`` and ``shifted``.
    """
    rule = rule or DriftRule()
    p_value, effect = _compare_levels(reference["predictions"], predictions)
    shifted = bool(p_value < rule.p_value and effect >= rule.effect)
    return {"effect": float(effect), "p_value": float(p_value), "shifted": shifted}
