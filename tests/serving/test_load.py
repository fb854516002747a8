"""What a request may cost the scoring server and its other clients, whatever is in it."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pandas as pd
import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import serving
from helpers.server import processes
from helpers.serving import inputs, scored_rows
from tests.scoring import NETWORK, SVM, assert_same, post

MB = 2**20
MOST = 62 * MB  # bytes of a large request here; 64 MB are admitted
NAMES = ("length", "width", "age", "city", "course")


@contextmanager
def measured(served):
    """Measure by how many bytes the server grows, while another client asks short questions.

    Gives a dict, ``grown`` and ``waited`` (seconds of each short question) at the end.
    """
    process = psutil.Process(processes.read_state(served.workspace.scoring).pid)
    before, stop, found = process.memory_info().rss, threading.Event(), {"waited": []}
    body = served.split.X_test.head(1).to_csv(index=False)

    def watch():
        peak = before
        while not stop.wait(0.02):
            peak = max(peak, process.memory_info().rss)
        found["grown"] = peak - before

    def ask():
        while not stop.wait(0.02):
            start = time.perf_counter()
            address = f"{served.client.address(NETWORK)}/invocations?record=false"
            answer = requests.post(address, body, headers={"Content-Type": "text/csv"}, timeout=60)
            found["waited"].append(time.perf_counter() - start)
            assert answer.status_code == 200

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(watch), pool.submit(ask)]
        try:
            yield found
        finally:
            stop.set()
        for task in tasks:
            task.result()


def filled(head, item, end):
    """Return a body of `MOST` bytes of equal items."""
    count = (MOST - len(head) - len(end)) // (len(item) + 1)
    return head + b",".join([item] * count) + end


def test_small_requests_of_many_names_stay_small(served):
    records = json.dumps({"dataframe_records": [{f"key{n}": 1} for n in range(8000)]})
    rows = served.split.X_test.head(2)
    more = pd.DataFrame(1, rows.index, [f"column{n}" for n in range(50_000)])
    wide = pd.concat([more, rows], axis=1).to_csv(index=False)
    with measured(served) as found:
        assert "missing inputs" in post(served.client, records).json()["message"]
        answer = post(served.client, wide, kind="text/csv")
    plain = post(served.client, rows.to_csv(index=False), kind="text/csv")
    assert answer.json() == plain.json()
    assert found["grown"] < 150 * MB


LARGE = {
    "rows without values": lambda: filled(b'{"instances": [', b"[]", b"]}"),
    "a row of lists": lambda: filled(b'{"instances": [[', b"[]", b"]]}"),
    "a column of texts": lambda: filled(b'{"inputs": {"city": [', b'"ab"', b"]}}"),
    "one text": lambda: b'{"params": "' + "😀".encode() * (MOST // 4) + b'"}',
    "an open quotation mark": lambda: b"length,width\n1," + b'"' + b"1,\n" * (MOST // 3),
    "new names": lambda: (
        b'{"dataframe_records": [' + b",".join(b'{"%d":1}' % n for n in range(1_000_000)) + b"]}"
    ),
    "rows to answer": lambda: (
        ",".join([*NAMES, "note"]).encode()
        + (b"\n1.125,10.50,30,Lisboa,171," + b"x" * 800) * (MOST // 830)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_large_request_takes_at_most_ten_times_its_size(served, case):
    body = LARGE[case]()
    kind = "text/csv" if body.startswith(b"length") else "application/json"
    with measured(served) as found:
        answer = post(served.client, body, NETWORK, kind)
    assert answer.status_code in ((200,) if case == "rows to answer" else (400, 413))
    assert found["grown"] < 10 * 64 * MB
    assert found["waited"]


# --- what is no request -------------------------------------------------------------------------


def test_client_that_goes_away_in_mid_body_is_not_scored(served):
    body = served.split.X_test.head(3).to_csv(index=False).encode()
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n"
    host, port = served.client.url.removeprefix("http://").split(":")
    log = served.workspace.scoring / "log.txt"
    for head, part in (
        (f"Content-Length: {len(body) + 9}", body),
        ("Transfer-Encoding: chunked", chunk),
    ):
        address = f"POST /models/{SVM}/invocations HTTP/1.1"
        lines = (address, "Host: localhost", "Content-Type: text/csv", head, "", "")
        before = requests_kept(served)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("\r\n".join(lines).encode() + part)
        answer = serving.ask(served.client, SVM, served.split.X_test.head(1))
        assert scored_rows.wait_for(served.workspace.scored_rows, answer.index[0])
        assert requests_kept(served) == before + 1
    assert "Traceback" not in log.read_text(encoding="utf-8")


def requests_kept(served):
    with scored_rows.connect(served.workspace.scored_rows) as connection:
        return connection.execute("SELECT count(*) FROM requests").fetchone()[0]


def test_record_means_what_it_says(served):
    body, address = served.split.X_test.head(1).to_csv(index=False), served.client.address(SVM)
    before, options = requests_kept(served), {"headers": {"Content-Type": "text/csv"}}
    for value, status in (("FALSE", 200), ("0", 200), ("no", 400), ("", 400)):
        url = f"{address}/invocations?record={value}"
        answer = requests.post(url, body, timeout=30, **options)
        assert answer.status_code == status
    assert "record must be true or false" in answer.json()["message"]
    kept = serving.ask(served.client, SVM, served.split.X_test.head(1))
    assert scored_rows.wait_for(served.workspace.scored_rows, kept.index[0])
    assert requests_kept(served) == before + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("age,age\n1,2\n", "'age' is there more than once"),
        ("length,width,age,city,course\n1,2,3,Faro,33\n1,2,3\n", "Line 3 .* fewer fields"),
        ('length,width,age,city,course\n1,2,3,"Faro,33\n', "cannot be read"),
    ],
)
def test_csv_that_pandas_would_mend_is_refused(served, body, message):
    answer = post(served.client, body, kind="text/csv")
    assert answer.status_code == 400
    assert re.search(message, answer.json()["message"])


# --- anything -----------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\ud800")
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*NAMES, *inputs.FORMS, "columns", "data"]), inner)
    ),
    max_leaves=15,
)
ROWS = st.one_of(  # that are nearly right
    st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=4), max_size=3),
    st.dictionaries(st.sampled_from(NAMES), st.lists(VALUES, max_size=3), min_size=4),
)
FIELDS = st.sampled_from(["", "1", "1e999", "old", "Faro", '"', '"a\nb"', "é", "\x00", "nan", "\r"])
BODIES = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda form, content: json.dumps({form: content}).encode(),
        st.sampled_from(inputs.FORMS),
        JSON | ROWS,
    ),
    st.lists(st.lists(FIELDS, min_size=4, max_size=6).map(",".join), max_size=4).map(
        lambda rows: "\n".join([",".join(NAMES), *rows]).encode()
    ),
)
LETTERS = st.characters(codec="latin-1", exclude_categories=["Cc"])  # no header has others
TEXTS = st.text(LETTERS, max_size=20)


def test_whatever_is_sent_gets_an_answer_below_500_on_an_open_connection(served):
    log = served.workspace.scoring / "log.txt"
    known = len(log.read_bytes())
    with closing(requests.Session()) as session:

        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        @given(
            BODIES,
            st.sampled_from(["application/json", "text/csv", "text/csv; x"]) | TEXTS.map(str.strip),
            st.sampled_from([f"/models/{SVM}/invocations", "/invocations"]) | TEXTS,
            st.sampled_from(["record=false", "record=FALSE"]) | TEXTS,
        )
        def send(body, kind, path, query):
            url = f"{served.client.url}/{requests.utils.quote(path.lstrip('/'))}"
            headers = {"Content-Type": kind.encode("latin-1")}
            answer = session.post(url, body, params=query, headers=headers, timeout=30)
            assert answer.status_code < 500
            assert answer.headers.get("Connection") != "close"
            assert "Traceback" not in answer.text
            if answer.status_code >= 400:
                assert answer.json()["message"]

        send()
    assert b"Traceback" not in log.read_bytes()[known:]


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.slow
def test_thousand_requests_beside_idle_connections_and_an_upload_are_all_answered(
    served, local_models
):
    rows = served.split.X_test.head(125)
    host, port = served.client.url.removeprefix("http://").split(":")
    upload = LARGE["rows to answer"]()

    def ask_one_by_one(number):
        model = (NETWORK, SVM)[number % 2]
        with closing(served.client.session()) as session:
            answers = [
                serving.ask(served.client, model, rows.iloc[[n]], session) for n in range(len(rows))
            ]
        return model, pd.concat(answers, ignore_index=True)

    with ExitStack() as idle, ThreadPoolExecutor(9) as pool:
        for _ in range(60):
            idle.enter_context(socket.create_connection((host, int(port))))
        uploaded = pool.submit(post, served.client, upload, NETWORK, "text/csv")
        for model, answer in pool.map(ask_one_by_one, range(8)):
            assert len(answer) == 125
            assert_same(answer, local_models[model].predict(rows))
        assert len(uploaded.result().json()["predictions"]) == MOST // 830
