import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest

from helpers import serving
from helpers.data import DataError
from helpers.serving import batch
from helpers.workspace import PROJECT_ROOT
from tests.scoring import SVM, assert_same
from tests.series import wait_for


@pytest.fixture
def many(served, tmp_path):
    """A CSV of 700 rows with a column that no model knows, which looks like numbers at first."""
    rows = served.split.X_train.head(700).reset_index(drop=True)
    rows.insert(0, "id", [*(f"{number:05d}" for number in range(699)), "A0001"])
    rows.to_csv(tmp_path / "many.csv", index=False)
    return SimpleNamespace(path=tmp_path / "many.csv", rows=rows)


@pytest.mark.parametrize(("ending", "read"), [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_file_is_scored_chunk_by_chunk(served, local_models, many, tmp_path, ending, read):
    output = tmp_path / f"scored.{ending}"
    assert serving.score_csv(served.client, SVM, many.path, output, ["id"], 150, False) == 700
    table = read(output)
    assert table["id"].tolist() == many.rows["id"].tolist()
    assert table["row"].tolist() == list(range(1, 701))
    expected = local_models[SVM].predict(many.rows.drop(columns="id"))
    assert_same(table[expected.columns], expected)
    assert table["model_version"].astype(str).nunique() == 1
    assert not list(tmp_path.glob("*.parts"))


def test_packed_file_with_semicolons_and_blanks_in_the_header(served, many, tmp_path):
    odd = many.rows.rename(columns={"age": " age\t"})
    odd.to_csv(tmp_path / "odd.csv.gz", index=False, sep=";", encoding="utf-8-sig")
    plain, other = tmp_path / "plain.csv", tmp_path / "other.csv"
    serving.score_csv(served.client, SVM, many.path, plain, record=False)
    serving.score_csv(served.client, SVM, tmp_path / "odd.csv.gz", other, record=False)
    first, second = (pd.read_csv(path).drop(columns="row_id") for path in (plain, other))
    pd.testing.assert_frame_equal(first, second)


@pytest.fixture
def interrupted(served, many, tmp_path, monkeypatch):
    """A batch that was interrupted at its fourth chunk; the rows of every request."""
    asked, ask = [], batch.ask

    def counted(client, model, rows, *more):
        asked.append(len(rows))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return ask(client, model, rows, *more)

    monkeypatch.setattr(batch, "ask", counted)
    output = tmp_path / "scored.csv"
    with pytest.raises(KeyboardInterrupt):
        serving.score_csv(served.client, SVM, many.path, output, chunk_rows=100, record=False)
    assert not output.exists()
    return SimpleNamespace(output=output, asked=asked)


def test_interrupted_file_goes_on_and_finished_chunks_are_not_asked_again(
    served, many, interrupted, capsys
):
    output = interrupted.output
    assert serving.score_csv(served.client, SVM, many.path, output, chunk_rows=100) == 700
    assert interrupted.asked == [100] * (4 + 4)
    assert "goes on after the 3 parts" in capsys.readouterr().out
    assert pd.read_csv(output)["row"].tolist() == list(range(1, 701))


def test_changed_file_does_not_reuse_parts(served, many, interrupted):
    many.rows.head(350).to_csv(many.path, index=False)
    output = interrupted.output
    assert serving.score_csv(served.client, SVM, many.path, output, chunk_rows=100) == 350
    assert interrupted.asked[4:] == [100, 100, 100, 50]
    assert len(pd.read_csv(output)) == 350


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
        serving.score_csv(served.client, SVM, tmp_path / "bad.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("model", "output", "keep", "message"),
    [
        (SVM, "out.xlsx", [], r"\.csv or \.parquet"),
        ("other", "out.csv", [], "is not served"),
        (SVM, "out.csv", ["number"], "no column 'number'"),
    ],
)
def test_what_cannot_be_is_named(served, many, tmp_path, model, output, keep, message):
    with pytest.raises((DataError, serving.ServingError), match=message):
        serving.score_csv(served.client, model, many.path, tmp_path / output, keep)


@pytest.mark.slow
def test_command_scores_a_large_file_in_bounded_memory_and_goes_on_after_a_kill(served, tmp_path):
    rows = served.split.X_train
    path, output = tmp_path / "large.csv", tmp_path / "scored.parquet"
    lines = rows.to_csv(index=False, header=False)
    path.write_text(rows.head(0).to_csv(index=False) + 201 * lines)
    total = 201 * len(rows)
    command = [sys.executable, "-m", "helpers.serving", "--workspace", served.workspace.root]
    command = [str(each) for each in (*command, "--score", path, output, "--model", SVM)]
    options = {"cwd": PROJECT_ROOT, "env": {**os.environ, "MLFLOW_TRACKING_URI": ""}}
    parts = output.with_name("scored.parquet.parts")
    first = subprocess.Popen(command, **options)
    assert wait_for(lambda: len(list(parts.glob("*.parquet"))) > 5, 120)
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
    assert pd.read_parquet(output)["row"].tolist() == list(range(1, total + 1))
    assert peak < 700 * 2**20
