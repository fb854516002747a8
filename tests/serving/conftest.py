from types import SimpleNamespace

import mlflow
import pytest

from helpers import registry, server, serving, tracking
from helpers.serving import models
from helpers.workspace import open_workspace
from tests.scoring import NETWORK, SVM, log_network, log_svm, put_in_production


@pytest.fixture(scope="package")
def production(tmp_path_factory, big_split, _no_team_server):
    """Both models in Production, and a scoring server of them."""
    workspace = open_workspace(tmp_path_factory.mktemp("production") / "ws")
    tracking.connect(workspace, keep=False)
    put_in_production(NETWORK, log_network(big_split, workspace.root), big_split)
    put_in_production(SVM, log_svm(big_split), big_split)
    serving.start(workspace, port=5401, keep=False)
    yield SimpleNamespace(workspace=workspace, split=big_split)
    serving.stop(workspace)
    server.stop_server(workspace)


@pytest.fixture
def served(production):
    """The scoring server, with this process connected to its MLflow server."""
    tracking.connect(production.workspace, keep=False)
    production.client = serving.start(production.workspace, keep=False)
    yield production
    mlflow.end_run("KILLED")


@pytest.fixture(scope="package")
def local_models(production):
    """The same models, loaded as a client would without a scoring server."""
    tracking.connect(production.workspace, keep=False)
    return {name: registry.load_production(name) for name in (NETWORK, SVM)}


@pytest.fixture(scope="package")
def loaded_svm(production):
    tracking.connect(production.workspace, keep=False)
    return models.load(SVM, registry.production_version(SVM))
