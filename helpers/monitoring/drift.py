"""How far today's rows are from those that a model was promoted with.

The tests are SciPy's: two-sample Kolmogorov-Smirnov for numbers, chi-squared for categories and
predicted classes, with false discoveries over all columns controlled after Benjamini and
Hochberg [1]_.

References
----------
.. [1] Y. Benjamini, Y. Hochberg (1995). *Controlling the False Discovery Rate*. JRSS B 57(1),
   289-300. doi:10.1111/j.2517-6161.1995.tb02031.x
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from helpers.registry.reference import QUANTILES, levels

MOST_SAMPLED = 2_000  # numbers that stand for the reference in a test
RARE = 5  # expected rows below which levels are pooled, as the chi-squared test asks for


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
    now = levels(values).value_counts()
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
