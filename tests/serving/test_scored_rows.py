from contextlib import closing, suppress
from types import SimpleNamespace

import pandas as pd
import pytest

from helpers.serving import scored_rows
from helpers.serving.recorder import Recorder
from tests.series import wait_for

MODEL = SimpleNamespace(name="model", version="1", labels=["high", "low"])


@pytest.fixture
def recorder(tmp_path):
    with closing(Recorder(tmp_path / "scored.db", most_rows=25)) as recorder:
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


def test_rows_of_a_demo_are_read_apart_and_get_their_dates(recorder):
    for request_id in ("demo-b", "real", "demo-a"):
        assert write(recorder, request_id, pd.DataFrame({"age": [1]}))
    assert scored_rows.date_demo(recorder.path, "model", "1", [0, 86_400]) == 2
    assert scored_rows.date_demo(recorder.path, "model", "2", [0]) == 0
    _, real = scored_rows.read_rows(recorder.path, "model")
    _, demo = scored_rows.read_rows(recorder.path, "model", demo=True)
    assert list(real.index) == ["real-0"]
    assert real["time"].dt.year.item() > 2000
    assert list(demo.index) == ["demo-b-0", "demo-a-0"]
    assert demo["time"].dt.strftime("%Y-%m-%d").tolist() == ["1970-01-01", "1970-01-02"]


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


@pytest.mark.parametrize("damage", ["garbage", "a hole", "half of it"])
def test_damaged_file_is_set_aside_whole_and_recording_goes_on(tmp_path, damage):
    path, rows = tmp_path / "scored.db", pd.DataFrame({"age": range(500)})
    with closing(Recorder(path)) as recorder:
        for number in range(10):
            assert write(recorder, f"r{number}", rows)
        assert recorder.state() == "ok"
    content = bytearray(path.read_bytes())
    if damage == "half of it":
        del content[len(content) // 2 :]
    else:
        start = 0 if damage == "garbage" else 4096
        content[start : start + 20_000] = b"garbage " * 2500
    path.write_bytes(content)
    with pytest.raises(scored_rows.ScoredRowsError, match="scored.db is damaged"):
        scored_rows.read_rows(path, "model")
    with closing(Recorder(path)) as recorder:
        assert "scored.db was damaged" in recorder.state()
        assert write(recorder, "after", rows)
        assert recorder.dropped == 0
        (aside,) = tmp_path.glob("scored.damaged-*.db")
        assert aside.name in recorder.state()
        assert aside.read_bytes() == content


def test_file_that_is_overwritten_or_deleted_meanwhile_is_replaced(recorder):
    rows = pd.DataFrame({"age": [1]})
    assert write(recorder, "a", rows)
    recorder.path.write_bytes(b"garbage " * 1000)
    recorder.write("b", MODEL, rows, ["low"], [[0.25, 0.75]])
    assert wait_for(lambda: "was damaged" in recorder.state())
    assert scored_rows.wait_for(recorder.path, "b-0")
    for file in recorder.path.parent.glob("scored.db*"):
        file.unlink()
    assert write(recorder, "c", rows)
    assert recorder.dropped == 0


def test_request_of_more_rows_than_are_kept_does_not_push_out_the_others(recorder):
    assert write(recorder, "a", pd.DataFrame({"age": [1]}))
    rows = pd.DataFrame({"age": range(26)})
    recorder.write("large", MODEL, rows, ["low"] * 26, [[0.25, 0.75]] * 26)
    assert recorder.dropped == 1
    assert scored_rows.known_rows(recorder.path, ["a-0"]) == {"a-0"}


@pytest.mark.parametrize("strange", ["", "17", "a-", "a-x", "a-²", float("nan"), "a-" + "9" * 5000])
def test_id_that_is_none_gets_a_sentence(recorder, strange):
    with pytest.raises(scored_rows.ScoredRowsError, match="is no id of a scored row"):
        scored_rows.known_rows(recorder.path, ["a-0", strange])


def test_full_or_read_only_disk_is_told_and_recording_goes_on_after_it(small_disk):
    folder, mount = small_disk
    rows = pd.DataFrame({"age": [1]})

    def lose(recorder, request_id):
        lost = recorder.dropped
        recorder.write(request_id, MODEL, rows, ["low"], [[0.25, 0.75]])
        assert wait_for(lambda: recorder.dropped == lost + 1)

    with closing(Recorder(folder / "scored.db")) as recorder:
        assert write(recorder, "first", rows)
        with (folder / "other").open("wb", buffering=0) as other, suppress(OSError):
            while other.write(b"x" * 512):
                pass
        lose(recorder, "on a full disk")
        (folder / "other").unlink()
        assert write(recorder, "second", rows)
    assert mount("remount,ro")
    with closing(Recorder(folder / "scored.db")) as recorder:
        lose(recorder, "on a read-only disk")
        assert "Requests are not recorded" in recorder.state()
        assert mount("remount,rw")
        assert write(recorder, "third", rows)
        assert recorder.state() == "ok"
        ids = {"first-0", "second-0", "third-0"}
        assert scored_rows.known_rows(recorder.path, ids) == ids


def test_file_is_closed_to_others(recorder):
    assert write(recorder, "a", pd.DataFrame({"age": [1]}))
    assert oct(recorder.path.stat().st_mode)[-3:] == "600"
