"""A stand-in for Colab: machines with an empty disk that vanish, and a front end with a person.

What is real: the kernels, the packages (those of Colab's runtime, see ``constraints.txt``), the
notebooks and everything that they start. What is not: the front end. ``packages`` holds a package
``google.colab`` that asks it by Colab's own messages, and waits as long as Colab's does.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from tests.series import wait_for

PYTHON = "3.13"
UV = (sys.executable, "-m", "uv")
HERE = Path(__file__).parent
MARK = "COLAB_DOUBLE_DISK"  # variable in the environment of all that runs on a machine
LOG, RIGHT = "requests.jsonl", "right"  # on its disk: what was asked, whether Drive is allowed
CONSTRAINTS = HERE / "constraints.txt"


# What each front end answers; none of the batch runs has one that could be asked for input.
PAGE = frozenset({"request_auth", "GetSecret", "cell_javascript_eval"})  # Colab's own
VS_CODE = DRIVEMOUNT = frozenset({"request_auth"})  # of google-colab-cli, the second
BATCH = frozenset()  # papermill, `colab exec`


class ColabMachine:
    """One machine of Colab: an empty disk, a kernel, a person who runs cells.

    The folder `disk` stands for the machine's root, ``/content`` is a folder in it; `python` is
    the runtime's, `drive` the person's Google Drive, `secrets` are theirs: a value, or None where
    the notebook may not read it.

    Attributes
    ----------
    front_end : set of str
        What the front end answers from the next cell on.
    allows_drive : bool
        Whether the person, when asked, allows Drive.
    requests : list of tuple
        What the machine's kernels asked a front end: what, whether it answered, the seconds.
    """

    def __init__(self, python: Path, disk: Path, drive: Path, secrets: dict, front_end=PAGE):
        self.content = disk / "content"
        self.content.mkdir(parents=True)
        drive.mkdir(exist_ok=True)
        self.front_end, self.allows_drive = front_end, True
        self._secrets, self._log, self._right = secrets, disk / LOG, disk / RIGHT
        self._environment = set_up(python, disk, drive)
        connection = disk / "kernel.json"
        write_connection_file(str(connection))
        # Now, as the kernel takes the file away for a moment when it writes it anew.
        self._client = BlockingKernelClient()
        self._client.load_connection_file(str(connection))
        port = json.loads(connection.read_text(encoding="utf-8"))["hb_port"]
        self._kernel = subprocess.Popen(
            [python, "-m", "colab_kernel_launcher", "-f", str(connection)],
            cwd=self.content,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=(disk / "kernel.log").open("wb"),
        )
        # The client takes a kernel that does not answer within a second for dead.
        assert wait_for(lambda: _listens(port)), (disk / "kernel.log").read_text()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    @property
    def requests(self):
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.is_file() else []
        return [tuple(json.loads(line)) for line in lines]

    def _answer(self, kind: str, request: dict) -> dict:
        """Answer a request as a front end and the person before it would."""
        if kind == "request_auth":
            if not self.allows_drive:
                return {"error": "Error: credential propagation was unsuccessful"}
            self._right.touch()
            return {}
        if kind == "GetSecret":
            there, value = request["key"] in self._secrets, self._secrets.get(request["key"])
            return {"data": {"exists": there, "access": value is not None, "payload": value}}
        port = re.fullmatch(r"google\.colab\.kernel\.proxyPort\((\d+).*\)", request["script"])
        if port:
            return {"data": f"https://{port[1]}-colab.example/"}
        return {"data": json.loads(request["script"])}

    def run(self, code: str) -> tuple[str, str | None]:
        """Run a cell as the front end does; return what it shows and its error, or None."""
        shown, errors = [], []

        def look(message):
            content = message["content"]
            if message["msg_type"] == "colab_request":
                asked = message["metadata"]
                kind, number = asked["colab_request_type"], asked["colab_msg_id"]
                if kind in self.front_end:
                    answer = self._answer(kind, content["request"])
                    self._client.input({"type": "colab_reply", "colab_msg_id": number, **answer})
            elif message["msg_type"] == "stream":
                shown.append(content["text"])
            elif message["msg_type"] in ("display_data", "execute_result"):
                data = content["data"]
                shown.append(data.get("application/javascript", data.get("text/plain", "")) + "\n")
            elif message["msg_type"] == "error":
                errors.append("\n".join(content["traceback"]))

        self._client.execute_interactive(
            code,
            allow_stdin=bool(self.front_end),
            output_hook=look,
            # Asked for a token, the person presses Enter.
            stdin_hook=lambda _: self._client.input(""),
            timeout=600,
        )
        return "".join(shown), (errors[0] if errors else None)

    def interrupt(self) -> None:
        """Interrupt the cell that runs, as the front end's stop button does."""
        self._kernel.send_signal(signal.SIGINT)

    def step_through(self, notebook: Path, **changes) -> str:
        """Run all cells of a notebook, stopping at an error; return what they showed.

        The changes are what the person writes into fields of the first cell and of the
        parameters' cell.
        """
        shown = []
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            lines = "".join(cell["source"]).replace("/content", str(self.content)).splitlines()
            code = "\n".join(
                f"{name} = {changes[name]!r}" if name in changes else line
                for line in lines
                for name in [re.split(r"[: ]", line)[0]]
            )
            text, error = self.run(code)
            shown.append(text)
            assert error is None, f"{notebook.name}: {error}\n{code}\n{text}"
        return "\n".join(shown)

    def vanish(self) -> None:
        """Take the machine away at once, with all that runs on it."""
        self._client.stop_channels()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._environment[MARK]:
                    process.kill()
        self._kernel.wait(30)


def set_up(python: Path, disk: Path, drive: Path) -> dict[str, str]:
    """Make every kernel of the machine one of Colab's; return the environment of what it runs."""
    profile = disk / "ipython" / "profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_kernel_config.py").write_text(
        'get_config().IPKernelApp.kernel_class = "google.colab._kernel.Kernel"\n'
    )
    spec = disk / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [str(python), "-m", "colab_kernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3"}))
    kept = {"PATH", "HOME", "LANG", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "LD_LIBRARY_PATH"}
    return {
        **{name: value for name, value in os.environ.items() if name in kept},
        # As in Colab, "python" is the one with the packages.
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HERE / "packages"),
        "IPYTHONDIR": str(disk / "ipython"),
        "JUPYTER_PATH": str(disk / "jupyter"),
        "COLAB_RELEASE_TAG": "release-colab-stand-in",
        "COLAB_DOUBLE_DRIVE": str(drive),
        "COLAB_DOUBLE_RIGHT": str(disk / RIGHT),
        "COLAB_DOUBLE_LOG": str(disk / LOG),
        MARK: str(disk),
    }


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _interpreter() -> str:
    """Return Colab's version of Python where the machine has it, else what uv has to fetch."""
    # pyenv's own command of this name fails where another version is the current one.
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in [*versions.glob(f"{PYTHON}*/bin/python"), shutil.which(f"python{PYTHON}")]:
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
            return str(path)
    return PYTHON


def make_runtime(folder: Path, requirements: Path) -> Path:
    """Make an environment with those of the requirements that Colab has, in Colab's versions.

    Returns
    -------
    pathlib.Path
        Its interpreter.
    """
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in read_constraints()}
    lines = requirements.read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[\w.-]+", line).group().lower() for line in lines if line[:1] not in "#"]
    wanted = ["pip", "ipykernel", *(name for name in names if name in pinned)]
    subprocess.run([*UV, "venv", "-q", "--python", _interpreter(), folder], check=True)
    interpreter = folder / "bin" / "python"
    install = [*UV, "pip", "install", "-q", "--python", interpreter, "--compile-bytecode"]
    subprocess.run([*install, "--constraint", CONSTRAINTS, *wanted], check=True)
    return interpreter


def read_constraints() -> list[str]:
    """Return the packages of Colab's runtime, as lines ``name==version``."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if "==" in line and not line.startswith("#")]
