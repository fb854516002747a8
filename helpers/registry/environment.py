"""Whether a logged model answers elsewhere: where there is nothing but what it asks for."""

import json
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.utils.process import ShellCommandException

from helpers.data import Split
from helpers.registry.behaviour import CheckFailedError

ROWS = 20  # test rows that it is asked
TOLERANCE = 1e-4  # largest difference of a probability


def check(model_uri: str, split: Split, answer: pd.DataFrame) -> str:
    """Make an environment from the logged requirements alone and ask the model there.

    It takes about a minute, and installs packages from the index that ``uv`` uses.

    Parameters
    ----------
    answer : pandas.DataFrame
        The model's answer to the test rows in this environment.

    Raises
    ------
    CheckFailedError
        If it does not answer there, or otherwise than here.
    """
    if not shutil.which("uv"):
        # A virtual environment that is not activated is not on the PATH.
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        # From a folder of its own: the new environment needs no password of the server.
        folder = mlflow.artifacts.download_artifacts(model_uri, dst_path=temporary)
        output, rows = Path(temporary, "answer.json"), split.X_test.head(ROWS)
        try:
            mlflow.models.predict(folder, rows, env_manager="uv", output_path=str(output))
        except (MlflowException, ShellCommandException) as error:
            first_line = str(error).partition("\n")[0]
            raise CheckFailedError(
                f"does not answer in an environment made from its requirements: {first_line}"
            ) from error
        there = pd.DataFrame(json.loads(output.read_text(encoding="utf-8"))["predictions"])
    names = [f"probability_{label}" for label in split.labels]
    gap = np.abs(there[names].to_numpy() - answer[names].head(ROWS).to_numpy()).max()
    if not gap <= TOLERANCE:
        raise CheckFailedError(f"a probability there differs by {gap:.2g}")
    return f"answers {len(rows)} rows with nothing but its requirements, as here"
