"""All that was scored, period by period, beside what was promoted."""

import hashlib
import json
from dataclasses import dataclass, replace

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from helpers import registry, series, tracking
from helpers.display import notice
from helpers.models.evaluation import class_names
from helpers.monitoring.alerting import AlertError, raise_alerts, tag_version
from helpers.monitoring.checks import (
    MIN_LABELLED,
    MIN_ROWS,
    Finding,
    check_labelled,
    check_rates,
    check_unlabelled,
    measure,
)
from helpers.registry.rates import ALL, count_rates
from helpers.serving import scored_rows
from helpers.workspace import Workspace, is_interactive

EXPERIMENT = "monitoring"


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes
    ----------
    periods : pandas.DataFrame
        One row per model, version and period: rows, labelled rows, metrics, the same estimated
        before labels arrive (``estimated_<metric>``), drifted columns, and ``alerts`` (their
        number).
    drift : dict of str to pandas.DataFrame
        By model: `helpers.monitoring.drift.column_drift` of the newest period with enough rows.
    groups : dict of str to pandas.DataFrame
        By model: the table of `helpers.monitoring.checks.check_rates` of the newest period with
        enough labels.
    findings : pandas.DataFrame
        ``model``, ``version``, ``period`` and ``message`` of all that is worse than it may be.
    current : list of str
        Messages of the alerts of the newest period of each version in Production.
    references : dict of str to dict
        Metrics at promotion, by model and version, ``name version``.
    demo : bool
        Whether all that is of a demo.
    """

    periods: pd.DataFrame
    drift: dict[str, pd.DataFrame]
    groups: dict[str, pd.DataFrame]
    findings: pd.DataFrame
    current: list[str]
    references: dict[str, dict]
    demo: bool = False

    def table(self) -> pd.DataFrame:
        """Return the periods as a table to look at."""
        if self.periods.empty:
            return self.periods
        names = ["rows", "labelled", "estimated_accuracy", "accuracy", "f1_macro"]
        names += ["calibration_error"]
        shown = [name for name in (*names, "drifted_columns", "alerts") if name in self.periods]
        table = self.periods.set_index(["model", "version", "period"])[shown].round(3)
        return table.rename(columns=lambda name: name.replace("_", " "))  # breaks where narrow


def monitor(workspace: Workspace, period: str = "D", demo: bool = False) -> Report:
    """Look at all scored rows, period by period; log, and raise alerts.

    A period that was looked at before is not logged again unless rows or labels came since; an
    alert that is known is not sent again.

    Parameters
    ----------
    period : str
        Length, as pandas writes it: ``h``, ``D``, ``W``, ``M``.
    demo
        Look at the rows of a demo instead, of the versions in Production; nothing is logged, and
        nobody alarmed.
    """
    report = Report(pd.DataFrame(), {}, {}, pd.DataFrame(), [], {}, demo)
    entries, found = [], []
    for name in series.MODELS:
        rows, answers = scored_rows.read_rows(workspace.scored_rows, name, demo)
        if answers.empty:
            continue
        production = registry.production_version(name)
        # As numbers: as texts, 10 would stand before 9.
        for number, of_version in answers.groupby(answers["version"].astype(int)):
            version = str(number)
            in_production = production is not None and str(production.version) == version
            if demo and not in_production:
                continue
            reference = _reference(name, version)
            if reference is None:
                notice(f"{name} version {version} has no reference to compare with.", "warning")
                continue
            report.references[f"{name} {version}"] = reference["metrics"]
            if not reference.get("grouping"):
                notice(f"{name} version {version} was promoted without GROUPS; none is watched.")
            periods = of_version["time"].dt.tz_localize(None).dt.to_period(period)
            for when, part in of_version.groupby(periods):
                figures, findings, drift, groups = _look(rows.loc[part.index], part, reference)
                keys = {"model": name, "version": version, "period": str(when)}
                start = when.start_time.tz_localize("UTC")
                entries.append({**keys, "start": start, **figures})
                found += [(*keys.values(), each.message) for each in findings]
                if drift is not None:
                    report.drift[name] = drift
                if groups is not None and len(groups):
                    report.groups[name] = groups
                if not demo:
                    _log_period(keys, figures)
                    raise_alerts(workspace, *keys.values(), findings)
            if in_production:
                messages = [f"{name} version {version}: {each.message}" for each in findings]
                report.current.extend(messages)
                if not demo:
                    tag_version(*keys.values(), findings)
    findings = pd.DataFrame(found, columns=["model", "version", "period", "message"])
    return replace(report, periods=pd.DataFrame(entries), findings=findings)


def _reference(name: str, version: str) -> dict | None:
    """Return what a version was promoted with, or None if it, or that, is not there any more."""
    try:
        run_id = mlflow.MlflowClient().get_model_version(name, version).run_id
        return mlflow.artifacts.load_dict(f"runs:/{run_id}/{registry.REFERENCE}")
    except (MlflowException, OSError):
        return None


def _look(
    rows: pd.DataFrame, answers: pd.DataFrame, reference: dict
) -> tuple[dict[str, float], list[Finding], pd.DataFrame | None, pd.DataFrame | None]:
    """Return the figures of a period, what is worse, the drift of its columns, and its groups."""
    # A file of labels does not tell the text 1 from the number.
    by_text = {str(label): label for label in reference["labels"]}
    labels = answers["label"].dropna().map(str)
    other = labels[~labels.isin(list(by_text))]
    if len(other):
        example = other.iloc[0]
        notice(f"{len(other)} labels are no class of the model, such as {example!r}.", "warning")
    labels = labels.drop(other.index).map(by_text)
    labelled = answers.loc[labels.index].assign(label=labels)
    findings, drift = check_unlabelled(rows, answers, reference)
    figures = {"rows": len(rows), "labelled": len(labelled)}
    if drift is not None:
        figures["drifted_columns"] = int(drift["drifted"].sum())
    for name, label in zip(class_names(reference["labels"]), reference["labels"], strict=True):
        figures[f"predicted_{name}"] = float((answers["prediction"] == label).mean())
    expected = count_rates(rows, answers, reference["labels"], {})
    for (_, _, metric), share in (expected["hits"] / expected["whole"]).items():
        figures[f"estimated_{metric}"] = float(share)
    if len(labelled):
        figures |= measure(labelled, reference["labels"])
        findings = check_labelled(labelled, reference) + findings
    groups = None
    if "grouping" in reference:  # of a version that was promoted by an earlier edition it is not
        if len(labelled) >= MIN_LABELLED:
            worse, groups = check_rates(rows.loc[labelled.index], labelled, reference)
            groups = groups.drop(ALL, level="column")
            findings += worse
        elif len(rows) >= MIN_ROWS:
            findings += check_rates(rows, answers.drop(columns="label"), reference)[0]
    return {**figures, "alerts": len(findings)}, findings, drift, groups


def _log_period(keys: dict[str, str], figures: dict[str, float]) -> None:
    """Log a period as a run; the run of a period that has grown is brought up to date."""
    metrics = {name: float(value) for name, value in figures.items() if np.isfinite(value)}
    content = json.dumps(metrics, sort_keys=True).encode()
    tags = {**keys, "content": hashlib.sha256(content).hexdigest()}
    name = "{model} version {version}, {period}".format(**keys)
    tracking.keep_run(mlflow.MlflowClient(), EXPERIMENT, name, keys, tags, metrics)


def require_healthy(report: Report) -> None:
    """Say whether production is what was promoted; in a batch run, fail if it is not.

    Raises
    ------
    AlertError
        In a batch run, if the newest period of a version in Production raised an alert.
    """
    if not report.current:
        text = "No alert: production is what was promoted, as far as the rows so far can tell."
        if report.periods.empty:
            notice("No real requests yet: there is nothing to judge.")
        else:
            notice(text, level="good")
        return
    message = "ALERT. " + "\n".join(report.current)
    if not is_interactive():
        raise AlertError(message)
    notice(f"{message}\nThe way back: registry.rollback(name, reason=…)", level="bad")
