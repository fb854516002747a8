"""One period: whether it is worse than what was promoted.

A metric raises an alert when it is worse than at promotion by more than its limit, and surely so:
in at least `SURE` of the bootstrap draws of the period's rows. When a column has drifted is in
`helpers.monitoring.drift`. Groups are few rows, then and now: their shares are compared after
Agresti and Caffo [1]_, all of a period at once with an error of 1 - `SURE`; estimates likewise, as
if they were counted.

References
----------
.. [1] A. Agresti, B. Caffo (2000). *Simple and Effective Confidence Intervals for Proportions and
   Differences of Proportions Result from Adding Two Successes and Two Failures*. The American
   Statistician 54(4), 280-288. doi:10.1080/00031305.2000.10474560
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from helpers.models.evaluation import class_names, compute_metrics
from helpers.monitoring.drift import EFFECT, column_drift, prediction_shift
from helpers.registry.groups import FEWEST_ROWS
from helpers.registry.rates import ALL, count_rates, read_rates
from helpers.registry.reference import calibration

# Largest changes since promotion; recall: of each class, overconfidence: a gain, all others losses.
LIMITS = {"accuracy": 0.05, "f1_macro": 0.05, "recall": 0.10, "overconfidence": 0.05}
SURE = 0.99
RESAMPLES = 300  # bootstrap draws
# Labelled rows, labelled rows of a class, and rows, below which nothing is concluded from them.
MIN_LABELLED, MIN_CLASS, MIN_ROWS = 50, 20, 100


@dataclass(frozen=True)
class Finding:
    """A threshold that was crossed."""

    metric: str
    value: float
    threshold: float
    message: str


def _crossed(metric: str, value, threshold, before, side: str = "below") -> Finding:
    message = f"{metric} {value:.3f} is {side} {threshold:.3f} ({before:.3f} at promotion)"
    return Finding(metric, float(value), float(threshold), message)


def measure(answers: pd.DataFrame, labels: list) -> dict[str, float]:
    """Compute the metrics of labelled rows.

    Parameters
    ----------
    answers : pandas.DataFrame
        With ``label``, ``prediction`` and ``probability_<label>``; no label missing.
    labels : list
        All classes.

    Returns
    -------
    dict of str to float
        Those of `helpers.models.evaluation.compute_metrics`, as far as the classes that are there
        allow, and of `helpers.registry.reference.calibration`.
    """
    true, complete = answers["label"], set(answers["label"]) == set(labels)
    metrics = compute_metrics(true, answers, labels) if complete else {}
    accuracy = float((true == answers["prediction"]).mean())
    return {"accuracy": accuracy, **metrics, **calibration(true, answers, labels)}


def _draws(answers: pd.DataFrame, labels: list) -> tuple[np.ndarray, ...]:
    """Return bootstrap draws of accuracy, recalls, F1 scores and overconfidence.

    The first is the rows themselves.

    Shapes: (RESAMPLES,), (RESAMPLES, n_classes), (RESAMPLES, n_classes) and (RESAMPLES,).
    """
    true = pd.Categorical(answers["label"], labels).codes.astype(int)
    predicted = pd.Categorical(answers["prediction"], labels).codes
    confidence = answers[[f"probability_{label}" for label in labels]].max(axis=1).to_numpy()
    n_rows, size = len(true), len(labels)
    chosen = np.random.default_rng(0).integers(0, n_rows, (RESAMPLES, n_rows))
    chosen[0] = np.arange(n_rows)
    cells = true[chosen] * size + predicted[chosen]
    cells += size * size * np.arange(RESAMPLES)[:, None]
    matrix = np.bincount(cells.ravel(), minlength=RESAMPLES * size * size)
    matrix = matrix.reshape(RESAMPLES, size, size)
    hits = matrix.diagonal(axis1=1, axis2=2)
    accuracy = hits.sum(axis=1) / n_rows
    in_class, said = matrix.sum(axis=2), matrix.sum(axis=1)
    recall = hits / np.maximum(in_class, 1)
    f1 = 2 * hits / np.maximum(in_class + said, 1)
    return accuracy, recall, f1, confidence[chosen].mean(axis=1) - accuracy


def check_labelled(answers: pd.DataFrame, reference: dict) -> list[Finding]:
    """Compare labelled rows with the metrics at promotion.

    Parameters
    ----------
    answers : pandas.DataFrame
        As for `measure`.
    reference : dict
        From `helpers.registry.reference.make_reference`.
    """
    if len(answers) < MIN_LABELLED:
        return []
    labels, promoted = reference["labels"], reference["metrics"]
    accuracy, recall, f1, overconfidence = _draws(answers, labels)
    counts = answers["label"].value_counts()
    there = [
        (number, name)
        for number, (label, name) in enumerate(zip(labels, class_names(labels), strict=True))
        if counts.get(label, 0) >= MIN_CLASS
    ]
    # Name, draws, value at promotion, limit, and 1 where less is worse or -1 where more is.
    compared = [("accuracy", accuracy, promoted["accuracy"], LIMITS["accuracy"], 1)]
    if there:
        draws = f1[:, [number for number, _ in there]].mean(axis=1)
        before = np.mean([promoted[f"f1_{name}"] for _, name in there])
        compared += [("f1_macro", draws, before, LIMITS["f1_macro"], 1)]
    for number, name in there:
        before = promoted[f"recall_{name}"]
        compared += [(f"recall_{name}", recall[:, number], before, LIMITS["recall"], 1)]
    before, limit = promoted["overconfidence"], LIMITS["overconfidence"]
    compared += [("overconfidence", overconfidence, before, limit, -1)]
    findings = []
    for name, draws, before, limit, sign in compared:
        threshold = before - sign * limit
        if np.mean(sign * draws < sign * threshold) >= SURE:
            side = "below" if sign > 0 else "above"
            findings.append(_crossed(name, draws[0], threshold, before, side))
    return findings


def check_unlabelled(
    rows: pd.DataFrame, answers: pd.DataFrame, reference: dict
) -> tuple[list[Finding], pd.DataFrame | None]:
    """Compare rows and predictions with those at promotion.

    Parameters
    ----------
    rows : pandas.DataFrame
        What was asked.
    answers : pandas.DataFrame
        With ``prediction``.
    reference : dict
        From `helpers.registry.reference.make_reference`.

    Returns
    -------
    findings : list of Finding
    drift : pandas.DataFrame or None
        From `helpers.monitoring.drift.column_drift`; None where there are too few rows.
    """
    if len(rows) < MIN_ROWS:
        return [], None
    table = column_drift(reference, rows)
    findings = [
        Finding(
            f"drift {name}",
            float(row.effect),
            EFFECT,
            f"{name} has drifted ({row.test}, effect {row.effect:.2f}, p {row.p_value:.1g})",
        )
        for name, row in table[table["drifted"]].iterrows()
    ]
    effect, shifted = prediction_shift(reference, answers["prediction"])
    if shifted:
        said = answers["prediction"].value_counts(normalize=True)
        shares = ", ".join(f"{label} {share:.0%}" for label, share in said.items())
        message = f"the predicted classes have shifted to {shares} (effect {effect:.2f})"
        findings.append(Finding("predictions", effect, EFFECT, message))
    return findings, table


def check_rates(
    rows: pd.DataFrame, answers: pd.DataFrame, reference: dict
) -> tuple[list[Finding], pd.DataFrame]:
    """Compare accuracy and recall by group with those at promotion, before or after labels.

    Parameters
    ----------
    rows : pandas.DataFrame
        What was asked.
    answers : pandas.DataFrame
        As for `measure`; without ``label``, all is estimated, see `helpers.registry.rates`, and
        compared with what was estimated at promotion.
    reference : dict
        Of a version, with those of `helpers.registry.rates.reference_rates`.

    Returns
    -------
    findings : list of Finding
        Of groups; of estimates of all rows together, too.
    table : pandas.DataFrame
        Index: ``column``, ``group``, ``metric``; ``rows`` that it is a share of, ``value``,
        ``promoted``, ``change`` since then, and ``worse``, whether that is a finding: these
        first, and what fell most. Without what too few rows tell.
    """
    estimated = "label" not in answers
    before = read_rates(reference, "estimated" if estimated else "labelled")
    now = count_rates(
        rows, answers, reference["labels"], reference["grouping"], answers.get("label")
    )
    both = now.join(before, how="inner", rsuffix="_before")
    both = both[both["whole"] >= FEWEST_ROWS]
    limits = both.index.get_level_values("metric").map(_limit).to_numpy("float64")
    change, variance = -limits, 0.0
    for sign, end in ((-1, ""), (1, "_before")):
        whole = both[f"whole{end}"] + 2
        share = (both[f"hits{end}"] + 1) / whole
        change, variance = change + sign * share, variance + share * (1 - share) / whole
    z = change / np.sqrt(variance)
    table = pd.DataFrame(
        {
            "rows": both["whole"].round().astype(int),
            "value": both["hits"] / both["whole"],
            "promoted": both["hits_before"] / both["whole_before"],
        }
    )
    table["change"] = table["value"] - table["promoted"]
    of_all = both.index.get_level_values("column") == ALL
    compared = np.where(of_all, of_all.sum(), (~of_all).sum())
    table["worse"] = z > norm.isf((1 - SURE) / compared)
    table = table.sort_values(["worse", "change"], ascending=[False, True])
    findings = []
    for (column, group, metric), row in table[table["worse"]].iterrows():
        if column == ALL and not estimated:
            continue  # what `check_labelled` looks at
        name = metric if column == ALL else f"{metric} of {column} {group}"
        name += " (estimated)" * estimated
        threshold = row["promoted"] - _limit(metric)
        findings.append(_crossed(name, row["value"], threshold, row["promoted"]))
    return findings, table


def _limit(metric: str) -> float:
    return LIMITS["accuracy" if metric == "accuracy" else "recall"]
