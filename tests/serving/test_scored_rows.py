from contextlib import closing
from types import SimpleNamespace

import pandas as pd
import pytest

from helpers.serving import scored_rows
from tests.series import wait_for

MODEL = SimpleNamespace(name="model", version="1", labels=["high", "low"])


@pytest.fixture
def recorder(tmp_path):
    with closing(scored_rows.Recorder(tmp_path / "scored.db", most_rows=25)) as recorder:
        yield recorder


def write(recorder, request_id, rows):
    n_rows = len(rows)
    recorder.write(request_id, MODEL, rows, ["low"] * n_rows, [[0.25, 0.75]] * n_rows)
    return scored_rows.wait_for(recorder.path, f"{request_id}-{n_rows - 1}")


def test_rows_answers_and_labels_are_read_back(recorder):
    rows = pd.DataFrame({"age": [30.0, None, 31.5], "city": ["Faro", None, "Évora"]})
    assert write(recorder, "a", rows)
    scored_rows.write_labels(recorder.path, {"a-1": "high"})
    scored_rows.write_labels(recorder.path, {"a-1": "low"})
    got, answers = scored_rows.read_rows(recorder.path, "model")
    pd.testing.assert_frame_equal(got, rows.set_axis(["a-0", "a-1", "a-2"]))
    assert answers["prediction"].tolist() == ["low"] * 3
    assert answers["probability_low"].tolist() == [0.75] * 3
    assert answers["label"].tolist() == [None, "low", None]
    assert scored_rows.read_rows(recorder.path, "another")[0].empty
    assert scored_rows.is_known(recorder.path, "model", "1")
    assert not scored_rows.is_known(recorder.path, "model", "2")


def test_no_more_rows_are_kept_than_allowed_and_the_oldest_go(recorder):
    for number in range(6):
        assert write(recorder, f"r{number}", pd.DataFrame({"age": range(10)}))
        scored_rows.write_labels(recorder.path, {f"r{number}-0": "low"})
    assert write(recorder, "r6", pd.DataFrame({"age": range(10)}))
    _, answers = scored_rows.read_rows(recorder.path, "model")
    assert set(answers.index.str.split("-").str[0]) == {"r5", "r6"}
    with scored_rows.connect(recorder.path) as connection:
        labels = connection.execute("SELECT id FROM labels").fetchall()
    assert labels == [("r5-0",)]


def test_request_that_cannot_be_written_is_counted_and_the_next_is_kept(recorder):
    rows = pd.DataFrame({"age": [1]})
    assert write(recorder, "before", rows)
    with scored_rows.connect(recorder.path) as connection:
        connection.execute("ALTER TABLE requests RENAME TO elsewhere")
        recorder.write("lost", MODEL, rows, ["low"], [[0.25, 0.75]])
        assert wait_for(lambda: recorder.dropped == 1)
        connection.execute("ALTER TABLE elsewhere RENAME TO requests")
    assert write(recorder, "kept", rows)


def test_file_is_closed_to_others(recorder):
    assert write(recorder, "a", pd.DataFrame({"age": [1]}))
    assert oct(recorder.path.stat().st_mode)[-3:] == "600"
