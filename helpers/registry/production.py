"""What is in Production, and what the registry holds.

Production is the alias ``production``, which clients load, together with the stage
``Production``, which the classic UI shows.
"""

import pickle
import struct
import warnings
import zlib

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

from helpers import series, tracking
from helpers.workspace import MissingStepError

ALIAS = "production"
STAGE = "Production"
LOAD_ERRORS = (  # of a model whose files are damaged or lost, or that cannot answer
    MlflowException,
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
    zlib.error,
)

# Stages are deprecated since MLflow 2.9 and work in 3; the original document names them.
warnings.filterwarnings("ignore", r".*Model registry stages will be removed", FutureWarning)


def versions_of(name: str) -> list[ModelVersion]:
    """Return all versions of a registered model, the newest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: -int(version.version))


def number_of(version: ModelVersion | None) -> str | None:
    """Return the number of a version as text; a database without a server gives an int."""
    return None if version is None else str(version.version)


def metrics_of(version: ModelVersion | None) -> dict[str, float]:
    """Return what the run of a version logged; nothing where it is not from a run."""
    if version is None or not version.run_id:
        return {}
    return mlflow.MlflowClient().get_run(version.run_id).data.metrics


def aliased_version(name: str) -> ModelVersion | None:
    """Return the version that the alias points to."""
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        # There is no such model, or it has no such alias.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def production_version(name: str) -> ModelVersion | None:
    """Return the version of a registered model that is in Production.

    By alias; where nobody set the alias (a promotion by hand in the UI), by stage.
    """
    aliased = aliased_version(name)
    if aliased is not None:
        return aliased
    return next((each for each in versions_of(name) if each.current_stage == STAGE), None)


def load_production(name: str) -> PyFuncModel:
    """Load the model in Production as any client would."""
    version = production_version(name)
    if version is not None and ALIAS not in version.aliases:
        # Promoted by hand in the UI, which sets the stage alone.
        return tracking.load_model(f"models:/{name}/{version.version}")
    return tracking.load_model(f"models:/{name}@{ALIAS}")


def require_production() -> list[str]:
    """Return the names of the models of the series that are in Production.

    Raises
    ------
    helpers.workspace.MissingStepError
        If none is.
    """
    names = [name for name in series.MODELS if production_version(name)]
    if not names:
        raise MissingStepError(f"No model is in Production. Run {series.STEPS['04'].name} first.")
    return names


def models_table() -> pd.DataFrame:
    """Show the registered models like the UI's Models page, one row per version.

    Returns
    -------
    pandas.DataFrame
        Index name and version, the newest first; stage, aliases, accuracy, macro F1, what it was
        trained on, checks, and when it was made (UTC).
    """
    client, rows = mlflow.MlflowClient(), []
    for name in series.MODELS:
        for version in versions_of(name):
            metrics = metrics_of(version)
            # A search leaves the aliases out.
            aliases = client.get_model_version(name, version.version).aliases
            rows.append(
                {
                    "name": name,
                    "version": number_of(version),
                    "stage": version.current_stage,
                    "aliases": ", ".join(f"@{alias}" for alias in aliases),
                    "accuracy": metrics.get("accuracy"),
                    "f1_macro": metrics.get("f1_macro"),
                    "data": version.tags.get("data_source"),
                    "checks": version.tags.get("checks"),
                    "created": pd.to_datetime(
                        version.creation_timestamp // 1000, unit="s", utc=True
                    ),
                }
            )
    return pd.DataFrame(rows).set_index(["name", "version"]) if rows else pd.DataFrame()
