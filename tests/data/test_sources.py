"""A table comes from where `DATA_SOURCE` says, or a sentence says why not."""

import functools
import http.server
import threading
from contextlib import contextmanager

import pandas as pd
import pytest

from helpers.data import DataError, load_table, read_table, save_split
from tests.conftest import split_table
from tests.data.conftest import as_csv, zipped


@contextmanager
def site(handler):
    """A real web server on loopback; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class CutShort(Files):
    """Promises more bytes than it sends, as a broken line does."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"length,width,Target\n1,2,high\n")
        self.close_connection = True


@pytest.fixture
def web(tmp_path):
    """The address of a web server that shows the test's folder."""
    with site(functools.partial(Files, directory=str(tmp_path))) as address:
        yield address


@pytest.fixture
def nobody(monkeypatch):
    """An address at which UCI does not answer."""
    url = "http://127.0.0.1:9/students.zip"
    monkeypatch.setattr("helpers.data.sources.UCI_URL", url)
    return url


@pytest.fixture
def uci(web, tmp_path, small_frame, monkeypatch):
    """UCI answers with a small table of its own."""
    frame = small_frame(seed=5)
    (tmp_path / "students.zip").write_bytes(zipped(as_csv(frame, sep=";")))
    monkeypatch.setattr("helpers.data.sources.UCI_URL", f"{web}/students.zip")
    return frame


def test_bundled_sample_says_that_it_is_synthetic(workspace):
    manifest = split_table(load_table("sample", workspace)).manifest
    assert (manifest["source"], manifest["synthetic"]) == ("sample", True)


def test_url_gives_the_same_table_as_the_file(workspace, web, small_csv):
    path = small_csv("table.csv")
    by_url, by_path = (load_table(s, workspace) for s in (f"{web}/table.csv", str(path)))
    assert by_url.digest == by_path.digest
    assert (by_url.source, by_path.source) == (f"{web}/table.csv", str(path))


def test_missing_file_or_folder_is_refused_by_name(workspace, tmp_path):
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(DataError, match=f"{path.name}.*DATA_SOURCE"):
            load_table(str(path), workspace)


def test_url_that_does_not_answer_is_refused_by_name(workspace, nobody, web):
    with site(CutShort) as cut:
        for url in (nobody, f"{web}/nowhere.csv", f"{cut}/table.csv"):
            with pytest.raises(DataError, match=url):
                load_table(url, workspace)


def test_uci_refuses_where_it_does_not_answer(workspace, nobody):
    with pytest.raises(DataError, match=nobody):
        load_table("uci", workspace)


def test_auto_falls_back_to_the_sample_with_a_notice(workspace, nobody, capsys):
    assert load_table("auto", workspace).synthetic
    shown = capsys.readouterr().out
    assert "SYNTHETIC" in shown
    assert nobody in shown


def test_auto_uses_uci_where_it_answers(workspace, uci):
    table = load_table("auto", workspace)
    assert table.source == "uci"
    assert not table.synthetic
    assert table.digest == read_table(as_csv(uci), "x").digest


# --- the copy prepared before ------------------------------------------------------------------


@pytest.fixture
def prepared(wide, workspace):
    """The bytes of a CSV that was prepared without the column ``age``, and its table."""
    wide["debtor"] = wide["score"] > 1
    content = as_csv(wide.rename(columns={"width": " width"}))
    table = read_table(content, "mine.csv", drop=["age"], categorical=["course", "age"])
    save_split(split_table(table), workspace)
    return content, table


@pytest.mark.parametrize(
    ("options", "drop"),
    [
        ({}, ["age"]),
        ({"drop": ["age"]}, ["age"]),
        ({"drop": ["course", "age"]}, ["age", "course"]),
        ({"categorical": ["length", "age"]}, ["age"]),
    ],
)
def test_auto_prefers_the_prepared_copy(prepared, workspace, uci, options, drop, capsys):
    content, table = prepared
    copy = load_table("auto", workspace, **options)
    named = options.get("categorical", ["course", "age"])
    again = read_table(content, table.source, drop=drop, categorical=named)
    pd.testing.assert_frame_equal(copy.frame, again.frame)
    assert split_table(copy).manifest == split_table(again).manifest
    shown = capsys.readouterr().out
    assert table.source in shown
    assert f"without {', '.join(drop)}" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": []}, r"DROP = \['age'\].*DATA_SOURCE"),
        ({"drop": ["width"]}, r"DROP = \['age'\].*DATA_SOURCE"),
        ({"drop": ["age", "with"]}, "'with' .parameter DROP.*'width'"),
        ({"drop": ["age", "Target"]}, "DROP names 'Target'"),
        ({"categorical": ["corse"]}, "'corse' .parameter CATEGORICAL.*'course'"),
        ({"drop": ["age"], "target": "city"}, "TARGET = 'Target'"),
    ],
)
def test_prepared_copy_that_cannot_serve_is_refused_naming_the_parameter(
    prepared, workspace, options, words
):
    with pytest.raises(DataError, match=words):
        load_table("auto", workspace, **options)
