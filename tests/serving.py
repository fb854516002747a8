"""What the tests of serving and monitoring share: models in Production, and servers of them."""

import threading
from contextlib import contextmanager

import mlflow
import pandas as pd
import uvicorn

from helpers import cnn, registry, svm, tracking
from helpers.registry import Candidate
from tests.series import wait_for

QUICK = cnn.Settings(epochs=4, batch_size=32)
PASSED = {"passed": [True], "finding": [""]}


def log_svm(split, C=1.0):
    """Log an SVM as notebook 03 does, without the search."""
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        info = tracking.log_model(split, classifier=svm.fit_best(split, C, 0.1, folds=3))
        tracking.evaluate_logged_model(info, split)
    return mlflow.get_run(run.info.run_id)


def log_network(split):
    """Log a network as notebook 02 does, trained for a few epochs."""
    training = cnn.train(split, QUICK)
    parts = {"preprocessor": training.preprocessor, "network": training.network}
    with tracking.start_run("conv_network", "default_logistic", split.manifest) as run:
        info = tracking.log_model(split, **parts)
        tracking.evaluate_logged_model(info, split)
    return mlflow.get_run(run.info.run_id)


def put_in_production(name, run, split):
    """Register a run's model and promote it, as notebook 04 does; return the version."""
    candidate, client = Candidate(name, run, split), mlflow.MlflowClient()
    checks = pd.concat({name: pd.DataFrame(PASSED, index=["all"])})
    with registry.promoting(candidate, checks, "a test") as promotion:
        version = promotion.version or mlflow.register_model(candidate.model_uri, name)
        client.transition_model_version_stage(name, version.version, "Production", True)
        client.set_registered_model_alias(name, "production", version.version)
    return client.get_model_version(name, version.version)


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
