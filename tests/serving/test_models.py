import threading

import mlflow
import requests

from helpers import registry
from tests.scoring import SVM, log_svm, post, put_in_production
from tests.series import wait_for


class Load(threading.Thread):
    """Asks one model without a pause; notes every status and version."""

    def __init__(self, served):
        super().__init__()
        self.client, self.body = served.client, served.split.X_test.head(2).to_csv(index=False)
        self.seen, self.stopped = [], threading.Event()

    def run(self):
        while not self.stopped.is_set():
            answer = post(self.client, self.body, SVM, "text/csv")
            self.seen.append((answer.status_code, answer.headers.get("X-Model-Version")))


def test_new_version_takes_over_without_a_failed_request_and_a_bad_one_is_refused(served):
    second, third = log_svm(served.split), log_svm(served.split)
    threads = [Load(served) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert wait_for(lambda: all(len(thread.seen) > 5 for thread in threads))
        put_in_production(SVM, second, served.split)
        assert wait_for(lambda: all(thread.seen[-1][1] == "2" for thread in threads))
        break_model(served.workspace, third)
        registry.promote(SVM, register_broken(third), "by hand, without a check")
        assert wait_for(lambda: refused(served).get("version") == "3")
        before = [len(thread.seen) for thread in threads]
        assert wait_for(
            lambda: all(len(t.seen) > n + 5 for t, n in zip(threads, before, strict=True))
        )
        registry.rollback(SVM, "it does not load")
        assert wait_for(lambda: not refused(served))
    finally:
        for thread in threads:
            thread.stopped.set()
        for thread in threads:
            thread.join()
    for thread in threads:
        assert {status for status, _ in thread.seen} == {200}
        versions = [version for _, version in thread.seen]
        assert versions == sorted(versions)
        assert set(versions) == {"1", "2"}


def break_model(workspace, run):
    """Damage a logged model's classifier, as a disk would."""
    model_id = run.outputs.model_outputs[0].model_id
    (path,) = workspace.artifacts.glob(f"*/models/{model_id}/artifacts/**/classifier.joblib")
    path.write_bytes(path.read_bytes()[:100])


def register_broken(run):
    model_id = run.outputs.model_outputs[0].model_id
    client = mlflow.MlflowClient()
    source = f"models:/{model_id}"
    return client.create_model_version(SVM, source, run.info.run_id, model_id=model_id).version


def refused(served):
    answer = requests.get(f"{served.client.url}/models", timeout=10).json()
    return answer["refused"].get(SVM, {})
