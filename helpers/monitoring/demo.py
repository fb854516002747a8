"""For the notebook: a demo of production, and a rehearsal of a bad day."""

import numpy as np
import pandas as pd
from mlflow.pyfunc import PyFuncModel
from pandas.api.types import is_bool_dtype

from helpers.data import Split
from helpers.monitoring.checks import check_labelled, check_unlabelled
from helpers.monitoring.labels import add_labels
from helpers.registry.reference import make_reference, watched_columns
from helpers.serving import ScoringClient, ask, scored_rows
from helpers.workspace import Workspace

ROWS = 250  # per period of the demo
PERIODS, HARD, WITHOUT_LABELS = 10, 4, 2  # of it; the last ones with hard rows, without labels


def play_demo(workspace: Workspace, client: ScoringClient, split: Split, period: str = "D") -> str:
    """Let production seem to have been asked for a while; return what was done.

    Test rows are sent to the scoring server, and their labels after them. In the last periods
    they come from the half that the first model is less sure of, and the newest have no labels
    yet. The rows are marked: real monitoring does not see them. A version that was asked before
    is not asked again; its rows get the dates of today's demo.

    Parameters
    ----------
    period
        As for `helpers.monitoring.monitor`.
    """
    today = pd.Timestamp.now("UTC").tz_localize(None).to_period(period)
    dates = pd.period_range(end=today, periods=PERIODS)
    times = [date.start_time.timestamp() for date in dates]
    database, done, hard = workspace.scored_rows, [], None
    for name, model in client.models.items():
        first = scored_rows.date_demo(database, name, model["version"], times)
        title = f"{name} version {model['version']}"
        done.append(f"{title}: a demo of {PERIODS} periods, {dates[0]} to {today}.")
        if first >= PERIODS:
            continue
        arrived = []
        with client.session() as session:
            for number in range(first, PERIODS):
                if hard is None:
                    answer = ask(client, next(iter(client.models)), split.X_test, session, False)
                    sure = answer.filter(like="probability_").max(axis=1).to_numpy()
                    hard = split.X_test.iloc[sure.argsort()[: max(1, len(sure) // 2)]]
                rows = split.X_test if number < PERIODS - HARD else hard
                rows = rows.sample(ROWS, replace=len(rows) < ROWS, random_state=number)
                ids = ask(client, name, rows, session, demo=True).index
                if number < PERIODS - WITHOUT_LABELS:
                    arrived.append(split.y_test[rows.index].set_axis(ids))
        scored_rows.wait_for(database, ids[-1])
        if arrived:
            add_labels(workspace, pd.concat(arrived))
        scored_rows.date_demo(database, name, model["version"], times)
    return "\n".join(done)


def rehearse(models: dict[str, PyFuncModel], split: Split) -> pd.DataFrame:
    """Show what would be found if production got worse; nothing is logged and nobody alarmed.

    Of three columns numbers move by a standard deviation and truths become their opposite, and
    three labels in ten are others.

    Returns
    -------
    pandas.DataFrame
        ``model`` and ``message`` of each finding.
    """
    random, found = np.random.default_rng(0), []
    rows = split.X_test.copy()
    for name in [name for name in watched_columns(split) if name in split.numeric][-3:]:
        values = rows[name]
        truth = is_bool_dtype(values)
        rows[name] = ~values if truth else values.astype("float64") + values.std()
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
