"""The activity log: what is written, and what notebooks read back."""

import asyncio
import stat

import pandas as pd
import pytest

from helpers import plots
from helpers.server import activity


def request(**changes):
    return {
        "time": 1_800_000_000.5,
        "user": "ana",
        "method": "GET",
        "path": "/",
        "status": 200,
        "duration": 3.5,
        "address": "203.0.113.7",
        "host": "x.ngrok-free.app",
        "outcome": "ok",
        **changes,
    }


@pytest.fixture
def log(workspace):
    workspace.server.mkdir(parents=True, exist_ok=True)
    return activity.ActivityLog(workspace.activity)


def test_kinds_of_requests(workspace, log):
    api = "/ajax-api/2.0/mlflow"
    expected = {
        ("GET", "/"): "page",
        ("GET", f"{api}/runs/get"): "look",
        ("POST", f"{api}/runs/search"): "look",
        ("POST", f"{api}/experiments/search-datasets"): "look",
        ("POST", "/graphql"): "look",
        ("POST", f"{api}/runs/create"): "change",
        ("PATCH", f"{api}/model-versions/update"): "change",
        ("DELETE", f"{api}/registered-models/delete"): "change",
        ("POST", f"{api}/runs/search-and-delete/now"): "change",
        ("GET", "/get-artifact"): "artifact",
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/a.txt"): "artifact",
    }
    for method, path in expected:
        log.write(**request(method=method, path=path))
    table = activity.read_activity(workspace)
    assert table["kind"].tolist() == list(expected.values())


def test_requests_are_counted_by_user_and_outcome(workspace, log):
    log.write(**request())
    log.write(**request(user="luis", method="POST", path="/api/2.0/mlflow/runs/create"))
    log.write(**request(user="luis", status=500, outcome="error", path="/api/2.0/mlflow/runs/get"))
    log.write(**request(user="eve", status=401, outcome="sign-in"))
    log.write(**request(user=None, status=403, outcome="host", host="evil.example"))
    log.write(**request(user=None, status=403, outcome="origin"))
    table = activity.read_activity(workspace)
    counts = activity.summarize_activity(table)
    assert counts.loc["ana", "page"] == 1
    assert counts.loc["luis", ["look", "change", "errors"]].tolist() == [1, 1, 1]
    assert counts.loc["eve", "rejected: sign-in"] == 1
    assert counts.loc["(none)", ["rejected: host", "rejected: origin"]].tolist() == [1, 1]
    assert counts.to_numpy().sum() == len(table) + 1  # the error is counted as a look as well
    figure = plots.activity(table)
    shown = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert shown == set(counts.index)


def test_log_that_is_empty_is_shown_as_empty(workspace):
    table = activity.read_activity(workspace)
    assert table.empty
    assert activity.summarize_activity(table).empty
    assert plots.activity(table) is None


def test_log_rotates_and_is_read_back_in_order(workspace, monkeypatch):
    monkeypatch.setattr(activity, "MAX_BYTES", 2_000)
    workspace.server.mkdir(parents=True)
    log = activity.ActivityLog(workspace.activity)
    for number in range(90):
        log.write(**request(time=1_800_000_000 + number, path=f"/{number}"))
    files = sorted(workspace.server.glob("activity.jsonl*"))
    assert len(files) == activity.FILES
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert all(file.stat().st_size <= 2_000 for file in files)
    table = activity.read_activity(workspace)
    assert table["path"].tolist() == [f"/{number}" for number in range(90 - len(table), 90)]


def test_line_breaks_in_what_a_client_sends_stay_inside_their_line(workspace, log):
    log.write(**request(user='eve\n{"user": "admin"}', path="/\r\n\u2028x"))
    table = activity.read_activity(workspace)
    assert len(table) == 1
    assert table["user"].iloc[0].startswith("eve\n")


def test_times_are_utc(workspace, log):
    log.write(**request(time=1_800_000_000.5))
    assert activity.read_activity(workspace)["time"].iloc[0] == pd.Timestamp("2027-01-15 08:00Z")


def as_server(writing):
    """Write as the server does: in a loop, which is what counts the time."""

    async def run():
        writing()

    asyncio.run(run())


def test_strangers_push_no_line_of_a_user_out(workspace, log):
    log.write(**request())

    def attack():
        for number in range(3_200):
            tried = {"user": f"{number}\N{PILE OF POO}" * 4_000, "path": "/\N{PILE OF POO}" * 4_000}
            log.write(signed_in=False, **request(outcome="sign-in", status=401, **tried))
        log.flush()

    as_server(attack)
    table = activity.read_activity(workspace)
    assert "ana" in set(table["user"])
    assert table["count"].sum() == 3_201
    assert sum(file.stat().st_size for file in workspace.server.iterdir()) < 1_000_000
    lines = (workspace.server / activity.NOT_SIGNED_IN).read_bytes().splitlines()
    assert max(map(len, lines)) < 1_500
    counts = activity.summarize_activity(table)
    assert "ana" in counts.index
    assert len(counts) == activity.MOST_USERS + 1
    assert counts["rejected: sign-in"].sum() == 3_200
    shown = plots.activity(table).axes[0].get_yticklabels()
    assert len(shown) == activity.MOST_USERS + 1


def test_repeats_of_a_stranger_are_one_line_with_their_number_and_time(workspace, log):
    def repeat():
        for number in range(50):
            turned_away = {"outcome": "host", "status": 403, "time": 1_800_000_000 + number}
            log.write(signed_in=False, **request(user=None, **turned_away))
        log.flush()

    as_server(repeat)
    once, rest = activity.read_activity(workspace).to_dict("records")
    assert (once["count"], rest["count"]) == (1, 49)
    assert (rest["time"] - rest["first"]).total_seconds() == 48


@pytest.mark.parametrize("torn", [b'{"time": 18', b"\xff\x00\n", b"[]\n", b'{"time": 1}\n'])
def test_damaged_lines_are_named_and_the_rest_is_read(workspace, log, capsys, torn):
    log.write(**request())
    with workspace.activity.open("ab") as file:
        file.write(torn)
    activity.ActivityLog(workspace.activity).write(**request(user="luis"))
    assert activity.read_activity(workspace)["user"].tolist() == ["ana", "luis"]
    said = capsys.readouterr().out
    assert f"1 of 3 lines of {workspace.activity}" in said
    assert torn in workspace.activity.read_bytes()
