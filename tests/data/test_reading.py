"""Files in many dialects give the same table; what cannot be read is refused by name."""

import gzip

import pandas as pd
import pytest

from helpers.data import CsvChunks, DataError, read_table
from tests.data.conftest import DIALECTS, as_csv, zipped


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialect_gives_the_same_table_as_a_plain_csv(small_frame, dialect):
    frame = small_frame()
    table = read_table(DIALECTS[dialect](frame), dialect)
    assert table.frame.dtypes.map(str).tolist() == [
        *("float64", "float64", "int64", "object", "int64", "object")
    ]
    pd.testing.assert_frame_equal(table.frame, frame.astype({"city": object, "Target": object}))
    assert table.digest == read_table(as_csv(frame), "plain").digest
    assert table.categorical == ("city",)


@pytest.mark.parametrize(
    ("header", "row", "names"),
    [
        ('a, "b, c", Target', "1, 2, {}", ["a", "b, c", "Target"]),
        ("height, cm;Target", "175;{}", ["height, cm", "Target"]),
        ("height, cm;Target", "1,75;{}", ["height, cm", "Target"]),
        ("low, mm;low, cm;high, m, s;Target", "1,5;2,5;3,5;{}", None),
        ("a;b|c|Target", "1|2|{}", ["a;b", "c", "Target"]),
    ],
)
def test_commas_in_the_header_are_not_taken_for_delimiters(header, row, names):
    rows = [row.format(label) for label in ("high", "low") * 10]
    table = read_table("\n".join([header, *rows]).encode(), "header")
    assert list(table.frame.columns) == (names or header.split(";"))
    assert len(table.frame) == 20


def test_header_of_very_many_characters_is_read():
    # Python's csv module takes no more than 131,072 characters at once.
    names = [f"{'a long name of a column ' * 120}{number}" for number in range(50)]
    rows = [[*names, "Target"], *(["1"] * 50 + [label] for label in ("high", "low"))]
    table = read_table("\n".join(map(",".join, rows)).encode(), "wide")
    assert table.frame.shape == (2, 51)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_letters_quotes_and_line_breaks_stay_in_their_field(small_frame, encoding):
    places = {"Faro": "Peñíscola", "Lisboa": 'Évora, the "old" town', "Porto": "Por\nto"}
    frame = small_frame().replace(places).rename(columns={"width": "largura média"})
    table = read_table(as_csv(frame).decode().encode(encoding), "letters")
    assert table.frame["city"].tolist() == frame["city"].tolist()
    assert "largura média" in table.frame.columns


# --- what cannot be used -----------------------------------------------------------------------


def with_line(number, change):
    """Change one line of the small table's CSV, counted from 1 like its header."""

    def make(frame):
        lines = as_csv(frame).decode().splitlines()
        lines[number - 1] = change(lines[number - 1])
        return "\n".join(lines).encode()

    return make


def longer(line):
    return f"{line},1"


def shorter(line):
    return line.rsplit(",", 2)[0]


def huge(line):
    return line.replace("o", "x" * 140_000)


def marked_zip(flags=0, method=0):
    """Make a zip file that claims to be encrypted or compressed in a way of its own."""

    def make(frame):
        packed = bytearray(zipped(as_csv(frame)))
        for place in (6, packed.index(b"PK\x01\x02") + 8):
            packed[place] |= flags
            packed[place + 2] |= method
        return bytes(packed)

    return make


def without(pack, start, stop=None):
    def make(frame):
        packed = pack(as_csv(frame))
        return packed[:start] + (packed[stop:] if stop else b"")

    return make


HTML = b"""<!DOCTYPE html>
<html>
<head><title>404</title></head>
<body>
<p>Not found, sorry.</p>
</body>
</html>
"""
BAD_FILES = {
    "PNG bytes": (lambda frame: b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(50), "binary"),
    "HTML page": (lambda frame: HTML, ""),
    "empty file": (lambda frame: b"", "empty"),
    "blank file": (lambda frame: b"\n \n", "empty"),
    "header only": (lambda frame: as_csv(frame.head(0)), "no rows"),
    "one column": (lambda frame: as_csv(frame[["Target"]]), "two columns"),
    "duplicate names": (with_line(1, lambda line: line.replace("width", "age")), "'age'"),
    "column without a name": (with_line(1, lambda line: line.replace("width", "")), "a name"),
    "long first row": (with_line(2, longer), "line 2 has 7 fields, the header has 6"),
    "long row early": (with_line(4, longer), "line 4 has 7 fields"),
    "long row late": (with_line(101, longer), "line 101 has 7 fields"),
    "short row early": (with_line(4, shorter), "line 4 has 4 fields, the header has 6"),
    "short row late": (with_line(101, shorter), "line 101 has 4 fields"),
    "short row after blank lines": (
        lambda frame: b"\n\r\n" + with_line(4, shorter)(frame),
        "line 6 has 4 fields",
    ),
    "short row before missing features": (
        lambda frame: with_line(101, shorter)(frame[["Target", *frame.columns[:-1]]]),
        "line 101 has 4 fields",
    ),
    "all rows longer than the header": (with_line(1, shorter), "line 2 has 6 fields"),
    "open quotation mark": (with_line(101, lambda line: ',"'.join(line.rsplit(",", 1))), "EOF"),
    "huge field": (with_line(11, huge), "line 11"),
    "huge field late": (with_line(101, huge), "line 101"),
    "UTF-16 cut short": (lambda frame: DIALECTS["UTF-16"](frame)[:-1], "UTF-16.*cut short"),
    "broken gzip": (without(gzip.compress, 200), "archive"),
    "corrupted gzip": (without(gzip.compress, 60, 90), "archive"),
    "encrypted zip": (marked_zip(flags=1), "encrypted.*Unpack"),
    "unknown compression": (marked_zip(method=99), "compression.*Unpack"),
    "zip without its end": (without(zipped, -40), "archive"),
    "zip without its middle": (without(zipped, 40, 400), "archive"),
    "zip without a CSV": (lambda frame: zipped(b"1", "a.bin"), "0 CSV"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_unusable_file_is_refused_by_name(small_frame, fault):
    make, words = BAD_FILES[fault]
    with pytest.raises(DataError, match=f"bad.csv.*{words}"):
        read_table(make(small_frame()), "bad.csv")


# --- a chunk at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["gzip", "semicolon", "UTF-8 with BOM", "UTF-16", "CR"])
def test_chunks_have_the_rows_of_the_table(small_frame, tmp_path, dialect, monkeypatch):
    # The head ends within a row.
    monkeypatch.setattr("helpers.data.reading.HEAD_BYTES", 300)
    frame = small_frame()
    path = tmp_path / "large.csv"
    path.write_bytes(DIALECTS[dialect](frame))
    with CsvChunks(path, 40, {"course": str}) as chunks:
        parts = list(chunks)
        assert chunks.position == path.stat().st_size
    assert [len(part) for part in parts] == [40, 40, 40, 30]
    joined = pd.concat(parts).astype({"course": int})
    pd.testing.assert_frame_equal(joined, frame, check_dtype=False)


CUT = {
    "gzip": (lambda content: gzip.compress(content)[:-500], "archive"),
    "UTF-8": (lambda content: content + b"1,2,3,\xe9vora,5,high\n", "UTF-8"),
    "a quotation mark": (lambda content: content + b'"1,2', "EOF"),
}


@pytest.mark.parametrize("fault", CUT)
def test_file_that_breaks_off_after_its_head_is_refused_by_name(small_frame, tmp_path, fault):
    damage, word = CUT[fault]
    path = tmp_path / "large.csv"
    path.write_bytes(damage(as_csv(small_frame(rows=40_000))))
    with CsvChunks(path, 5_000) as chunks, pytest.raises(DataError, match=f"large.csv.*{word}"):
        list(chunks)
