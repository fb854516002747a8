"""The history of promotions and rollbacks: each is a run of an experiment of MLflow.

So nothing in it is overwritten, and the UI shows it too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from helpers import series, tracking
from helpers.models.evaluation import HEADLINE
from helpers.registry.production import metrics_of, number_of, production_version

NONE = "none"  # the version before the first one
COLUMNS = {  # of the history: where MLflow has them
    "when": "start_time",
    "model": "params.model",
    "action": "params.action",
    "from_version": "params.from_version",
    "to_version": "params.to_version",
    "by": "tags.by",
    "reason": "tags.reason",
    "accuracy": "metrics.to_accuracy",
    "f1_macro": "metrics.to_f1_macro",
    "f1_macro_before": "metrics.from_f1_macro",
    "result": "status",
}


@contextmanager
def recorded(
    action: str, name: str, reason: str, by: str | None, find: Callable[[], ModelVersion | None]
) -> Iterator[None]:
    """Record which version the block puts in Production; `find` gives it after the block.

    A block that fails is recorded as FAILED, one that is interrupted as KILLED.
    """
    before = production_version(name)
    tags = {"reason": reason, "by": tracking.user_name(by)}
    with tracking.start_run(series.PROMOTIONS, name, tags=tags) as run:
        try:
            yield
        finally:
            numbers = {}
            for side, version in {"from": before, "to": find()}.items():
                numbers[f"{side}_version"] = number_of(version) or NONE
                metrics = metrics_of(version)
                mlflow.log_metrics({f"{side}_{m}": metrics[m] for m in HEADLINE if m in metrics})
            mlflow.log_params({"action": action, "model": name, **numbers})
            title = f"{name}: version {' → '.join(numbers.values())}"
            mlflow.MlflowClient().update_run(run.info.run_id, name=title)


def history(name: str | None = None) -> pd.DataFrame:
    """List promotions and rollbacks, of one registered model or of all, the newest first.

    Returns
    -------
    pandas.DataFrame
        Columns ``when`` (UTC), ``model``, ``action``, ``from_version`` (None at first),
        ``to_version``, ``by``, ``reason``, ``accuracy``, ``f1_macro`` (of the version promoted),
        ``f1_macro_before`` and ``result`` (``FINISHED``, or what an interrupt left).
    """
    experiment = mlflow.get_experiment_by_name(series.PROMOTIONS)
    if experiment is None:
        return pd.DataFrame(columns=list(COLUMNS))
    runs = mlflow.search_runs(
        [experiment.experiment_id],
        f"params.model = '{name}'" if name else "",
        order_by=["attributes.start_time DESC"],
    )
    table = runs.reindex(columns=list(COLUMNS.values())).set_axis(list(COLUMNS), axis=1)
    when = pd.to_datetime(table["when"], utc=True).dt.floor("s")
    return table.assign(when=when, from_version=table["from_version"].replace({NONE: None}))


def production_line(name: str) -> list[str]:
    """Return the versions that were promoted on top of each other, the newest last.

    The version in Production now is not among them where somebody put it there by hand.
    """
    events, line = history(name), []
    for event in events[events["result"] == "FINISHED"][::-1].itertuples():
        if event.action == "rollback":
            while line and line[-1] != event.to_version:
                line.pop()
        elif event.from_version and event.from_version not in line[-1:]:
            # Somebody moved versions by hand in between.
            line.append(event.from_version)
        if event.to_version not in line[-1:]:
            line.append(event.to_version)
    return line
