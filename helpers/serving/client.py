"""Clients of a scoring server: what it serves, and its answers."""

import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import requests

from helpers.display import notice
from helpers.server import users
from helpers.serving.scored_rows import row_ids
from helpers.workspace import ProjectError

TIMEOUT = 120  # seconds for the answer to one request


class ServingError(ProjectError):
    """The scoring server cannot be used, or refused a request."""


@dataclass(frozen=True)
class ScoringClient:
    """A scoring server that answers, as its clients see it.

    Attributes
    ----------
    url : str
        Base address; MLflow's protocol for the first model.
    models : dict of str to dict
        What is served, by name: ``version``, ``run_id``, ``columns``, ``labels``, ``since``.
    password : str or None
        Of every request, with any user name; None if none is asked for.
    """

    url: str
    models: dict[str, dict]
    password: str | None = field(default=None, repr=False)

    def address(self, model: str) -> str:
        """Return the base address of a model, for MLflow's protocol."""
        if model not in self.models:
            raise ServingError(
                f"{model!r} is not served at {self.url}. Served: {', '.join(self.models)}."
            )
        return f"{self.url}/models/{model}"

    def session(self) -> requests.Session:
        """Return a session that knows the password, if there is one."""
        session = users.local_session()
        if self.password is not None:
            session.auth = ("client", self.password)
        return session

    def table(self) -> pd.DataFrame:
        """Return version, run and address of what is served, by name."""
        table = pd.DataFrame.from_dict(self.models, orient="index")[["version", "run_id"]]
        table["address"] = [f"{self.address(name)}/invocations" for name in self.models]
        return table.rename_axis("model")


def connect(url: str, password: str | None = None) -> ScoringClient:
    """Connect to a scoring server that runs, here or elsewhere.

    Raises
    ------
    ServingError
        If it does not answer, refuses the password, or serves nothing.
    """
    client = ScoringClient(url.rstrip("/"), {}, password)
    try:
        with client.session() as session:
            answer = session.get(f"{client.url}/models", timeout=30)
        content = answer.json() if answer.ok else None
    except requests.RequestException as error:
        raise ServingError(f"No scoring server answers at {client.url}: {error}") from None
    if content is None:
        raise ServingError(f"The scoring server at {client.url} refuses: {_reason(answer)}")
    for name, refused in content["refused"].items():
        notice(
            f"{name}: version {refused['version']} is in Production but cannot be served "
            f"({refused['reason']}).",
            "warning",
        )
    if content.get("recording", "ok") != "ok":
        notice(content["recording"], "warning")
    if not content["models"]:
        raise ServingError(
            f"The scoring server at {client.url} serves nothing. Put a working version into "
            "Production (04_registry_promotion, or registry.rollback)."
        )
    client.models.update((each["name"], each) for each in content["models"])
    return client


def _reason(answer: requests.Response) -> str:
    try:
        return answer.json()["message"]
    except (requests.JSONDecodeError, KeyError, TypeError):
        # Something else may answer at that address.
        return f"{answer.status_code} {answer.reason}"


def ask(
    client: ScoringClient,
    model: str,
    rows: pd.DataFrame,
    session: requests.Session | None = None,
    record: bool = True,
    demo: bool = False,
) -> pd.DataFrame:
    """Ask a model for predictions, in one request.

    Parameters
    ----------
    rows : pandas.DataFrame, shape (n_rows, n_columns)
        Raw columns in any order.
    session : requests.Session, optional
        Reused between requests.
    record : bool
        Whether the server may keep the rows for the monitoring.
    demo : bool
        Whether it keeps them apart, as those of a demo.

    Returns
    -------
    pandas.DataFrame, shape (n_rows, 1 + n_classes)
        ``prediction`` and ``probability_<label>``; index: the ids of the rows, under which
        labels can be sent later; ``attrs``: ``model``, ``version`` and ``run_id``.

    Raises
    ------
    ServingError
        If the request is refused; says why.
    """
    body = rows.to_json(orient="split", index=False, double_precision=15, date_format="iso")
    try:
        answer = (session or client.session()).post(
            f"{client.address(model)}/invocations",
            params=({} if record else {"record": "false"}) | ({"demo": "true"} if demo else {}),
            data=f'{{"dataframe_split": {body}}}'.encode(),
            headers={"Content-Type": "application/json"},
            timeout=TIMEOUT,
        )
    except requests.RequestException as error:
        raise ServingError(f"The scoring server at {client.url} does not answer: {error}") from None
    if not answer.ok:
        raise ServingError(f"{model} refused the rows: {_reason(answer)}")
    table = pd.DataFrame(answer.json()["predictions"])
    table.index = row_ids(answer.headers["X-Request-Id"], len(table))
    table.attrs = {
        "model": answer.headers["X-Model-Name"],
        "version": answer.headers["X-Model-Version"],
        "run_id": answer.headers["X-Run-Id"],
    }
    return table


def ask_with_curl(client: ScoringClient, model: str, path: Path) -> str:
    """Send a CSV with the program curl, as from a shell; return the command and its answer.

    The answer is left out where there is no curl.
    """
    command = [
        *("curl", "--silent", "--header", "Content-Type: text/csv"),
        *("--data-binary", f"@{path}", f"{client.address(model)}/invocations?record=false"),
    ]
    shown = "$ " + shlex.join(command)
    if shutil.which("curl") is None:
        return f"{shown}\n(there is no curl on this machine)"
    # By way of its standard input: everyone on the machine can read a command line.
    secret = f'user = "client:{client.password}"\n' if client.password else ""
    answer = subprocess.run(
        [*command, "--noproxy", "*", "--config", "-"],
        input=secret,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return f"{shown}\n{answer.stdout or answer.stderr}"
