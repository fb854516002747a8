"""What the tests of serving and monitoring share: models in Production, and servers of them."""

import threading
from contextlib import contextmanager

import mlflow
import numpy as np
import pandas as pd
import requests
import uvicorn
from sklearn.ensemble import StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.svm import SVC

from helpers import registry, tracking
from helpers.models.interface import TabularPreprocessor
from helpers.registry.candidates import Candidate
from helpers.workspace import open_workspace
from tests.cells import train_network
from tests.series import wait_for

NETWORK, SVM = "model_conv_network", "model_svm_rbf"
PASSED = pd.DataFrame({"passed": [True], "finding": [""]}, index=["all"])


def fit_svm(split):
    """Return fitted preprocessing and classifier, as notebook 03 makes them."""
    preprocessing = TabularPreprocessor(split.categorical)
    svc = SVC(C=1.0, gamma=0.1, decision_function_shape="ovo")
    probabilities = make_pipeline(PolynomialFeatures(2), LogisticRegression(C=0.3))
    classifier = StackingClassifier(
        [("svc", svc)], probabilities, cv=StratifiedKFold(3), stack_method="decision_function"
    )
    return preprocessing, classifier.fit(preprocessing.fit_transform(split.X_train), split.y_train)


def answer_of(classifier, rows, labels):
    """Answer rows as the model's interface does."""
    probabilities = classifier.predict_proba(rows)
    answer = pd.DataFrame(probabilities, rows.index, [f"probability_{label}" for label in labels])
    answer.insert(0, "prediction", np.asarray(labels)[probabilities.argmax(axis=1)])
    return answer


def log_svm(split):
    """Log an SVM as notebook 03 does, without the search."""
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        tracking.log_split(split)
        info = tracking.log_model(split, *fit_svm(split))
        tracking.evaluate_logged_model(info, split)
    return mlflow.get_run(run.info.run_id)


def log_network(split, folder):
    """Log a network as notebook 02 does; `folder` is a workspace's."""
    ws = open_workspace(folder)
    quick = {"EPOCHS": 10, "BATCH_SIZE": 8, "FILTERS": 8, "LEARNING_RATE": 0.02}
    made = train_network(split, ws, steps=1, **quick)
    return mlflow.get_run(made.run.info.run_id)


def promote_without(candidate, checks, *missing, broken=None):
    """Promote as notebook 04 does, but for the lines of some calls; raise `broken` at the end."""
    client, name = mlflow.MlflowClient(), candidate.name
    with registry.promoting(candidate, checks, "a test") as promotion:
        version = promotion.version
        if not version and "register_model" not in missing:
            version = mlflow.register_model(candidate.model_uri, name)
        if promotion.due or "promotion.due" in missing:
            if version and "transition_model_version_stage" not in missing:
                client.transition_model_version_stage(name, version.version, "Production", True)
            if version and "set_registered_model_alias" not in missing:
                client.set_registered_model_alias(name, "production", version.version)
        if broken:
            raise broken


def put_in_production(name, run, split, grouping=()):
    """Register a run's model and promote it, as notebook 04 does; return the version."""
    candidate = Candidate(name, run, split, grouping=dict(grouping))
    promote_without(candidate, pd.concat({name: PASSED}))
    return registry.production_version(name)


@contextmanager
def serve_here(app):
    """Serve an ASGI application in a thread of this process; gives its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def post(client, body, model=SVM, kind="application/json", headers=None):
    """Send a body to a scoring server as it is."""
    headers = {"Content-Type": kind, **(headers or {})}
    address = f"{client.address(model)}/invocations"
    return requests.post(address, data=body, headers=headers, timeout=60)


def assert_same(answer, expected):
    """Compare an answer over HTTP with that of the loaded model."""
    got = pd.DataFrame(answer)
    assert list(got.columns) == list(expected.columns)
    assert (got["prediction"].to_numpy() == expected["prediction"].to_numpy()).all()
    np.testing.assert_allclose(
        got.iloc[:, 1:].to_numpy("float64"), expected.iloc[:, 1:].to_numpy("float64"), atol=1e-6
    )
