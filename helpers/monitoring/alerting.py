"""Alerts: noted in a table and at the model version, shown, and sent to a webhook."""

import time

import mlflow
import pandas as pd
import requests

from helpers.display import notice
from helpers.monitoring.checks import Finding
from helpers.server import credentials
from helpers.serving import scored_rows
from helpers.workspace import ProjectError, Workspace

TAG = "monitoring"  # of the model version: ok or alert, since when and why
WEBHOOK_TIMEOUT = 10  # seconds


class AlertError(ProjectError):
    """Production got worse than it may."""


def raise_alerts(
    workspace: Workspace, model: str, version: str, period: str, findings: list[Finding]
) -> None:
    """Note in the table what is new among the findings of a period, and call the webhook."""
    now, new = time.time(), []
    with scored_rows.connect(workspace.scored_rows) as connection:
        for each in findings:
            found = (each.metric, period, now, each.value, each.threshold, each.message)
            done = connection.execute(
                "INSERT OR IGNORE INTO alerts VALUES (?,?,?,?,?,?,?,?)", (model, version, *found)
            )
            if done.rowcount:
                new.append(each)
    url = credentials.find_secret(credentials.ALERT_WEBHOOK)
    if url is None or not new:
        return
    messages = "; ".join(each.message for each in new)
    content = {
        # What chat programs such as Slack and Mattermost show.
        "text": f"{model} version {version}, {period}: {messages}",
        "model": model,
        "version": version,
        "period": period,
        "alerts": [vars(each) for each in new],
    }
    try:
        requests.post(url, json=content, timeout=WEBHOOK_TIMEOUT).raise_for_status()
    except requests.RequestException as error:
        # The address is a secret, and it is in the error's own text.
        notice(f"The webhook was not reached ({type(error).__name__}).", "warning")


def tag_version(model: str, version: str, period: str, findings: list[Finding]) -> None:
    """Write the state of the newest period to the model version."""
    state = "; ".join(each.message for each in findings)
    text = f"alert {period}: {state}" if findings else f"ok {period}"
    mlflow.MlflowClient().set_model_version_tag(model, version, TAG, text[:5000])


def alerts(workspace: Workspace) -> pd.DataFrame:
    """Return all alerts so far, the newest first.

    Returns
    -------
    pandas.DataFrame
        ``when`` (UTC), ``model``, ``version``, ``period``, ``metric``, ``value``,
        ``threshold`` and ``message``.
    """
    query = (
        'SELECT time AS "when", model, version, period, metric, value, threshold, message '
        "FROM alerts ORDER BY time DESC, rowid"
    )
    with scored_rows.connect(workspace.scored_rows) as connection:
        table = pd.read_sql_query(query, connection)
    table["when"] = pd.to_datetime(table["when"], unit="s", utc=True).dt.floor("s")
    return table
