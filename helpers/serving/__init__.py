"""Notebook 05: the scoring server of the production models, and clients of it.

``python -m helpers.serving`` starts the server; ``--stop`` ends it; ``--score IN.csv OUT.csv``
has it score a file of any size. What runs in the server's process is `helpers.serving.app`.
"""

import argparse
import hashlib
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import requests

from helpers import registry, series, tracking
from helpers.data import CsvChunks, DataError
from helpers.display import notice, progress
from helpers.server import credentials, processes, users
from helpers.workspace import ProjectError, atomic_path, open_workspace

PORT = 5001
CHUNK_ROWS = 5_000  # rows per request of the batch scorer
TIMEOUT = 120  # seconds for the answer to one request


class ServingError(ProjectError):
    """The scoring server cannot be used, or refused a request."""


@dataclass(frozen=True)
class ScoringServer:
    """A scoring server that answers; a notebook shows its addresses.

    Attributes
    ----------
    url : str
        Base address; MLflow's protocol for the first model.
    models : dict of str to dict
        What is served, by name: ``version``, ``run_id``, ``columns``, ``labels``.
    password : str or None
        Of every request, with any user name; None if none is asked for.
    """

    url: str
    models: dict
    password: str | None = field(default=None, repr=False)

    def address(self, model):
        """Return the base address of a model, for MLflow's protocol.

        Parameters
        ----------
        model : str

        Returns
        -------
        str
        """
        if model not in self.models:
            raise ServingError(
                f"{model!r} is not served at {self.url}. Served: {', '.join(self.models)}."
            )
        return f"{self.url}/models/{model}"

    def session(self):
        """Return a `requests.Session` that knows the password, if there is one."""
        session = users.local_session()
        if self.password is not None:
            session.auth = ("client", self.password)
        return session

    def table(self):
        """Return name, version, run and address of what is served, a pandas.DataFrame."""
        rows = {
            name: {
                "version": each["version"],
                "run_id": each["run_id"],
                "address": f"{self.address(name)}/invocations",
            }
            for name, each in self.models.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


# --- the process ------------------------------------------------------------------------------


def service(workspace, host=processes.HOST, record=True):
    """Return the scoring server of a workspace as a background service.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    host : str
        Address to listen at.
    record : bool
        Keep scored rows for the monitoring.

    Returns
    -------
    helpers.server.processes.Service
    """
    password = _password(workspace, host)
    arguments = () if record else ("--no-record",)
    return processes.Service(
        "scoring server",
        "helpers.serving.app",
        workspace.root,
        workspace.scoring,
        {credentials.SCORING_PASSWORD: password} if password else {},
        ("--host", host, *arguments),
        host,
    )


def _password(workspace, host=processes.HOST):
    """Return the password of the models; nothing is on a network without one."""
    password = credentials.find_secret(credentials.SCORING_PASSWORD)
    if password is None and host != processes.HOST:
        return credentials.stored_secret(workspace, credentials.SCORING)
    return password


def start(workspace, port=PORT, keep=None, host=processes.HOST, record=True):
    """Find the workspace's scoring server or start it, and wait until it answers.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    port : int
        Where to start; if something else is there, the next free port is taken and said.
    keep : bool, optional
        Whether it goes on after this process; default: where a person is.
    host : str
        Address to listen at; ``0.0.0.0`` takes requests of other machines, with a password.
    record : bool
        Keep scored rows for the monitoring.

    Returns
    -------
    ScoringServer

    Raises
    ------
    helpers.workspace.MissingStepError
        If no model is in Production.
    ServingError
        If what is in Production cannot be served; says why.
    """
    tracking.connect(workspace, keep)
    registry.require_production()
    process = service(workspace, host, record)
    server = process.start(port, keep)
    process.wait(server)
    return connect(server.url.replace("0.0.0.0", processes.HOST), _password(workspace, host))


def connect(url, password=None):
    """Connect to a scoring server that runs, here or elsewhere.

    Parameters
    ----------
    url : str
    password : str, optional

    Returns
    -------
    ScoringServer

    Raises
    ------
    ServingError
        If it does not answer, refuses the password, or serves nothing.
    """
    url = url.rstrip("/")
    session = ScoringServer(url, {}, password).session()
    try:
        with session, closing(session.get(f"{url}/models", timeout=30)) as answer:
            content = answer.json() if answer.ok else None
    except (requests.RequestException, ValueError) as error:
        raise ServingError(f"No scoring server answers at {url}: {error}") from None
    if content is None:
        raise ServingError(f"The scoring server at {url} refuses: {_reason(answer)}")
    for name, refused in content["refused"].items():
        notice(
            f"{name}: version {refused['version']} is in Production but cannot be served "
            f"({refused['reason']}).",
            "warning",
        )
    if not content["models"]:
        raise ServingError(
            f"The scoring server at {url} serves nothing. Put a working version into Production "
            "(04_registry_promotion, or registry.rollback)."
        )
    return ScoringServer(url, {each["name"]: each for each in content["models"]}, password)


def stop(workspace):
    """Stop the workspace's scoring server, whoever uses it.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace

    Returns
    -------
    bool
        Whether there was one.
    """
    return service(workspace).stop()


# --- clients ----------------------------------------------------------------------------------


def _reason(answer):
    try:
        return answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason}"


def ask(server, model, rows, session=None, record=True):
    """Ask a model for predictions, in one request.

    Parameters
    ----------
    server : ScoringServer
    model : str
    rows : pandas.DataFrame, shape (n_rows, n_columns)
        Raw columns in any order.
    session : requests.Session, optional
        Reused between requests.
    record : bool
        Whether the server may keep the rows for the monitoring.

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
    session = session or server.session()
    body = rows.to_json(orient="split", index=False, double_precision=15, date_format="iso")
    try:
        answer = session.post(
            f"{server.address(model)}/invocations",
            params={} if record else {"record": "false"},
            data=f'{{"dataframe_split": {body}}}'.encode(),
            headers={"Content-Type": "application/json"},
            timeout=TIMEOUT,
        )
    except requests.RequestException as error:
        raise ServingError(f"The scoring server at {server.url} does not answer: {error}") from None
    if not answer.ok:
        raise ServingError(f"{model} refused the rows: {_reason(answer)}")
    table = pd.DataFrame(answer.json()["predictions"])
    request_id = answer.headers["X-Request-Id"]
    table.index = [f"{request_id}-{number}" for number in range(len(table))]
    table.attrs = {
        "model": answer.headers["X-Model-Name"],
        "version": answer.headers["X-Model-Version"],
        "run_id": answer.headers["X-Run-Id"],
    }
    return table


def ask_with_curl(server, model, path):
    """Ask with the program curl, as from a shell.

    Parameters
    ----------
    server : ScoringServer
    model : str
    path : pathlib.Path
        CSV to send.

    Returns
    -------
    str
        The command and its answer; the answer's part is left out where there is no curl.
    """
    command = [
        *("curl", "--silent", "--header", "Content-Type: text/csv"),
        *("--data-binary", f"@{path}", f"{server.address(model)}/invocations?record=false"),
    ]
    shown = "$ " + shlex.join(command)
    if shutil.which("curl") is None:
        return f"{shown}\n(there is no curl on this machine)"
    # By way of its standard input: everyone on the machine can read a command line.
    secret = f'user = "client:{server.password}"\n' if server.password else ""
    answer = subprocess.run(
        [*command, "--noproxy", "*", "--config", "-"],
        input=secret,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return f"{shown}\n{answer.stdout or answer.stderr}"


@dataclass(frozen=True)
class _Parts:
    """The finished parts of a batch, in a folder beside the output.

    The folder goes when the output is complete; until then an interrupted batch goes on from
    it. What was made from another input or for another model is not reused.
    """

    folder: Path
    key: str

    def open(self):
        """Return how many parts are finished."""
        note = self.folder / "key"
        if self.folder.exists() and (not note.is_file() or note.read_text() != self.key):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(self.key)
        return next(number for number in itertools.count() if not self.path(number).is_file())

    def path(self, number):
        """Return the file of a part."""
        return self.folder / f"{number:06d}.parquet"


def score_csv(server, model, source, output, keep=(), chunk_rows=CHUNK_ROWS, record=True):
    """Score a CSV of any size, chunk by chunk; go on where an interrupted batch stopped.

    Parameters
    ----------
    server : ScoringServer
    model : str
    source : str or path-like
        CSV with the model's columns, and any others; may be packed with gzip.
    output : str or path-like
        ``.csv`` or ``.parquet``; appears when it is complete.
    keep : sequence of str
        Columns of the input to copy to the output, such as a student's number.
    chunk_rows : int
        Rows per request; bounds the memory.
    record : bool
        Whether the server may keep the rows for the monitoring.

    Returns
    -------
    int
        Rows scored, including those of an earlier, interrupted call.

    Raises
    ------
    helpers.data.DataError
        If the input cannot be read; the finished parts stay.
    ServingError
        If the output is neither, or the server refuses rows; names the rows.
    """
    source, output = Path(source), Path(output)
    if output.suffix not in (".csv", ".parquet"):
        raise ServingError(f"The output {output} must end in .csv or .parquet.")
    address = server.address(model)
    if not source.is_file():
        raise DataError(f"{source} does not exist.")
    status = source.stat()
    about = [str(source.resolve()), status.st_size, status.st_mtime_ns, address, *keep, chunk_rows]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    parts = _Parts(output.with_name(f"{output.name}.parts"), key)
    done, total = parts.open(), 0
    if done:
        notice(f"{output.name}: goes on after the {done:,} parts that are finished.")
    columns = server.models[model]["columns"]
    texts = {name: str for name, kind in columns.items() if kind == "text"}
    chunks = CsvChunks(source, chunk_rows, texts)
    with chunks, server.session() as session, _bar(source) as bar:
        for number, chunk in enumerate(chunks):
            if number >= done:
                scored = _score_chunk(server, model, chunk, keep, total, session, record)
                with atomic_path(parts.path(number)) as path:
                    scored.to_parquet(path, index=False)
            total += len(chunk)
            bar.set_postfix_str(f"{total:,} rows")
            bar.update(chunks.position - bar.n)
    _join(parts, output)
    shutil.rmtree(parts.folder)
    return total


def _bar(source):
    size = source.stat().st_size
    return progress(size, source.name, "B", unit_scale=True)


def _score_chunk(server, model, chunk, keep, first, session, record):
    missing = [name for name in keep if name not in chunk.columns]
    if missing:
        raise DataError(f"The input has no column {missing[0]!r} to keep.")
    wanted = [name for name in chunk.columns if name.strip() in server.models[model]["columns"]]
    try:
        answer = ask(server, model, chunk[wanted], session, record)
    except ServingError as error:
        last = first + len(chunk)
        raise ServingError(f"Rows {first + 1:,} to {last:,} of the input: {error}") from None
    table = chunk[list(keep)].reset_index(drop=True)
    table.insert(0, "row", range(first + 1, first + 1 + len(chunk)))
    answer.insert(0, "row_id", answer.index)
    table = pd.concat([table, answer.reset_index(drop=True)], axis=1)
    return table.assign(model_version=answer.attrs["version"])


def _join(parts, output):
    """Write the parts one after the other into the output, which appears at once."""
    import pyarrow.csv
    import pyarrow.parquet

    files = sorted(parts.folder.glob("*.parquet"))
    schema = pyarrow.unify_schemas(
        [pyarrow.parquet.read_schema(path) for path in files], promote_options="permissive"
    )
    kinds = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}
    with atomic_path(output) as temporary, kinds[output.suffix](temporary, schema) as writer:
        for path in files:
            writer.write_table(pyarrow.parquet.read_table(path).cast(schema))


# --- the command line -------------------------------------------------------------------------


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m helpers.serving", description="Serve the models in Production."
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument("--host", default=processes.HOST, help="0.0.0.0: for other machines, too")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--stop", action="store_true", help="stop the server")
    parser.add_argument("--score", nargs=2, metavar=("IN.csv", "OUT"), help="score a file")
    parser.add_argument("--model", default=next(iter(series.MODELS)), help="for --score")
    parser.add_argument("--keep", action="append", default=[], help="column to copy; repeatable")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Start or stop the scoring server, or score a file, from the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0; 1 with a message; 130 after an interrupt.
    """
    options = _parse(arguments)
    try:
        workspace = open_workspace(options.workspace)
        if options.stop:
            print("Stopped." if stop(workspace) else "No scoring server was running.")
            return 0
        server = start(workspace, options.port, not options.score, options.host)
        if options.score:
            rows = score_csv(server, options.model, *options.score, keep=options.keep)
            print(f"{rows:,} rows scored into {options.score[1]}")
            return 0
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from there.", file=sys.stderr)
        return 130
    print(server.table().to_string())
    if (
        server.password is not None
        and credentials.find_secret(credentials.SCORING_PASSWORD) is None
    ):
        print(f"The password of the models is in {workspace.passwords}, under 'scoring'.")
    return 0
