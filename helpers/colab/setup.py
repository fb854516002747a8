"""Colab: setting up its machines, and the links that open the notebooks there.

``python -m helpers.colab`` writes `REPOSITORY` into the notebooks and the READMEs: the *Open in
Colab* links, and the address in each notebook's first cell. With ``--check`` it only says what
is not up to date.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from helpers.workspace import (
    DRIVE,
    PROJECT_ROOT,
    ProjectError,
    colab_front_end,
    in_colab,
    is_batch,
    kernel,
)

# The one setting: where the project is on GitHub, as "owner/name", and the branch to open.
# After a change: python -m helpers.colab
REPOSITORY = ""
BRANCH = "main"

NOTEBOOKS = PROJECT_ROOT / "notebooks"
COPY = "MyDrive/mlflow_series"  # the safe copy in Google Drive
READMES = {
    "README.md": (
        "The links appear here once `REPOSITORY` in `helpers/colab/setup.py` is set and "
        "`python -m helpers.colab` was run."
    ),
    "README.es.md": (
        "Los enlaces aparecen aquí cuando `REPOSITORY` tiene un valor en "
        "`helpers/colab/setup.py` y se ha ejecutado `python -m helpers.colab`."
    ),
}
COLAB = "https://colab.research.google.com/github"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


# --- setting up -------------------------------------------------------------------------------


def set_up(use_drive: bool) -> None:
    """Make the project's folder the working one; in Colab also mount Drive and install packages.

    Parameters
    ----------
    use_drive : bool
        In Colab: whether data, runs and models are kept in Google Drive. It becomes the default
        of ``DRIVE_FOLDER``.

    Raises
    ------
    helpers.workspace.ProjectError
        If Drive is not allowed, or pip cannot install what the machine lacks.
    """
    os.chdir(PROJECT_ROOT)
    if not in_colab():
        return
    # What starts a batch run has decided.
    if not (is_batch() and os.environ.get("DRIVE_FOLDER")):
        kept = use_drive and mount_drive()
        os.environ["DRIVE_FOLDER"] = str(DRIVE / COPY) if kept else "off"
    print("Installed:", ", ".join(install_missing()) or "nothing, all is here")


def mount_drive() -> bool:
    """Mount Google Drive where a person can allow it; tell whether it is there.

    Raises
    ------
    ProjectError
        If the person does not allow it, or it fails.
    """
    # Colab asks before it looks, and would wait two minutes for the answer.
    if (DRIVE / "MyDrive").is_dir():
        return True
    if kernel() is None or is_batch():
        return False
    from google.colab import drive, errors
    from pexpect import ExceptionPexpect

    seconds = 120 if colab_front_end() else 60
    try:
        drive.mount(str(DRIVE), timeout_ms=1000 * seconds)
    except (errors.Error, ValueError, NotImplementedError, ExceptionPexpect) as error:
        reason = str(error).partition("\n")[0].removeprefix("Error: ").rstrip(".")
        raise ProjectError(
            f"Google Drive is not connected: {reason}. Run this cell again and allow it within "
            f"{seconds} seconds, or go on without a copy (USE_DRIVE off, DRIVE_FOLDER = 'off'): "
            "nothing is kept then when this machine goes."
        ) from None
    return True


# --- what Colab lacks -------------------------------------------------------------------------


def missing_requirements() -> list[str]:
    """List the lines of `requirements.txt` that no installed package satisfies by name.

    A package that is there in any version is kept: nothing that Colab ships is replaced.
    """
    missing = []
    for line in (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement:
            try:
                metadata.version(re.match(r"[\w.-]+", requirement).group())
            except metadata.PackageNotFoundError:
                missing.append(requirement)
    return missing


def installed_versions() -> list[str]:
    """Return the version of every installed package, as the lines of a constraints file.

    Packages of the system whose versions pip cannot read are left out.
    """
    # Only here: a machine without pip's companion can still run the first cell.
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    found = {}
    for each in metadata.distributions():
        # Of two of one name, Python imports the first.
        if each.name:
            found.setdefault(canonicalize_name(each.name), each.version)
    pins = []
    for name, version in sorted(found.items()):
        with suppress(InvalidVersion):
            pins.append(f"{name}=={Version(version)}")
    return pins


def install_missing() -> list[str]:
    """Install what `requirements.txt` names and the machine lacks; return it, replace nothing.

    What is installed is a constraint to pip: it takes versions that go with it, or gives up.
    So no package changes under a running notebook, and no restart is needed.

    Raises
    ------
    ProjectError
        If pip cannot install them.
    """
    missing = missing_requirements()
    if not missing:
        return missing
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("\n".join(installed_versions()), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
        done = subprocess.run([*pip, "--constraint", constraints, *missing], check=False)
    if done.returncode:
        raise ProjectError(
            f"pip could not install {', '.join(missing)} beside what is installed. Check the "
            "network, then run this cell again; on a machine where you installed other packages "
            "before, start with a new one (Runtime → Disconnect and delete runtime)."
        )
    return missing


# --- links ------------------------------------------------------------------------------------


def _badge(notebook: Path, repository: str) -> str:
    url = f"{COLAB}/{repository}/blob/{BRANCH}/notebooks/{notebook.name}"
    return f"[![Open in Colab]({BADGE})]({url})"


def stamped_notebook(text: str, notebook: Path, repository: str) -> str:
    """Return a notebook's text with the link and the address of ``owner/name``, or without."""
    content = json.loads(text)
    cells = content["cells"]
    title = re.sub(r"\n\n\[!\[Open in Colab\].*", "", "".join(cells[0]["source"]))
    if repository:
        first, _, rest = title.partition("\n")
        title = f"{first}\n\n{_badge(notebook, repository)}\n{rest}"
    cells[0]["source"] = title.splitlines(keepends=True)
    first_code = next(cell for cell in cells if cell["cell_type"] == "code")
    url = f"https://github.com/{repository}" if repository else ""
    first_code["source"] = [
        re.sub(r'^REPO_URL = "[^"]*"', f'REPO_URL = "{url}"', line) for line in first_code["source"]
    ]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def stamped_readme(text: str, without: str, repository: str) -> str:
    """Return a README's text with a link to each notebook, or the text `without`."""
    links = [f"- {_badge(path, repository)} `{path.stem}`" for path in _notebooks()]
    shown = "\n".join(links) if repository else without
    pattern = r"(<!-- colab links -->\n).*?(\n<!-- end -->)"
    return re.sub(pattern, lambda found: found[1] + shown + found[2], text, flags=re.DOTALL)


def _notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Stamp the links, or with ``--check`` say where they are not up to date; return 0, or 1."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.colab", description="Stamp the Open in Colab links."
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    if REPOSITORY and not re.fullmatch(r"[\w.-]+/[\w.-]+", REPOSITORY):
        print(f"REPOSITORY must be 'owner/name', not {REPOSITORY!r}.", file=sys.stderr)
        return 1
    stamped = {path: stamped_notebook(_read(path), path, REPOSITORY) for path in _notebooks()}
    for name, without in READMES.items():
        path = PROJECT_ROOT / name
        stamped[path] = stamped_readme(_read(path), without, REPOSITORY)
    stale = {path: text for path, text in stamped.items() if text != _read(path)}
    if not options.check:
        for path, text in stale.items():
            path.write_text(text, encoding="utf-8")
    names = ", ".join(path.name for path in stale)
    print(f"Not up to date: {names}" if stale else "Everything is up to date.")
    return 1 if stale and options.check else 0
