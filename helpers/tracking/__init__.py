"""What is kept in MLflow: runs, the rows they were trained on, and logged models."""

from helpers.tracking.logged_models import (
    column_kinds,
    evaluate_logged_model,
    load_model,
    log_model,
)
from helpers.tracking.rows import log_split, row_hashes, training_rows
from helpers.tracking.runs import (
    connect,
    data_tags,
    is_own,
    keep_run,
    latest_run,
    log_figure,
    start_run,
    user_name,
)
from helpers.tracking.search import log_search

__all__ = [
    "column_kinds",
    "connect",
    "data_tags",
    "evaluate_logged_model",
    "is_own",
    "keep_run",
    "latest_run",
    "load_model",
    "log_figure",
    "log_model",
    "log_search",
    "log_split",
    "row_hashes",
    "start_run",
    "training_rows",
    "user_name",
]
