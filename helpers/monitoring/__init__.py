"""Notebook 05: is production still what was promoted? Metrics, drift, and alerts.

``python -m helpers.monitoring`` looks at everything that the scoring server noted, period by
period, and ends with exit code 3 if the newest period of a model in Production raised an alert;
``--labels FILE.csv`` adds labels (columns ``row_id`` and ``label``) first.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from functools import cache

import mlflow
import numpy as np
import pandas as pd
import requests
from mlflow.exceptions import MlflowException

from helpers import registry, series, tracking
from helpers.display import notice
from helpers.models.evaluation import class_names, compute_metrics
from helpers.monitoring.drift import DriftRule, column_drift, prediction_shift
from helpers.registry.reference import calibration, make_reference
from helpers.server import credentials
from helpers.serving import ask, scored_rows
from helpers.workspace import ProjectError, is_interactive, open_workspace

EXPERIMENT = "monitoring"
TAG = "monitoring"  # of the model version: ok or alert, since when and why
RESAMPLES = 300  # bootstrap draws behind each comparison of metrics
DEMO_ROWS = 200  # per request of the first day
WEBHOOK_TIMEOUT = 10  # seconds


class AlertError(ProjectError):
    """Production got worse than it may."""


class LabelsError(ProjectError):
    """Labels cannot be matched with scored rows."""


@dataclass(frozen=True)
class Thresholds:
    """How much worse production may be than at its promotion.

    A metric raises an alert when it is worse than at promotion by more than its limit, and
    surely so: in at least `sure` of the bootstrap draws of the period's rows.

    Attributes
    ----------
    accuracy, f1_macro, recall, overconfidence : float
        Largest loss (accuracy, macro F1, recall of a class) or gain (mean confidence minus
        accuracy) since promotion.
    sure : float
        Share of the draws that must agree.
    min_labelled, min_class, min_rows : int
        Labelled rows, labelled rows of a class, and rows of a period below which nothing is
        concluded from them.
    drift : helpers.monitoring.drift.DriftRule
        Of columns and of the predicted classes.
    """

    accuracy: float = 0.05
    f1_macro: float = 0.05
    recall: float = 0.10
    overconfidence: float = 0.05
    sure: float = 0.99
    min_labelled: int = 50
    min_class: int = 20
    min_rows: int = 100
    drift: DriftRule = field(default_factory=DriftRule)


@dataclass(frozen=True)
class Finding:
    """A threshold that was crossed.

    Attributes
    ----------
    metric : str
    value, threshold : float
    message : str
    """

    metric: str
    value: float
    threshold: float
    message: str


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes
    ----------
    periods : pandas.DataFrame
        One row per model, version and period: rows, labelled rows, metrics, drifted columns,
        and ``alerts`` (their number).
    drift : dict of str to pandas.DataFrame
        By model: `helpers.monitoring.drift.column_drift` of the newest period with enough rows.
    current : tuple of str
        Messages of the alerts of the newest period of each version in Production.
    references : dict of str to dict
        Metrics at promotion, by model and version, ``name version``.
    """

    periods: pd.DataFrame
    drift: dict
    current: tuple
    references: dict

    def table(self):
        """Return the periods as a table to look at."""
        if self.periods.empty:
            return self.periods
        names = ["rows", "labelled", "accuracy", "f1_macro", "calibration_error"]
        shown = [name for name in (*names, "drifted_columns", "alerts") if name in self.periods]
        return self.periods.set_index(["model", "version", "period"])[shown].round(4)


# --- labels -----------------------------------------------------------------------------------


def add_labels(workspace, labels):
    """Keep labels that arrived after the rows were scored.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    labels : pandas.Series
        Labels as in the CSV; index: the ids of the rows, as the scoring server gave them
        (``X-Request-Id`` and the row's position in the request, joined by a hyphen).

    Returns
    -------
    int
        Labels kept. Those of rows that are not kept any more are left out.

    Raises
    ------
    LabelsError
        If none belongs to a scored row, or a label is missing.
    """
    if labels.isna().any():
        raise LabelsError(f"The label of row {labels.index[labels.isna()][0]!r} is missing.")
    known = scored_rows.known_rows(workspace.scored_rows, labels.index)
    if len(labels) and not known:
        raise LabelsError(
            f"No label belongs to a row that was scored here; the first is of "
            f"{labels.index[0]!r}. Use the ids that the scoring server gave the rows."
        )
    kept = labels[labels.index.isin(known)]
    scored_rows.write_labels(
        workspace.scored_rows, dict(zip(kept.index, kept.tolist(), strict=True))
    )
    return len(kept)


def read_labels(path):
    """Read a CSV with the columns ``row_id`` and ``label``.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    pandas.Series
        Labels by id of the row.

    Raises
    ------
    LabelsError
        If it is not such a file.
    """
    try:
        table = pd.read_csv(path, dtype={"row_id": str})
    except (OSError, ValueError) as error:
        raise LabelsError(f"{path} cannot be read: {error}") from None
    if not {"row_id", "label"} <= set(table.columns):
        raise LabelsError(f"{path} must have the columns row_id and label.")
    return table.set_index("row_id")["label"]


# --- one period -------------------------------------------------------------------------------


def measure(answers, labels):
    """Compute the metrics of labelled rows.

    Parameters
    ----------
    answers : pandas.DataFrame
        With ``label``, ``prediction`` and ``probability_<label>``; no label missing.
    labels : sequence
        All classes.

    Returns
    -------
    dict of str to float
        Those of `helpers.models.evaluation.compute_metrics`, as far as the classes that are there
        allow, and of `helpers.registry.reference.calibration`.
    """
    complete = set(answers["label"]) == set(labels)
    # Labels that came later stand in a column of objects, where numbers are not seen as such.
    true = np.array(answers["label"].tolist())
    metrics = compute_metrics(true, answers, labels) if complete else {}
    accuracy = float((answers["label"] == answers["prediction"]).mean())
    return {"accuracy": accuracy, **metrics, **calibration(true, answers, labels)}


def _draws(answers, labels, seed=0):
    """Return bootstrap draws of (accuracy, recalls, F1 scores, overconfidence), as arrays."""
    position = {label: number for number, label in enumerate(labels)}
    true = answers["label"].map(position).to_numpy(dtype=int)
    predicted = answers["prediction"].map(position).to_numpy(dtype=int)
    confidence = answers[[f"probability_{label}" for label in labels]].max(axis=1).to_numpy()
    random, n_rows, size = np.random.default_rng(seed), len(true), len(labels)
    chosen = random.integers(0, n_rows, (RESAMPLES, n_rows))
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


def check_labelled(answers, reference, thresholds=None):
    """Compare labelled rows with the metrics at promotion.

    Parameters
    ----------
    answers : pandas.DataFrame
        As for `measure`.
    reference : dict
        From `helpers.registry.reference.make_reference`.
    thresholds : Thresholds, optional

    Returns
    -------
    list of Finding
    """
    limits, labels = thresholds or Thresholds(), reference["labels"]
    if len(answers) < limits.min_labelled:
        return []
    accuracy, recall, f1, overconfidence = _draws(answers, labels)
    counts = answers["label"].value_counts()
    there = [n for n, label in enumerate(labels) if counts.get(label, 0) >= limits.min_class]
    at_promotion, names = reference["metrics"], class_names(labels)
    # Name, draws, value at promotion, limit, and 1 where less is worse or -1 where more is.
    compared = [("accuracy", accuracy, at_promotion["accuracy"], limits.accuracy, 1)]
    if there:
        before = np.mean([at_promotion[f"f1_{names[number]}"] for number in there])
        compared += [("f1_macro", f1[:, there].mean(axis=1), before, limits.f1_macro, 1)]
    for number in there:
        name = f"recall_{names[number]}"
        compared += [(name, recall[:, number], at_promotion[name], limits.recall, 1)]
    before = at_promotion["overconfidence"]
    compared += [("overconfidence", overconfidence, before, limits.overconfidence, -1)]
    findings = []
    for name, draws, before, limit, sign in compared:
        threshold = before - sign * limit
        if np.mean(sign * draws < sign * threshold) >= limits.sure:
            value, side = float(draws.mean()), "below" if sign > 0 else "above"
            message = f"{name} {value:.3f} is {side} {threshold:.3f} ({before:.3f} at promotion)"
            findings.append(Finding(name, value, float(threshold), message))
    return findings


def check_unlabelled(rows, answers, reference, thresholds=None):
    """Compare rows and predictions with those at promotion.

    Parameters
    ----------
    rows : pandas.DataFrame
        What was asked.
    answers : pandas.DataFrame
        With ``prediction``.
    reference : dict
        From `helpers.registry.reference.make_reference`.
    thresholds : Thresholds, optional

    Returns
    -------
    findings : list of Finding
    drift : pandas.DataFrame or None
        From `helpers.monitoring.drift.column_drift`; None where there are too few rows.
    """
    limits = thresholds or Thresholds()
    if len(rows) < limits.min_rows:
        return [], None
    table = column_drift(reference, rows, limits.drift)
    findings = [
        Finding(
            f"drift {name}",
            float(row.effect),
            limits.drift.effect,
            f"{name} has drifted ({row.test}, effect {row.effect:.2f}, p {row.p_value:.1g})",
        )
        for name, row in table[table["drifted"]].iterrows()
    ]
    shift = prediction_shift(reference, answers["prediction"], limits.drift)
    if shift["shifted"]:
        said = answers["prediction"].value_counts(normalize=True)
        shares = ", ".join(f"{label} {share:.0%}" for label, share in said.items())
        message = f"the predicted classes have shifted to {shares} (effect {shift['effect']:.2f})"
        findings.append(Finding("predictions", shift["effect"], limits.drift.effect, message))
    return findings, table


# --- all periods ------------------------------------------------------------------------------


def _reference_of(client, name, version):
    """Return what a version was promoted with, or None if it, or that, is not there any more."""
    try:
        return _load_reference(client.get_model_version(name, version).run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


@cache
def _load_reference(run_id):
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{registry.REFERENCE}")
    except (MlflowException, OSError):
        return None
    return json.loads(text)


def monitor(workspace, period="D", thresholds=None):
    """Look at all scored rows, period by period; log, and raise alerts.

    A period that was looked at before is not logged again unless rows or labels came since; an
    alert that is known is not sent again.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    period : str
        Length, as pandas writes it: ``h``, ``D``, ``W``, ``M``.
    thresholds : Thresholds, optional

    Returns
    -------
    Report
    """
    limits, client = thresholds or Thresholds(), mlflow.MlflowClient()
    table, drift, current, references = [], {}, [], {}
    for name in series.MODELS:
        in_production = registry.production_version(name)
        rows, answers = scored_rows.read_rows(workspace.scored_rows, name)
        if answers.empty:
            continue
        # As numbers: as texts, 10 would stand before 9.
        for version in sorted(answers["version"].unique(), key=int):
            of_version = answers[answers["version"] == version]
            reference = _reference_of(client, name, version)
            if reference is None:
                notice(f"{name} version {version} has no reference to compare with.", "warning")
                continue
            references[f"{name} {version}"] = reference["metrics"]
            newest = []
            periods = of_version["time"].dt.tz_localize(None).dt.to_period(period)
            for when, part in of_version.groupby(periods):
                entry, newest, tested = _look(rows.loc[part.index], part, reference, limits)
                entry = {"model": name, "version": version, "period": str(when), **entry}
                entry["start"] = when.start_time.tz_localize("UTC")
                table.append(entry)
                if tested is not None:
                    drift[name] = tested
                _log_period(client, entry)
                _raise_alerts(workspace, entry, newest)
            if in_production is not None and str(in_production.version) == version:
                current += [f"{name} version {version}: {each.message}" for each in newest]
                _tag_version(client, name, version, str(when), newest)
    return Report(pd.DataFrame(table), drift, tuple(current), references)


def _look(rows, answers, reference, limits):
    labelled = answers[answers["label"].notna()]
    # A file of labels does not tell the text 1 from the number.
    by_text = {str(label): label for label in reference["labels"]}
    own = labelled["label"].map(lambda label: by_text.get(str(label), label))
    labelled = labelled.assign(label=own.astype(object))
    known = labelled["label"].isin(reference["labels"])
    if not known.all():
        other = labelled["label"][~known].iloc[0]
        notice(f"{(~known).sum()} labels are no class of the model, such as {other!r}.", "warning")
        labelled = labelled[known]
    findings, tested = check_unlabelled(rows, answers, reference, limits)
    entry = {"rows": len(rows), "labelled": len(labelled)}
    if tested is not None:
        entry["drifted_columns"] = int(tested["drifted"].sum())
    for name, label in zip(class_names(reference["labels"]), reference["labels"], strict=True):
        entry[f"predicted_{name}"] = float((answers["prediction"] == label).mean())
    if len(labelled):
        entry |= measure(labelled, reference["labels"])
        findings = check_labelled(labelled, reference, limits) + findings
    return {**entry, "alerts": len(findings)}, findings, tested


def _log_period(client, entry):
    """Log a period as a run; the run of a period that has grown is brought up to date."""
    keys = {"model": entry["model"], "version": entry["version"], "period": entry["period"]}
    metrics = {
        name: float(value)
        for name, value in entry.items()
        if name not in (*keys, "start") and value is not None and np.isfinite(value)
    }
    content = json.dumps(metrics, sort_keys=True).encode()
    tags = {**keys, "content": hashlib.sha256(content).hexdigest()}
    name = "{model} version {version}, {period}".format(**keys)
    tracking.keep_run(client, EXPERIMENT, name, keys, tags, metrics)


def _raise_alerts(workspace, entry, findings):
    """Note new alerts in the table, show them, and call the webhook."""
    keys = (entry["model"], entry["version"])
    now, new = time.time(), []
    with scored_rows.connect(workspace.scored_rows) as connection:
        for each in findings:
            values = (*keys, each.metric, entry["period"], now, each.value, each.threshold)
            done = connection.execute(
                "INSERT OR IGNORE INTO alerts VALUES (?,?,?,?,?,?,?,?)", (*values, each.message)
            )
            if done.rowcount:
                new.append(each)
    if new:
        title = f"{entry['model']} version {entry['version']}, {entry['period']}"
        _call_webhook(title, entry, new)


def _call_webhook(title, entry, findings):
    url = credentials.find_secret(credentials.ALERT_WEBHOOK)
    if url is None:
        return
    content = {
        # What chat programs such as Slack and Mattermost show.
        "text": f"{title}: " + "; ".join(each.message for each in findings),
        "model": entry["model"],
        "version": entry["version"],
        "period": entry["period"],
        "alerts": [vars(each) for each in findings],
    }
    try:
        requests.post(url, json=content, timeout=WEBHOOK_TIMEOUT).raise_for_status()
    except requests.RequestException as error:
        # The address is a secret, and it is in the error's own text.
        notice(f"The webhook was not reached ({type(error).__name__}).", "warning")


def _tag_version(client, name, version, period, findings):
    state = "; ".join(each.message for each in findings)
    text = f"alert {period}: {state}" if findings else f"ok {period}"
    client.set_model_version_tag(name, version, TAG, text[:5000])


def alerts(workspace):
    """Return all alerts so far, the newest first.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace

    Returns
    -------
    pandas.DataFrame
        ``when`` (UTC), ``model``, ``version``, ``period``, ``metric``, ``value``,
        ``threshold`` and ``message``.
    """
    columns = ["when", "model", "version", "period", "metric", "value", "threshold", "message"]
    if not workspace.scored_rows.is_file():
        return pd.DataFrame(columns=columns)
    query = (
        "SELECT time, model, version, period, metric, value, threshold, message FROM alerts "
        "ORDER BY time DESC, rowid"
    )
    with scored_rows.connect(workspace.scored_rows) as connection:
        table = pd.DataFrame(connection.execute(query).fetchall(), columns=columns)
    table["when"] = pd.to_datetime(table["when"], unit="s", utc=True).dt.floor("s")
    return table


def require_healthy(report):
    """Say whether production is what was promoted; in a batch run, fail if it is not.

    Parameters
    ----------
    report : Report

    Raises
    ------
    AlertError
        In a batch run, if the newest period of a version in Production raised an alert.
    """
    if not report.current:
        text = "No alert: production is what was promoted, as far as the rows so far can tell."
        notice(text if len(report.periods) else "Nothing was scored yet.", level="good")
        return
    message = "ALERT. " + "\n".join(report.current)
    if not is_interactive():
        raise AlertError(message)
    notice(f"{message}\nThe way back: registry.rollback(name, reason=…)", level="bad")


# --- for the notebook -------------------------------------------------------------------------


def play_first_day(workspace, client, split):
    """Send the test rows to the scoring server, and their labels after them.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    client : helpers.serving.ScoringClient
    split : helpers.data.Split

    Returns
    -------
    str
        What was done. A version that was asked before is left alone.
    """
    done = []
    for name, served in client.models.items():
        if scored_rows.is_known(workspace.scored_rows, name, served["version"]):
            done.append(f"{name} version {served['version']} has been asked before; nothing sent.")
            continue
        with client.session() as session:
            parts = [
                ask(client, name, split.X_test.iloc[start : start + DEMO_ROWS], session)
                for start in range(0, len(split.X_test), DEMO_ROWS)
            ]
        ids = [row_id for part in parts for row_id in part.index]
        scored_rows.wait_for(workspace.scored_rows, ids[-1])
        add_labels(workspace, pd.Series(split.y_test.to_numpy(), index=ids))
        done.append(f"{name} version {served['version']}: {len(ids):,} rows and labels.")
    return "\n".join(done)


def rehearse(models, split, seed=0):
    """Show what would be found if production got worse; nothing is logged and nobody alarmed.

    Three numeric columns move by a standard deviation, and three labels in ten are others.

    Parameters
    ----------
    models : dict of str to mlflow.pyfunc.PyFuncModel
    split : helpers.data.Split
    seed : int

    Returns
    -------
    pandas.DataFrame
        ``model`` and ``message`` of each finding.
    """
    random, found = np.random.default_rng(seed), []
    rows = split.X_test.astype(dict.fromkeys(split.numeric, "float64"))
    for name in split.numeric[-3:]:
        rows[name] = rows[name] + rows[name].std()
    labels = split.y_test.to_numpy(copy=True)
    wrong = random.random(len(labels)) < 0.3
    labels[wrong] = random.permutation(labels[wrong])
    for name, model in models.items():
        reference = make_reference(split, model.predict(split.X_test))
        answers = model.predict(rows).assign(label=labels)
        findings = check_labelled(answers, reference)
        findings += check_unlabelled(rows, answers, reference)[0]
        found += [(name, each.message) for each in findings]
    return pd.DataFrame(found, columns=["model", "message"])


# --- the command line -------------------------------------------------------------------------


def main(arguments=None):
    """Look at production from the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0; 1 with a message; 3 after an alert.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.monitoring", description="Is production what was promoted?"
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument("--labels", metavar="FILE.csv", help="columns row_id and label")
    parser.add_argument("--period", default="D", choices=("h", "D", "W", "M"))
    options = parser.parse_args(arguments)
    try:
        workspace = open_workspace(options.workspace)
        tracking.connect(workspace, keep=False)
        if options.labels:
            print(f"{add_labels(workspace, read_labels(options.labels)):,} labels kept")
        report = monitor(workspace, options.period)
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if len(report.periods):
        print(report.table().to_string())
    for message in report.current:
        print(f"ALERT: {message}", file=sys.stderr)
    return 3 if report.current else 0
