"""Tables as the bytes of CSV files."""

import gzip
import io
import zipfile

import pytest


def as_csv(frame, **options):
    return frame.to_csv(**{"index": False, **options}).encode()


def zipped(content, name="data.csv"):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("readme.txt", "not a table")
    return packed.getvalue()


DIALECTS = {
    "plain": as_csv,
    "semicolon": lambda frame: as_csv(frame, sep=";"),
    "semicolon and decimal comma": lambda frame: as_csv(frame, sep=";", decimal=","),
    "tab": lambda frame: as_csv(frame, sep="\t"),
    "tab and decimal comma": lambda frame: as_csv(frame, sep="\t", decimal=","),
    "pipe": lambda frame: as_csv(frame, sep="|"),
    "UTF-8 with BOM": lambda frame: b"\xef\xbb\xbf" + as_csv(frame),
    "UTF-16": lambda frame: as_csv(frame).decode().encode("utf-16"),
    "UTF-16 big endian": lambda frame: b"\xfe\xff" + as_csv(frame).decode().encode("utf-16-be"),
    "gzip": lambda frame: gzip.compress(as_csv(frame)),
    "zip": lambda frame: zipped(as_csv(frame)),
    "blank lines before the header": lambda frame: b"\n  \t\r\n" * 25 + as_csv(frame),
    "CR": lambda frame: as_csv(frame, lineterminator="\r"),
    "CRLF": lambda frame: as_csv(frame, lineterminator="\r\n"),
    "all fields quoted": lambda frame: as_csv(frame, quoting=1),
    "unnamed row counter": lambda frame: as_csv(frame, index=True),
    "blanks after commas": lambda frame: as_csv(frame).replace(b",", b", "),
    "no newline at the end": lambda frame: as_csv(frame).rstrip(b"\n"),
    "blank lines at the end": lambda frame: as_csv(frame) + b"\n\n",
    "header with blanks and tabs": lambda frame: as_csv(
        frame.rename(columns={"width": ' width\t"', "age": "  age "})
    ),
}


@pytest.fixture
def wide(small_frame):
    """The small table with a text and a number that have missing values."""
    frame = small_frame()
    frame["nickname"] = frame["city"].where(frame.index % 7 != 0)
    frame["score"] = frame["length"].where(frame.index % 5 != 0)
    return frame
