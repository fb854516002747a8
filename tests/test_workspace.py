"""The workspace is a folder that can be written to, or a sentence says why not."""

import subprocess
from pathlib import Path

import pytest

from helpers.workspace import ParameterError, WorkspaceError, open_workspace


@pytest.mark.parametrize("place", [2024, 0, True, ["ws"]])
def test_workspace_that_is_no_path_is_refused_by_name(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match="^WORKSPACE must be.*'./2024'"):
        open_workspace(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["below a file", "/proc/nowhere"])
def test_workspace_that_cannot_be_written_is_refused_by_name(tmp_path, place):
    if place == "below a file":
        (tmp_path / "file").write_text("x")
        place = str(tmp_path / "file" / "ws")
    elif not Path("/proc").is_dir():
        pytest.skip("no /proc on this system")
    with pytest.raises(WorkspaceError) as caught:
        open_workspace(place)
    assert place in str(caught.value)
    assert "WORKSPACE" in str(caught.value)


def test_workspace_is_made_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "from environment"))
    workspace = open_workspace()
    assert workspace.root == tmp_path / "from environment"
    assert all(folder.is_dir() for folder in (workspace.data, workspace.artifacts))
    assert list(workspace.data.iterdir()) == []


def test_new_workspace_is_no_part_of_a_repository_and_an_old_folder_stays_as_it_is(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (open_workspace(tmp_path / "mine").root / "passwords.json").write_text("{}")
    status = ["git", "-C", tmp_path, "status", "--porcelain", "-uall"]
    assert subprocess.run(status, capture_output=True, check=True).stdout == b""
    (tmp_path / "own").mkdir()
    assert not (open_workspace(tmp_path / "own").root / ".gitignore").exists()
