"""Reading a CSV: its bytes as a frame of texts, or a large file a chunk of rows at a time."""

import codecs
import csv
import gzip
import io
import itertools
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from helpers.workspace import ProjectError

# How pandas reads every CSV of the series, whatever its delimiter.
CSV_OPTIONS = {
    "skipinitialspace": True,
    "keep_default_na": False,
    "na_values": ["", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null"],
}
DELIMITERS = ";\t|,"  # where several fit equally well the first wins: texts have commas in them
HEAD_BYTES = 1_000_000  # of a file that is read in chunks; tell its encoding and delimiter
FIRST_ROWS = 20  # tell the delimiter
GZIP = b"\x1f\x8b"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class DataError(ProjectError):
    """The table cannot be used; the message names the file, the column and the way out."""


@contextmanager
def _faults_named(source: str | Path):
    """Turn what makes a file unreadable into one sentence that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} begins as {error.encoding.upper()} text but does not go on so; it may have "
            "been cut short. Fetch it again, or save it as UTF-8."
        ) from None
    except pd.errors.ParserError as error:
        reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise DataError(f"{source} is not a well-formed CSV file: {reason}.") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        # zipfile: a RuntimeError where it needs a password or does not know the compression, a
        # ValueError where the middle of the file is missing.
        raise DataError(
            f"{source} is an archive that cannot be unpacked here ({error}). Unpack it and give "
            "the path of the CSV, or fetch it again."
        ) from None


def _unpack(content: bytes, source: str) -> bytes:
    """Return the CSV inside a gzip or zip file, or the content as it is."""
    if content.startswith(GZIP):
        return gzip.decompress(content)
    if not content.startswith(b"PK\x03\x04"):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".csv")]
        if len(names) != 1:
            raise DataError(
                f"{source} is a zip file with {len(names)} CSV files in it; one is needed. "
                "Unpack it and give the path of the CSV."
            )
        return archive.read(names[0])


def _decode(content: bytes, source: str | Path, whole: bool = True) -> tuple[str, str]:
    """Return the text and its encoding; what is not `whole` may end within a letter.

    What is neither UTF-16 nor UTF-8 is taken for Latin-1. Guesses from the frequencies of letters
    (charset-normalizer) make "Peńa" of "Peña" in tables, whose texts are short.
    """
    encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"
    if encoding != "utf-16" and b"\x00" in content:
        raise DataError(f"{source} is not a CSV file: it holds binary data.")
    try:
        return codecs.getincrementaldecoder(encoding)().decode(content, final=whole), encoding
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise
    return content.decode("latin-1"), "latin-1"


def _lines(text: str) -> io.StringIO:
    # Lines end as in the file; `str.splitlines` would also cut at letters such as U+0085.
    return io.StringIO(text, newline="")


def _reader(text: str, delimiter: str):
    return csv.reader(_lines(text), delimiter=delimiter, skipinitialspace=True)


def _first_rows(text: str, delimiter: str) -> list[list[str]]:
    rows, filled = [], (row for row in _reader(text, delimiter) if any(map(str.strip, row)))
    # With a wrong delimiter a long line is one field, too long for the reader; with the right
    # one `_check_widths` meets the fault again and names its line.
    with suppress(csv.Error):
        for row in itertools.islice(filled, FIRST_ROWS):
            rows.append(row)
    return rows or [[]]


def _clean_name(name: str) -> str:
    return name.strip().strip('"').strip()


def _find_delimiter(text: str, target: str | None, source: str) -> tuple[str, list[str]]:
    """Return the delimiter that finds the target, else as many fields in header as in rows.

    Rows of another width than most are left to `_check_widths`. `csv.Sniffer` takes the comma of
    "1,75;high" for a delimiter. The second value is the header, its names without blanks.
    """
    rows = {delimiter: _first_rows(text, delimiter) for delimiter in DELIMITERS}

    def fit(delimiter):
        (header, *others), names = rows[delimiter], map(_clean_name, rows[delimiter][0])
        usual = [width for width, _ in Counter(map(len, others)).most_common(1)]
        return len(header) > 1, target in names, len(header) in usual, len(header)

    best = max(DELIMITERS, key=fit)
    names = [_clean_name(name) for name in rows[best][0]]
    if len(names) < 2:
        raise DataError(
            f"{source} is not a CSV file with a header and at least two columns separated by "
            "a comma, a semicolon, a tab or '|'."
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"{source} has more than one column named {', '.join(map(repr, twice))}. "
            "Rename or remove the repeated ones."
        )
    if "" in names[1:]:
        raise DataError(f"{source} has a column without a name. Give every column a name.")
    return best, names


def _check_widths(text: str, delimiter: str, skipped: int, source: str) -> None:
    """Refuse rows with more or fewer fields than the header; pandas would fill them up."""
    reader = _reader(text, delimiter)
    try:
        width = len(next(reader))
        for row in reader:
            if len(row) != width and any(map(str.strip, row)):
                raise DataError(
                    f"{source} is not a well-formed CSV file: line {reader.line_num + skipped} "
                    f"has {len(row)} fields, the header has {width}."
                )
    except csv.Error as error:
        raise DataError(
            f"{source} is not a well-formed CSV file: line {reader.line_num + skipped}: {error}. "
            "Is a quotation mark not closed?"
        ) from None


def _read_csv(file, delimiter: str, names: list[str], **options):
    return pd.read_csv(
        file, sep=delimiter, header=0, names=names, index_col=False, **CSV_OPTIONS, **options
    )


def parse(content: bytes, target: str, source: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read the bytes of a CSV as a frame of texts, missing values as NaN.

    The second value has the names that pandas alone reads otherwise, see `Table.header`.
    """
    with _faults_named(source):
        text, _ = _decode(_unpack(content, source), source)
    if not text.strip():
        raise DataError(f"{source} is empty. Give DATA_SOURCE a CSV with a header and rows.")
    blank = re.match(r"(\s*[\r\n])?", text).group()
    text = text.removeprefix(blank)
    delimiter, names = _find_delimiter(text, target, source)
    _check_widths(text, delimiter, len(blank.splitlines()), source)
    with _faults_named(source):
        frame = _read_csv(io.StringIO(text), delimiter, names, dtype=str)
    if frame.empty:
        raise DataError(f"{source} has a header but no rows.")
    # A first column without a name is the row counter that spreadsheets and pandas write.
    frame = frame.drop(columns="", errors="ignore").apply(lambda column: column.str.strip())
    written = next(csv.reader(_lines(text), delimiter=delimiter))
    # Without the same number of fields pandas, too, needs an option to read the file.
    pairs = zip(names, written, strict=True) if len(written) == len(names) else ()
    return frame, {name: raw for name, raw in pairs if raw != name}


class CsvChunks:
    """A CSV of any size, a chunk of rows at a time; an iterable and a context manager.

    Parameters
    ----------
    source
        UTF-8, UTF-16, or another encoding that Latin-1 can stand for; may be packed with gzip.
    n_rows
        Rows per chunk.
    dtype
        Types of columns by their name without blanks; default: inferred in each chunk.
    """

    def __init__(self, source: Path, n_rows: int, dtype: dict[str, type] | None = None):
        self._options = {"chunksize": n_rows, "dtype": dtype}
        self._file = source.open("rb")

    @property
    def position(self) -> int:
        """Bytes of the file that were read."""
        return self._file.tell()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __iter__(self) -> Iterator[pd.DataFrame]:
        packed = self._file.read(2) == GZIP
        self._file.seek(0)
        stream = gzip.GzipFile(fileobj=self._file) if packed else self._file
        with _faults_named(self._file.name):
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
            text, encoding = _decode(head, self._file.name, whole=len(head) < HEAD_BYTES)
            delimiter, names = _find_delimiter(text, None, self._file.name)
            yield from _read_csv(stream, delimiter, names, encoding=encoding, **self._options)
