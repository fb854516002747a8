import mlflow
import pytest
import requests
from mlflow.pyfunc.scoring_server.client import ScoringServerClient

from helpers import registry, serving
from helpers.serving.app import Application
from helpers.serving.models import Models
from helpers.serving.recorder import Recorder
from tests.scoring import NETWORK, SVM, assert_same, post, serve_here


def test_headers_say_which_version_answered(served):
    answer = post(served.client, served.split.X_test.head(1).to_csv(index=False), kind="text/csv")
    version = registry.production_version(SVM)
    assert answer.headers["X-Model-Name"] == SVM
    assert answer.headers["X-Model-Version"] == str(version.version)
    assert answer.headers["X-Run-Id"] == version.run_id
    assert len(answer.headers["X-Request-Id"]) == 32


def test_mlflows_own_client_asks_the_server(served, local_models):
    host, port = served.client.url.removeprefix("http://").split(":")
    client = ScoringServerClient(host, int(port))
    client.ping()
    assert client.get_version() == mlflow.__version__
    rows = served.split.X_test.head(5)
    answer = client.invoke(rows).get_predictions()
    assert_same(answer, local_models[NETWORK].predict(rows))


def test_paths_of_the_protocol(served):
    for base in (served.client.url, served.client.address(SVM)):
        assert requests.get(f"{base}/ping", timeout=10).status_code == 200
        assert requests.get(f"{base}/version", timeout=10).text == mlflow.__version__
        assert requests.get(f"{base}/invocations", timeout=10).status_code == 405
    for path in ("models/none/ping", "nothing"):
        assert requests.get(f"{served.client.url}/{path}", timeout=10).status_code == 404


def test_password_is_asked_of_all_but_ping(loaded_svm, tmp_path):
    recorder = Recorder(tmp_path / "scored.db")
    app = Application(Models(loaded_svm), recorder, "the password of a test")
    with serve_here(app.starlette()) as url:
        assert requests.get(f"{url}/ping", timeout=10).status_code == 200
        for account in (None, ("client", "wrong"), ("client", "the password of a tes")):
            for method, path in (("GET", "/models"), ("POST", "/invocations")):
                answer = requests.request(method, url + path, auth=account, timeout=10)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic")
        with pytest.raises(serving.ServingError, match="password"):
            serving.connect(url, "wrong")
        client = serving.connect(url, "the password of a test")
        assert client.models[SVM]["version"] == loaded_svm.version
        assert "the password" not in repr(client)


def test_other_sites_name_is_refused(served):
    answer = post(served.client, b'{"instances": []}', headers={"Host": "evil.example"})
    assert answer.status_code == 403
