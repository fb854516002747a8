"""Scoring a CSV of any size, chunk by chunk."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import pandas as pd

from helpers.data import CsvChunks, DataError
from helpers.display import notice, progress
from helpers.serving.client import ScoringClient, ServingError, ask
from helpers.workspace import atomic_path

CHUNK_ROWS = 5_000  # rows per request


def score_csv(
    client: ScoringClient,
    model: str,
    source: str | PathLike,
    output: str | PathLike,
    keep: Sequence[str] = (),
    chunk_rows: int = CHUNK_ROWS,
    record: bool = True,
) -> int:
    """Score a CSV of any size, chunk by chunk; go on where an interrupted call stopped.

    The finished parts lie in the folder ``<output>.parts`` until the output is complete. What was
    made from another input or for another model is not reused.

    Parameters
    ----------
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
    address = client.address(model)
    if not source.is_file():
        raise DataError(f"{source} does not exist.")
    status = source.stat()
    made_from = [str(source.resolve()), status.st_size, status.st_mtime_ns]
    made_from += [address, *keep, chunk_rows]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    folder = output.with_name(f"{output.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    finished = len(list(folder.glob(f"{key}-*.parquet")))
    if finished:
        notice(f"{output.name}: goes on after the {finished:,} parts that are finished.")
    columns = client.models[model]["columns"]
    # What is copied only is no number either: 007 stays 007.
    texts = {name: str for name in (*columns, *keep) if columns.get(name, "text") == "text"}
    parts, total = [], 0
    with (
        CsvChunks(source, chunk_rows, texts) as chunks,
        client.session() as session,
        progress(
            status.st_size,
            source.name,
            "B",
            lambda: f"run the cell again, it goes on after {total:,} rows",
            unit_scale=True,
        ) as bar,
    ):
        for chunk in chunks:
            parts.append(folder / f"{key}-{len(parts):06d}.parquet")
            if not parts[-1].is_file():
                scored = _score_chunk(client, model, chunk, keep, total, session, record)
                with atomic_path(parts[-1]) as path:
                    scored.to_parquet(path, index=False)
            total += len(chunk)
            bar.set_postfix_str(f"{total:,} rows")
            bar.update(chunks.position - bar.n)
    _join(parts, output)
    shutil.rmtree(folder)
    return total


def _score_chunk(client, model, chunk, keep, first, session, record) -> pd.DataFrame:
    missing = [name for name in keep if name not in chunk.columns]
    if missing:
        raise DataError(f"The input has no column {missing[0]!r} to keep.")
    last = first + len(chunk)
    asked = chunk[chunk.columns.intersection(list(client.models[model]["columns"]))]
    try:
        answer = ask(client, model, asked, session, record)
    except ServingError as error:
        raise ServingError(f"Rows {first + 1:,} to {last:,} of the input: {error}") from None
    return pd.concat(
        [
            pd.DataFrame({"row": range(first + 1, last + 1)}),
            chunk[list(keep)].reset_index(drop=True),
            answer.rename_axis("row_id").reset_index(),
        ],
        axis=1,
    ).assign(model_version=answer.attrs["version"])


def _join(parts: list[Path], output: Path) -> None:
    """Write the parts one after the other into the output, which appears at once."""
    import pyarrow.csv
    import pyarrow.parquet

    schema = pyarrow.unify_schemas(
        [pyarrow.parquet.read_schema(path) for path in parts], promote_options="permissive"
    )
    kinds = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}
    with atomic_path(output) as temporary, kinds[output.suffix](temporary, schema) as writer:
        for path in parts:
            writer.write_table(pyarrow.parquet.read_table(path).cast(schema))
