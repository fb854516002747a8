"""A search in MLflow: what was tried, as finished runs below the run of the search."""

from collections.abc import Iterable

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from helpers.tracking.runs import data_tags, process_tags


def log_child_runs(run: mlflow.ActiveRun, children: Iterable[tuple], manifest: dict) -> None:
    """Log finished runs below a run: name, parameters and metrics of each."""
    client = mlflow.MlflowClient()
    tags = {**process_tags(), **data_tags(manifest), MLFLOW_PARENT_RUN_ID: run.info.run_id}
    # A millisecond before it: the newest run of the experiment is the parent.
    start = run.info.start_time - 1
    for name, params, metrics in children:
        child = client.create_run(run.info.experiment_id, start, tags, name).info.run_id
        mlflow.log_params(params, run_id=child)
        mlflow.log_metrics(metrics, run_id=child)
        client.set_terminated(child)
