"""A search in MLflow: in its run what was tried, below it the best pairs as runs of their own."""

import mlflow
import pandas as pd
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from helpers.data import Split
from helpers.tracking.runs import data_tags, log_figure, process_tags

N_CHILD_RUNS = 10


def log_search(search, run: mlflow.ActiveRun, split: Split) -> None:
    """Log a fitted `KernelGridSearch`, with accuracy as its score, in its run."""
    # Only here: the scoring server, which needs neither, starts sooner.
    from helpers import plots
    from helpers.models import svm

    table = svm.results_table(search)
    grid = {name.removeprefix("svc__"): values for name, values in search.param_grid.items()}
    mlflow.log_params(
        {
            "kernel": "rbf",
            "C": float(search.best_params_["svc__C"]),
            "gamma": float(search.best_params_["svc__gamma"]),
            **{f"grid_{name}": " ".join(f"{v:g}" for v in sorted(grid[name])) for name in grid},
            "cv_folds": search.n_splits_,
            "edge": ", ".join(svm.edges(search)) or "none",
        }
    )
    mlflow.log_metrics(
        {
            "cv_accuracy": search.best_score_,
            "cv_accuracy_std": search.cv_results_["std_test_score"][search.best_index_],
            "search_seconds": search.search_time_,
        }
    )
    log_figure(plots.grid_map(search), "grid_search/heat_map.png")
    mlflow.log_text(table.to_csv(index=False), "grid_search/cv_results.csv")
    _log_pairs(table.head(N_CHILD_RUNS), run, split.manifest)


def _log_pairs(table: pd.DataFrame, run: mlflow.ActiveRun, manifest: dict) -> None:
    client = mlflow.MlflowClient()
    tags = {**process_tags(), **data_tags(manifest), MLFLOW_PARENT_RUN_ID: run.info.run_id}
    # A millisecond before it: the newest run of the experiment is the parent.
    start = run.info.start_time - 1
    for row in table.itertuples():
        name = f"C={row.C:g} gamma={row.gamma:g}"
        child = client.create_run(run.info.experiment_id, start, tags, name).info.run_id
        mlflow.log_params({"kernel": "rbf", "C": row.C, "gamma": row.gamma}, run_id=child)
        metrics = {
            "cv_accuracy": row.mean_test_score,
            "cv_accuracy_std": row.std_test_score,
            "fit_seconds": row.mean_fit_time,
        }
        mlflow.log_metrics(metrics, run_id=child)
        client.set_terminated(child)
