"""Several at once in one workspace: who comes second waits, or is told."""

import subprocess

import pytest

from helpers.locks import BusyError, hold
from tests.series import run_series, start_python, wait_for

HOLDER = """
import subprocess, sys
from helpers.locks import hold
from helpers.workspace import open_workspace
ws = open_workspace(sys.argv[1])
hold(ws, ["02", "01"], "the first")
hold(ws, ["02"], "the first, again", wait=False)
if len(sys.argv) == 2:
    subprocess.run([sys.executable, "-c", sys.stdin.readline(), str(ws.root), "child"], check=True)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(workspace):
    """A process that holds the steps 01 and 02, and whose child has asked for them, too."""
    process = start_python("-c", HOLDER, workspace.root)
    # What the child runs is the same code, on one line.
    process.stdin.write(f"exec({HOLDER!r})\n")
    process.stdin.flush()
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_one_is_told_for_whom_and_gets_the_lock_of_a_killed_process(workspace, holder):
    busy = rf"02_cnn_training of .* is being run by the first \(process {holder.pid}, since \d\d:"
    with pytest.raises(BusyError, match=busy):
        hold(workspace, ["02", "03"], "the second", wait=False)
    hold(workspace, ["03"], "the second", wait=False)
    said = []

    def say(line):
        said.append(line)
        holder.kill()

    hold(workspace, ["01", "02"], "the second", say=say)
    assert [line.partition(" of ")[0] for line in said] == ["01_data_preparation"]
    assert said[0].endswith("waiting until that has ended.")


@pytest.mark.slow
def test_two_series_at_once_run_one_after_the_other(tmp_path, small_csv):
    place, note = tmp_path / "ws", tmp_path / "ws" / ".locks" / "01.json"
    first = start_python(
        *("-m", "helpers.run", "--workspace", place, "--only", "01"),
        *("--data", small_csv("one.csv", rows=90)),
        stderr=subprocess.PIPE,
    )
    assert wait_for(note.is_file)
    other = ("--only", "01", "--data", str(small_csv("other.csv", rows=120)))
    refused = run_series(place, *other, "--no-wait")
    assert refused.returncode == 1
    assert f"is being run by python -m helpers.run (process {first.pid}" in refused.stderr
    second = run_series(place, *other)
    _, errors = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), errors + second.stderr
    assert "waiting until that has ended" in second.stdout
    assert len(list((place / "data" / "previous").iterdir())) == 1
