"""Every route of the MLflow server, asked by everybody: who changes what, in all of its tables."""

import json
import queue
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from helpers.server.activity import is_look
from tests.server.routes import every_route

pytestmark = pytest.mark.slow

MCP_SERVER = "com.example/theirs"  # such a server must have a name of this kind
# What an admin makes before, so that there is something to be changed: version of the API, path
# and body.
THINGS = [
    ("2.0", "logged-models", {"experiment_id": "<experiment>", "name": "theirs"}),
    ("2.0", "registered-models/create", {"name": "theirs", "tags": [{"key": "a", "value": "b"}]}),
    ("2.0", "model-versions/create", {"name": "theirs", "source": "models:/<model>",
        "model_id": "<model>"}),
    ("2.0", "model-versions/set-tag", {"name": "theirs", "version": "1", "key": "a", "value": "b"}),
    ("2.0", "registered-models/alias", {"name": "theirs", "version": "1", "alias": "champion"}),
    ("3.0", "traces", {"trace": {"trace_info": {
        "trace_id": "tr-1", "request_time": "2026-01-01T00:00:00Z", "execution_duration": "1s",
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {
            "experiment_id": "<experiment>"}}, "state": "OK", "tags": {"a": "b"}}}}),
    ("3.0", "traces/tr-1/assessments", {"assessment": {
        "assessment_name": "good", "feedback": {"value": True},
        "source": {"source_type": "HUMAN", "source_id": "boss"}}}),
    ("3.0", "datasets/create", {"name": "theirs", "experiment_ids": ["<experiment>"]}),
    ("3.0", "label-schemas/create", {"experiment_id": "<experiment>", "name": "schema",
        "type": "FEEDBACK", "input": {"text": {}}}),
    ("3.0", "review-queues/get-or-create-user", {
        "experiment_id": "<experiment>", "user": "boss"}),
    ("3.0", "issues", {"experiment_id": "<experiment>", "name": "issue", "description": "x",
        "status": "pending"}),
    ("3.0", "scorers/register", {"experiment_id": "<experiment>", "name": "theirs",
        "serialized_scorer": '{"name": "theirs"}'}),
    ("3.0", "roles/create", {"name": "theirs", "workspace": "default"}),
    ("3.0", "gateway/secrets/create", {"secret_name": "theirs", "provider": "openai",
        "secret_value": {"api_key": "a secret"}}),
    ("3.0", "gateway/budgets/create", {"budget_unit": "USD", "budget_amount": 1.0,
        "duration": {"unit": "DAYS", "value": 1}, "target_scope": "GLOBAL",
        "budget_action": "ALERT"}),
    ("2.0", "webhooks", {"name": "theirs", "url": "https://93.184.215.14/hook", "events": [
        {"entity": "REGISTERED_MODEL", "action": "CREATED"}]}),
    ("3.0", "mcp-servers", {"name": MCP_SERVER}),
    ("3.0", f"mcp-servers/{MCP_SERVER}/tags", {"key": "a", "value": "b"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    found = every_route(tmp_path_factory.mktemp("routes") / "ws")
    # Of each kind of server that the app joins.
    for path in ("/graphql", "/api/2.0/mlflow/runs/create", "/api/2.0/mlflow/users/create"):
        assert any(route.path == path for route in found)
    assert any(route.path.startswith("/gateway/") for route in found)
    assert sum(bool(route.fields) for route in found) > 400
    return found


def tables(public):
    """Return every row of the databases, by database and table."""
    rows = {}
    for path in (public.workspace.tracking_db, public.workspace.server / "users.db"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            for (name,) in names.fetchall():
                found = database.execute(f'SELECT * FROM "{name}"').fetchall()
                rows[path.name, name] = [tuple(sorted(dict(row).items())) for row in found]
    return rows


def files(public):
    found = (path for path in public.workspace.artifacts.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in found}


def ids(public):
    """Return an id of each kind that the tables have."""
    rows = [row for rows in tables(public).values() for row in rows]
    found = (pair for row in rows for pair in row)
    return {name: value for name, value in found if name.endswith("_id") and value}


@pytest.fixture(scope="module")
def theirs(public):
    """What others made, by the names of fields."""
    boss, model = public.session("boss"), ""
    for version, path, body in THINGS:
        body = (
            json.dumps(body).replace("<experiment>", public.experiment_id).replace("<model>", model)
        )
        address = f"{public.url}/api/{version}/mlflow/{path}"
        answer = boss.post(address, data=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, (path, answer.text)
        if path == "logged-models":
            model = answer.json()["model"]["info"]["model_id"]
    artifact = f"{public.experiment_id}/{public.run_id}/artifacts/note.txt"
    return {
        **ids(public),
        **dict.fromkeys(("experiment_id", "experiment"), public.experiment_id),
        **dict.fromkeys(("experiment_ids", "source_experiment_ids"), [public.experiment_id]),
        **dict.fromkeys(("run_id", "run_uuid", "source_run_id"), public.run_id),
        **dict.fromkeys(("trace_id", "request_id"), "tr-1"),
        **{"trace_ids": ["tr-1"], "request_ids": ["tr-1"], "model_id": model},
        **{"name": "theirs", "version": "1", "alias": "champion", "stage": "Production"},
        **{"username": "boss", "user": "boss", "is_admin": False, "password": "a long password"},
        **{"key": "a", "value": "c", "timestamp": 1_800_000_000_000, "new_name": "ours"},
        **{"resource_type": "registered_model", "resource_id": "theirs", "permission": "MANAGE"},
        **{"artifact_path": artifact, "path": "note.txt", "tags": [{"key": "a", "value": "c"}]},
        **{"source": f"mlflow-artifacts:/{artifact}", "artifact_location": ""},
        **dict.fromkeys(("filter", "filter_string", "page_token"), ""),
        **{"model_id_to_name": {}, "max_results": 10, "max_timestamp_millis": 1_900_000_000_000},
    }


def ask_all(public, routes, theirs, user=None):
    """Send every route as a user; return the status of each."""
    sessions = queue.SimpleQueue()
    for _ in range(4):
        sessions.put(public.session(user))

    def ask(route):
        own = {"name": MCP_SERVER} if "/mcp-servers" in route.path else {}
        path, body = route.filled(theirs | own)
        asking = sessions.get()
        # What takes no JSON is told by the address; what takes it gets nothing there.
        in_address = {} if route.fields and route.method != "GET" else body or theirs
        answer = asking.request(
            route.method,
            public.url + path,
            params=in_address,
            json=None if route.method == "GET" else body,
            timeout=30,
        )
        sessions.put(asking)
        return route, answer.status_code

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, routes))


def changed(before, after):
    """Return the rows that are gone, and those that are new; a changed row is both."""

    def only(one, other):
        return [
            (table, row) for table in one for row in Counter(one[table]) - Counter(other[table])
        ]

    return only(before, after), only(after, before)


def test_nothing_is_answered_without_sign_in(public, routes, theirs):
    before, stored = tables(public), files(public)
    for route, status in ask_all(public, routes, theirs):
        assert status == 401, route
    assert changed(before, tables(public)) == ([], [])
    assert files(public) == stored


def test_reader_changes_no_row_and_no_file(public, routes, theirs):
    before, stored = tables(public), files(public)
    statuses = ask_all(public, routes, theirs, "reader")
    assert changed(before, tables(public)) == ([], [])
    assert files(public) == stored
    assert sum(status == 200 for _, status in statuses) > 60
    changing = [status for route, status in statuses if not is_look(route.method, route.path)]
    assert set(changing) == {403}


def test_editor_changes_no_row_and_no_file_of_others(public, routes, theirs):
    before, stored = tables(public), files(public)
    statuses = ask_all(public, routes, theirs, "editor")
    gone, new = changed(before, tables(public))
    assert gone == []
    assert files(public).items() >= stored.items()
    assert sum(status == 200 for _, status in statuses) > 60
    # What is new belongs to nothing that was there.
    owners = ("run_uuid", "run_id", "experiment_id", "model_id", "trace_id", "request_id")
    known = {pair for rows in before.values() for row in rows for pair in row if pair[0] in owners}
    known = {(name, value) for name, value in known if value not in (None, "", 0)}
    for (_, table), row in new:
        named = {("name", "theirs")} if table.startswith(("registered_", "model_")) else set()
        assert not (known | named) & set(row), (table, row)
