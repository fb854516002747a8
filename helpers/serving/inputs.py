"""The rows of a request, in the forms of MLflow's protocol.

What cannot be read is refused with starlette's ``HTTPException``, whose detail says why.
"""

import csv
import io
import json
from contextlib import suppress

import numpy as np
import pandas as pd
from starlette.exceptions import HTTPException

from helpers.data import CSV_OPTIONS

FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")


def parse(body: bytes, content_type: str, columns: dict[str, str]) -> pd.DataFrame:
    """Read the rows of a request.

    Parameters
    ----------
    content_type : str
        ``application/json`` or ``text/csv``, with or without parameters.
    columns : dict of str to {'number', 'boolean', 'text'}
        The model's columns, for rows that come without names or types.

    Raises
    ------
    starlette.exceptions.HTTPException
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/csv":
        return _parse_csv(body, columns)
    if kind == "application/json":
        return _parse_json(body, columns)
    given = repr(kind or "(none)")
    message = f"Content-Type {given} is not known here: send application/json or text/csv."
    raise HTTPException(415, message)


def _parse_csv(body: bytes, columns: dict[str, str]) -> pd.DataFrame:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HTTPException(400, "The CSV is not UTF-8 text.") from None
    header = text.partition("\n")[0]
    separator = ";" if header.count(";") > header.count(",") else ","
    try:
        # Texts that look like numbers, such as 007, stay as they are.
        names = next(csv.reader([header], delimiter=separator), [])
        texts = {name: str for name in names if columns.get(name.strip()) == "text"}
        frame = pd.read_csv(io.StringIO(text), sep=separator, dtype=texts, **CSV_OPTIONS)
    except pd.errors.EmptyDataError:
        raise HTTPException(400, "The CSV is empty: send a header and rows.") from None
    except (ValueError, OverflowError, csv.Error) as error:
        raise HTTPException(400, f"The CSV cannot be read: {str(error)[:200]}") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise HTTPException(400, "The CSV has rows with more fields than its header.")
    return frame


def _parse_json(body: bytes, columns: dict[str, str]) -> pd.DataFrame:
    try:
        content = json.loads(body)
    except RecursionError:
        raise HTTPException(400, "The JSON is nested too deeply.") from None
    except ValueError as error:
        raise HTTPException(400, f"The body is not JSON: {str(error)[:200]}") from None
    names = [name for name in FORMS if isinstance(content, dict) and name in content]
    if len(names) != 1 or set(content) - {*names, "params"}:
        message = f"The JSON must be an object with exactly one of {', '.join(FORMS)}."
        raise HTTPException(400, message)
    (form,) = names
    try:
        return _from_form(form, content[form], columns)
    except (ValueError, TypeError, OverflowError) as error:
        raise HTTPException(400, f"{form} cannot be read as rows: {str(error)[:200]}") from None


def _from_form(form: str, content: object, columns: dict[str, str]) -> pd.DataFrame:
    match form, content:
        case "dataframe_split", {"columns": list(names), "data": list(data)}:
            return _from_lists(data, names)
        case "dataframe_split", _:
            raise HTTPException(400, "dataframe_split must have the lists 'columns' and 'data'.")
        case _, [*rows] if all(isinstance(row, dict) for row in rows):
            return pd.DataFrame.from_records(rows)
        case "dataframe_records", _:
            message = "dataframe_records must be a list of objects, one per row."
            raise HTTPException(400, message)
        case _, {**lists} if all(isinstance(values, list) for values in lists.values()):
            if len({len(values) for values in lists.values()}) > 1:
                raise HTTPException(400, "The columns have different numbers of values.")
            return pd.DataFrame(lists)
        case _, {**row}:
            return pd.DataFrame.from_records([row])
        case _, [*rows]:
            return _from_lists(rows, list(columns))
        case _:
            raise HTTPException(400, f"{form} must be rows, or lists by column.")


def _from_lists(data: list, columns: list) -> pd.DataFrame:
    if not all(isinstance(name, str) for name in columns):
        raise HTTPException(400, "Column names must be texts.")
    for number, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            size = f"{len(row)} values" if isinstance(row, list) else "no list"
            message = f"Row {number} has {size}, but there are {len(columns)} columns."
            raise HTTPException(400, message)
    kinds = {type(value) for row in data for value in row}
    if kinds <= {int, float, type(None)}:
        # As one array: column by column, making the table takes longer than the model.
        with suppress(OverflowError):
            values = np.array(data, dtype="float64").reshape(len(data), len(columns))
            return pd.DataFrame(values, columns=columns)
    return pd.DataFrame(data, columns=columns)
