import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.pyfunc.scoring_server.client import ScoringServerClient

from helpers import registry, series, serving, tracking
from helpers.data import DataError
from helpers.server import processes, stop_server
from helpers.serving import app as serving_app
from helpers.serving import scored_rows
from helpers.workspace import PROJECT_ROOT, MissingStepError, open_workspace
from tests.scoring import log_network, log_svm, put_in_production, serve_here
from tests.series import wait_for

NETWORK, SVM = "model_conv_network", "model_svm_rbf"


@pytest.fixture(scope="module")
def production(tmp_path_factory, big_split, _no_team_server):
    """Both models in Production, and a scoring server of them."""
    workspace = open_workspace(tmp_path_factory.mktemp("production") / "ws")
    tracking.connect(workspace, keep=False)
    put_in_production(NETWORK, log_network(big_split, workspace.root), big_split)
    first = log_svm(big_split)
    put_in_production(SVM, first, big_split)
    server = serving.start(workspace, port=5401, keep=False)
    yield SimpleNamespace(workspace=workspace, split=big_split, server=server, first=first)
    serving.stop(workspace)
    stop_server(workspace)


@pytest.fixture
def served(production):
    """The scoring server, with this process connected to its MLflow server."""
    tracking.connect(production.workspace, keep=False)
    production.server = serving.start(production.workspace, keep=False)
    yield production
    mlflow.end_run("KILLED")


@pytest.fixture(scope="module")
def local_models(production):
    """The same models, loaded as a client would without a scoring server."""
    tracking.connect(production.workspace, keep=False)
    return {name: registry.load_production(name) for name in (NETWORK, SVM)}


def post(served, body, model=SVM, kind="application/json", **options):
    """Send a body as it is."""
    headers = {"Content-Type": kind, **options.pop("headers", {})}
    address = f"{served.server.address(model)}/invocations"
    return requests.post(address, data=body, headers=headers, timeout=60, **options)


def assert_same(answer, expected):
    """Compare an answer over HTTP with that of the loaded model."""
    got = pd.DataFrame(answer)
    assert list(got.columns) == list(expected.columns)
    assert (got["prediction"].to_numpy() == expected["prediction"].to_numpy()).all()
    np.testing.assert_allclose(
        got.iloc[:, 1:].to_numpy("float64"), expected.iloc[:, 1:].to_numpy("float64"), atol=1e-6
    )


# --- the protocol ------------------------------------------------------------------------------


def as_forms(rows):
    """Write rows in every form of MLflow's protocol."""
    split = json.loads(rows.to_json(orient="split", index=False))
    return {
        "dataframe_split": {"dataframe_split": split},
        "dataframe_records": {"dataframe_records": rows.to_dict("records")},
        "instances by name": {"instances": rows.to_dict("records")},
        "instances by position": {"instances": rows.to_numpy(object).tolist()},
        "inputs": {"inputs": rows.to_dict("list")},
        "inputs of one row": {"inputs": rows.head(1).to_dict("records")[0]},
    }


@pytest.mark.parametrize("model", [NETWORK, SVM])
@pytest.mark.parametrize(
    "form",
    [
        "dataframe_split",
        "dataframe_records",
        "instances by name",
        "instances by position",
        "inputs",
        "inputs of one row",
        "csv",
        "csv with semicolons",
    ],
)
def test_every_form_gets_the_answer_of_the_loaded_model(served, local_models, model, form):
    rows = served.split.X_test.head(1 if form == "inputs of one row" else 20)
    if form.startswith("csv"):
        separator = ";" if "semicolons" in form else ","
        body, kind = rows.to_csv(index=False, sep=separator), "text/csv; charset=utf-8"
    else:
        body, kind = json.dumps(as_forms(rows)[form], default=float), "application/json"
    answer = post(served, body, model, kind)
    assert answer.status_code == 200, answer.text
    assert_same(answer.json()["predictions"], local_models[model].predict(rows))


def test_texts_of_a_csv_that_look_like_numbers_stay_texts(loaded_svm):
    body = b"length,width,age,city,course\n1,2,30,007,33\n"
    frame = serving_app.parse(body, "text/csv", loaded_svm.columns)
    assert frame["city"].tolist() == ["007"]
    assert frame["course"].tolist() == [33]


def test_headers_say_which_version_answered(served):
    answer = post(served, json.dumps(as_forms(served.split.X_test.head(1))["inputs"]), SVM)
    version = registry.production_version(SVM)
    assert answer.headers["X-Model-Name"] == SVM
    assert answer.headers["X-Model-Version"] == str(version.version)
    assert answer.headers["X-Run-Id"] == version.run_id
    assert len(answer.headers["X-Request-Id"]) == 32


def test_mlflows_own_client_asks_the_server(served, local_models):
    host, port = served.server.url.removeprefix("http://").split(":")
    client = ScoringServerClient(host, int(port))
    client.ping()
    assert client.get_version() == mlflow.__version__
    rows = served.split.X_test.head(5)
    answer = client.invoke(rows).get_predictions()
    assert_same(answer, local_models[NETWORK].predict(rows))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_sends_a_csv(served, local_models, tmp_path):
    rows = served.split.X_test.head(4)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    command, answer = serving.ask_with_curl(served.server, SVM, tmp_path / "rows.csv").split(
        "\n", 1
    )
    assert command.startswith("$ curl ")
    assert_same(json.loads(answer)["predictions"], local_models[SVM].predict(rows))


def test_paths_of_the_protocol(served):
    for base in (served.server.url, served.server.address(SVM)):
        assert requests.get(f"{base}/ping", timeout=10).status_code == 200
        assert requests.get(f"{base}/version", timeout=10).text == mlflow.__version__
    assert requests.get(f"{served.server.url}/models/none/ping", timeout=10).status_code == 404
    assert requests.get(f"{served.server.url}/nothing", timeout=10).status_code == 404
    assert requests.get(f"{served.server.url}/invocations", timeout=10).status_code == 405


# --- what cannot be answered -------------------------------------------------------------------


def changed(rows, **columns):
    records = rows.to_dict("records")
    records[0].update(columns)
    return json.dumps({"dataframe_records": records}, default=float)


ROW = '{"length": 1, "width": 2, "age": 30, "city": "Porto", "course": 33}'
BAD = {
    "empty body": (b"", "application/json", 400, "not JSON"),
    "cut off": (b'{"instances": [', "application/json", 400, "not JSON"),
    "not UTF-8": (b'{"instances": "\xff"}', "application/json", 400, "not JSON"),
    "no form": (b'{"rows": []}', "application/json", 400, "exactly one of"),
    "a list": (b"[1, 2]", "application/json", 400, "exactly one of"),
    "two forms": (b'{"inputs": [], "instances": []}', "application/json", 400, "exactly one of"),
    "nested": (b"[" * 100_000, "application/json", 400, "nested"),
    "10 MB of garbage": (os.urandom(10_000_000), "application/json", 400, "not JSON"),
    "10 MB of brackets": (b"[" * 10_000_000, "application/json", 400, "nested"),
    "10 MB of a CSV": (os.urandom(10_000_000), "text/csv", 400, "not UTF-8"),
    "10 MB of letters": (b"x" * 10_000_000, "text/csv", 400, "cannot be read"),
    "10 MB of lines": (b"x\n" * 5_000_000, "text/csv", 400, "missing inputs"),
    "empty CSV": (b"", "text/csv", 400, "empty"),
    "CSV of wider rows": (b"length,width\n1,2,3\n", "text/csv", 400, "more fields"),
    "too much": (b"x" * (65 * 2**20), "application/json", 413, "64 MB"),
    "no type": (ROW.encode(), "", 415, "Content-Type"),
    "other type": (ROW.encode(), "application/xml", 415, "application/xml"),
    "numbers": (b'{"instances": [1, 2]}', "application/json", 400, "Row 0 has no list"),
    "short row": (b'{"instances": [[1, 2]]}', "application/json", 400, "2 values"),
    "uneven columns": (
        b'{"inputs": {"length": [1], "width": [1, 2]}}',
        "application/json",
        400,
        "different numbers",
    ),
    "no data": (b'{"dataframe_split": {"columns": []}}', "application/json", 400, "'data'"),
    "a text": (b'{"dataframe_records": "rows"}', "application/json", 400, "list of objects"),
    "column twice": (
        b'{"dataframe_split": {"columns": ["age", "age"], "data": [[1, 2]]}}',
        "application/json",
        400,
        "'age' is there more than once",
    ),
    "missing column": (
        b'{"dataframe_records": [{"length": 1, "width": 2}]}',
        "application/json",
        400,
        "missing inputs ['age', 'city', 'course']",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_request_that_cannot_be_answered_says_why(served, case):
    body, kind, status, message = BAD[case]
    answer = post(served, body, SVM, kind)
    assert answer.status_code == status
    assert message in answer.json()["message"]
    assert "Traceback" not in answer.text
    assert len(answer.text) < 2000


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", "old", "'age'"),
        ("age", [1], "'age'"),
        ("age", {"years": 1}, "'age'"),
        ("age", float("inf"), "finite"),
        ("age", 10**400, "finite"),
        ("city", 1.5, "'city'"),
        ("city", True, "'city'"),
    ],
)
def test_wrong_type_names_the_column(served, column, value, message):
    answer = post(served, changed(served.split.X_test.head(2), **{column: value}))
    assert answer.status_code == 400
    assert message in answer.json()["message"]


@pytest.mark.parametrize("model", [NETWORK, SVM])
def test_gaps_unseen_categories_and_extra_columns_are_answered(served, local_models, model):
    rows = served.split.X_test.head(2)
    plain = post(served, changed(rows), model).json()["predictions"]
    extra = post(served, changed(rows, name="Ana", number=7), model)
    assert extra.json()["predictions"] == plain
    for column, value in {
        "age": None,
        "length": float("nan"),
        "city": "Évora",
        "course": 1,
    }.items():
        answer = post(served, changed(rows, **{column: value}), model)
        assert answer.status_code == 200
        first, second = answer.json()["predictions"]
        assert second == pytest.approx(plain[1])
        assert sum(v for k, v in first.items() if k != "prediction") == pytest.approx(1)


@pytest.mark.parametrize(
    "body",
    [
        '{"instances": []}',
        '{"dataframe_records": []}',
        '{"dataframe_split": {"columns": [], "data": []}}',
    ],
)
def test_no_rows_get_an_empty_answer(served, body):
    answer = post(served, body)
    assert (answer.status_code, answer.json()) == (200, {"predictions": []})


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)
NAMES = st.sampled_from(["length", "width", "age", "city", "course", "other"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.recursive(CELLS, lambda inner: st.lists(inner, max_size=3), max_leaves=6),
        st.lists(st.dictionaries(NAMES, CELLS, min_size=5), max_size=3),
        st.dictionaries(NAMES, st.lists(CELLS, max_size=3), min_size=5),
    ),
    st.sampled_from(serving_app.FORMS),
)
def test_any_json_is_answered_or_refused_with_a_message(loaded_svm, content, form):
    body = json.dumps({form: content}).encode()
    try:
        answer = serving_app._score(loaded_svm, body, "application/json", "id", None)
    except serving_app.BadRequestError as error:
        assert str(error)
    else:
        assert isinstance(json.loads(answer)["predictions"], list)


@pytest.fixture(scope="module")
def loaded_svm(production):
    tracking.connect(production.workspace, keep=False)
    return serving_app.load_served(SVM, registry.production_version(SVM))


# --- password and names ------------------------------------------------------------------------


class Fixed(serving_app.Models):
    """Models that do not change."""

    def __init__(self, *served):
        super().__init__()
        self.served = {each.name: each for each in served}

    def refresh(self):
        """Stay as they are."""


def test_password_is_asked_of_all_but_ping(loaded_svm):
    app = serving_app.Application(Fixed(loaded_svm), None, "the password of a test")
    body = json.dumps({"instances": []})
    headers = {"Content-Type": "application/json"}
    with serve_here(app.starlette()) as url:
        assert requests.get(f"{url}/ping", timeout=10).status_code == 200
        for account in (None, ("client", "wrong"), ("client", "the password of a tes")):
            for path in ("/models", "/invocations"):
                method = "GET" if path == "/models" else "POST"
                answer = requests.request(
                    method, url + path, data=body, headers=headers, auth=account, timeout=10
                )
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic")
        with pytest.raises(serving.ServingError, match="password"):
            serving.connect(url, "wrong")
        server = serving.connect(url, "the password of a test")
        assert server.models[SVM]["version"] == loaded_svm.version
        assert "the password" not in repr(server)


def test_other_sites_name_is_refused(served):
    answer = post(served, b'{"instances": []}', headers={"Host": "evil.example"})
    assert answer.status_code == 403


def test_outside_address_gets_a_password(workspace, monkeypatch):
    assert serving.service(workspace).environment == {}
    made = serving.service(workspace, "0.0.0.0").environment["SCORING_PASSWORD"]
    assert len(made) >= 20
    assert oct(workspace.passwords.stat().st_mode)[-3:] == "600"
    monkeypatch.setenv("SCORING_PASSWORD", "a password that was given")
    chosen = serving.service(workspace, "0.0.0.0").environment["SCORING_PASSWORD"]
    assert chosen == "a password that was given"


# --- versions ----------------------------------------------------------------------------------


class Load(threading.Thread):
    """Asks one model without a pause; notes every status and version."""

    def __init__(self, served):
        super().__init__()
        self.url = f"{served.server.address(SVM)}/invocations"
        self.body = json.dumps({"instances": served.split.X_test.head(2).to_dict("records")})
        self.seen, self.stopped = [], threading.Event()

    def run(self):
        headers = {"Content-Type": "application/json"}
        with requests.Session() as session:
            while not self.stopped.is_set():
                answer = session.post(self.url, data=self.body, headers=headers, timeout=60)
                self.seen.append((answer.status_code, answer.headers.get("X-Model-Version")))


def test_new_version_takes_over_without_a_failed_request_and_a_bad_one_is_refused(served):
    second, third = log_svm(served.split, C=4.0), log_svm(served.split)
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
    seen = [each for thread in threads for each in thread.seen]
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {"1", "2"}
    for thread in threads:
        versions = [version for _, version in thread.seen]
        assert versions == sorted(versions)


def break_model(workspace, run):
    """Damage a logged model's classifier, as a disk would."""
    model_id = run.outputs.model_outputs[0].model_id
    (path,) = workspace.artifacts.glob(f"*/models/{model_id}/artifacts/**/classifier.joblib")
    path.write_bytes(path.read_bytes()[:100])


def register_broken(run):
    model_id = run.outputs.model_outputs[0].model_id
    version = mlflow.MlflowClient().create_model_version(
        SVM, f"models:/{model_id}", run.info.run_id, model_id=model_id
    )
    return version.version


def refused(served):
    answer = requests.get(f"{served.server.url}/models", timeout=10).json()
    return answer["refused"].get(SVM, {})


@pytest.mark.slow
def test_killed_server_is_started_again_with_nothing_lost(served):
    process = processes.read_state(served.workspace.scoring)
    answer = serving.ask(served.server, SVM, served.split.X_test.head(3))
    assert scored_rows.wait_for(served.workspace.scored_rows, answer.index[-1])
    psutil.Process(process.pid).send_signal(signal.SIGKILL)
    assert wait_for(lambda: processes.read_state(served.workspace.scoring) is None)
    with pytest.raises(serving.ServingError, match="does not answer"):
        serving.ask(served.server, SVM, served.split.X_test.head(1))
    again = serving.start(served.workspace, keep=False)
    assert processes.read_state(served.workspace.scoring).pid != process.pid
    assert len(serving.ask(again, SVM, served.split.X_test.head(3))) == 3
    with sqlite3.connect(served.workspace.scored_rows) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert scored_rows.known_rows(served.workspace.scored_rows, answer.index) == set(answer.index)


@pytest.mark.slow
def test_thousand_requests_of_eight_clients_are_all_answered(served, local_models):
    rows = served.split.X_test.head(125)
    expected = {
        name: registry.load_production(name).predict(rows).reset_index(drop=True)
        for name in (NETWORK, SVM)
    }

    def client(number):
        model = (NETWORK, SVM)[number % 2]
        with served.server.session() as session:
            answers = [
                serving.ask(served.server, model, rows.iloc[[n]], session) for n in range(len(rows))
            ]
        return model, pd.concat(answers, ignore_index=True)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(client, range(8)))
    assert sum(len(answer) for _, answer in results) == 1000
    for model, answer in results:
        assert_same(answer.to_dict("list"), expected[model])


def test_without_production_the_notebook_to_run_is_named(tracking_server, workspace, monkeypatch):
    monkeypatch.setattr(series, "MODELS", {"model_that_is_not_there": series.MODELS[SVM]})
    with pytest.raises(MissingStepError, match="04_registry_promotion"):
        serving.start(tracking_server.workspace)


def test_address_where_nothing_answers_is_said():
    with pytest.raises(serving.ServingError, match="No scoring server answers"):
        serving.connect("http://127.0.0.1:9")


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def many(served, tmp_path):
    """A CSV of 700 rows with a column that no model knows."""
    rows = served.split.X_train.head(700).reset_index(drop=True)
    rows.insert(0, "id", [f"s{number:05d}" for number in range(len(rows))])
    rows.to_csv(tmp_path / "many.csv", index=False)
    return SimpleNamespace(path=tmp_path / "many.csv", rows=rows)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_file_is_scored_chunk_by_chunk(served, many, tmp_path, ending):
    output = tmp_path / f"scored.{ending}"
    assert serving.score_csv(served.server, SVM, many.path, output, ["id"], 150, False) == 700
    table = pd.read_csv(output) if ending == "csv" else pd.read_parquet(output)
    assert table["id"].tolist() == many.rows["id"].tolist()
    assert table["row"].tolist() == list(range(1, 701))
    expected = registry.load_production(SVM).predict(many.rows.drop(columns="id"))
    assert_same(table[expected.columns].to_dict("list"), expected)
    assert table["model_version"].astype(str).nunique() == 1
    assert not list(tmp_path.glob("*.parts"))


def test_packed_file_with_semicolons_and_blanks_in_the_header(served, many, tmp_path):
    odd = many.rows.rename(columns={"age": " age\t"})
    odd.to_csv(tmp_path / "odd.csv.gz", index=False, sep=";", encoding="utf-8-sig")
    plain, other = tmp_path / "plain.csv", tmp_path / "other.csv"
    serving.score_csv(served.server, SVM, many.path, plain, record=False)
    serving.score_csv(served.server, SVM, tmp_path / "odd.csv.gz", other, record=False)
    first, second = (pd.read_csv(path).drop(columns="row_id") for path in (plain, other))
    pd.testing.assert_frame_equal(first, second)


@pytest.fixture
def interrupted(served, many, tmp_path, monkeypatch):
    """A batch that was interrupted at its fourth chunk; the rows of every request."""
    asked, ask = [], serving.ask

    def counted(server, model, rows, *more):
        asked.append(len(rows))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return ask(server, model, rows, *more)

    monkeypatch.setattr(serving, "ask", counted)
    output = tmp_path / "scored.csv"
    with pytest.raises(KeyboardInterrupt):
        serving.score_csv(served.server, SVM, many.path, output, chunk_rows=100, record=False)
    assert not output.exists()
    return SimpleNamespace(output=output, asked=asked)


def test_interrupted_file_goes_on_and_finished_chunks_are_not_asked_again(
    served, many, interrupted, capsys
):
    output = interrupted.output
    assert serving.score_csv(served.server, SVM, many.path, output, chunk_rows=100) == 700
    assert interrupted.asked == [100] * (4 + 4)
    assert "goes on after the 3 parts" in capsys.readouterr().out
    assert pd.read_csv(output)["row"].tolist() == list(range(1, 701))


def test_changed_file_does_not_reuse_parts(served, many, interrupted):
    many.rows.head(350).to_csv(many.path, index=False)
    output = interrupted.output
    assert serving.score_csv(served.server, SVM, many.path, output, chunk_rows=100) == 350
    assert interrupted.asked[4:] == [100, 100, 100, 50]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("length,width\n1,2\n", "Rows 1 to 1.*missing inputs"),
        ("", "is not a CSV"),
        ("length;length\n1;2\n", "more than one column"),
    ],
)
def test_file_that_cannot_be_scored_says_why(served, tmp_path, content, message):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises((DataError, serving.ServingError), match=message):
        serving.score_csv(served.server, SVM, tmp_path / "bad.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_output_and_model_that_cannot_be_are_named(served, many, tmp_path):
    with pytest.raises(serving.ServingError, match=r"\.csv or \.parquet"):
        serving.score_csv(served.server, SVM, many.path, tmp_path / "out.xlsx")
    with pytest.raises(serving.ServingError, match="is not served"):
        serving.score_csv(served.server, "other", many.path, tmp_path / "out.csv")
    with pytest.raises(DataError, match="no column 'number'"):
        serving.score_csv(served.server, SVM, many.path, tmp_path / "out.csv", ["number"])


@pytest.mark.slow
def test_command_scores_a_large_file_in_bounded_memory_and_goes_on_after_a_kill(served, tmp_path):
    rows = served.split.X_train
    path, output = tmp_path / "large.csv", tmp_path / "scored.parquet"
    with path.open("w") as file:
        rows.to_csv(file, index=False)
        for _ in range(200):
            rows.to_csv(file, index=False, header=False)
    total = 201 * len(rows)
    command = [sys.executable, "-m", "helpers.serving", "--workspace", served.workspace.root]
    command = [str(each) for each in (*command, "--score", path, output, "--model", SVM)]
    options = {"cwd": PROJECT_ROOT, "env": {**os.environ, "MLFLOW_TRACKING_URI": ""}}
    first = subprocess.Popen(command, **options)
    parts = output.with_name("scored.parquet.parts")
    assert wait_for(lambda: parts.is_dir() and len(list(parts.glob("*.parquet"))) > 5, 120)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = len(list(parts.glob("*.parquet")))
    second = subprocess.Popen(command, **options, stdout=subprocess.PIPE, text=True)
    process, peak = psutil.Process(second.pid), 0
    while second.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    text = second.communicate()[0]
    assert second.returncode == 0
    assert f"goes on after the {kept:,} parts" in text
    assert f"{total:,} rows scored" in text
    table = pd.read_parquet(output)
    assert table["row"].tolist() == list(range(1, total + 1))
    assert peak < 700 * 2**20
