"""Colab: every notebook on a machine of its own that vanishes, with Drive in common."""

import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from helpers.colab import setup as colab
from helpers.workspace import PROJECT_ROOT, WorkspaceError, open_workspace
from tests.doubles.colab import (
    BATCH,
    CONSTRAINTS,
    DRIVEMOUNT,
    UV,
    ColabMachine,
    make_runtime,
    read_constraints,
)
from tests.series import wait_for

REQUIREMENTS = PROJECT_ROOT / "requirements.txt"
NOTEBOOKS = {path.name[:2]: path for path in sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))}
SMALL = {
    "01": {"DATA_SOURCE": "sample"},
    "02": {"EPOCHS": 6},
    "03": {"C_EXPONENTS": [0, 1], "GAMMA_EXPONENTS": [-5, -4]},
    "04": {"ATTACKED_ROWS": 5},
}


# --- the packages of the runtime --------------------------------------------------------------


def _versions(lines):
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "pins"),
    [("3.13", read_constraints()), ("3.12", ["tensorflow==2.20.0", "numpy==2.0.2"])],
)
def test_resolver_replaces_no_package_of_the_runtime(tmp_path, python, pins):
    constraints = tmp_path / "pins.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    command = [
        *(*UV, "pip", "compile", "--no-header", "--no-annotate", "-q"),
        *("--python-version", python, "--python-platform", "x86_64-manylinux_2_28"),
        *("--constraint", constraints, PROJECT_ROOT / "requirements.txt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen, had = _versions(done.stdout.splitlines()), _versions(pins)
    both = chosen.keys() & had.keys()
    assert {"tensorflow", "numpy"} <= both
    assert {name: chosen[name] for name in both} == {name: had[name] for name in both}
    assert {"mlflow", "pyngrok", "papermill"} <= chosen.keys()


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
    assert f"mlflow=={metadata.version('mlflow')}" in constraints.splitlines()


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


def test_first_import_needs_no_package():
    code = "import sys; sys.path.insert(0, '.'); from helpers import colab; colab.set_up(True)"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=PROJECT_ROOT, check=True)


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


def _repository(target, content):
    """Copy the project and commit it to a repository of its own."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    _project(target, content)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "c"]):
        subprocess.run([*git, *command], cwd=target, check=True)
    return target


NOT_FOUND = "Not found. Fill in REPO_URL or PROJECT"


@pytest.fixture
def machine(tmp_path):
    """A machine whose packages are those of the tests: pip has nothing to do."""
    machine = ColabMachine(Path(sys.executable), tmp_path / "disk", tmp_path / "drive", {})
    yield machine
    machine.vanish()


def _first_cell(machine, **fields):
    """Run the first cell in the folder that a kernel starts in; return what it shows, its error."""
    cells = json.loads(NOTEBOOKS["01"].read_text(encoding="utf-8"))["cells"]
    cell = "".join(next(c for c in cells if c["cell_type"] == "code")["source"])
    code = cell.replace("/content", str(machine.content))
    for name, value in {"USE_DRIVE": False, **fields}.items():
        before = next(line for line in code.splitlines() if line.startswith(f"{name} = "))
        code = code.replace(before, f"{name} = {value!r}")
    machine.run(
        f"import os, sys; os.chdir({str(machine.content)!r})\n"
        "sys.path[:] = [path for path in sys.path if 'project' not in path]\n"
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('helpers')]"
    )
    return machine.run(code)


def _place(machine):
    return machine.run("print(os.getcwd())")[0].strip()


def test_first_cell_takes_the_project_from_git_a_zip_or_a_folder_in_drive(machine, tmp_path):
    source = _repository(tmp_path / "source" / "series-main", machine.content)
    place = machine.content / "project"
    for fields in ({"REPO_URL": f"file://{source}"}, {}):
        assert _first_cell(machine, **fields)[1] is None
        assert _place(machine) == str(place)
    shutil.rmtree(place)
    # As GitHub packs it: all in a folder.
    shutil.make_archive(machine.content / "upload", "zip", source.parent, source.name)
    assert _first_cell(machine, PROJECT=str(machine.content / "upload.zip"))[1] is None
    assert _place(machine) == str(place / "series-main")
    shutil.rmtree(place)
    shutil.copytree(source, tmp_path / "drive" / "my project")
    shown, error = _first_cell(machine, PROJECT="MyDrive/my project")
    assert error is None
    assert _place(machine) == str(place)
    assert "Installed: nothing, all is here" in shown


def test_first_cell_says_in_one_line_what_to_write_where_nothing_is_set(machine, tmp_path):
    # Of other data, unpacked by mistake.
    with zipfile.ZipFile(machine.content / "data.zip", "w") as archive:
        archive.writestr("students.csv", "a,b\n")
    for fields in (
        {},
        {"REPO_URL": f"file://{tmp_path}/none.git"},
        {"PROJECT": "MyDrive/not there"},
        {"PROJECT": str(machine.content / "data.zip")},
    ):
        shown, error = _first_cell(machine, **fields)
        assert error.startswith(NOT_FOUND)
        assert "\n" not in error
        assert "To exit" not in shown
    # What was unpacked is not in the way of the right one.
    _project(tmp_path / "drive" / "series", machine.content)
    assert _first_cell(machine, PROJECT="MyDrive/series")[1] is None
    assert _place(machine) == str(machine.content / "project" / "series")


def test_refused_drive_is_one_sentence_and_the_way_on(machine, tmp_path):
    _project(tmp_path / "drive" / "series", machine.content)
    project = {"PROJECT": "MyDrive/series", "USE_DRIVE": True}
    machine.allows_drive = False
    shown, error = _first_cell(machine, **project)
    assert error.startswith(NOT_FOUND)
    assert "allow Drive" in error
    assert "\n" not in error
    assert "Traceback" not in shown
    machine.allows_drive = True
    assert _first_cell(machine, **project)[1] is None
    assert _copy(machine) == str(machine.content / "drive" / "MyDrive" / "mlflow_series")
    # The project is here, and Drive is not any more.
    (machine.content / "drive" / "MyDrive").unlink()
    machine.allows_drive = False
    _, error = _first_cell(machine, **project)
    assert re.fullmatch(
        r"ProjectError: Google Drive is not connected: credential .*\. Run this cell again .*"
        r"\(USE_DRIVE off, .*",
        error,
    )
    assert _first_cell(machine)[1] is None
    assert _copy(machine) == "off"


def _copy(machine):
    return machine.run("print(os.environ['DRIVE_FOLDER'])")[0].strip()


def test_machine_without_a_front_end_takes_drive_as_it_is_and_asks_nobody(machine, tmp_path):
    _project(tmp_path / "drive" / "series", machine.content)
    project = {"PROJECT": "MyDrive/series", "USE_DRIVE": True}
    machine.front_end = BATCH
    _, error = _first_cell(machine, **project)
    assert error.startswith(NOT_FOUND)
    _project(machine.content / "project", machine.content)
    assert _first_cell(machine, USE_DRIVE=True)[1] is None
    assert _copy(machine) == "off"
    start = "from helpers.colab import safe_copy; from helpers.workspace import open_workspace\n"
    start += "safe_copy.start(open_workspace(), {!r}, 'test')"
    # In the cell, and in a program that it starts.
    for folder in ("MyDrive/copy", str(machine.content / "drive" / "MyDrive" / "copy")):
        _, error = machine.run(start.format(folder))
        assert "Google Drive is not mounted" in error
        assert "DRIVE_FOLDER to off" in error
        program = f"import subprocess, sys; code = {start.format(folder)!r}\n"
        program += "print(subprocess.run([sys.executable, '-c', code], capture_output=True))"
        shown, _ = machine.run(program)
        assert "Google Drive is not mounted" in shown
    assert machine.requests == []
    assert not (machine.content / "drive").exists()
    # A terminal has Drive mounted, by a front end that can do no more.
    machine.front_end = DRIVEMOUNT
    place = str(machine.content / "drive")
    assert machine.run(f"from google.colab import drive; drive.mount({place!r})")[1] is None
    machine.front_end = BATCH
    machine.run("del os.environ['DRIVE_FOLDER']")
    assert _first_cell(machine, USE_DRIVE=True)[1] is None
    assert _copy(machine) == f"{place}/MyDrive/mlflow_series"
    # What the calling cell says about the copy holds in each notebook of a batch run.
    machine.run("os.environ['DRIVE_FOLDER'] = 'off'")
    assert _first_cell(machine, USE_DRIVE=True)[1] is None
    assert _copy(machine) == "off"
    assert [kind for kind, _, _ in machine.requests] == ["request_auth"]


def test_front_end_that_never_answers_is_given_up(machine, tmp_path):
    _project(machine.content / "project", machine.content)
    assert _first_cell(machine)[1] is None
    machine.front_end = frozenset({"nothing"})
    machine.run(
        "from helpers import colab, workspace; workspace.PATIENCE = 0.5\n"
        "from google.colab import drive; mount = drive.mount\n"
        "drive.mount = lambda place, timeout_ms: mount(place, timeout_ms=timeout_ms / 60)"
    )
    _, error = machine.run("colab.mount_drive()")
    assert "Google Drive is not connected: mount failed" in error
    assert "within 60 seconds" in error
    assert [seconds < 2 for _, _, seconds in machine.requests] == [True, True]


def test_workspace_in_drive_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr("helpers.workspace.DRIVE", tmp_path / "drive")
    with pytest.raises(WorkspaceError, match=r"DRIVE_FOLDER = '.*drive/MyDrive/mine'"):
        open_workspace(tmp_path / "drive" / "MyDrive" / "mine")
    assert not (tmp_path / "drive").exists()


# --- the series -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def new_runtime(tmp_path_factory):
    """The interpreter of a machine on which nothing was installed yet."""
    return make_runtime(tmp_path_factory.mktemp("colab") / "runtime", REQUIREMENTS)


@pytest.fixture(scope="module")
def runtime(new_runtime):
    """The interpreter of a machine that has all that it needs."""
    install = [*UV, "pip", "install", "-q", "--python", new_runtime, "-r", REQUIREMENTS]
    subprocess.run([*install, "--constraint", CONSTRAINTS], check=True)
    return new_runtime


@pytest.mark.slow
def test_each_notebook_on_a_machine_of_its_own_with_drive_in_common(tmp_path, new_runtime):
    python = new_runtime
    freeze = [python, "-m", "pip", "freeze", "--all"]
    before = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    drive, shown = tmp_path / "drive", []
    for day, number in enumerate([*NOTEBOOKS, "04"]):
        disk = tmp_path / f"machine{day}"
        shutil.rmtree(drive / "project", ignore_errors=True)
        _project(drive / "project", disk / "content")
        machine = ColabMachine(python, disk, drive, {"MLFLOW_AUTH_ADMIN_PASSWORD": "a" * 12})
        try:
            fields = {"PROJECT": "MyDrive/project", **SMALL.get(number, {})}
            shown.append(machine.step_through(NOTEBOOKS[number], **fields))
            if number == "04":
                table, error = machine.run("print(registry.history()[['to_version', 'result']])")
                assert error is None, error
        finally:
            machine.vanish()
        assert "Mounted at" in shown[day]
    after = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    assert set(before) <= set(after)
    assert "Installed: mlflow" in shown[0]
    assert "Installed: nothing" in shown[1]
    assert all("Saved to" in each for each in shown[:5])
    assert all("Restored what was saved at" in each for each in shown[1:])
    # 5000, or the next port where something else has that one.
    assert re.search(r"https://50\d\d-colab\.example/", shown[1])
    assert "Every candidate passed and is in Production." in shown[3]
    # The last machine has what the others made: nothing is to be promoted again.
    assert "already" in shown[5]
    assert table.count("FINISHED") == 2
    assert not (drive / "mlflow_series" / "aside").exists()


def _in_a_terminal(python, disk, drive, interrupt=None):
    """Do on a new machine what the README says for google-colab-cli; return the machine, shown."""
    machine = ColabMachine(python, disk, drive, {}, front_end=DRIVEMOUNT)
    source = _repository(disk / "repository", machine.content)
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"colab exec .*<<'EOF'\n(.*?)EOF", readme, re.DOTALL)[1]
    small = {name: value for values in SMALL.values() for name, value in values.items()}
    changes = " ".join(f"-p {name} '{value}'" for name, value in small.items())
    code = re.sub(r"https://github\S+", f"file://{source}", code).replace("--data sample", changes)
    _, error = machine.run(
        f"from google.colab import drive; drive.mount({str(machine.content / 'drive')!r})"
    )
    assert error is None, error
    machine.front_end = BATCH
    if interrupt:
        threading.Thread(target=interrupt, args=(machine,)).start()
    shown, error = machine.run(code)
    assert error is None, error
    return machine, shown


@pytest.mark.slow
def test_headless_series_goes_on_on_the_next_machine_and_asks_nobody(tmp_path, runtime):
    drive = tmp_path / "drive"

    def interrupt(machine):
        search = machine.content / "project" / "workspace" / "search"
        assert wait_for(lambda: len(list(search.rglob("output.pkl"))) > 1, 120)
        machine.interrupt()

    machine, shown = _in_a_terminal(runtime, tmp_path / "disk", drive, interrupt)
    try:
        assert "Interrupted. Go on with the same command and --resume." in shown
        executed = machine.content / "project" / "workspace" / "executed"
        assert "KeyboardInterrupt" in (executed / "03_svm_grid_search.ipynb").read_text()
        asked = machine.requests
    finally:
        machine.vanish()
    shutil.rmtree(tmp_path / "disk")
    machine, shown = _in_a_terminal(runtime, tmp_path / "disk", drive)
    try:
        assert "Restored what was saved at" in shown
        assert "01_data_preparation: skipped, done and unchanged" in shown
        assert re.search(r"model_conv_network .* version 1\s", shown), shown
        assert re.search(r"model_svm_rbf .* version 1\s", shown), shown
        # Lines, no progress bars that overwrite each other.
        assert "\x1b" not in shown
        asked += machine.requests
    finally:
        machine.vanish()
    # Of both machines' kernels, the one in which Drive was mounted asked for it, and no other.
    assert [(kind, answered) for kind, answered, _ in asked] == [("request_auth", True)] * 2
