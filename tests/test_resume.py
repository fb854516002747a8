"""Which steps `--resume` runs again, and why."""

import shutil

import pytest

from helpers import execution, resume
from helpers.series import STEPS

NOTHING = {number: {} for number in STEPS}
ALL = list(STEPS)


@pytest.fixture(autouse=True)
def _results_are_there(monkeypatch):
    monkeypatch.setattr(resume, "has_results", lambda number, workspace: True)


@pytest.mark.parametrize(
    ("undone", "numbers"),
    [
        ([], []),
        (["02"], ["02", "04", "05"]),
        (["03"], ["03", "04", "05"]),
        (["04"], ["04", "05"]),
        (["01"], ALL),
    ],
)
def test_step_runs_again_with_those_that_need_it(workspace, undone, numbers):
    record, digests, lines = resume.Record(workspace), dict.fromkeys(STEPS, "same"), []
    for number in STEPS:
        record.set(number, None if number in undone else "same")
    assert resume.steps_to_run(ALL, digests, record, lines.append) == numbers
    assert sum("skipped" in line for line in lines) == len(STEPS) - len(numbers)
    if undone == ["02"]:
        assert "04_registry_promotion: runs, it needs 02_cnn_training" in lines


def test_step_that_ran_alone_leaves_what_needs_it_undone(workspace, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *arguments: None)
    record, digests, lines = resume.Record(workspace), dict.fromkeys(STEPS, "same"), []
    rest, saved = (NOTHING, digests, workspace, lines.append), []
    assert execution.run_steps(ALL, *rest, lambda: saved.append(record.read())) == []
    # Saved after each step, with the step noted as done.
    done = [sum(map(bool, state.values())) for state in saved]
    assert done == [*range(1, len(STEPS) + 1)]
    assert resume.steps_to_run(ALL, digests, record, lines.append) == []
    execution.run_steps(["02"], *rest, lambda: None)
    assert resume.steps_to_run(ALL, digests, record, lines.append) == ["04", "05"]


@pytest.mark.parametrize(
    ("edited", "numbers"),
    [
        ("monitoring/__init__.py", ["05"]),
        ("serving/app.py", ["05"]),
        ("registry/behaviour.py", ["04", "05"]),
        ("data/__init__.py", ALL),
        ("workspace.py", ALL),
        ("run.py", []),
    ],
)
def test_edited_helper_changes_the_steps_that_import_it(tmp_path, monkeypatch, edited, numbers):
    before = resume.fingerprints(NOTHING)
    copy = tmp_path / "helpers"
    shutil.copytree(resume.HELPERS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(resume, "HELPERS", copy)
    assert resume.fingerprints(NOTHING) == before
    with (copy / edited).open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    after = resume.fingerprints(NOTHING)
    assert [number for number in STEPS if after[number] != before[number]] == numbers


def test_parameters_and_data_change_the_steps_that_use_them_and_those_that_follow(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("1")
    given = {**NOTHING, "01": {"DATA_SOURCE": str(table)}}
    before = resume.fingerprints(given)
    table.write_text("2")
    assert not set(before.values()) & set(resume.fingerprints(given).values())
    plain = resume.fingerprints(NOTHING)
    other = resume.fingerprints({**NOTHING, "02": {"EPOCHS": 2}})
    assert [n for n in STEPS if other[n] != plain[n]] == ["02", "04", "05"]
    assert resume.fingerprints({**NOTHING, "02": {"EXPOSE_UI": False}}) == plain
