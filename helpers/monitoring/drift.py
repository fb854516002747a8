"""How far today's rows are from those that a model was promoted with.

The tests are SciPy's: two-sample Kolmogorov-Smirnov for numbers, chi-squared for categories and
predicted classes, with false discoveries over all columns controlled after Benjamini and
Hochberg [1]_.

References
----------
.. [1] Y. Benjamini, Y. Hochberg (1995). *Controlling the False Discovery Rate*. JRSS B 57(1),
   289-300. doi:10.1111/j.2517-6161.1995.tb02031.x
"""

import numpy as np
import pandas as pd
from scipy import stats

from helpers.registry.reference import QUANTILES, levels

# A column counts as drifted when it changed surely and by much.
P_VALUE = 0.001  # largest p-value, adjusted for the number of columns
EFFECT = 0.15  # smallest distance (numbers), Cramér's V (levels), difference of shares (missing)

MOST_SAMPLED = 2_000  # numbers that stand for the reference in a test
RARE = 5  # expected rows below which levels are pooled, as the chi-squared test asks for


Result = tuple[str, float, float]  # test, effect, p-value


def _sample(summary: dict) -> np.ndarray:
    """Return numbers distributed as those that were summarised."""
    if summary["kind"] == "values":
        counts = np.asarray(summary["counts"], dtype="float64")
        scale = min(1.0, MOST_SAMPLED / max(counts.sum(), 1))
        return np.repeat(summary["values"], np.round(counts * scale).astype(int))
    n_rows = min(summary["rows"], MOST_SAMPLED)
    positions = (np.arange(n_rows) + 0.5) / n_rows
    return np.interp(positions, np.linspace(0, 1, QUANTILES), summary["values"])


def _compare_levels(counts: list, values: pd.Series) -> Result:
    """Compare levels today with a reference; the effect is Cramér's V."""
    before, now = dict(counts), levels(values).value_counts().to_dict()
    # In numpy: many columns of many periods are compared.
    table = np.array([[each.get(level, 0) for each in (before, now)] for level in before | now])
    rare = table.sum(axis=1) / table.sum() * table.sum(axis=0).min() < RARE
    if rare.any():
        table = np.vstack([table[~rare], table[rare].sum(axis=0)])
    if len(table) < 2:
        return "chi-squared", 0.0, 1.0
    result = stats.chi2_contingency(table)
    expected = result.expected_freq
    effect = np.sqrt((np.square(table - expected) / expected).sum() / table.sum())
    return "chi-squared", float(effect), float(result.pvalue)


def _compare_numbers(summary: dict, values: pd.Series) -> Result:
    """Compare numbers today with a reference; the effect is the Kolmogorov-Smirnov distance.

    Numbers that are missing more or less often than before are drift, too; the larger of the
    two effects counts.
    """
    sample, known = _sample(summary), values.dropna().astype("float64")
    found = [_compare_gaps(summary, len(known), len(values) - len(known))]
    if len(known) and len(sample):
        result = stats.ks_2samp(sample, known, method="asymp")
        found.append(("Kolmogorov-Smirnov", float(result.statistic), float(result.pvalue)))
    return max(found, key=lambda each: each[1])


def _compare_gaps(summary: dict, n_known: int, n_missing: int) -> Result:
    """Compare how often numbers are missing; the effect is the difference of the shares."""
    before, now = (summary["rows"], summary["missing"]), (n_known, n_missing)
    counted = np.array([before, now])
    if not counted.sum(axis=0).all():
        return "missing values", 0.0, 1.0
    effect = abs(before[1] / sum(before) - now[1] / sum(now))
    return "missing values", float(effect), float(stats.chi2_contingency(counted).pvalue)


def column_drift(reference: dict, rows: pd.DataFrame) -> pd.DataFrame:
    """Test every column for drift.

    Parameters
    ----------
    reference : dict
        From `helpers.registry.reference.make_reference`.
    rows : pandas.DataFrame, shape (n_rows, n_columns)
        What production was asked.

    Returns
    -------
    pandas.DataFrame
        Index ``column``; ``test``, ``effect`` (0 to 1), ``p_value`` (adjusted) and ``drifted``,
        the largest effect first.
    """
    found = {
        name: _compare_levels(summary["counts"], rows[name])
        if summary["kind"] == "levels"
        else _compare_numbers(summary, rows[name])
        for name, summary in reference["columns"].items()
    }
    table = pd.DataFrame.from_dict(found, orient="index", columns=["test", "effect", "p_value"])
    table["p_value"] = stats.false_discovery_control(table["p_value"])
    table["drifted"] = (table["p_value"] < P_VALUE) & (table["effect"] >= EFFECT)
    return table.rename_axis("column").sort_values("effect", ascending=False)


def prediction_shift(reference: dict, predictions: pd.Series) -> tuple[float, bool]:
    """Test whether the predicted classes are spread as on the test rows.

    Returns
    -------
    effect : float
        Cramér's V.
    shifted : bool
    """
    _, effect, p_value = _compare_levels(reference["predictions"], predictions)
    return effect, p_value < P_VALUE and effect >= EFFECT
