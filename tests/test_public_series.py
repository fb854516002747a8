"""The whole series seen from outside: batch runs with a tunnel, and a real browser."""

import json
import os
import subprocess
import time

import mlflow
import pytest
import requests

from helpers.server import credentials
from helpers.workspace import open_workspace
from tests.series import (
    ONE_PAIR,
    RUNS,
    clean_environment,
    connected,
    files_below,
    find_runs,
    run_notebook,
    start_python,
)
from tests.tools import walkthrough

pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUICK = (*ONE_PAIR, "-p", "EPOCHS", "8", "-p", "ATTACKED_ROWS", "5")
EXPOSING = ("02_cnn_training", "03_svm_grid_search", "04_registry_promotion")
EXPOSING += ("05_serving_and_monitoring",)


@pytest.fixture(scope="module")
def settings(cloud, tmp_path_factory):
    """Environment of a machine with ngrok's agent and a token."""
    return cloud.machine(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def done(cloud, settings, tmp_path_factory, _no_team_server):
    """The series, run headlessly with a token; what was seen from outside meanwhile."""
    root = tmp_path_factory.mktemp("public") / "ws"
    running = start_python(
        *("-m", "helpers.run", "--workspace", root, "--data", "sample", *QUICK),
        env=clean_environment(**settings),
        stderr=subprocess.STDOUT,
    )
    seen = set()
    while running.poll() is None:
        for url in cloud.endpoints:
            answer = requests.get(
                f"{url}/version",
                proxies={"https": cloud.proxy_url},
                verify=cloud.ca_file,
                headers={"ngrok-skip-browser-warning": "1"},
                timeout=30,
            )
            if "Ngrok-Error-Code" not in answer.headers:
                seen.add((url, answer.status_code))
        time.sleep(0.5)
    output = running.stdout.read()
    assert running.returncode == 0, output
    return root, output, seen


def outputs(root, name):
    """Return what the cells of an executed notebook showed, as text."""
    book = json.loads((root / "executed" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return json.dumps([cell.get("outputs", []) for cell in book["cells"]])


# --- batch runs --------------------------------------------------------------------------------


def test_ui_of_a_batch_run_is_public_behind_a_password_while_it_runs(done, cloud):
    _, output, seen = done
    assert seen == {(cloud.account.url, 401)}
    assert f"The MLflow UI is at {cloud.account.url}" in output
    assert cloud.endpoints == []


def test_every_notebook_of_the_run_shows_the_same_address(done, cloud):
    root, _, _ = done
    for name in EXPOSING:
        assert cloud.account.url in outputs(root, name), name


def test_token_and_passwords_are_in_nothing_that_the_run_made(done, cloud):
    root, output, _ = done
    passwords = root / "passwords.json"
    secrets = [cloud.account.token, *json.loads(passwords.read_text()).values()]
    assert len(secrets) >= 5
    texts = {path: path.read_bytes() for path in files_below(root) if path != passwords}
    assert len(texts) > 40
    for secret in secrets:
        assert secret not in output
        assert not [path for path, text in texts.items() if secret.encode() in text]


def test_notebook_alone_with_true(done, cloud, settings, tmp_path):
    root, _, _ = done
    out = tmp_path / "out.ipynb"
    parameters = ("-p", "WORKSPACE", str(root), "-p", "EXPOSE_UI", "True")
    ran = run_notebook("05_serving_and_monitoring", out, *parameters, **settings)
    assert ran.returncode == 0, ran.stderr
    text = out.read_text(encoding="utf-8")
    assert cloud.account.url in text
    assert cloud.account.token not in text + ran.stdout + ran.stderr
    assert cloud.endpoints == []


def test_notebook_alone_without_a_token(done, tmp_path):
    root, _, _ = done
    out = tmp_path / "out.ipynb"
    ran = run_notebook("05_serving_and_monitoring", out, "-p", "WORKSPACE", str(root))
    assert ran.returncode == 0, ran.stderr
    book = json.loads(out.read_text(encoding="utf-8"))
    (cell,) = (cell for cell in book["cells"] if "ngrok.connect" in "".join(cell["source"]))
    (shown,) = cell["outputs"]
    (line,) = "".join(shown["text"]).splitlines()
    assert line.startswith("The MLflow UI is at http://localhost:")

    ran = run_notebook(
        "05_serving_and_monitoring", out, "-p", "WORKSPACE", str(root), "-p", "EXPOSE_UI", "True"
    )
    assert ran.returncode != 0
    assert "TunnelError" in ran.stderr
    assert "https://dashboard.ngrok.com/get-started/your-authtoken" in ran.stderr


# --- a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(done, cloud, tmp_path_factory):
    """The UI of the finished series at its public address; skipped where there is no browser."""
    if walkthrough.find_browser() is None:
        pytest.skip(f"no browser: install one of {', '.join(walkthrough.BROWSERS)}")
    workspace = open_workspace(done[0])
    before = {name: os.environ.pop(name, None) for name in ("MLFLOW_TRACKING_URI",)}
    with walkthrough.exposed(workspace, cloud, tmp_path_factory.mktemp("agent")) as address:
        yield workspace, address.url
    os.environ.update({name: value for name, value in before.items() if value})


def test_reader_sees_the_ui_with_little_traffic_and_registers_nothing(public, cloud, tmp_path):
    workspace, url = public
    password = credentials.password_of(workspace, "reader")
    with walkthrough.browser_page(cloud, "reader", password) as page:
        received, network = [], page.context.new_cdp_session(page)
        network.send("Network.enable")
        network.on(
            "Network.loadingFinished", lambda event: received.append(event["encodedDataLength"])
        )
        way = walkthrough.Walk(page, url, tmp_path)
        way.open()
        way.experiment("conv_network")
        page.get_by_role("link", name="default_logistic").first.wait_for()
        page.wait_for_timeout(2000)
        # A first visit, with an experiment open; ngrok's free plan has 1 GB a month.
        assert 1_000_000 < sum(received) < 2_500_000
        way.run("default_logistic")
        assert float(way.metrics("metrics")["accuracy"]) > 0.5
        way.model_files("files")
        assert all("/assistant/" in address for _, _, address in way.refused)
        page.get_by_role("button", name="Register model").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("combobox").first.click()
        page.get_by_text("Create New Model").last.click()
        dialog.get_by_placeholder("Input a model name").fill("by_a_reader")
        dialog.get_by_role("button", name="Register", exact=True).click()
        page.wait_for_timeout(1500)
        refused = [(code, path.split("/")[-1]) for code, _, path in way.refused[-1:]]
        assert refused == [(403, "create")]


@pytest.mark.parametrize("user", [None, "editor"])
def test_browser_without_the_password_sees_nothing(public, cloud, user):
    _, url = public
    with walkthrough.browser_page(cloud, user, "wrong password") as page:
        page.goto(url)
        with page.expect_response(lambda answer: answer.status != 200) as refused:
            page.get_by_role("button", name="Visit Site").click()
        assert refused.value.status == 401
        page.wait_for_timeout(500)
        assert "MLflow" not in page.title()
        assert not page.get_by_role("link").count()


def test_the_way_of_the_deployment_document(public, cloud, tmp_path):
    """Every step that the document describes, by hand, as an editor."""
    workspace, url = public
    password = credentials.password_of(workspace, "editor")
    with walkthrough.browser_page(cloud, "editor", password) as page:
        seen = walkthrough.walk(page, url, tmp_path)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert [name[:2] for name in pictures] == [f"{number:02d}" for number in range(1, 16)]
    kept = {path.name for path in walkthrough.IMAGES.glob("[0-9]*.png")}
    assert kept == {*pictures} - {f"{walkthrough.NGROK_PAGE}.png"}
    for name in ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "artifacts"):
        assert name in seen["files"]
    assert all(width > 300 for width in seen["matrices"])
    production = {row[0]: row[1:4] for row in seen["models"]}
    for name in (*RUNS, walkthrough.BY_HAND):
        assert production[name] == ["Version 1", "—", "Version 1"]
    assert seen["card"] == ["metric", "value", "95 % interval"]
    # The browser's own probing of MLflow's assistant is all that was refused.
    assert all("/assistant/" in address for _, _, address in seen["refused"])
    with connected(workspace.root) as client:
        for name, shown in (
            ("model_conv_network", seen["metrics"]),
            ("model_svm_rbf", seen["svm"]),
        ):
            data = find_runs(client, name)[0].data
            for metric, value in data.metrics.items():
                assert float(shown[metric]) == pytest.approx(value), metric
        assert {shown["C"], shown["gamma"]} == {data.params["C"], data.params["gamma"]}
        version = client.get_model_version(walkthrough.BY_HAND, "1")
        assert version.current_stage == "Production"
        model = mlflow.pyfunc.load_model(f"models:/{walkthrough.BY_HAND}/Production")
        assert model.metadata.signature is not None
