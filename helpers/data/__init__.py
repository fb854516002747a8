"""Notebook 01: fetch, read, check, split and save a table.

Any CSV with a target column will do. The first data set is the students' table of the UCI
repository [1]_, in its original variant (UCI) and in its re-coded one (Kaggle).

References
----------
.. [1] V. Realinho, M. Vieira Martins, J. Machado, L. Baptista (2021). *Predict Students'
   Dropout and Academic Success*. UCI Machine Learning Repository. doi:10.24432/C5MC89
   (CC BY 4.0).
"""

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import zipfile
import zlib
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.data.students import STUDENT_CATEGORICAL, STUDENT_COLUMNS
from helpers.display import notice
from helpers.workspace import MissingStepError, ProjectError

UCI_URL = (
    "https://archive.ics.uci.edu/static/public/697/"
    "predict+students+dropout+and+academic+success.zip"
)
UCI_TIMEOUT = 5  # seconds; without a network `auto` must not keep anyone waiting
URL_TIMEOUT = 30  # seconds
SAMPLE = Path(__file__).with_name("sample_data") / "student_outcomes_sample.csv.gz"

MISSING = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null")
# How pandas reads every CSV of the series, whatever its delimiter.
CSV_OPTIONS = {
    "skipinitialspace": True,
    "keep_default_na": False,
    "na_values": list(MISSING),
}
DELIMITERS = ";\t|,"  # where several fit equally well the first wins: texts have commas in them
HEAD_BYTES = 1_000_000  # of a file that is read in chunks; tell its encoding and delimiter
FIRST_LINES = 20  # lines that tell the delimiter
BLANK_LINES = re.compile(r"(?:[^\S\r\n]*(?:\r\n?|\n))*")
THOUSANDS = r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"
MAX_CLASSES = 50
MIN_TRAIN_ROWS = 5  # rows of each class among the training rows: one for each fold of five
SPLIT_FILES = ("table.parquet", "train.parquet", "test.parquet", "manifest.json")


class DataError(ProjectError):
    """The table cannot be used; the message names the file, the column and the way out."""


@dataclass(frozen=True)
class Table:
    """A table as read, with what is known about it.

    Attributes
    ----------
    frame : pandas.DataFrame, shape (n_rows, n_columns)
        Features (int64, float64, bool, text, or pandas' boolean where a truth value is
        missing) and the target (int64 or text), in file order.
    target : str
        Name of the target column.
    categorical : tuple of str
        Features that are categories, whether written as text or as number codes.
    source : str
        ``uci``, ``sample``, or the path or URL of the CSV.
    digest : str
        SHA-256 of the table's content as CSV, independent of the file's dialect.
    dropped : tuple of str
        Columns of the file that were left out, sorted.
    header : dict of str to str
        Names as pandas reads them from the file, for columns where blanks were removed.
    """

    frame: pd.DataFrame
    target: str
    categorical: tuple
    source: str
    digest: str
    dropped: tuple = ()
    header: dict = field(default_factory=dict)

    @property
    def features(self) -> pd.DataFrame:
        """All columns but the target."""
        return self.frame.drop(columns=self.target)

    @property
    def labels(self) -> pd.Series:
        """The target column: int64 or text."""
        return self.frame[self.target]

    @property
    def meanings(self) -> dict[str, str]:
        """What the columns of the students' table mean; empty for any other table."""
        known = [name for name in self.frame.columns if name in STUDENT_COLUMNS]
        if len(known) <= self.frame.shape[1] / 2:
            return {}
        return {name: STUDENT_COLUMNS[name] for name in known}

    @property
    def synthetic(self):
        """Whether this is the bundled synthetic sample."""
        return self.source == "sample"

    @property
    def numeric(self):
        """Features that are not categories."""
        return tuple(
            name
            for name in self.frame.columns
            if name != self.target and name not in self.categorical
        )


@dataclass(frozen=True)
class Split:
    """Training and test rows of a table.

    Attributes
    ----------
    X_train, X_test : pandas.DataFrame, shapes (n_train, n_features), (n_test, n_features)
    y_train, y_test : pandas.Series, shapes (n_train,), (n_test,)
        int64 or text labels.
    manifest : dict
        What the split is: source, digest, rows, columns, classes, seed.
    table : pandas.DataFrame, optional
        The table before the split; only where the split was just made.
    """

    X_train: pd.DataFrame
    X_test: pd.DataFrame
    y_train: pd.Series
    y_test: pd.Series
    manifest: dict
    table: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def categorical(self):
        """Names of the categorical features."""
        return tuple(self.manifest["categorical"])

    @property
    def numeric(self):
        """Names of the other features."""
        return tuple(self.manifest["numeric"])

    @property
    def labels(self):
        """Class labels, sorted."""
        return list(self.manifest["classes"])

    @property
    def students(self) -> bool:
        """Whether this is the students' table."""
        return set(STUDENT_CATEGORICAL) <= set(self.X_train.columns)

    def encode(self, y) -> np.ndarray:
        """Return the positions of labels in `labels`.

        Parameters
        ----------
        y : array-like, shape (n_rows,)
            Labels as in the CSV.

        Returns
        -------
        numpy.ndarray, shape (n_rows,), int64

        Raises
        ------
        DataError
            If one of them is no label of this split.
        """
        codes = pd.Index(self.labels).get_indexer(pd.Index(y)).astype("int64")
        if (codes < 0).any():
            unknown = pd.Index(y)[codes < 0].tolist()[0]
            raise DataError(f"{unknown!r} is no class of the prepared data: {self.labels}.")
        return codes


# --- fetching ---------------------------------------------------------------------------------


def _download(url, timeout):
    import requests

    try:
        response = requests.get(url, timeout=timeout)
        response.raise_for_status()
    except requests.RequestException as error:
        raise DataError(
            f"{url} does not answer ({type(error).__name__}). Check the address and the "
            "network, or give the path of a CSV on this machine as DATA_SOURCE."
        ) from None
    return response.content


def _read_bytes(source):
    if source.startswith(("http://", "https://")):
        return _download(source, URL_TIMEOUT)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"There is no file {path} (looked in {Path.cwd()}). Give DATA_SOURCE the path or "
            "URL of a CSV, or 'sample' for the bundled table."
        )
    return path.read_bytes()


def _unpack(content, source):
    """Return the CSV inside a gzip or zip file, or the content as it is."""
    try:
        if content.startswith(b"\x1f\x8b"):
            return gzip.decompress(content)
        if content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                names = [name for name in archive.namelist() if name.lower().endswith(".csv")]
                if len(names) == 1:
                    return archive.read(names[0])
            raise DataError(
                f"{source} is a zip file with {len(names)} CSV files in it; one is needed. "
                "Unpack it and give the path of the CSV."
            )
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError):
        raise DataError(f"{source} is a broken archive. Fetch it again.") from None
    except RuntimeError as error:
        # So zipfile says that a password is needed or that it does not know the compression.
        raise DataError(
            f"{source} cannot be unpacked here ({error}). Unpack it and give the path of the CSV."
        ) from None
    return content


def _decode(content, source):
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError(
                f"{source} begins as UTF-16 text but does not go on so; it may have been cut "
                "short. Fetch it again, or save it as UTF-8."
            ) from None
    if b"\x00" in content:
        raise DataError(f"{source} is not a CSV file: it holds binary data.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


# --- reading ----------------------------------------------------------------------------------


def _reader(lines, delimiter):
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True)


def _lines(text):
    # Lines end as in the file; `str.splitlines` would also cut at letters such as U+0085.
    return io.StringIO(text, newline="")


def _first_rows(text, delimiter):
    lines, rows = itertools.islice(_lines(text), FIRST_LINES), []
    # With a wrong delimiter a long line is one field, too long for the reader; with the right
    # one `_check_widths` meets the fault again and names its line.
    with suppress(csv.Error):
        for row in _reader(lines, delimiter):
            if row:
                rows.append(row)
    return rows


def _find_delimiter(text, target, source):
    """Return the delimiter that finds the target, else as many fields in header as in rows.

    Rows of another width than most are left to `_check_widths`.
    """
    best, most = None, ()
    for delimiter in DELIMITERS:
        header, *rows = _first_rows(text, delimiter) or [[]]
        width = len(header)
        usual = [number for number, _ in Counter(map(len, rows)).most_common(1)]
        fit = (target in map(_clean_name, header), width in usual, width)
        if width > 1 and fit > most:
            best, most = delimiter, fit
    if best is None:
        raise DataError(
            f"{source} is not a CSV file with a header and at least two columns separated by "
            "a comma, a semicolon, a tab or '|'."
        )
    return best


def _clean_name(name):
    return name.strip().strip('"').strip()


def _clean_header(names, source):
    names = [_clean_name(name) for name in names]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise DataError(
            f"{source} has more than one column named {', '.join(map(repr, twice))}. "
            "Rename or remove the repeated ones."
        )
    if "" in names[1:]:
        raise DataError(f"{source} has a column without a name. Give every column a name.")
    return names


def _check_widths(text, delimiter, skipped, source):
    """Refuse rows with more or fewer fields than the header; pandas would fill them up.

    Returns the header.
    """
    reader = _reader(_lines(text), delimiter)
    try:
        header = next(reader)
        width = len(header)
        for row in reader:
            if len(row) not in (0, width) and any(field.strip() for field in row):
                raise DataError(
                    f"{source} is not a well-formed CSV file: line {reader.line_num + skipped} "
                    f"has {len(row)} fields, the header has {width}."
                )
    except csv.Error as error:
        raise DataError(
            f"{source} is not a well-formed CSV file: line {reader.line_num + skipped}: {error}. "
            "Is a quotation mark not closed?"
        ) from None
    return header


def _parse(content, target, source):
    """Read the bytes of a CSV as a frame of texts, missing values as NaN.

    Returns the frame and the names that the file writes otherwise, see `Table.header`.
    """
    text = _decode(_unpack(content, source), source)
    if not text.strip():
        raise DataError(f"{source} is empty. Give DATA_SOURCE a CSV with a header and rows.")
    blank = BLANK_LINES.match(text).group()
    text = text[len(blank) :]
    delimiter = _find_delimiter(text, target, source)
    header = _check_widths(text, delimiter, len(blank.splitlines()), source)
    names = _clean_header(header, source)
    raw = next(csv.reader(_lines(text), delimiter=delimiter))
    # Without the same number of fields pandas, too, needs an option to read the file.
    written = dict(zip(names, raw, strict=True)) if len(raw) == len(names) else {}
    try:
        frame = pd.read_csv(
            io.StringIO(text),
            sep=delimiter,
            header=0,
            names=names,
            index_col=False,
            dtype=str,
            **CSV_OPTIONS,
        )
    except (pd.errors.ParserError, ValueError) as error:
        reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise DataError(f"{source} is not a well-formed CSV file: {reason}.") from None
    if frame.empty:
        raise DataError(f"{source} has a header but no rows.")
    # A first column without a name is the row counter that spreadsheets and pandas write.
    frame = frame.drop(columns=[""]) if "" in frame.columns else frame
    frame = frame.apply(lambda column: column.str.strip())
    return frame, {name: written[name] for name in frame if written.get(name, name) != name}


def _to_number(column, source):
    """Convert texts to numbers, also with a decimal comma; what is no number becomes NaN."""
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    texts = column[values.isna()].dropna()
    commas = texts[texts.str.contains(",", regex=False)]
    if commas.empty:
        return values
    if commas.str.fullmatch(THOUSANDS).all():
        if len(texts) - len(commas) > column.notna().sum() / 2:
            return values
        raise DataError(
            f"Column {column.name!r} of {source} has numbers such as {commas.iloc[0]!r}, whose "
            "comma may separate thousands or decimals. Write them without thousands separators "
            "and with a decimal point, or leave the column out with DROP."
        )
    decimals = pd.to_numeric(column.str.replace(",", ".", regex=False), errors="coerce")
    return decimals.astype("float64") if decimals.count() > values.count() else values


def _as_integers(values):
    whole = values.notna().all() and np.isfinite(values).all() and (values % 1 == 0).all()
    return values.astype("int64") if whole and values.abs().max() < 2**53 else values


def _to_truth(column):
    """Convert true and false in any case to booleans; None if there is anything else."""
    lower = column.str.lower()
    if not lower.dropna().isin(["true", "false"]).all():
        return None
    truth = lower == "true"
    # pandas' own boolean has a missing value; models take it for a boolean column too.
    return truth if column.notna().all() else truth.astype("boolean").mask(column.isna())


def _convert_feature(column, categorical, source):
    """Give a feature its type: bool, boolean, int64, float64 or text (object).

    Raises
    ------
    DataError
        If the column is empty, infinite, mostly numbers with some text among them, or has
        commas that may mean two things.
    """
    known = column.notna()
    if not known.any():
        raise DataError(
            f"Column {column.name!r} of {source} has no value at all. Leave it out with "
            f"DROP = [{column.name!r}]."
        )
    values = _to_number(column, source)
    wrong = known & values.isna()
    if not wrong.any():
        if np.isinf(values).any():
            raise DataError(f"Column {column.name!r} of {source} has infinite values.")
        looks_whole = column[known].str.fullmatch(r"[+-]?\d+").all()
        return _as_integers(values) if looks_whole else values
    if categorical or wrong.sum() > known.sum() / 2:
        truth = _to_truth(column)
        return column.astype(object).where(known, None) if truth is None else truth
    examples = ", ".join(f"{column[row]!r} (row {row + 2})" for row in column.index[wrong][:3])
    raise DataError(
        f"Column {column.name!r} of {source} is numeric but has text in {wrong.sum()} of "
        f"{len(column)} rows: {examples}. Correct these rows, leave the column out with DROP, "
        "or name it in CATEGORICAL."
    )


def _convert_target(column):
    """Keep labels as they stand in the CSV; whole numbers become int64."""
    if column.str.fullmatch(r"-?(0|[1-9]\d{0,15})").all():
        return column.astype("int64")
    return column.astype(object)


def _check_target(column, source):
    missing = column.isna()
    if missing.any():
        rows = ", ".join(str(row + 2) for row in column.index[missing][:5])
        raise DataError(
            f"The target column {column.name!r} of {source} has {missing.sum()} missing "
            f"values (rows {rows}{', …' if missing.sum() > 5 else ''}). Remove these rows or "
            "fill in their label."
        )
    counts = column.value_counts()
    if len(counts) == 1:
        raise DataError(
            f"The target column {column.name!r} of {source} has one class only "
            f"({counts.index[0]!r}); a classifier needs at least two."
        )
    if len(counts) > MAX_CLASSES:
        raise DataError(
            f"The target column {column.name!r} of {source} has {len(counts)} different values; "
            f"at most {MAX_CLASSES} classes are supported. Is it a number to be predicted, or "
            "an identifier? Choose another TARGET."
        )


def _require_columns(names, frame, parameter, source):
    for name in names:
        if name not in frame.columns:
            close = difflib.get_close_matches(name, frame.columns, n=1, cutoff=0.6)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{source} has no column {name!r} (parameter {parameter}).{hint} Its columns: "
                f"{', '.join(frame.columns)}."
            )


def _digest(frame):
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()


def _default_categorical(frame):
    if set(STUDENT_CATEGORICAL) <= set(frame.columns):
        return STUDENT_CATEGORICAL
    return ()


def _check_drop(drop, target):
    if target in (drop or ()):
        raise DataError(
            f"DROP names {target!r}, the column to predict. Take it out of DROP, or choose "
            "another TARGET."
        )


def _make_table(frame, target, named, dropped, header, source):
    """Make the table of converted columns; texts are categories whether named or not."""
    if frame.shape[1] < 2:
        raise DataError(f"{source} has no column besides the target {target!r}.")
    chosen = tuple(
        name
        for name, column in frame.items()
        if name != target and (name in named or column.dtype == object)
    )
    header = {name: raw for name, raw in header.items() if name in frame and name != target}
    return Table(frame, target, chosen, source, _digest(frame), tuple(sorted(dropped)), header)


def read_table(content, source, target="Target", categorical=None, drop=None):
    """Read the bytes of a CSV file.

    The delimiter (comma, semicolon, tab, ``|``), the encoding (UTF-8 with or without BOM,
    UTF-16, Latin-1), gzip or zip packing and a decimal comma are recognised; blanks and tabs
    around header names are removed.

    Parameters
    ----------
    content : bytes
        The file.
    source : str
        What to call it in messages and logs.
    target : str
        Name of the target column.
    categorical : sequence of str, optional
        Features whose values are categories. Default: for the students' table its nine code
        columns, for any other table the text columns.
    drop : sequence of str, optional
        Columns to leave out.

    Returns
    -------
    Table

    Raises
    ------
    DataError
        If this is not a table with that target; see the message.
    """
    frame, header = _parse(content, target, source)
    dropped = set(drop or ())
    _check_drop(dropped, target)
    _require_columns([target], frame, "TARGET", source)
    _require_columns(drop or [], frame, "DROP", source)
    _require_columns(categorical or [], frame, "CATEGORICAL", source)
    # Before columns are dropped: the students' table is known by all its code columns.
    named = categorical if categorical is not None else _default_categorical(frame)
    frame = frame.drop(columns=list(dropped))
    _check_target(frame[target], source)
    columns = {
        name: _convert_target(frame[name])
        if name == target
        else _convert_feature(frame[name], name in named, source)
        for name in frame.columns
    }
    return _make_table(pd.DataFrame(columns), target, named, dropped, header, source)


class CsvChunks:
    """A CSV of any size, a chunk of rows at a time; an iterator and a context manager.

    Parameters
    ----------
    source : pathlib.Path
        UTF-8, or another encoding that Latin-1 can stand for; may be packed with gzip.
    n_rows : int
        Rows per chunk.
    dtype : dict of str to type, optional
        Types of columns by their name without blanks; default: inferred in each chunk.
    """

    def __init__(self, source, n_rows, dtype=None):
        self.source = source
        with ExitStack() as opened:
            self._raw = opened.enter_context(Path(source).open("rb"))
            self._chunks = opened.enter_context(self._open(n_rows, dtype))
            self._opened = opened.pop_all()

    def _open(self, n_rows, dtype):
        source = self.source
        packed = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        stream = gzip.GzipFile(fileobj=self._raw) if packed else self._raw
        try:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
            if len(head) == HEAD_BYTES and b"\n" in head:
                # It may end within a letter.
                head = head[: head.rindex(b"\n")]
            text = _decode(head, source)
            delimiter = _find_delimiter(text, None, source)
            names = _clean_header(_first_rows(text, delimiter)[0], source)
            return pd.read_csv(
                io.TextIOWrapper(stream, _encoding(head), newline=""),
                sep=delimiter,
                header=0,
                names=names,
                index_col=False,
                dtype=dtype,
                **CSV_OPTIONS,
                chunksize=n_rows,
            )
        except (OSError, EOFError, zlib.error):
            raise DataError(f"{source} is a broken archive. Fetch it again.") from None

    @property
    def position(self):
        """Bytes of the file that were read."""
        return self._raw.tell()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._opened.close()

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return next(self._chunks)
        except UnicodeDecodeError:
            raise DataError(
                f"{self.source} is UTF-8 at its beginning but not later. Save it as UTF-8."
            ) from None
        except (pd.errors.ParserError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.source} is not a well-formed CSV file: {str(error).strip()}"
            ) from None


def _encoding(head):
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        head.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def _fetch_uci():
    return _download(UCI_URL, UCI_TIMEOUT)


def _prepared(workspace, target, categorical, drop):
    """Return the table that notebook 01 prepared before, or None."""
    if not all((workspace.data / name).is_file() for name in SPLIT_FILES):
        return None
    manifest = json.loads((workspace.data / "manifest.json").read_text(encoding="utf-8"))
    frame = _read_parquet(workspace.data / "table.parquet")
    source, dropped = manifest["source"], set(manifest.get("drop", ()))
    copy = f"The prepared copy of {source}"
    _check_drop(drop, target)
    _require_columns([target], frame, "TARGET", copy)
    if target != manifest["target"]:
        raise DataError(
            f"{copy} was made with TARGET = {manifest['target']!r}. To prepare it otherwise, "
            "name the CSV in DATA_SOURCE."
        )
    if drop is not None:
        if dropped - set(drop):
            raise DataError(
                f"{copy} was made with DROP = {sorted(dropped)}, and what was left out is gone. "
                "Repeat these in DROP, or name the CSV in DATA_SOURCE to prepare it otherwise."
            )
        more = [name for name in drop if name not in dropped]
        _require_columns(more, frame, "DROP", copy)
        frame, dropped = frame.drop(columns=more), dropped.union(more)
    named = manifest["categorical"]
    if categorical is not None:
        named = [name for name in categorical if name not in dropped]
        _require_columns(named, frame, "CATEGORICAL", copy)
    return _make_table(frame, target, named, dropped, manifest.get("header", {}), source)


def load_table(source, workspace, target="Target", categorical=None, drop=None):
    """Fetch and read the table that `source` names.

    Parameters
    ----------
    source : str
        ``auto``: the copy prepared before in this workspace, else the UCI repository, else the
        bundled sample with a notice. ``uci``, ``sample``, or a path or URL of any CSV.
    workspace : Workspace
        Where a prepared copy may be.
    target, categorical, drop
        See `read_table`.

    Returns
    -------
    Table

    Raises
    ------
    DataError
        If the source cannot be read; see the message.
    """
    options = {"target": target, "categorical": categorical, "drop": drop}
    if source == "auto":
        return _load_auto(workspace, options)
    if source == "uci":
        return read_table(_fetch_uci(), "uci", **options)
    if source == "sample":
        return read_table(SAMPLE.read_bytes(), "sample", **options)
    return read_table(_read_bytes(source), source, **options)


def _load_auto(workspace, options):
    prepared = _prepared(workspace, **options)
    if prepared is not None:
        without = f", without {', '.join(prepared.dropped)}" if prepared.dropped else ""
        notice(
            f"Using the copy prepared before from {prepared.source} in {workspace.data}{without}."
        )
        return prepared
    try:
        return read_table(_fetch_uci(), "uci", **options)
    except DataError as error:
        notice(
            f"{error}\nThe notebooks go on with the bundled SYNTHETIC sample: models trained on "
            "it say so and are for practice only.",
            level="warning",
        )
        return read_table(SAMPLE.read_bytes(), "sample", **options)


# --- looking ----------------------------------------------------------------------------------


def describe_columns(table):
    """Describe each column of a table.

    Parameters
    ----------
    table : Table

    Returns
    -------
    pandas.DataFrame
        One row per column: its meaning (of the students' table only), role, type, missing values,
        distinct values, smallest, median and largest value, and a remark where a column deserves
        a look.
    """
    rows = []
    for name, column in table.frame.items():
        numbers = column.dtype != object
        role = "target" if name == table.target else "numeric"
        role = "category" if name in table.categorical else role
        distinct = column.nunique()
        remark = "constant" if distinct == 1 else ""
        if role == "category" and distinct > max(50, len(column) / 2):
            remark = "almost all values differ: an identifier? (DROP)"
        rows.append(
            {
                "column": name,
                "role": role,
                "type": str(column.dtype).replace("object", "text"),
                "missing": int(column.isna().sum()),
                "distinct": distinct,
                "min": column.min() if numbers else "",
                "median": column.astype(float).median() if numbers else "",
                "max": column.max() if numbers else "",
                "remark": remark,
            }
        )
    described = pd.DataFrame(rows).set_index("column")
    if table.meanings:
        meanings = [table.meanings.get(name, "") for name in described.index]
        described.insert(0, "meaning", meanings)
    return described


def check_table(table):
    """Summarise the checks of a table.

    Parameters
    ----------
    table : Table
        As read: the checks that make a table unusable have passed by then.

    Returns
    -------
    pandas.DataFrame
        One row per check, with its finding.
    """
    frame = table.frame
    counts = frame[table.target].value_counts()
    findings = {
        "rows": f"{len(frame):,}",
        "features": f"{len(table.numeric)} numeric, {len(table.categorical)} categorical",
        "missing values": f"{int(frame.isna().sum().sum()):,}",
        "duplicate rows": f"{int(frame.duplicated().sum()):,}",
        "constant columns": ", ".join(frame.columns[frame.nunique() == 1]) or "none",
        "classes": ", ".join(f"{label}: {count:,}" for label, count in counts.items()),
        "majority class": f"{counts.max() / len(frame):.1%} of the rows",
        "source": table.source + (" (SYNTHETIC)" if table.synthetic else ""),
        "digest": table.digest,
    }
    return pd.DataFrame({"finding": findings}).rename_axis("check")


# --- splitting and saving ---------------------------------------------------------------------


def check_split(table: Table, test_size: float) -> None:
    """Check that a table can be split by class.

    Parameters
    ----------
    table : Table
    test_size : float
        Share of test rows.

    Raises
    ------
    DataError
        If a class has too few rows to stand in both parts and in every fold of the training
        rows.
    """
    counts = table.labels.value_counts()
    needed = int(np.ceil(max((MIN_TRAIN_ROWS + 0.5) / (1 - test_size), 1.5 / test_size)))
    few = counts[counts < needed]
    if len(few):
        listed = ", ".join(f"{label!r} ({count})" for label, count in few.items())
        raise DataError(
            f"Too few rows to split by class: {listed}; each class of {table.target!r} needs at "
            f"least {needed} rows with TEST_SIZE = {test_size:g}. Collect more, or merge or "
            "remove the class."
        )


def make_split(
    table: Table,
    X_train: pd.DataFrame,
    X_test: pd.DataFrame,
    y_train: pd.Series,
    y_test: pd.Series,
    test_size: float,
    seed: int,
) -> Split:
    """Note what a split is, so that models can tell which rows they have seen.

    Parameters
    ----------
    table : Table
        What was split.
    X_train, X_test, y_train, y_test
        As `sklearn.model_selection.train_test_split` returns them, with the table's index.
    test_size, seed
        How it was split.

    Returns
    -------
    Split
    """
    counts = table.labels.value_counts()
    manifest = {
        "source": table.source,
        "synthetic": table.synthetic,
        "digest": table.digest,
        "rows": len(table.frame),
        "train_rows": len(X_train),
        "test_rows": len(X_test),
        "target": table.target,
        "columns": {name: str(dtype) for name, dtype in X_train.dtypes.items()},
        "categorical": list(table.categorical),
        "numeric": list(table.numeric),
        "drop": list(table.dropped),
        "header": table.header,
        "classes": sorted(counts.index.tolist()),
        "class_counts": {str(label): int(count) for label, count in counts.sort_index().items()},
        "test_size": test_size,
        "seed": seed,
    }
    # With another target or other roles the same rows give other models.
    roles = [table.target, manifest["categorical"], manifest["numeric"]]
    manifest["split_digest"] = hashlib.sha256(
        json.dumps([table.digest, roles, test_size, seed, X_test.index.tolist()]).encode()
    ).hexdigest()
    return Split(X_train, X_test, y_train, y_test, manifest, table.frame)


def _write_parquet(frame, path):
    frame.to_parquet(path)


def _read_parquet(path):
    frame = pd.read_parquet(path)
    for name in frame.columns:
        # pandas 3 reads text back as its own string type; models see plain Python texts.
        if pd.api.types.is_string_dtype(frame[name].dtype):
            column = frame[name].astype(object)
            frame[name] = column.where(column.notna(), None)
    return frame


def keep_previous(source, data):
    """Copy a split that is about to be replaced to a folder of its own in ``data/previous``.

    Parameters
    ----------
    source : pathlib.Path
        Folder of the split.
    data : pathlib.Path
        The workspace's folder of data.

    Returns
    -------
    pathlib.Path or None
        The folder; None if there is no split.
    """
    manifest_path = source / "manifest.json"
    if not manifest_path.is_file():
        return None
    text = manifest_path.read_text(encoding="utf-8")
    digest = json.loads(text)["split_digest"][:16]
    for number in itertools.count(1):
        folder = data / "previous" / (digest if number == 1 else f"{digest}-{number}")
        kept = folder / "manifest.json"
        if not kept.is_file():
            break
        if kept.read_text(encoding="utf-8") == text:
            return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is the last of them: a folder that has one is complete.
    for name in SPLIT_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)
    return folder


def replace_split(source, data):
    """Move the files of a split from a folder to where the notebooks read them.

    Parameters
    ----------
    source : pathlib.Path
        Folder on the same disk.
    data : pathlib.Path
        The workspace's folder of data.
    """
    # The manifest goes first and comes back last: without it there is no split to read.
    (data / "manifest.json").unlink(missing_ok=True)
    for name in SPLIT_FILES:
        os.replace(source / name, data / name)


def save_split(split, workspace):
    """Save a split in the workspace: ``data/*.parquet`` and ``data/manifest.json``.

    A split that is there already is left as it is when it is the same, and moved to
    ``data/previous/`` when it is another.

    Parameters
    ----------
    split : Split
        As made by `make_split`.
    workspace : Workspace

    Returns
    -------
    pathlib.Path
        The manifest.
    """
    folder, target = workspace.data, split.manifest["target"]
    manifest_path = folder / "manifest.json"
    text = json.dumps(split.manifest, indent=2, ensure_ascii=False) + "\n"
    complete = all((folder / name).is_file() for name in SPLIT_FILES)
    if complete and manifest_path.read_text(encoding="utf-8") == text:
        return manifest_path
    keep_previous(folder, folder)
    parts = {
        "table.parquet": split.table,
        "train.parquet": split.X_train.assign(**{target: split.y_train}),
        "test.parquet": split.X_test.assign(**{target: split.y_test}),
    }
    staging = folder / f".staging.{os.getpid()}"
    staging.mkdir(exist_ok=True)
    try:
        for name, frame in parts.items():
            _write_parquet(frame, staging / name)
        (staging / "manifest.json").write_text(text, encoding="utf-8")
        replace_split(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest_path


def load_split(workspace):
    """Load the split that notebook 01 saved.

    Parameters
    ----------
    workspace : Workspace

    Returns
    -------
    Split

    Raises
    ------
    MissingStepError
        If there is none yet.
    """
    if not all((workspace.data / name).is_file() for name in SPLIT_FILES):
        raise MissingStepError(
            f"There is no prepared data in {workspace.data}. Run notebook 01_data_preparation "
            "first (with the same WORKSPACE)."
        )
    manifest = json.loads((workspace.data / "manifest.json").read_text(encoding="utf-8"))
    train, test = (
        _read_parquet(workspace.data / name) for name in ("train.parquet", "test.parquet")
    )
    target = manifest["target"]
    return Split(
        train.drop(columns=target),
        test.drop(columns=target),
        train[target],
        test[target],
        manifest,
    )
