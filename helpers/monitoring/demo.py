"""For the notebook: a first day of production, and a rehearsal of a bad one."""

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

ROWS = 200  # per request of the first day


def play_first_day(workspace: Workspace, client: ScoringClient, split: Split) -> str:
    """Send the test rows to the scoring server, and their labels after them; say what was done.

    A version that was asked before is left alone.
    """
    done = []
    for name, model in client.models.items():
        title = f"{name} version {model['version']}"
        if scored_rows.is_known(workspace.scored_rows, name, model["version"]):
            done.append(f"{title} has been asked before; nothing sent.")
            continue
        with client.session() as session:
            parts = [
                ask(client, name, split.X_test.iloc[start : start + ROWS], session)
                for start in range(0, len(split.X_test), ROWS)
            ]
        ids = pd.concat(parts).index
        scored_rows.wait_for(workspace.scored_rows, ids[-1])
        add_labels(workspace, split.y_test.set_axis(ids))
        done.append(f"{title}: {len(ids):,} rows and labels.")
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
