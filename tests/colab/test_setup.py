"""Colab: every notebook on a machine of its own that vanishes, with Drive in common."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.colab import safe_copy
from helpers.colab import setup as colab
from helpers.colab.safe_copy import SafeCopyError
from helpers.workspace import PROJECT_ROOT, WorkspaceError, open_workspace
from tests.doubles.colab import CONSTRAINTS, UV, ColabMachine, make_runtime, read_constraints

NOTEBOOKS = {path.name[:2]: path for path in sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))}
SMALL = {
    "02": {"EPOCHS": 6},
    "03": {"C_EXPONENTS": [0, 1], "GAMMA_EXPONENTS": [-5, -4]},
    "04": {"ATTACKED_ROWS": 5},
}


# --- the packages of the runtime --------------------------------------------------------------


def _names(lines):
    return {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines}


def _resolve(tmp_path, python, pins):
    """Resolve all requirements beside pinned packages; return the versions chosen."""
    constraints = tmp_path / "pins.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    done = subprocess.run(
        [
            *(*UV, "pip", "compile", "--no-header", "--no-annotate", "-q"),
            *("--python-version", python, "--python-platform", "x86_64-manylinux_2_28"),
            *("--constraint", constraints, PROJECT_ROOT / "requirements.txt"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return _names(line for line in done.stdout.splitlines() if "==" in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "pins"),
    [
        ("3.13", read_constraints()),
        ("3.12", ["tensorflow==2.20.0", "numpy==2.0.2"]),
    ],
)
def test_resolver_replaces_no_package_of_the_runtime(tmp_path, python, pins):
    chosen, had = _resolve(tmp_path, python, pins), _names(pins)
    both = chosen.keys() & had.keys()
    assert {"tensorflow", "numpy"} <= both
    assert {name: chosen[name] for name in both} == {name: had[name] for name in both}
    assert {"mlflow", "pyngrok", "papermill"} <= chosen.keys()


# --- links ------------------------------------------------------------------------------------


def test_links_are_those_of_the_setting():
    assert colab.main(["--check"]) == 0


def test_links_and_address_are_stamped_and_taken_away_again():
    path = NOTEBOOKS["03"]
    text = path.read_text(encoding="utf-8")
    stamped = colab.stamped_notebook(text, path, "ana/series")
    cells = json.loads(stamped)["cells"]
    place = "https://colab.research.google.com/github/ana/series/blob/main/notebooks"
    assert f"]({place}/03_svm_grid_search.ipynb)\n" in "".join(cells[0]["source"])
    first = "".join(next(c for c in cells if c["cell_type"] == "code")["source"])
    assert 'REPO_URL = "https://github.com/ana/series"  # @param' in first
    assert colab.stamped_notebook(stamped, path, "ana/series") == stamped
    assert colab.stamped_notebook(stamped, path, "") == text
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    linked = colab.stamped_readme(readme, "none yet", "ana/series")
    assert linked.count(place) == len(NOTEBOOKS)
    assert colab.stamped_readme(linked, colab.READMES["README.md"], "") == readme


# --- the first cell ---------------------------------------------------------------------------


def _project(target, content):
    """Copy the project; what it calls ``/content`` is a folder of the test."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, files):
        if name.startswith(("helpers/", "notebooks/0", "requirements")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT_ROOT / name, target / name)
    place = target / "helpers" / "workspace.py"
    text = place.read_text(encoding="utf-8")
    assert '"/content/drive"' in text
    place.write_text(text.replace('"/content/drive"', f'"{content}/drive"'), encoding="utf-8")
    return target


def _first_cell(tmp_path, **fields):
    """Run the first cell in a process of its own, where pip has nothing to do."""
    content = tmp_path / "content"
    content.mkdir(exist_ok=True)
    cells = json.loads(NOTEBOOKS["01"].read_text(encoding="utf-8"))["cells"]
    cell = "".join(next(c for c in cells if c["cell_type"] == "code")["source"])
    code = cell.replace("/content", str(content))
    for name, value in {"USE_DRIVE": False, **fields}.items():
        before = next(line for line in code.splitlines() if line.startswith(f"{name} = "))
        code = code.replace(before, f"{name} = {value!r}")
    packages = CONSTRAINTS.parent / "packages"
    (tmp_path / "drive").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", f"import google.colab, os\n{code}\nprint('at', os.getcwd())"],
        cwd=content,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(packages),
            "COLAB_DOUBLE_DRIVE": str(tmp_path / "drive"),
        },
        capture_output=True,
        text=True,
    )


def test_first_cell_takes_the_project_from_git_a_zip_or_a_folder_in_drive(tmp_path):
    source = _project(tmp_path / "source" / "series-main", tmp_path / "content")
    subprocess.run(["git", "init", "-q"], cwd=source, check=True)
    subprocess.run(["git", "add", "-A"], cwd=source, check=True)
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *who, "commit", "-qm", "c"], cwd=source, check=True)
    place = tmp_path / "content" / "project"
    done = _first_cell(tmp_path, REPO_URL=f"file://{source}")
    assert f"at {place}\n" in done.stdout, done.stderr
    again = _first_cell(tmp_path)
    assert f"at {place}\n" in again.stdout, again.stderr
    shutil.rmtree(place)
    # As GitHub packs it: all in a folder.
    shutil.make_archive(tmp_path / "content" / "upload", "zip", source.parent, source.name)
    done = _first_cell(tmp_path, PROJECT=str(tmp_path / "content" / "upload.zip"))
    assert f"at {place / 'series-main'}\n" in done.stdout, done.stderr
    shutil.rmtree(place)
    shutil.copytree(source, tmp_path / "drive" / "my project")
    done = _first_cell(tmp_path, PROJECT="MyDrive/my project")
    assert f"at {place}\n" in done.stdout, done.stderr
    assert "Installed: nothing, all is here" in done.stdout


NOT_FOUND = "Not found. Fill in REPO_URL or PROJECT."


def test_first_cell_says_what_to_write_where_nothing_is_set(tmp_path):
    for fields, reason in (
        ({}, "repository '' does not exist"),
        ({"REPO_URL": f"file://{tmp_path}/none.git"}, "none.git"),
        ({"PROJECT": "MyDrive/not there"}, "MyDrive/not there"),
    ):
        done = _first_cell(tmp_path, **fields)
        assert done.returncode != 0
        assert reason in done.stderr
        assert done.stderr.endswith(f"{NOT_FOUND}\n")
    with zipfile.ZipFile(tmp_path / "content" / "data.zip", "w") as archive:
        archive.writestr("students.csv", "a,b\n")
    done = _first_cell(tmp_path, PROJECT=str(tmp_path / "content" / "data.zip"))
    assert done.stderr == f"{NOT_FOUND}\n"
    # What was unpacked by mistake is not in the way of the right one.
    _project(tmp_path / "drive" / "series", tmp_path / "content")
    done = _first_cell(tmp_path, PROJECT="MyDrive/series")
    assert f"at {tmp_path / 'content' / 'project' / 'series'}\n" in done.stdout, done.stderr


def test_drive_is_mounted_where_a_person_can_allow_it(tmp_path, monkeypatch):
    drive = SimpleNamespace(mount=lambda place: Path(place, "MyDrive").mkdir(parents=True))
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=drive))
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(colab, "is_batch", lambda: True)
    assert not colab.mount_drive()
    with pytest.raises(SafeCopyError, match="DRIVE_FOLDER to off"):
        safe_copy.start(open_workspace(tmp_path / "ws"), "MyDrive/copy", "test")
    monkeypatch.setattr(colab, "is_batch", lambda: False)
    assert colab.mount_drive()
    assert (tmp_path / "drive" / "MyDrive").is_dir()
    # Once is enough, for the batch runs that follow, too.
    monkeypatch.setattr(colab, "is_batch", lambda: True)
    assert colab.mount_drive()


def test_install_replaces_nothing_that_is_there(monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append((command, command[command.index("--constraint") + 1].read_text()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(colab, "missing_requirements", lambda: ["some-package>=1"])
    monkeypatch.setattr(colab.subprocess, "run", pip)
    assert colab.install_missing() == ["some-package>=1"]
    ((command, constraints),) = commands
    assert command[-1] == "some-package>=1"
    import mlflow

    assert f"mlflow=={mlflow.__version__}" in constraints.splitlines()


def test_pins_are_those_of_what_python_imports(tmp_path, monkeypatch):
    for place, name, version in (
        ("first", "twice", "2.0"),
        ("second", "twice", "1.0"),
        ("second", "of_the_system", "0.23ubuntu1"),
    ):
        folder = tmp_path / place / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert colab.installed_versions() == ["twice==2.0"]


def test_workspace_in_drive_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr("helpers.workspace.DRIVE", tmp_path / "drive")
    with pytest.raises(WorkspaceError, match=r"DRIVE_FOLDER = '.*drive/MyDrive/mine'"):
        open_workspace(tmp_path / "drive" / "MyDrive" / "mine")
    assert not (tmp_path / "drive").exists()


# --- the series -------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_notebook_on_a_machine_of_its_own_with_drive_in_common(tmp_path):
    python = make_runtime(tmp_path / "runtime", PROJECT_ROOT / "requirements.txt")
    freeze = [python, "-m", "pip", "freeze", "--all"]
    before = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    drive = tmp_path / "drive"
    shown = {}
    tomorrow = ("faketime", "-f", "+1d") if shutil.which("faketime") else ()
    days = [*[(number, ()) for number in NOTEBOOKS], ("04", tomorrow)]
    for day, (number, clock) in enumerate(days):
        disk = tmp_path / f"machine{day}"
        shutil.rmtree(drive / "project", ignore_errors=True)
        _project(drive / "project", disk / "content")
        machine = ColabMachine(python, disk, drive, {"MLFLOW_AUTH_ADMIN_PASSWORD": "a" * 12}, clock)
        try:
            fields = {"PROJECT": "MyDrive/project", **SMALL.get(number, {})}
            if number == "01":
                fields["DATA_SOURCE"] = "sample"
            shown[day] = machine.step_through(NOTEBOOKS[number], **fields)
        finally:
            machine.vanish()
        assert "Mounted at" in shown[day]
        assert "Saved to" in shown[day]
    after = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    assert set(before) <= set(after)
    assert "Installed: mlflow" in shown[0]
    assert "Installed: nothing" in shown[1]
    assert "Restored what was saved at" in shown[1]
    # 5000, or the next port where something else has that one.
    assert re.search(r"https://50\d\d-colab\.example/", shown[1])
    assert "Every candidate passed and is in Production." in shown[3]
    assert "already" in shown[5]
    # What the person sees at the end on a new machine, by hand.
    last = ColabMachine(python, tmp_path / "last", drive)
    try:
        _project(tmp_path / "last" / "content" / "project", tmp_path / "last" / "content")
        text, error = last.run(
            "import os, sys; os.chdir('project'); sys.path.insert(0, '.')\n"
            "from helpers import registry, tracking\n"
            "from helpers.colab import safe_copy\n"
            "from helpers.workspace import open_workspace\n"
            "ws = open_workspace()\n"
            "copy = safe_copy.start(ws, 'MyDrive/mlflow_series', 'look')\n"
            "tracking.connect(ws)\n"
            "print(registry.models_table()[['stage']])\n"
            "print(registry.history()[['model', 'to_version', 'result']])\n"
        )
    finally:
        last.vanish()
    assert error is None, error
    assert text.count("Production") == 2
    assert text.count("FINISHED") == 2
