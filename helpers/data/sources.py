"""Where a table comes from: the UCI repository, the bundled sample, a file or a URL."""

from collections.abc import Sequence
from pathlib import Path

import requests

from helpers.data.reading import DataError
from helpers.data.split import prepared_table
from helpers.data.table import Table, read_table
from helpers.display import notice
from helpers.workspace import Workspace

UCI_URL = (
    "https://archive.ics.uci.edu/static/public/697/"
    "predict+students+dropout+and+academic+success.zip"
)
UCI_TIMEOUT = 5  # seconds; without a network `auto` must not keep anyone waiting
URL_TIMEOUT = 30  # seconds
SAMPLE = Path(__file__).with_name("sample_data") / "student_outcomes_sample.csv.gz"


def _download(url: str, timeout: float) -> bytes:
    try:
        response = requests.get(url, timeout=timeout)
        response.raise_for_status()
    except requests.RequestException as error:
        raise DataError(
            f"{url} does not answer ({type(error).__name__}). Check the address and the "
            "network, or give the path of a CSV on this machine as DATA_SOURCE."
        ) from None
    return response.content


def _fetch(source: str) -> bytes:
    if source == "uci":
        return _download(UCI_URL, UCI_TIMEOUT)
    if source == "sample":
        return SAMPLE.read_bytes()
    if source.startswith(("http://", "https://")):
        return _download(source, URL_TIMEOUT)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"There is no file {path} (looked in {Path.cwd()}). Give DATA_SOURCE the path or "
            "URL of a CSV, or 'sample' for the bundled table."
        )
    return path.read_bytes()


def load_table(
    source: str,
    workspace: Workspace | None,
    target: str = "Target",
    categorical: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
) -> Table:
    """Fetch and read the table that `source` names, see `read_table`.

    Parameters
    ----------
    source
        ``auto``: the copy prepared before in this workspace, else the UCI repository, else the
        bundled sample with a notice. ``uci``, ``sample``, or a path or URL of any CSV.
    workspace
        Where a prepared copy may be; for ``auto`` only.

    Raises
    ------
    DataError
        If the source cannot be read; see the message.
    """
    options = {"target": target, "categorical": categorical, "drop": drop}
    if source != "auto":
        return read_table(_fetch(source), source, **options)
    table = prepared_table(workspace, **options)
    if table is not None:
        without = f", without {', '.join(table.dropped)}" if table.dropped else ""
        notice(f"Using the copy prepared before from {table.source} in {workspace.data}{without}.")
        return table
    try:
        return read_table(_fetch("uci"), "uci", **options)
    except DataError as error:
        notice(
            f"{error}\nThe notebooks go on with the bundled SYNTHETIC sample: models trained on "
            "it say so and are for practice only.",
            level="warning",
        )
        return read_table(_fetch("sample"), "sample", **options)
