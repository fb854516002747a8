"""The promotion rule: what a candidate must show before it may go to Production.

To add a check, write a function and add it to `CHECKS`. How a model must behave whatever its
metrics is in `helpers.registry.behaviour`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from helpers.display import COLOURS
from helpers.models.evaluation import LOGISTIC, MAJORITY, Baselines, compute_metrics
from helpers.registry import behaviour, environment
from helpers.registry.behaviour import NO_CONDITION, CheckFailedError
from helpers.registry.candidates import Candidate
from helpers.registry.production import LOAD_ERRORS

LOADS = "loads back and answers"  # the first check: what fails it is not registered
REPRODUCED = 1e-4  # largest difference between a logged metric and the same one recomputed
WARNING = "warning: "  # in front of a finding that is no reason to refuse, but one to look
SUM_TOLERANCE = 1e-6  # how far the probabilities of a row may be from summing to 1


@dataclass(frozen=True)
class PromotionRules:
    """The bounds of the promotion rule.

    Attributes
    ----------
    min_gain : float
        Macro F1 that a candidate must have above the best of the majority class and `gain_over`.
    max_loss : float
        Macro F1 that it may be below the version in Production, and more where that may be
        chance. Above 0, because the same training on another machine differs by a few rows.
    allow_replace : bool
        Promote even where Production was trained on another kind of table.
    min_robustness : float
        Share of attacked rows whose answer must hold, see `helpers.registry.robustness`; 0: any.
    gain_over : str
        A key of `Baselines.answers`.
    max_gap : float
        Largest difference between groups in the recall of the class that matters, where it is
        surely there, see `helpers.registry.groups`; 1: any.
    check_environment : bool
        Whether it must answer in an environment made from its logged requirements alone.
    """

    min_gain: float
    max_loss: float
    allow_replace: bool
    min_robustness: float
    max_gap: float = 1.0
    check_environment: bool = False
    gain_over: str = MAJORITY


def _require(condition: bool, finding: str) -> str:
    if not condition:
        raise CheckFailedError(finding)
    return finding


def _check_loads(candidate, baselines, rules):
    try:
        answer = candidate.answer
    except LOAD_ERRORS as error:
        first_line = str(error).partition("\n")[0]
        raise CheckFailedError(f"{type(error).__name__}: {first_line}") from error
    labels = candidate.split.labels
    wanted = ["prediction", *(f"probability_{label}" for label in labels)]
    _require(list(answer.columns) == wanted, f"answers {list(answer.columns)}, not {wanted}")
    _require(set(answer["prediction"]) <= set(labels), "predicts labels that are not in the CSV")
    sums = answer[wanted[1:]].to_numpy().sum(axis=1)
    _require(np.abs(sums - 1).max() < SUM_TOLERANCE, "probabilities do not sum to 1")
    return f"prediction and one probability per class for {len(answer):,} test rows"


def _check_schema(candidate, baselines, rules):
    X, inputs = candidate.split.X_test, candidate.model.metadata.get_input_schema()
    _require(inputs is not None, "the model has no signature")
    names = [*X.columns, *candidate.split.manifest.get("header", {}).values()]
    _require(inputs.input_names() == names, "its signature has other columns than the data")
    try:
        candidate.model.predict(X.head(20).drop(columns=X.columns[0]))
    except MlflowException:
        return f"{X.shape[1]} columns, none of which may be missing"
    raise CheckFailedError(f"answers although column {X.columns[0]!r} is missing")


def _check_reproduced(candidate, baselines, rules):
    recomputed = compute_metrics(candidate.split.y_test, candidate.answer, candidate.split.labels)
    logged = candidate.metrics
    missing = sorted(set(recomputed) - set(logged))
    _require(not missing, f"not logged: {', '.join(missing)}; train again")
    gaps = {name: abs(value - logged[name]) for name, value in recomputed.items()}
    worst = max(gaps, key=gaps.get)
    now, then = recomputed[worst], logged[worst]
    _require(
        gaps[worst] <= REPRODUCED, f"{worst} is {now:.4f} when loaded back, {then:.4f} was logged"
    )
    return f"{len(gaps)} metrics, none differs by more than {max(gaps[worst], 1e-12):.0e}"


def _check_baseline(candidate, baselines, rules):
    best = max((MAJORITY, rules.gain_over), key=lambda name: baselines.metrics[name]["f1_macro"])
    # In nine of ten draws: of a rare class there are few rows, and many a draw has none.
    gain, low, high = baselines.gain(candidate.answer, best, level=0.8)
    finding = f"macro F1 {gain:+.4f} ({low:+.4f} to {high:+.4f}) beside the {best}"
    # Better at all, by what is asked for, and not by chance of a few rows.
    good = gain > 0 and gain >= rules.min_gain and low >= 0
    return _require(good, f"{finding}, needed {rules.min_gain:+.4f} (MIN_GAIN) and surely above 0")


def _check_simple(candidate, baselines, rules):
    gain, low, high = baselines.gain(candidate.answer, LOGISTIC)
    finding = f"macro F1 {gain:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"{WARNING}{finding}: surely worse" if high < 0 else f"{NO_CONDITION}{finding}"


def _check_robustness(candidate, baselines, rules):
    result, wanted = candidate.robustness, rules.min_robustness
    if result is None:
        _require(not wanted, "not measured, but MIN_ROBUSTNESS asks for it")
        return f"{NO_CONDITION}not measured"
    holds = 1 - result.flip_rate
    finding = f"{holds:.0%} of {result.n_rows} attacked rows hold"
    if not wanted:
        return f"{NO_CONDITION}{finding}"
    return _require(holds >= wanted, f"{finding}, needed {wanted:.0%} (MIN_ROBUSTNESS)")


def _check_groups(candidate, baselines, rules):
    report = candidate.groups
    if report is None:
        return f"{NO_CONDITION}not measured"
    if report.gap is None:
        return f"{NO_CONDITION}{report}"
    if not report.gap.sure:
        return str(report)
    _require(report.gap.size <= rules.max_gap, f"{report}, above {rules.max_gap:g} (MAX_GAP)")
    return f"{WARNING}{report}"


def _check_environment(candidate, baselines, rules):
    if not rules.check_environment:
        return f"{NO_CONDITION}not asked for (CHECK_ENVIRONMENT)"
    return environment.check(candidate.model_uri, candidate.split, candidate.answer)


def _check_replaceable(candidate, baselines, rules):
    champion = candidate.champion
    if champion is None:
        return f"{NO_CONDITION}nothing in Production yet"
    if rules.allow_replace:
        return f"{NO_CONDITION}ALLOW_REPLACE is set"
    synthetic = candidate.split.manifest["synthetic"]
    _require(
        not synthetic or champion.tags.get("synthetic_data") == "true",
        f"{champion} was trained on real data, the candidate on the synthetic sample. Set "
        "ALLOW_REPLACE if that is meant",
    )
    if champion.model is None:
        return f"{champion} does not load: it serves nobody"
    _require(
        champion.same_columns,
        f"{champion} takes other columns or gives other labels; its clients would break. Use "
        "another WORKSPACE, or set ALLOW_REPLACE",
    )
    return f"same columns and labels as {champion}"


def _check_champion(candidate, baselines, rules):
    champion = candidate.champion
    if champion is None:
        return f"{NO_CONDITION}nothing in Production yet"
    if not champion.same_columns:
        why = "takes other columns" if champion.model else "does not load"
        return f"{NO_CONDITION}{champion} {why}: there is nothing to compare with"
    own, production, basis = candidate.beside_champion
    score, gain = own["f1_macro"], candidate.gain
    size = score - production["f1_macro"]
    finding = f"macro F1 {score:.4f}, {size:+.4f} against {champion} on {basis}"
    if gain is None:
        return _require(
            size >= -rules.max_loss, f"{finding}, allowed -{rules.max_loss:g} (MAX_LOSS)"
        )
    size, low, high = gain
    finding += f", 95 % interval of the difference {low:+.4f} to {high:+.4f}"
    if size >= -rules.max_loss:
        return f"{finding}: not below it by more than MAX_LOSS"
    _require(
        high >= 0, f"{finding}: surely below it, and by more than {rules.max_loss:g} (MAX_LOSS)"
    )
    return f"{WARNING}{finding}: below it by more than MAX_LOSS, but perhaps by chance"


def _behaviour(check):
    """Make a check of the promotion rule from one of `helpers.registry.behaviour`."""
    return lambda candidate, baselines, rules: check(candidate.model, candidate.split)


# The promotion rule, in order. A check takes the candidate, the baselines and the
# rules, returns its finding, and raises CheckFailedError where the candidate must not be promoted.
CHECKS = {
    LOADS: _check_loads,
    "schema": _check_schema,
    "metrics reproduced": _check_reproduced,
    "better than the baseline": _check_baseline,
    "beside a logistic regression": _check_simple,
    "minimum functionality": _behaviour(behaviour.check_cases),
    "direction": _behaviour(behaviour.check_directions),
    "invariance": _behaviour(behaviour.check_invariances),
    "robustness": _check_robustness,
    "gap between groups": _check_groups,
    "may replace Production": _check_replaceable,
    "not worse than Production": _check_champion,
    # Last: it takes a minute.
    "runs elsewhere": _check_environment,
}


def check_candidate(
    candidate: Candidate, baselines: Baselines, rules: PromotionRules
) -> pd.DataFrame:
    """Run every check on a candidate.

    Returns
    -------
    pandas.DataFrame
        Index ``check``; columns ``passed`` (bool) and ``finding``. Where a model does not
        load, or answers in another form, the other checks are left out.
    """
    rows, candidate.measures = {}, (baselines, rules)
    for title, check in CHECKS.items():
        try:
            rows[title] = (True, check(candidate, baselines, rules))
        except CheckFailedError as failure:
            rows[title] = (False, str(failure))
            if title == LOADS:
                break
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["passed", "finding"])
    return table.rename_axis("check")


def check_candidates(
    candidates: dict[str, Candidate], baselines: Baselines, rules: PromotionRules
) -> pd.DataFrame:
    """Run every check on every candidate.

    Returns
    -------
    pandas.DataFrame
        As from `check_candidate`, with the model's name as first level of the index.
    """
    tables = {name: check_candidate(c, baselines, rules) for name, c in candidates.items()}
    return pd.concat(tables, names=["model"])


def colour_checks(row: pd.Series) -> list[str]:
    """Colour a row of the table of checks.

    Green passed, red failed, orange passed with a warning, grey could not fail.
    """
    colour = COLOURS["good" if row["passed"] else "bad"]
    if row["finding"].startswith(WARNING):
        colour = COLOURS["warning"]
    if row["finding"].startswith(NO_CONDITION):
        colour = "grey"
    return [f"color: {colour}"] * len(row)
