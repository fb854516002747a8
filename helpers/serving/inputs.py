"""The rows of a request, in the forms of MLflow's protocol.

They come as tables of some rows each, with the model's columns only: whatever a client sends,
little of it is in memory at a time, and other requests get their turn in between. What cannot be
read is refused with starlette's ``HTTPException``, whose detail says why.
"""

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice

import numpy as np
import pandas as pd
from starlette.exceptions import HTTPException

from helpers.data import CSV_OPTIONS
from helpers.models.interface import convert
from helpers.serving.json_reader import MOST_BYTES, JsonReader

FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
ROWS = 1_000  # of a table
NESTED = (list, dict)


def parse(body: bytes, content_type: str, columns: dict[str, str]) -> Iterator[pd.DataFrame]:
    """Read the rows of a request.

    Parameters
    ----------
    content_type : str
        ``application/json`` or ``text/csv``, with or without parameters.
    columns : dict of str to {'number', 'boolean', 'text'}
        The model's columns.

    Yields
    ------
    pandas.DataFrame, shape (n_rows, len(columns))
        At most `ROWS` rows.

    Raises
    ------
    starlette.exceptions.HTTPException
    mlflow.exceptions.MlflowException
        If a column is missing or there twice.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/csv":
        return _parse_csv(body, columns)
    if kind == "application/json":
        return _parse_json(body, columns)
    given = repr(kind or "(none)")
    message = f"Content-Type {given} is not known here: send application/json or text/csv."
    raise HTTPException(415, message)


def _places(names: list[str], columns: dict[str, str]) -> list[int]:
    """Return where the model's columns are in a list of names."""
    given = {name.strip(): place for place, name in enumerate(names)}
    given |= {name: place for place, name in enumerate(names)}
    if len(set(names)) < len(names) or not columns.keys() <= given.keys():
        convert(pd.DataFrame(columns=names), columns)  # says what is wrong
    return [given[name] for name in columns]


# --- CSV ----------------------------------------------------------------------------------------


def _parse_csv(body: bytes, columns: dict[str, str]) -> Iterator[pd.DataFrame]:
    try:
        yield from _read_csv(body, columns)
    except UnicodeDecodeError:
        raise HTTPException(400, "The CSV is not UTF-8 text.") from None
    except (ValueError, OverflowError, csv.Error) as error:
        raise HTTPException(400, f"The CSV cannot be read: {str(error)[:200]}") from None


def _read_csv(body: bytes, columns: dict[str, str]) -> Iterator[pd.DataFrame]:
    text = io.TextIOWrapper(io.BytesIO(body), "utf-8-sig", newline="")
    size = 0  # letters since the last row

    def read_lines():
        nonlocal size
        while line := text.readline(MOST_BYTES + 1):
            size += len(line)
            if size > MOST_BYTES:
                message = f"The CSV cannot be read: a row is over {MOST_BYTES // 2**20} MB."
                raise HTTPException(400, f"{message} Is a quotation mark not closed?")
            yield line

    header = next(filter(str.strip, read_lines()), None)
    if header is None:
        raise HTTPException(400, "The CSV is empty: send a header and rows.")
    separator = ";" if header.count(";") > header.count(",") else ","
    lines = chain([header], read_lines())
    rows = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    names, places, chunk, chunk_size = next(rows), None, [], 0
    for row in rows:
        chunk_size, size = chunk_size + size, 0
        if len(row) != len(names):
            if not any(map(str.strip, row)):
                continue  # a blank line
            more = "more" if len(row) > len(names) else "fewer"
            place = f"Line {rows.line_num:,} of the CSV has {more} fields than its header"
            raise HTTPException(400, f"{place}: {len(row):,}, not {len(names):,}.")
        if places is None:
            # Programs for spreadsheets write columns without a name.
            named = [place for place, name in enumerate(names) if name]
            places = _places([names[place] for place in named], columns)
            places = [named[place] for place in places]
        chunk.append([row[place] for place in places])
        if len(chunk) == ROWS or chunk_size > MOST_BYTES:
            yield _typed(chunk, columns)
            chunk, chunk_size = [], 0
    if chunk:
        yield _typed(chunk, columns)


def _typed(rows: list[list[str]], columns: dict[str, str]) -> pd.DataFrame:
    """Return texts as the table that pandas reads from such a CSV."""
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    file.seek(0)
    # Texts that look like numbers, such as 007, stay as they are.
    texts = {name: str for name, kind in columns.items() if kind == "text"}
    return pd.read_csv(file, names=list(columns), dtype=texts, **CSV_OPTIONS)


# --- JSON ---------------------------------------------------------------------------------------


def _parse_json(body: bytes, columns: dict[str, str]) -> Iterator[pd.DataFrame]:
    """Read a JSON text twice: first all but the values is checked, then tables are made."""
    reader = JsonReader(body, len(codecs.BOM_UTF8) if body.startswith(codecs.BOM_UTF8) else 0)
    wrong = f"The JSON must be an object with exactly one of {', '.join(FORMS)}."
    if reader.peek() != "{":
        reader.value()
        raise HTTPException(400, wrong)
    found, others = {}, False
    for form in reader.fields():
        if form in FORMS:
            found[form] = _survey(reader, form, columns)
        else:
            _skip(reader)
            others |= form != "params"
    reader.end()
    if len(found) != 1 or others:
        raise HTTPException(400, wrong)
    ((form, rows),) = found.items()
    try:
        rows = _flat(rows, columns)
        while chunk := list(islice(rows, ROWS)):
            yield _as_table(chunk, list(columns))
    except (ValueError, TypeError, OverflowError) as error:
        message = f"{form} cannot be read as rows: {str(error)[:200]}"
        raise HTTPException(400, message) from None


def _survey(reader: JsonReader, form: str, columns: dict[str, str]) -> Iterator[list]:
    """Read past the rows of a form; return them, still to be read, in the order of `columns`."""
    match form, reader.peek():
        case "dataframe_split", "{":
            return _survey_split(reader, columns)
        case "dataframe_split", _:
            raise HTTPException(400, "dataframe_split must have the lists 'columns' and 'data'.")
        case _, "[":
            start = reader.mark()
            found, width = _survey_rows(reader, form, columns, len(columns))
            if width is not None:
                return reader.again(start).values()
            return _records(reader.again(start), found, columns)
        case "inputs" | "instances", "{":
            return _survey_columns(reader, columns)
        case "dataframe_records", _:
            raise HTTPException(400, "dataframe_records must be a list of objects, one per row.")
        case _:
            raise HTTPException(400, f"{form} must be rows, or lists by column.")


def _survey_rows(
    reader: JsonReader, form: str, columns: dict[str, str], width: int | None
) -> tuple[set[str], int | None]:
    """Read past rows; return which columns objects have, and how many values lists have.

    The rows are all objects or all lists, these of one `width`.
    """
    kind, found = list if form == "dataframe_split" else None, set()
    for number, row in enumerate(reader.values()):
        kind = kind or (dict if isinstance(row, dict) else list)
        if form == "dataframe_records" and not isinstance(row, dict):
            raise HTTPException(400, "dataframe_records must be a list of objects, one per row.")
        if not isinstance(row, kind):
            wanted = "list" if kind is list else "object, unlike the rows before"
            raise HTTPException(400, f"Row {number} has no {wanted}.")
        if kind is dict:
            if len(found) < len(columns):
                found |= {name.strip() for name in row} & columns.keys()
            continue
        width = len(row) if width is None else width
        if len(row) != width:
            message = f"Row {number} has {len(row)} values, but there are {width} columns."
            raise HTTPException(400, message)
    return found, width if kind is list else None


def _survey_split(reader: JsonReader, columns: dict[str, str]) -> Iterator[list]:
    names = start = width = None
    for part in reader.fields():
        if part == "columns":
            names = reader.value()
        elif part == "data" and reader.peek() == "[":
            start = reader.mark()
            known = len(names) if isinstance(names, list) else None
            _, width = _survey_rows(reader, "dataframe_split", columns, known)
        else:
            _skip(reader)
    if not isinstance(names, list) or start is None:
        raise HTTPException(400, "dataframe_split must have the lists 'columns' and 'data'.")
    if not all(isinstance(name, str) for name in names):
        raise HTTPException(400, "Column names must be texts.")
    if width not in (None, len(names)):
        message = f"Row 0 has {width} values, but there are {len(names)} columns."
        raise HTTPException(400, message)
    return _lists(reader.again(start), names, columns)


def _survey_columns(reader: JsonReader, columns: dict[str, str]) -> Iterator[list]:
    """Read past lists by column, or the values of a single row."""
    starts, sizes, single = {}, set(), False
    for name in reader.fields():
        known = name.strip() in columns
        if known:
            starts[name] = reader.mark()
        if reader.peek() == "[":
            size = 0
            for value in reader.values():
                size += 1
                if known and isinstance(value, NESTED):
                    raise _nested(name)
            sizes.add(size)
        else:
            reader.value()
            single = True
    if single:
        record = {name: reader.again(start).value() for name, start in starts.items()}
        return iter([[record[name] for name in _known(record, columns)]])
    if len(sizes) > 1:
        raise HTTPException(400, "The columns have different numbers of values.")
    if sizes <= {0}:
        return iter(())
    # A reader for each column, side by side.
    lists = [reader.again(starts[name]).values() for name in _known(starts, columns)]
    return map(list, zip(*lists, strict=True))


def _known(names: Iterable[str], columns: dict[str, str]) -> list[str]:
    """Return those of some names that are the model's columns, in its order."""
    names = list(names)
    return [names[place] for place in _places(names, columns)]


def _lists(reader: JsonReader, names: list[str], columns: dict[str, str]) -> Iterator[list]:
    rows = reader.values()
    first = next(rows, None)
    if first is None:
        return
    places = _places(names, columns)
    as_they_are = places == list(range(len(names)))
    for row in chain([first], rows):
        yield row if as_they_are else [row[place] for place in places]


def _nested(name: str) -> HTTPException:
    return HTTPException(400, f"The column {name!r} has a list or an object instead of a value.")


def _flat(rows: Iterator[list], columns: dict[str, str]) -> Iterator[list]:
    """Refuse lists and objects in rows before many of them, the dearest of all, are in memory."""
    for row in rows:
        if not {*NESTED}.isdisjoint(map(type, row)):
            raise next(
                _nested(name)
                for name, value in zip(columns, row, strict=True)
                if isinstance(value, NESTED)
            )
        yield row


def _records(reader: JsonReader, found: set[str], columns: dict[str, str]) -> Iterator[list]:
    for number, record in enumerate(reader.values()):
        if not number:
            _places(list(found), columns)
        if not columns.keys() <= record.keys():
            record = {name.strip(): value for name, value in record.items()} | record
        yield [record.get(name) for name in columns]


def _skip(reader: JsonReader) -> None:
    match reader.peek():
        case "[":
            for _ in reader.values():
                pass
        case "{":
            for _ in reader.fields():
                reader.value()
        case _:
            reader.value()


def _as_table(rows: list[list], names: list[str]) -> pd.DataFrame:
    kinds = {type(value) for row in rows for value in row}
    if kinds <= {int, float, type(None)}:
        # As one array: column by column, making the table takes longer than the model.
        with suppress(OverflowError):
            values = np.array(rows, dtype="float64").reshape(len(rows), len(names))
            return pd.DataFrame(values, columns=names)
    return pd.DataFrame(rows, columns=names)
