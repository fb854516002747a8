"""The gate, asked from outside: through the tunnel's https edge, in front of a real server."""

import asyncio
import json
import re
import socket
import sqlite3
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from urllib.parse import urlsplit

import mlflow
import numpy as np
import psutil
import pytest
import requests

from helpers import tracking
from helpers.server import activity, credentials, processes, tunnel, users
from helpers.server.gate import Gate
from helpers.server.http import basic_header
from tests.scoring import serve_here

API = "/api/2.0/mlflow"


@pytest.fixture(autouse=True)
def _server_survives(public):
    yield
    assert processes.answers(public.local)


def settled(public):
    """Return the activity log; a request's line is written just after its answer was sent."""
    table, before = activity.read_activity(public.workspace), None
    while before is None or len(table) != len(before):
        time.sleep(0.3)
        table, before = activity.read_activity(public.workspace), table
    return table


def last(public, **wanted):
    """Return the newest line of the activity log with the wanted values."""
    table = settled(public)
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.iloc[-1]


# --- no sign-in, no answer ---------------------------------------------------------------------


ROUTES = (
    *(("GET", path) for path in ("/", "/health", "/version", "/signup", "/no/such/page")),
    *(("GET", path) for path in ("/static-files/index.html", "/get-artifact")),
    *(("GET", f"{API}/users/current"), ("POST", f"{API}/runs/create"), ("POST", "/graphql")),
    *(("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/x"), ("POST", "/v1/traces")),
    ("POST", "/gateway/x/mlflow/invocations"),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
)


@pytest.mark.parametrize("account", [None, ("eve", "wrong password"), ("nobody", "")])
def test_no_page_and_no_api_without_sign_in(public, account):
    """One of each kind; `test_routes` asks for all of them."""
    asking = public.session()
    for method, path in ROUTES:
        answer = asking.request(method, public.url + path, json={}, auth=account)
        challenge = answer.headers.get("www-authenticate")
        assert (answer.status_code, challenge) == (401, 'Basic realm="mlflow"'), path


@pytest.mark.parametrize(
    "header", ["Basic", "Basic !!!", "Bearer abc", "Basic YWRtaW4=", "basic " + "A" * 3000, ""]
)
def test_sign_in_of_another_kind_is_refused(public, header):
    response = public.session().get(public.url, headers={"Authorization": header})
    assert response.status_code == 401


def test_password_of_another_user_is_refused(public):
    asking = public.session("editor", credentials.password_of(public.workspace, "reader"))
    assert asking.get(public.url).status_code == 401


def test_password_that_was_changed_is_not_remembered(public):
    boss, account = public.session("boss"), {"username": "changing", "password": "a long password"}
    boss.post(f"{public.url}{API}/users/create", json=account)
    asking = public.session(*account.values())
    assert asking.get(f"{public.url}/version").status_code == 200
    account["password"] = "another long password"
    boss.patch(f"{public.url}{API}/users/update-password", json=account)
    assert asking.get(f"{public.url}/version").status_code == 401


def test_guessing_a_password_is_stopped_for_that_user_and_address_only(public):
    password = credentials.password_of(public.workspace, "reader")

    def guess(address, user, word="guess"):
        headers = {"X-Forwarded-For": address, "Host": public.host}
        url = f"{public.local}/version"
        return requests.get(url, headers=headers, auth=(user, word)).status_code

    codes = [guess("198.51.100.9", "editor") for _ in range(30)]
    assert codes == [401] * 20 + [429] * 10
    assert guess("198.51.100.10", "editor") == 401
    assert guess("198.51.100.9", "reader", password) == 200
    assert last(public, outcome="too many")["address"] == "198.51.100.9"


def test_unknown_user_takes_as_long_as_a_wrong_password(public):
    def times(users):
        taken = []
        for user in users:
            start = time.perf_counter()
            assert requests.get(f"{public.local}/version", auth=(user, "guess")).status_code == 401
            taken.append(time.perf_counter() - start)
        return np.median(taken)

    known = times(["editor"] * 3)
    assert times([f"nobody{number}" for number in range(3)]) > known / 2


def test_many_long_names_take_no_memory(workspace):
    workspace.server.mkdir()
    nobody = SimpleNamespace(authenticate=lambda *account: None)
    users.change_rules(workspace, sign_in=True)
    gate = Gate(None, nobody, None, workspace, 5000)

    async def guess():
        for number in range(1_000):
            account = basic_header(f"{number:04}" + "\N{PILE OF POO}" * 2_500, "x")
            headers = [(b"host", b"localhost:5000"), (b"authorization", account.encode())]
            scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
            messages = []

            async def receive():
                return {"type": "http.request"}

            async def send(message):
                messages.append(message)  # noqa: B023

            await gate(scope, receive, send)
            assert messages[0]["status"] == 401

    tracemalloc.start()
    try:
        asyncio.run(guess())
        assert tracemalloc.get_traced_memory()[0] < 2 * 2**20
    finally:
        tracemalloc.stop()


def test_rejection_does_not_wait_for_a_body_that_never_comes(public):
    address = urlsplit(public.local)
    account = basic_header("reader", credentials.password_of(public.workspace, "reader"))
    request = f"POST /gateway/x/mlflow/invocations HTTP/1.1\r\nHost: {public.host}\r\n"
    request += f"Authorization: {account}\r\nContent-Length: 10\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=8) as connection:
        connection.sendall(request.encode())
        assert b" 403" in connection.recv(1000).split(b"\r\n")[0]


# --- under which name --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "other.ngrok-free.app", "localhost:1", "127.0.0.1.evil.example"),
        *("*", "localhost@evil"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", f"{API}/experiments/search?max_results=1"])
def test_wrong_host_is_refused(public, host, path):
    account = ("editor", credentials.password_of(public.workspace, "editor"))
    response = requests.get(public.local + path, headers={"Host": host}, auth=account)
    assert response.status_code == 403
    assert "Host" in response.text


def test_two_hosts_in_one_request_are_refused(public):
    address = urlsplit(public.local)
    request = f"GET / HTTP/1.1\r\nHost: {address.netloc}\r\nHost: {public.host}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(request.encode())
        status = connection.recv(1000).split(b"\r\n")[0]
    assert b" 403" in status or b" 400" in status


def test_the_tunnel_and_this_machine_are_admitted_under_their_names(public):
    account = ("editor", credentials.password_of(public.workspace, "editor"))
    port = public.local.rsplit(":", 1)[1]
    for host in (public.host, f"localhost:{port}", f"127.0.0.1:{port}", f"LOCALHOST:{port}"):
        answer = requests.get(f"{public.local}/version", headers={"Host": host}, auth=account)
        assert answer.status_code == 200, host
    # While the server is exposed, this machine signs in, too.
    assert requests.get(f"{public.local}/version").status_code == 401


# --- roles -------------------------------------------------------------------------------------


def look(asking, public):
    """Return the status codes of what a reader may see."""
    run = f"{API}/runs/get?run_id={public.run_id}"
    artifact = f"/get-artifact?run_uuid={public.run_id}&path=note.txt"
    search = {"experiment_ids": [public.experiment_id]}
    return [
        asking.get(public.url).status_code,
        asking.get(public.url + run).status_code,
        asking.get(public.url + artifact).status_code,
        asking.post(f"{public.url}{API}/runs/search", json=search).status_code,
        asking.get(f"{public.url}{API}/registered-models/search").status_code,
    ]


@pytest.mark.parametrize("user", ["reader", "editor", "boss", "admin"])
def test_everybody_who_signs_in_sees_everything(public, user):
    assert look(public.session(user), public) == [200] * 5


def metric(name, public):
    return {"run_id": public.run_id, "key": name, "value": 1.0, "timestamp": 1_800_000_000_000}


def changes(public):
    """List what only an editor may do, then what only an admin may do."""
    version = {"name": "there", "version": public.version}
    editing = [
        ("POST", f"{API}/experiments/create", {"name": "new"}),
        ("POST", f"{API}/runs/create", {"experiment_id": public.experiment_id}),
        ("POST", f"{API}/runs/log-metric", metric("a", public)),
        ("POST", f"{API}/runs/set-tag", {"run_id": public.run_id, "key": "a", "value": "b"}),
        ("POST", f"{API}/registered-models/create", {"name": "new"}),
        ("POST", f"{API}/model-versions/create", {"name": "there", "source": "models:/m-1"}),
        ("POST", f"{API}/model-versions/transition-stage", {**version, "stage": "Production"}),
        ("POST", f"{API}/registered-models/alias", {**version, "alias": "production"}),
        ("PATCH", f"{API}/model-versions/update", {**version, "description": "x"}),
    ]
    managing = [
        ("DELETE", f"{API}/model-versions/delete", version),
        ("DELETE", f"{API}/registered-models/delete", {"name": "there"}),
        ("POST", f"{API}/runs/delete", {"run_id": public.run_id}),
        ("POST", f"{API}/experiments/delete", {"experiment_id": public.experiment_id}),
        ("POST", f"{API}/users/create", {"username": "eve", "password": "a long password"}),
        ("PATCH", f"{API}/users/update-admin", {"username": "reader", "is_admin": True}),
        ("DELETE", f"{API}/users/delete", {"username": "boss"}),
    ]
    return editing, managing


def test_reader_changes_nothing(public):
    asking = public.session("reader")
    editing, managing = changes(public)
    for method, path, content in (*editing, *managing):
        response = asking.request(method, public.url + path, json=content)
        assert response.status_code == 403, path
        assert "reader" in response.text
    artifact = f"/api/2.0/mlflow-artifacts/artifacts/{public.experiment_id}/x.txt"
    assert asking.put(public.url + artifact, data=b"x").status_code == 403
    assert asking.delete(public.url + artifact).status_code == 403
    upload = f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={public.run_id}&path=x.txt"
    assert asking.post(public.url + upload, data=b"x").status_code == 403
    assert last(public, user="reader")["outcome"] == "role"
    assert not list(public.workspace.artifacts.rglob("x.txt"))


def make_own(asking, public, name, **experiment):
    """Make an experiment, a run, a file and a model with a version; return the run's id."""

    def post(action, content, method="POST"):
        response = asking.request(method, f"{public.url}{API}/{action}", json=content)
        assert response.status_code == 200, (action, response.text)
        return response.json()

    made = post("experiments/create", {"name": name, **experiment})
    run_id = post("runs/create", made)["run"]["info"]["run_id"]
    post("runs/log-metric", metric("a", public) | {"run_id": run_id})
    post("runs/set-tag", {"run_id": run_id, "key": "a", "value": "b"})
    place = f"{made['experiment_id']}/{run_id}/artifacts/model.txt"
    address = f"{public.url}/api/2.0/mlflow-artifacts/artifacts/{place}"
    assert asking.put(address, data=b"good").status_code == 200
    post("registered-models/create", {"name": name})
    source = {"source": f"mlflow-artifacts:/{place}", "run_id": run_id}
    version = {"name": name, "version": "1"}
    post("model-versions/create", {"name": name, **source})
    post("model-versions/update", {**version, "description": "x"}, "PATCH")
    return run_id, address


def promote(asking, public, name):
    version = {"name": name, "version": "1"}
    for action, content in (
        ("model-versions/transition-stage", {**version, "stage": "Production"}),
        ("registered-models/alias", {**version, "alias": "production"}),
    ):
        answer = asking.post(f"{public.url}{API}/{action}", json=content)
        assert answer.status_code == 200, answer.text


def test_editor_logs_registers_and_promotes_what_is_its_own(public):
    asking = public.session("editor")
    run_id, _ = make_own(asking, public, "of_editor")
    promote(asking, public, "of_editor")
    version = mlflow.MlflowClient().get_model_version_by_alias("of_editor", "production")
    assert version.current_stage == "Production"
    assert asking.post(f"{public.url}{API}/runs/delete", json={"run_id": run_id}).ok


def test_editor_changes_nothing_of_others(public):
    asking = public.session("editor")
    editing, managing = changes(public)
    for method, path, content in (*editing, *managing):
        if content != {"name": "new"}:
            response = asking.request(method, public.url + path, json=content)
            assert response.status_code == 403, (path, response.text)
    assert last(public, user="editor", outcome="role")["status"] == 403


@pytest.mark.parametrize("owner", ["editor", "boss"])
def test_editor_takes_no_production_model_away(public, owner):
    name, editor = f"taken_{owner}", public.session("editor")
    run_id, address = make_own(public.session(owner), public, name)
    promote(public.session(owner), public, name)
    attacks = [
        ("POST", "registered-models/rename", {"name": name, "new_name": f"{name}_2"}),
        ("DELETE", "registered-models/delete", {"name": name}),
        ("DELETE", "model-versions/delete", {"name": name, "version": "1"}),
    ]
    for method, action, content in attacks:
        for body in (json.dumps(content), json.dumps(json.dumps(content))):
            headers = {"Content-Type": "application/json"}
            answer = editor.request(
                method, f"{public.url}{API}/{action}", data=body, headers=headers
            )
            assert answer.status_code in (400, 403), (action, answer.text)
    for path in (address, address.replace("/model.txt", "/model.txt/.%2fx"), address + "/more"):
        assert editor.put(path, data=b"bad").status_code == 403, path
    folder = address.rsplit("/", 1)[0]
    for path in (address, folder, folder.rsplit("/", 2)[0]):
        assert editor.delete(path).status_code == 403, path
    upload = f"{public.url}/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run_id}&path=model.txt"
    assert editor.post(upload, data=b"bad").status_code == 403
    assert editor.get(address).content == b"good"
    version = mlflow.MlflowClient().get_model_version_by_alias(name, "production")
    assert version.current_stage == "Production"


@pytest.mark.parametrize("user", ["boss", "admin"])
def test_admin_manages(public, user):
    asking = public.session(user)
    name = f"of_{user}"
    for method, action, content in (
        ("POST", "registered-models/create", {"name": name}),
        ("DELETE", "registered-models/delete", {"name": name}),
        ("POST", "users/create", {"username": name, "password": "a long password"}),
        ("DELETE", "users/delete", {"username": name}),
    ):
        response = asking.request(method, f"{public.url}{API}/{action}", json=content)
        assert response.status_code == 200, response.text


def test_role_that_was_taken_away_is_gone_at_once(public):
    asking, address = public.session("boss"), f"{public.url}{API}/registered-models/create"
    assert asking.post(address, json={"name": "before"}).status_code == 200
    roles = users.read_rules(public.workspace.access_rules).roles
    try:
        # By another program: this server has the account in its memory.
        with closing(sqlite3.connect(public.workspace.server / "users.db")) as accounts, accounts:
            accounts.execute("UPDATE users SET is_admin = 0 WHERE username = 'boss'")
        users.change_rules(public.workspace, roles=roles | {"boss": "reader"})
        assert asking.post(address, json={"name": "after"}).status_code == 403
    finally:
        users.change_rules(public.workspace, roles=roles)
        with closing(sqlite3.connect(public.workspace.server / "users.db")) as accounts, accounts:
            accounts.execute("UPDATE users SET is_admin = 1 WHERE username = 'boss'")


def test_search_of_a_reader_is_short(public):
    search = {"experiment_ids": ["1"], "filter": "x" * 2_000_000}
    address = f"{public.url}{API}/runs/search"
    assert public.session("reader").post(address, json=search).status_code == 413
    assert public.session("editor").post(address, json=search).status_code == 400


def test_account_that_is_in_no_table_only_looks(public):
    boss, password = public.session("boss"), "a long password"
    account = {"username": "guest", "password": password}
    assert boss.post(f"{public.url}{API}/users/create", json=account).status_code == 200
    asking = public.session("guest", password)
    assert look(asking, public) == [200] * 5
    create = asking.post(f"{public.url}{API}/registered-models/create", json={"name": "guests"})
    assert create.status_code == 403


# --- the models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answering(public):
    """A stand-in for a scoring server with a password of its own, as the gate finds it."""
    asked = []

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        asked.append((scope["path"], dict(scope["headers"]), body))
        headers = [(b"content-type", b"application/json"), (b"x-model-version", b"7")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"predictions": []}'})

    credentials.stored_secret(public.workspace, credentials.SCORING)
    state = public.workspace.scoring / processes.STATE
    with serve_here(app) as url:
        me = psutil.Process()
        here = processes.ServerProcess(url, me.pid, me.create_time(), False)
        state.parent.mkdir()
        state.write_text(json.dumps(vars(here)))
        yield asked
        state.unlink()


ASK = "/scoring/models/model_svm_rbf/invocations"


@pytest.mark.parametrize("user", ["reader", "editor", "admin"])
def test_every_user_may_ask_the_models_at_the_public_address(public, answering, user):
    answer = public.session(user).post(f"{public.url}{ASK}", json={"instances": []})
    assert answer.json() == {"predictions": []}
    assert answer.headers["x-model-version"] == "7"
    path, headers, body = answering[-1]
    assert path == ASK.removeprefix("/scoring")
    assert json.loads(body) == {"instances": []}
    # The user's password stays here; the models' own goes on.
    secret = credentials.stored_secret(public.workspace, credentials.SCORING)
    assert headers[b"authorization"] == basic_header("client", secret).encode()
    line = last(public, kind="prediction")
    assert (line["user"], line["outcome"]) == (user, "ok")


def test_nobody_asks_the_models_without_sign_in(public, answering):
    before = len(answering)
    assert public.session().post(f"{public.url}{ASK}", json={}).status_code == 401
    wrong = public.session("reader", "a wrong password")
    assert wrong.post(f"{public.url}{ASK}", json={}).status_code == 401
    assert len(answering) == before


def test_scoring_server_that_does_not_run_is_said(public, answering):
    state = public.workspace.scoring / processes.STATE
    kept = state.read_text()
    state.unlink()
    answer = public.session("reader").post(f"{public.url}{ASK}", json={})
    state.write_text(kept)
    assert answer.status_code == 503
    assert "helpers.serving" in answer.text


def test_cell_shows_the_public_address_of_the_models(public):
    models = SimpleNamespace(url="http://127.0.0.1:5001", models={"model_svm_rbf": {}})
    address = tunnel.show_models(public.workspace, models)
    assert address.url == f"{public.url}/scoring"
    assert "The models answer at" in repr(address)


# --- attacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "value"),
    [
        *(("Origin", value) for value in ("https://evil.example", "null", "http://[")),
        ("Origin", "http://localhost.evil.example"),
        *(("Sec-Fetch-Site", value) for value in ("cross-site", "Cross-Site")),
    ],
)
def test_change_from_another_site_is_refused(public, header, value):
    asking, name = public.session("editor"), f"from {value}"
    address = f"{public.url}{API}/experiments/create"
    refused = asking.post(address, json={"name": name}, headers={header: value})
    assert refused.status_code == 403
    assert "cross-origin" in refused.text.lower()
    assert last(public, outcome="origin")["path"] == f"{API}/experiments/create"
    assert mlflow.MlflowClient().get_experiment_by_name(name) is None


def test_change_from_a_page_of_the_server_itself_is_taken(public):
    address = f"{public.url}{API}/experiments/create"
    headers = {"Origin": public.url, "Sec-Fetch-Site": "same-origin"}
    taken = public.session("editor").post(address, json={"name": "own page"}, headers=headers)
    assert taken.status_code == 200
    foreign = {"Origin": "https://evil.example"}
    read = public.session("editor").get(f"{public.url}/version", headers=foreign)
    assert "access-control-allow-origin" not in read.headers


@pytest.mark.parametrize(
    "path",
    [
        "../../passwords.json",
        "../../../passwords.json",
        "%2e%2e/%2e%2e/passwords.json",
        "..%2f..%2f..%2f..%2fpasswords.json",
        "..%252f..%252fpasswords.json",
        "....//....//passwords.json",
        "/etc/passwd",
        "//etc/passwd",
        "file:///etc/passwd",
        "..\\..\\passwords.json",
        "\x00passwords.json",
    ],
)
def test_no_file_outside_the_artifacts_is_given_out(public, path):
    asking = public.session("admin")
    plain = path.replace("\x00", "%00")
    addresses = [
        f"/get-artifact?run_uuid={public.run_id}&path={plain}",
        f"/model-versions/get-artifact?name=there&version=1&path={plain}",
        f"/api/2.0/mlflow-artifacts/artifacts/{plain}",
        f"/ajax-api/2.0/mlflow-artifacts/artifacts/{public.experiment_id}/{plain}",
        f"/static-files/{plain}",
    ]
    secret = credentials.stored_secret(public.workspace, credentials.NOTEBOOKS)
    for address in addresses:
        request = requests.Request("GET", public.url, auth=asking.auth).prepare()
        request.url = public.url + address  # as it stands, without requests' tidying
        settings = asking.merge_environment_settings(public.url, {}, None, None, None)
        response = asking.send(request, **settings)
        assert secret not in response.text
        assert "root:" not in response.text
        assert response.status_code != 200 or "<html" in response.text


@pytest.mark.parametrize(
    "place",
    [
        *("file:///etc", "/etc", "file://localhost/etc", "s3://bucket/x", "no-such-scheme:/x"),
        *("mlflow-artifacts://evil.example/1", "http://127.0.0.1:1/x", "mlflow-artifacts:/1/../.."),
        "mlflow-artifacts:/1/%2e%2e/%2e%2e",
    ],
)
@pytest.mark.parametrize("user", ["editor", "boss"])
def test_artifacts_lie_in_the_storage_of_the_server_only(public, user, place):
    asking, name = public.session(user), f"elsewhere {user}"
    asking.post(f"{public.url}{API}/registered-models/create", json={"name": name})
    trace = {"trace_id": "tr-x", "tags": {"mlflow.artifactLocation": place}}
    for path, content in (
        ("2.0/mlflow/experiments/create", {"name": place, "artifact_location": place}),
        ("2.0/mlflow/experiments/create", {"name": place, "artifactLocation": place}),
        ("2.0/mlflow/model-versions/create", {"name": name, "source": place}),
        ("3.0/mlflow/traces", {"trace": {"trace_info": trace}}),
    ):
        answer = asking.post(f"{public.url}/api/{path}", json=content)
        assert answer.status_code == 400, (path, answer.text)
        assert "mlflow-artifacts:/" in answer.text
    assert mlflow.MlflowClient().get_experiment_by_name(place) is None


def test_editor_puts_no_artifacts_among_those_of_others(public):
    place = f"mlflow-artifacts:/{public.experiment_id}/{public.run_id}/artifacts"
    experiment = {"name": "among others", "artifact_location": place}
    made = public.session("editor").post(f"{public.url}{API}/experiments/create", json=experiment)
    assert made.status_code == 403


def test_header_that_is_too_long_does_not_stop_the_server(public):
    try:
        headers = {"X-Long": "a" * 300_000}
        status = public.session("reader").get(public.url, headers=headers).status_code
    except requests.ConnectionError:
        status = 431  # closed before the whole header was read
    assert status in (400, 431, 502)
    assert public.session("reader").get(public.url).status_code == 200


def test_assistant_that_can_run_commands_is_not_offered_from_outside(public):
    asking = public.session("admin")
    address = f"{public.url}/ajax-api/3.0/mlflow/assistant/config"
    for headers in ({}, {"X-Forwarded-For": "127.0.0.1"}):
        assert asking.get(address, headers=headers).status_code == 403
    assert last(public, outcome="blocked")["user"] == "admin"


# --- the activity log --------------------------------------------------------------------------


def test_log_says_who_did_what_from_where(public):
    boss = public.session("boss")
    headers = {"X-Forwarded-For": "203.0.113.99"}
    address = f"{public.url}{API}/runs/log-metric"
    boss.post(address, json=metric("seen", public), headers=headers)
    line = last(public, user="boss", path=f"{API}/runs/log-metric")
    assert (line["method"], line["status"], line["outcome"]) == ("POST", 200, "ok")
    assert line["kind"] == "change"
    assert line["host"] == public.host
    assert line["duration"] > 0
    # What a client claims to be forwarded for is not believed; the edge adds what it sees.
    assert line["address"] == "127.0.0.1"


def test_address_is_what_the_last_proxy_says(public):
    address = urlsplit(public.local)
    request = f"GET /two-lines HTTP/1.1\r\nHost: {public.host}\r\n"
    request += "X-Forwarded-For: 198.51.100.1\r\nX-Forwarded-For: 198.51.100.2\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(request.encode())
        assert b" 401" in connection.recv(1000)
    assert last(public, path="/two-lines")["address"] == "198.51.100.2"


def test_log_says_what_was_turned_away(public):
    public.session("reader", "wrong password").get(public.url)
    requests.get(public.local, headers={"Host": "evil.example"})
    assert last(public, outcome="sign-in")["user"] == "reader"
    assert last(public, outcome="host")["host"] == "evil.example"


# --- secrets -----------------------------------------------------------------------------------


def test_token_and_passwords_are_in_no_file_and_no_process_listing(public, cloud):
    secrets = [cloud.account.token, *json.loads(public.workspace.passwords.read_text()).values()]
    assert len(secrets) >= 6
    for path in public.workspace.root.parent.rglob("*"):  # with what the agent keeps
        if path.is_file() and path != public.workspace.passwords:
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        assert not any(secret in line for secret in secrets), process


def test_notebook_signs_in_by_itself_and_its_files_are_in_the_workspace(public):
    tracking.connect(public.workspace, keep=False)
    with tracking.start_run("by itself", "one") as run:
        mlflow.log_text("hello", "a.txt")
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/a.txt") == "hello"
    # Whether the experiment is there was asked first: that it is not is no error.
    lines = settled(public).query("user == 'notebooks'")
    assert set(lines["status"]) == {200, 404} and set(lines["outcome"]) == {"ok"}
    assert public.workspace.tracking_db.is_file()
    (note,) = public.workspace.artifacts.rglob(f"{run.info.run_id}/artifacts/a.txt")
    assert note.read_text() == "hello"


def test_new_name_is_admitted_at_once_and_no_answer_is_interrupted(public):
    account = ("editor", credentials.password_of(public.workspace, "editor"))
    stop = threading.Event()

    def ask(**headers):
        return requests.get(f"{public.local}/version", headers=headers, auth=account).status_code

    def keep_asking():
        codes = {ask()}
        while not stop.is_set():
            codes.add(ask())
        return codes

    with ThreadPoolExecutor() as pool:
        codes = pool.submit(keep_asking)
        try:
            for number in range(20):
                users.change_rules(public.workspace, public=[public.host, f"x{number}.example"])
                assert ask(Host=f"x{number}.example") == 200
        finally:
            stop.set()
    users.change_rules(public.workspace, public=[public.host])
    assert codes.result() == {200}


# --- what is compressed ------------------------------------------------------------------------


def sent(public, path):
    """Return how a body was encoded, its size on the way, and the body."""
    answer = public.session("editor").get(public.url + path, stream=True)
    size = len(answer.raw.read(decode_content=False))
    plain = public.session("editor").get(public.url + path).content
    return answer.headers.get("content-encoding"), size, plain


def test_pages_are_compressed(public):
    page = public.session("reader").get(public.url).text
    (script,) = re.findall(r"static-files/static/js/main[^\"']*", page)
    encoding, size, body = sent(public, f"/{script}")
    assert encoding == "gzip"
    assert size < len(body) / 3


def test_artifact_is_handed_on_as_it_is(public):
    content = b"0123456789" * 100_000
    address = f"/api/2.0/mlflow-artifacts/artifacts/{public.experiment_id}/big.txt"
    public.session("boss").put(public.url + address, data=content)
    assert sent(public, address) == (None, len(content), content)
