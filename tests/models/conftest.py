"""Both models as their notebooks log them, loaded back from the server as a client does."""

from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from tests import scoring

LOGGERS = {
    "network": scoring.log_network,
    "svm": lambda split, folder: scoring.log_svm(split),
}


def log(kind, split, folder):
    run = LOGGERS[kind](split, folder / "ws")
    uri = f"runs:/{run.info.run_id}/model"
    return SimpleNamespace(
        kind=kind,
        run=run,
        model=mlflow.pyfunc.load_model(uri),
        folder=Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))),
    )


@pytest.fixture(scope="session", params=LOGGERS)
def logged(request, running_server, small_split, tmp_path_factory):
    running_server.connect()
    return log(request.param, small_split, tmp_path_factory.mktemp(request.param))
