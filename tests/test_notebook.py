"""The line that follows the parameters in every notebook."""

import pytest

from helpers import server
from helpers.colab.safe_copy import NoCopy, SafeCopy
from helpers.notebook import open_notebook
from helpers.workspace import ParameterError


@pytest.fixture
def prepared(monkeypatch):
    """The workspaces for which a server was started."""
    workspaces = []
    monkeypatch.setattr(server, "start", lambda workspace, wait: workspaces.append(workspace))
    return workspaces


def test_checked_values_are_written_back_under_their_names(tmp_path, prepared, monkeypatch):
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "ws"))
    notebook = {"WORKSPACE": None, "CATEGORICAL": "a, b", "TEST_SIZE": 0.3, "x": 1}
    ws, copy = open_notebook("01_data_preparation", notebook)
    assert ws.root == tmp_path / "ws"
    assert isinstance(copy, NoCopy)
    expected = {"WORKSPACE": str(ws.root), "CATEGORICAL": ["a", "b"], "TEST_SIZE": 0.3, "x": 1}
    assert notebook == expected
    assert prepared == []


def test_safe_copy_and_server_go_on_beside_the_notebook(tmp_path, prepared, capsys):
    folder = tmp_path / "copy"
    notebook = {"WORKSPACE": str(tmp_path / "ws"), "DRIVE_FOLDER": str(folder)}
    ws, copy = open_notebook("03_svm_grid_search", notebook)
    assert isinstance(copy, SafeCopy)
    assert prepared == [ws]
    assert capsys.readouterr().out == f"Workspace: {ws.root}\nSafe copy: {folder}\n"


def test_value_that_cannot_be_used_names_the_parameter(tmp_path, prepared):
    notebook = {"WORKSPACE": str(tmp_path / "ws"), "EPOCHS": 0}
    with pytest.raises(ParameterError, match="^EPOCHS must be at least 1"):
        open_notebook("02_cnn_training", notebook)
    assert not (tmp_path / "ws").exists()
