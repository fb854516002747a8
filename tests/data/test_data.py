import functools
import gzip
import http.server
import io
import json
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import data
from helpers.data import DataError, read_table
from helpers.data.split import SPLIT_FILES
from helpers.data.students import STUDENT_CATEGORICAL, STUDENT_COLUMNS
from helpers.settings import SETTINGS, check_parameters
from helpers.workspace import (
    MissingStepError,
    ParameterError,
    ProjectError,
    WorkspaceError,
    open_workspace,
)
from tests.conftest import split_table


def as_csv(frame, **options):
    return frame.to_csv(**{"index": False, **options}).encode()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def web_folder(tmp_path):
    """A real web server on loopback: its folder and its address."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{site.server_address[1]}"
        site.shutdown()
        thread.join()


@pytest.fixture
def wide(small_frame):
    """The small table with a text and a number that have missing values."""
    frame = small_frame()
    frame["nickname"] = frame["city"].where(frame.index % 7 != 0)
    frame["score"] = frame["length"].where(frame.index % 5 != 0)
    return frame


# --- the two variants of the students' table ---------------------------------------------------


@pytest.mark.parametrize(
    ("file", "features", "delimiter"), [("kaggle_students.csv", 34, ","), ("uci697.csv", 36, ";")]
)
def test_real_variant_is_read_with_clean_header_and_nine_categories(
    real_data, workspace, file, features, delimiter
):
    table = data.load_table(str(real_data / file), workspace)
    names = [name for name in table.frame.columns if name != "Target"]
    assert len(names) == features
    assert all(name == name.strip() for name in names)
    assert not any(mark in name for name in names for mark in ("\ufeff", "\t", '"'))
    assert names[0] == "Marital status"
    assert "Daytime/evening attendance" in names
    assert set(table.categorical) == set(STUDENT_CATEGORICAL)
    assert len(table.categorical) == 9
    assert len(table.numeric) == features - 9
    assert table.frame["Target"].value_counts().to_dict() == {
        "Dropout": 1421,
        "Enrolled": 794,
        "Graduate": 2209,
    }
    assert not table.frame.isna().any(axis=None)
    assert all(table.frame[name].dtype.kind in "if" for name in names)
    other = ";" if delimiter == "," else ","
    copy = read_table(as_csv(table.frame, sep=other), "copy")
    assert copy.digest == table.digest
    assert not table.synthetic
    meanings = data.describe_columns(table)["meaning"]
    assert list(meanings.index) == list(table.frame.columns)
    assert meanings.str.len().min() > 10
    assert meanings["Gender"] == "1 male, 0 female"


def test_meanings_are_those_of_both_real_variants_and_no_more(real_data):
    names = set()
    for file in ("kaggle_students.csv", "uci697.csv"):
        names |= set(read_table((real_data / file).read_bytes(), file).frame.columns)
    assert names == set(STUDENT_COLUMNS)
    assert len(names) == 37


def test_bundled_sample_says_that_it_is_synthetic_and_has_the_students_columns(workspace):
    table = data.load_table("sample", workspace)
    assert table.synthetic
    assert set(table.categorical) == set(STUDENT_CATEGORICAL)
    assert set(table.frame["Target"]) == {"Dropout", "Enrolled", "Graduate"}
    split = split_table(table)
    assert split.manifest["synthetic"] is True
    assert split.manifest["source"] == "sample"


def test_dropping_a_code_column_leaves_the_others_categories(workspace):
    table = data.load_table("sample", workspace, drop=["Course", "Debtor"])
    assert table.categorical == tuple(n for n in STUDENT_CATEGORICAL if n != "Course")
    assert len(table.categorical) == 8
    assert table.dropped == ("Course", "Debtor")


# --- dialects ----------------------------------------------------------------------------------


def zipped(content, name="data.csv"):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("readme.txt", "not a table")
    return packed.getvalue()


DIALECTS = {
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


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialect_gives_the_same_table_as_a_plain_csv(small_frame, dialect):
    frame = small_frame()
    plain = read_table(as_csv(frame), "plain")
    table = read_table(DIALECTS[dialect](frame), dialect)
    pd.testing.assert_frame_equal(table.frame, plain.frame)
    assert table.digest == plain.digest
    assert table.categorical == plain.categorical
    assert table.frame["length"].dtype == "float64"
    assert table.frame["age"].dtype == "int64"
    assert table.frame["length"].tolist() == frame["length"].tolist()


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
    names = [f"{'a long name of a column ' * 12}{number}" for number in range(500)]
    rows = [[*names, "Target"], *(["1"] * 500 + [label] for label in ("high", "low"))]
    table = read_table("\n".join(map(",".join, rows)).encode(), "wide")
    assert table.frame.shape == (2, 501)


def numbers_as(written, delimiter):
    rows = [f'"{text}"{delimiter}{label}' for text in written for label in ("high", "low")]
    return "\n".join([f"price{delimiter}Target", *rows]).encode()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_decimal_comma_is_read_whatever_the_delimiter(delimiter):
    frame = read_table(numbers_as(["1,5", "2,25", "3", "-0,125"], delimiter), "commas").frame
    assert frame["price"].tolist() == [1.5, 1.5, 2.25, 2.25, 3, 3, -0.125, -0.125]
    assert read_table(numbers_as(["0,125", "0,250"], delimiter), "x").frame["price"][0] == 0.125


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("written", [["950", "1,234", "12,500"], ["-1,234,567", "1,000.5"]])
def test_comma_that_may_separate_thousands_is_refused(written, delimiter):
    with pytest.raises(DataError, match="'price' of money.*thousands.*DROP"):
        read_table(numbers_as(written, delimiter), "money")


def test_texts_among_which_one_looks_like_thousands_stay_texts():
    written = ["under", "over", "1,000"]
    table = read_table(numbers_as(written, ";"), "bands")
    assert set(table.frame["price"]) == set(written)
    assert table.categorical == ("price",)


def test_another_value_gives_another_digest(small_frame):
    frame = small_frame()
    first = read_table(as_csv(frame), "first").digest
    frame.loc[3, "age"] += 1
    assert read_table(as_csv(frame), "second").digest != first


def test_latin_1_letters_are_read(small_frame):
    frame = small_frame()
    frame["city"] = frame["city"].replace("Faro", "Évora")
    frame = frame.rename(columns={"width": "largura média"})
    table = read_table(as_csv(frame).decode().encode("latin-1"), "latin")
    assert "largura média" in table.frame.columns
    assert set(table.frame["city"]) == {"Évora", "Lisboa", "Porto"}


def test_quoted_commas_quotes_and_line_breaks_stay_inside_their_field(small_frame):
    frame = small_frame()
    frame["city"] = frame["city"].replace({"Faro": 'Faro, the "old" town', "Porto": "Por\nto"})
    table = read_table(as_csv(frame), "quoted")
    assert set(table.frame["city"]) == {'Faro, the "old" town', "Lisboa", "Por\nto"}
    assert len(table.frame) == len(frame)


def test_true_and_false_become_booleans(small_frame):
    frame = small_frame()
    frame["debtor"] = np.where(frame["length"] > 1.5, "true", "FALSE")
    table = read_table(as_csv(frame), "booleans")
    assert table.frame["debtor"].dtype == bool
    assert table.frame["debtor"].tolist() == (frame["length"] > 1.5).tolist()
    assert "debtor" in table.numeric


def test_true_and_false_with_gaps_stay_booleans(small_frame, workspace):
    frame = small_frame()
    frame["debtor"] = np.where(frame["length"] > 1.5, "true", "FALSE")
    frame.loc[::4, "debtor"] = None
    table = read_table(as_csv(frame), "gaps")
    assert table.frame["debtor"].dtype == "boolean"
    assert table.frame["debtor"].isna().tolist() == frame["debtor"].isna().tolist()
    known = table.frame["debtor"].dropna().astype(bool)
    assert known.tolist() == (frame["length"] > 1.5)[known.index].tolist()
    assert "debtor" in table.numeric
    split = split_table(table)
    data.save_split(split, workspace)
    pd.testing.assert_frame_equal(data.load_split(workspace).X_train, split.X_train)


@pytest.mark.parametrize("mark", ["", "NA", "NaN", "null", "#N/A"])
def test_missing_values_are_recognised_in_numbers_texts_and_codes(wide, mark):
    table = read_table(as_csv(wide, na_rep=mark), "missing")
    assert table.frame["nickname"].isna().tolist() == wide["nickname"].isna().tolist()
    assert table.frame["score"].isna().tolist() == wide["score"].isna().tolist()
    assert table.frame["score"].dtype == "float64"
    assert table.frame["nickname"].dropna().isin(["Faro", "Lisboa", "Porto"]).all()
    assert "nickname" in table.categorical


def test_text_columns_are_categories_and_codes_are_where_named(small_frame):
    content = as_csv(small_frame())
    assert read_table(content, "inferred").categorical == ("city",)
    named = read_table(content, "named", categorical=["course"])
    assert named.categorical == ("city", "course")
    assert named.frame["course"].dtype == "int64"
    assert set(named.numeric) == {"length", "width", "age"}


def test_dropped_column_is_gone(small_frame):
    table = read_table(as_csv(small_frame()), "dropped", drop=["age"])
    assert "age" not in table.frame.columns


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["0", "1", "2"], [0, 1, 2]),
        (["-1", "0", "1"], [-1, 0, 1]),
        (["01", "02", "03"], ["01", "02", "03"]),
        (["TRUE", "FALSE", "maybe"], ["TRUE", "FALSE", "maybe"]),
        (["1.0", "2.0", "3.0"], ["1.0", "2.0", "3.0"]),
        (["+1", "+2", "+3"], ["+1", "+2", "+3"]),
        (["yes", "no", "None"], ["yes", "no", "None"]),
    ],
)
def test_labels_stay_as_in_the_csv(small_frame, workspace, written, read):
    frame = small_frame()
    frame["Target"] = frame["Target"].map(
        dict(zip(["high", "low", "middle"], written, strict=True))
    )
    table = read_table(as_csv(frame), "labels")
    assert sorted(table.frame["Target"].unique().tolist(), key=str) == sorted(read, key=str)
    assert table.frame["Target"].dtype == ("int64" if isinstance(read[0], int) else object)
    split = split_table(table)
    data.save_split(split, workspace)
    assert data.load_split(workspace).labels == sorted(read)
    assert set(data.load_split(workspace).y_test) == set(read)


# --- the split ---------------------------------------------------------------------------------


def test_split_keeps_the_share_of_each_class_and_every_row(small_frame):
    frame = small_frame()
    frame = pd.concat([frame, frame[frame["Target"] == "low"]], ignore_index=True)
    table = read_table(as_csv(frame), "split")
    split = split_table(table, test_size=0.3)
    assert len(split.X_test) == round(0.3 * len(frame))
    for label in ("high", "low", "middle"):
        share = (frame["Target"] == label).mean()
        assert abs((split.y_test == label).mean() - share) < 1 / len(split.y_test)
        assert abs((split.y_train == label).mean() - share) < 1 / len(split.y_test)
    rows = sorted([*split.X_train.index, *split.X_test.index])
    assert rows == list(range(len(frame)))
    assert "Target" not in split.X_train.columns
    assert split.labels == ["high", "low", "middle"]


def test_same_seed_gives_same_rows_and_another_seed_others(small_frame):
    table = read_table(as_csv(small_frame()), "seed")
    first, again, other = (split_table(table, seed=seed) for seed in (0, 0, 1))
    assert first.X_test.index.tolist() == again.X_test.index.tolist()
    assert first.manifest == again.manifest
    assert set(first.X_test.index) != set(other.X_test.index)
    assert first.manifest["split_digest"] != other.manifest["split_digest"]


def test_other_roles_or_another_target_give_another_split_digest(small_frame):
    content = as_csv(small_frame())
    options = [{}, {"categorical": ["course"]}, {"categorical": ["age"]}, {"target": "city"}]
    manifests = [split_table(read_table(content, "x", **o)).manifest for o in options]
    assert len({manifest["split_digest"] for manifest in manifests}) == len(options)
    assert len({manifest["digest"] for manifest in manifests}) == 1


def test_manifest_says_what_the_split_is(small_csv, workspace):
    path = small_csv()
    table = data.load_table(str(path), workspace, categorical=["course"])
    manifest = split_table(table, test_size=0.2, seed=7).manifest
    assert manifest["source"] == str(path)
    assert manifest["digest"] == table.digest
    assert (manifest["rows"], manifest["train_rows"], manifest["test_rows"]) == (150, 120, 30)
    assert manifest["categorical"] == ["city", "course"]
    assert manifest["class_counts"] == {"high": 50, "low": 50, "middle": 50}
    assert (manifest["seed"], manifest["test_size"], manifest["synthetic"]) == (7, 0.2, False)


@pytest.mark.parametrize("labels", [["high", "low", "middle"], [-1, 7, 10]])
def test_labels_are_encoded_as_their_positions(small_frame, labels):
    frame = small_frame()
    frame["Target"] = frame["Target"].map(dict(zip(["high", "low", "middle"], labels, strict=True)))
    split = split_table(read_table(as_csv(frame), "encoded"))
    codes = split.encode(split.y_test)
    assert codes.dtype == np.int64
    assert [split.labels[code] for code in codes] == split.y_test.tolist()
    with pytest.raises(DataError, match="'other' is no class"):
        split.encode(["other"])


# --- saving and loading ------------------------------------------------------------------------


def test_saved_split_is_loaded_back_the_same_with_types_and_missing_values(wide, workspace):
    wide["debtor"] = wide["age"] > 30
    split = split_table(read_table(as_csv(wide), "round trip", categorical=["course"]))
    data.save_split(split, workspace)
    back = data.load_split(workspace)
    pd.testing.assert_frame_equal(back.X_train, split.X_train)
    pd.testing.assert_frame_equal(back.X_test, split.X_test)
    pd.testing.assert_series_equal(back.y_train, split.y_train)
    pd.testing.assert_series_equal(back.y_test, split.y_test)
    assert back.manifest == split.manifest
    assert back.X_train["nickname"].isna().any()
    assert all(value is None or type(value) is str for value in back.X_train["nickname"])
    types = {name: dtype.kind for name, dtype in back.X_train.dtypes.items()}
    assert (types["debtor"], types["course"], types["score"]) == ("b", "i", "f")


def saved_files(workspace):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in workspace.data.iterdir()
        if path.is_file()
    }


def test_saving_the_same_split_again_touches_nothing(small_frame, workspace):
    content = as_csv(small_frame())
    data.save_split(split_table(read_table(content, "same")), workspace)
    before = saved_files(workspace)
    assert set(before) == set(SPLIT_FILES)
    data.save_split(split_table(read_table(content, "same")), workspace)
    assert saved_files(workspace) == before
    assert not (workspace.data / "previous").exists()


def test_another_split_keeps_the_previous_one(small_frame, workspace):
    table = read_table(as_csv(small_frame()), "previous")
    first, second = (split_table(table, seed=seed) for seed in (0, 1))
    data.save_split(first, workspace)
    before = {name: content for name, (content, _) in saved_files(workspace).items()}
    data.save_split(second, workspace)
    assert data.load_split(workspace).manifest == second.manifest
    (folder,) = (workspace.data / "previous").iterdir()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 0


def test_no_replaced_split_is_lost(small_frame, workspace):
    content = as_csv(small_frame())
    tables = [read_table(content, source) for source in ("a", "b", "c")]
    tables += [read_table(content, "c", categorical=["course"]), tables[0], tables[1], tables[0]]
    for table in tables:
        data.save_split(split_table(table), workspace)
    folders = list((workspace.data / "previous").iterdir())
    kept = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    roles = sorted((manifest["source"], len(manifest["categorical"])) for manifest in kept)
    assert roles == [("a", 1), ("b", 1), ("c", 1), ("c", 2)]
    assert all({path.name for path in folder.iterdir()} == set(SPLIT_FILES) for folder in folders)


def test_loading_without_data_names_the_notebook_to_run(workspace):
    with pytest.raises(MissingStepError, match="01_data_preparation"):
        data.load_split(workspace)


def test_loading_with_one_file_missing_names_the_notebook_to_run(small_frame, workspace):
    data.save_split(split_table(read_table(as_csv(small_frame()), "x")), workspace)
    (workspace.data / "test.parquet").unlink()
    with pytest.raises(MissingStepError, match="01_data_preparation"):
        data.load_split(workspace)


def test_interrupted_save_leaves_the_previous_split_readable(small_frame, workspace):
    table = read_table(as_csv(small_frame()), "interrupted")
    first = split_table(table, seed=0)
    data.save_split(first, workspace)
    before = saved_files(workspace)
    second = split_table(table, seed=1)
    mixed = second.X_test.assign(city=[1, *["Faro"] * (len(second.X_test) - 1)])
    with pytest.raises((ValueError, TypeError)):
        data.save_split(replace(second, X_test=mixed), workspace)
    assert data.load_split(workspace).manifest == first.manifest
    pd.testing.assert_frame_equal(data.load_split(workspace).X_test, first.X_test)
    assert saved_files(workspace) == before
    assert not list(workspace.data.glob(".staging*"))


# --- where the table is from -------------------------------------------------------------------


def test_auto_falls_back_to_the_sample_with_a_notice(workspace, monkeypatch, capsys):
    url = f"http://127.0.0.1:{closed_port()}/students.zip"
    monkeypatch.setattr("helpers.data.sources.UCI_URL", url)
    table = data.load_table("auto", workspace)
    shown = capsys.readouterr().out
    assert table.synthetic
    assert "SYNTHETIC" in shown
    assert url in shown


def test_uci_refuses_where_it_does_not_answer(workspace, monkeypatch):
    url = f"http://127.0.0.1:{closed_port()}/students.zip"
    monkeypatch.setattr("helpers.data.sources.UCI_URL", url)
    with pytest.raises(DataError, match="127.0.0.1"):
        data.load_table("uci", workspace)


def test_auto_uses_uci_where_it_answers(workspace, web_folder, small_frame, monkeypatch):
    folder, address = web_folder
    (folder / "students.zip").write_bytes(zipped(as_csv(small_frame(), sep=";")))
    monkeypatch.setattr("helpers.data.sources.UCI_URL", f"{address}/students.zip")
    table = data.load_table("auto", workspace)
    assert table.source == "uci"
    assert not table.synthetic
    assert table.digest == read_table(as_csv(small_frame()), "x").digest


def test_auto_prefers_the_prepared_copy(workspace, web_folder, small_frame, monkeypatch, capsys):
    folder, address = web_folder
    (folder / "students.zip").write_bytes(zipped(as_csv(small_frame(seed=5), sep=";")))
    monkeypatch.setattr("helpers.data.sources.UCI_URL", f"{address}/students.zip")
    (folder / "mine.csv").write_bytes(as_csv(small_frame()))
    mine = data.load_table(f"{address}/mine.csv", workspace, categorical=["course"])
    split = split_table(mine)
    data.save_split(split, workspace)
    table = data.load_table("auto", workspace)
    assert (table.source, table.digest) == (mine.source, mine.digest)
    assert table.categorical == mine.categorical
    pd.testing.assert_frame_equal(table.frame, mine.frame)
    assert mine.source in capsys.readouterr().out
    assert split_table(table).manifest == split.manifest


@pytest.fixture
def prepared(small_csv, workspace):
    """A workspace with a split that was made without the column ``age``; the CSV's bytes."""
    path = small_csv()
    table = data.load_table(str(path), workspace, drop=["age"], categorical=["course", "age"])
    data.save_split(split_table(table), workspace)
    return path.read_bytes(), table


@pytest.mark.parametrize("drop", [["age"], None])
def test_prepared_copy_is_used_again_with_the_same_drop(prepared, workspace, drop, capsys):
    before = saved_files(workspace)
    table = data.load_table("auto", workspace, drop=drop, categorical=["course", "age"])
    data.save_split(split_table(table), workspace)
    assert saved_files(workspace) == before
    assert table.dropped == prepared[1].dropped == ("age",)
    assert "without age" in capsys.readouterr().out


def test_prepared_copy_can_lose_more_columns(prepared, workspace):
    content, table = prepared
    less = data.load_table("auto", workspace, drop=["course", "age"])
    again = read_table(content, table.source, drop=["age", "course"])
    pd.testing.assert_frame_equal(less.frame, again.frame)
    assert split_table(less).manifest == split_table(again).manifest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": []}, r"DROP = \['age'\].*DATA_SOURCE"),
        ({"drop": ["width"]}, r"DROP = \['age'\].*DATA_SOURCE"),
        ({"drop": ["age", "with"]}, "'with' .parameter DROP.*'width'"),
        ({"drop": ["age", "Target"]}, "DROP names 'Target'"),
        ({"drop": ["age"], "target": "city"}, "TARGET = 'Target'"),
        ({"drop": ["age", "length", "width", "city", "course"]}, "no column besides the target"),
    ],
)
def test_prepared_copy_that_cannot_serve_is_refused_naming_the_parameter(
    prepared, workspace, options, words
):
    with pytest.raises(DataError, match=words):
        data.load_table("auto", workspace, **options)


def test_url_gives_the_same_table_as_the_file(workspace, web_folder, small_frame):
    folder, address = web_folder
    (folder / "table.csv").write_bytes(as_csv(small_frame()))
    by_url = data.load_table(f"{address}/table.csv", workspace)
    by_path = data.load_table(str(folder / "table.csv"), workspace)
    assert by_url.digest == by_path.digest
    assert by_url.source == f"{address}/table.csv"


# --- what cannot be used -----------------------------------------------------------------------


def lines(content, change):
    """Change the lines of a CSV (without line ends) by a function."""
    rows = content.decode().splitlines()
    change(rows)
    return ("\n".join(rows) + "\n").encode()


def with_column(name, value, rows=slice(None)):
    def make(frame):
        frame = frame.astype({name: object}) if name in frame else frame
        frame.loc[frame.index[rows], name] = value
        return as_csv(frame)

    return make


def ragged(row, extra):
    """Give one data row (counted from 1) a field more or less."""

    def change(rows):
        rows[row] = f"{rows[row]},1" if extra else rows[row].rsplit(",", 2)[0]

    return lambda frame: lines(as_csv(frame), change)


def renamed_twice(frame):
    return lines(as_csv(frame), lambda rows: rows.__setitem__(0, rows[0].replace("width", "age")))


def rare_class(frame):
    frame.loc[:2, "Target"] = "rare"
    return as_csv(frame)


def continuous_target(frame):
    return as_csv(frame.assign(Target=np.linspace(0, 1, len(frame))))


def corrupted_gzip(frame):
    packed = bytearray(gzip.compress(as_csv(frame)))
    packed[60:90] = bytes(30)
    return bytes(packed)


def marked_zip(flags=0, method=0):
    """Make a zip file that claims to be encrypted or compressed in a way of its own."""

    def make(frame):
        packed = bytearray(zipped(as_csv(frame)))
        packed[6] |= flags
        packed[8] |= method
        directory = packed.index(b"PK\x01\x02")
        packed[directory + 8] |= flags
        packed[directory + 10] |= method
        return bytes(packed)

    return make


BAD_FILES = {
    "PNG bytes": (lambda frame: b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(50), ["bad.csv"]),
    "HTML page": (
        lambda frame: (
            b"<!DOCTYPE html>\n<html>\n<head><title>404</title></head>\n"
            b"<body>\n<p>Not found, sorry.</p>\n</body>\n</html>\n"
        ),
        ["bad.csv"],
    ),
    "empty file": (lambda frame: b"", ["bad.csv", "empty"]),
    "blank file": (lambda frame: b"\n \n", ["bad.csv", "empty"]),
    "header only": (lambda frame: as_csv(frame.head(0)), ["bad.csv", "no rows"]),
    "one column": (lambda frame: as_csv(frame[["Target"]]), ["bad.csv", "column"]),
    "close target": (
        lambda frame: as_csv(frame.rename(columns={"Target": "target"})),
        ["bad.csv", "'Target'", "Did you mean 'target'"],
    ),
    "no target": (
        lambda frame: as_csv(frame.drop(columns="Target")),
        ["bad.csv", "'Target'", "length", "course"],
    ),
    "one class": (with_column("Target", "high"), ["bad.csv", "'Target'", "one class", "'high'"]),
    "rare class": (rare_class, ["'Target'", "'rare'", "(3)"]),
    "column all missing": (with_column("width", np.nan), ["bad.csv", "'width'", "DROP"]),
    "target missing": (
        with_column("Target", np.nan, slice(4, 6)),
        ["bad.csv", "'Target'", "2 missing", "6, 7"],
    ),
    "text in a number": (
        with_column("width", "n.a.", slice(9, 10)),
        ["bad.csv", "'width'", "'n.a.'", "row 11"],
    ),
    "duplicate names": (renamed_twice, ["bad.csv", "'age'"]),
    "long row early": (ragged(3, True), ["bad.csv", "line 4 has 7 fields", "header has 6"]),
    "short row early": (ragged(3, False), ["bad.csv", "line 4 has 4 fields", "header has 6"]),
    "long first row": (ragged(1, True), ["bad.csv", "line 2 has 7 fields"]),
    "short row after blank lines": (
        lambda frame: b"\n\r\n" + ragged(3, False)(frame),
        ["bad.csv", "line 6 has 4 fields"],
    ),
    "long row late": (ragged(100, True), ["bad.csv", "101"]),
    "short row late": (ragged(100, False), ["bad.csv"]),
    "short row before missing features": (
        lambda frame: ragged(100, False)(frame[["Target", *frame.columns[:-1]]]),
        ["bad.csv"],
    ),
    "all rows longer than the header": (
        lambda frame: lines(
            as_csv(frame),
            lambda rows: rows.__setitem__(slice(1, None), [f"{r},9" for r in rows[1:]]),
        ),
        ["bad.csv"],
    ),
    "infinite": (with_column("length", "inf", slice(3, 4)), ["bad.csv", "'length'", "infinite"]),
    "too large": (with_column("length", "1e999", slice(3, 4)), ["bad.csv", "'length'"]),
    "continuous target": (continuous_target, ["bad.csv", "'Target'", "150 different"]),
    "broken gzip": (lambda frame: gzip.compress(as_csv(frame))[:200], ["bad.csv", "archive"]),
    "corrupted gzip": (corrupted_gzip, ["bad.csv", "archive"]),
    "encrypted zip": (marked_zip(flags=1), ["bad.csv", "encrypted", "Unpack"]),
    "unknown compression": (marked_zip(method=99), ["bad.csv", "compression", "Unpack"]),
    "UTF-16 cut short": (
        lambda frame: as_csv(frame).decode().encode("utf-16")[:-1],
        ["bad.csv", "UTF-16"],
    ),
    "huge field": (with_column("city", "x" * 140_000, slice(9, 10)), ["bad.csv", "line 11"]),
    "huge field late": (with_column("city", "x" * 140_000, slice(99, 100)), ["line 101"]),
    "broken zip": (lambda frame: zipped(as_csv(frame))[:-40], ["bad.csv", "archive"]),
    "zip without a CSV": (lambda frame: zipped(b"1", "a.bin"), ["bad.csv", "0 CSV"]),
}


def prepare(source, workspace, **options):
    """Do what notebook 01 does."""
    split = split_table(data.load_table(str(source), workspace, **options))
    return data.save_split(split, workspace)


@pytest.mark.parametrize("fault", BAD_FILES)
def test_unusable_file_is_refused_by_name_and_nothing_is_saved(
    small_frame, workspace, tmp_path, fault
):
    make, words = BAD_FILES[fault]
    path = tmp_path / "bad.csv"
    path.write_bytes(make(small_frame()))
    with pytest.raises(DataError) as caught:
        prepare(path, workspace)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(workspace.data.iterdir()) == []


def test_missing_file_is_refused_by_name(workspace, tmp_path):
    with pytest.raises(DataError, match="nowhere.csv.*DATA_SOURCE"):
        prepare(tmp_path / "nowhere.csv", workspace)
    assert list(workspace.data.iterdir()) == []


def test_folder_instead_of_a_file_is_refused_by_name(workspace, tmp_path):
    with pytest.raises(DataError, match=tmp_path.name):
        prepare(tmp_path, workspace)


def test_url_that_does_not_answer_is_refused_by_name(workspace):
    url = f"http://127.0.0.1:{closed_port()}/table.csv"
    with pytest.raises(DataError, match=url):
        prepare(url, workspace)
    assert list(workspace.data.iterdir()) == []


def test_url_with_404_is_refused_by_name(workspace, web_folder):
    url = f"{web_folder[1]}/nowhere.csv"
    with pytest.raises(DataError, match=url):
        prepare(url, workspace)
    assert list(workspace.data.iterdir()) == []


class CutShort(http.server.BaseHTTPRequestHandler):
    """Promises more bytes than it sends, as a broken line does."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"length,width,Target\n1,2,high\n")
        self.close_connection = True

    def log_message(self, *arguments):
        pass


def test_transfer_that_stops_half_way_is_refused_by_name(workspace):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CutShort) as site:
        thread = threading.Thread(target=site.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{site.server_address[1]}/table.csv"
        try:
            with pytest.raises(DataError, match=url):
                prepare(url, workspace)
        finally:
            site.shutdown()
            thread.join()
    assert list(workspace.data.iterdir()) == []


@pytest.mark.parametrize(
    ("parameter", "option"), [("CATEGORICAL", "categorical"), ("DROP", "drop")]
)
def test_unknown_column_in_a_parameter_is_refused_with_a_close_one(
    small_csv, workspace, parameter, option
):
    with pytest.raises(DataError, match=f"'corse' .parameter {parameter}.*'course'"):
        prepare(small_csv(), workspace, **{option: ["corse"]})
    assert list(workspace.data.iterdir()) == []


@pytest.mark.parametrize("parameter", ["CATEGORICAL", "DROP"])
def test_column_that_is_no_text_is_refused_naming_the_parameter(small_csv, workspace, parameter):
    with pytest.raises(ProjectError, match=parameter):
        checked = check_parameters(**{parameter: [3]})
        prepare(small_csv(), workspace, **{parameter.lower(): checked[parameter]})


def test_dropping_the_target_is_refused(small_csv, workspace):
    with pytest.raises(DataError, match="DROP names 'Target'.*TARGET"):
        prepare(small_csv(), workspace, drop=["age", "Target"])
    assert list(workspace.data.iterdir()) == []


@pytest.mark.parametrize("place", [2024, 0, True, ["ws"]])
def test_workspace_that_is_no_path_is_refused_by_name(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match="^WORKSPACE must be.*'./2024'"):
        open_workspace(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["below a file", "/proc/nowhere"])
def test_workspace_that_cannot_be_written_is_refused_by_name(tmp_path, place):
    if place == "below a file":
        (tmp_path / "file").write_text("x")
        place = str(tmp_path / "file" / "ws")
    elif not Path("/proc").is_dir():
        pytest.skip("no /proc on this system")
    with pytest.raises(WorkspaceError) as caught:
        open_workspace(place)
    assert place in str(caught.value)
    assert "WORKSPACE" in str(caught.value)


NAN = float("nan")
WRONG = {
    "WORKSPACE": [5, ["a"]],
    "SEED": ["0", 0.5, -1, 2**32, True, None],
    "DATA_SOURCE": [None, 3, ["a.csv"]],
    "TARGET": [None, 1],
    "CATEGORICAL": [5, "[broken", True],
    "DROP": [5, "[broken", {"a": 1}],
    "TEST_SIZE": ["0.3", 0, 1, 0.9, -0.1, None, True, NAN],
    "FILTERS": [0, 1.5, "32", None, 5000],
    "KERNEL_SIZE": [0, 2.0, None, 65],
    "L2": [-1, "0", 2, None, NAN],
    "LEARNING_RATE": [0, -0.1, "fast", None, 2, NAN],
    "BATCH_SIZE": [0, 1.5, None],
    "EPOCHS": [0, "30", None, 2.5],
    "VALIDATION_SIZE": [0, 0.9, "0.1", None, NAN],
    "CLASS_WEIGHT_POWER": [-0.1, 1.1, "0", None, NAN],
    "N_BINS": [-1, 65, 0.5, "8", None, True],
    "C_EXPONENTS": [None, 3, "[broken", [], "", [1, "a"], [61], [-61], [NAN], [True]],
    "GAMMA_EXPONENTS": [None, 3, "[broken", [], "a,b", [[1]], [1e400]],
    "BEYOND_EDGES": ["yes", 1],
    "CV_FOLDS": [1, 21, 2.5, None, "5"],
    "N_JOBS": [0, -2, 1.5, None, "2"],
    "MIN_GAIN": [-0.1, 1.1, "0", None, NAN],
    "MAX_LOSS": [-0.1, 1.1, "0", None, NAN],
    "ALLOW_REPLACE": ["yes", 1, None],
    "MIN_ROBUSTNESS": [-0.1, 1.1, "0", None, NAN],
    "DRIVE_FOLDER": [1, ["MyDrive"], True],
    "ATTACKED_ROWS": [-1, 0.5, "30", None],
    "REASON": [None, 5],
    "PROMOTED_BY": [5, ["me"]],
    "DEMO_TRAFFIC": ["yes", 1, None],
    "PERIOD": ["day", "d", 1, None],
    "EXPOSE_UI": ["yes", None, 2],
}


def test_wrong_values_are_listed_for_every_setting():
    assert set(SETTINGS) - set(WRONG) == set()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_is_refused_naming_the_parameter(name, value):
    with pytest.raises(ParameterError, match=f"^{name} "):
        check_parameters(**{name: value})


def test_right_values_are_taken_and_lists_may_be_texts(monkeypatch):
    monkeypatch.setenv("WORKSPACE", "/from/environment")
    checked = check_parameters(
        WORKSPACE=None,
        TEST_SIZE=0.25,
        SEED=3,
        CATEGORICAL="a, b",
        DROP='["c, d"]',
        L2=0,
        C_EXPONENTS="-1, 0.5",
        GAMMA_EXPONENTS=[-5],
        BEYOND_EDGES=None,
    )
    assert checked == {
        "WORKSPACE": "/from/environment",
        "TEST_SIZE": 0.25,
        "SEED": 3,
        "CATEGORICAL": ["a", "b"],
        "DROP": ["c, d"],
        "L2": 0.0,
        "C_EXPONENTS": [-1, 0.5],
        "GAMMA_EXPONENTS": [-5],
        "BEYOND_EDGES": None,
    }
    assert check_parameters(WORKSPACE="/explicit")["WORKSPACE"] == "/explicit"


def test_workspace_is_made_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "from environment"))
    workspace = open_workspace()
    assert workspace.root == tmp_path / "from environment"
    assert all(folder.is_dir() for folder in (workspace.data, workspace.artifacts))
    assert list(workspace.data.iterdir()) == []


# --- describing --------------------------------------------------------------------------------


def test_description_names_roles_missing_values_and_identifiers(wide):
    wide["id"] = [f"student {number}" for number in wide.index]
    table = read_table(as_csv(wide), "described", categorical=["course"])
    described = data.describe_columns(table)
    assert described.loc["course", "role"] == "category"
    assert described.loc["Target", "role"] == "target"
    assert described.loc["length", "role"] == "numeric"
    assert described.loc["score", "missing"] == int(wide["score"].isna().sum())
    assert "DROP" in described.loc["id", "remark"]
    assert described.loc["city", "remark"] == ""
    assert "meaning" not in described.columns


def test_students_columns_keep_their_meaning_beside_columns_of_ones_own(workspace):
    table = data.load_table("sample", workspace, drop=["Course", "Marital status"])
    frame = table.frame.assign(shoe_size=42, Gender=table.frame["Gender"])
    meanings = data.describe_columns(read_table(as_csv(frame), "more"))["meaning"]
    assert meanings["shoe_size"] == ""
    assert meanings["Debtor"].startswith("1 owes")


def test_checks_report_duplicates_constants_and_the_majority_class(small_frame):
    frame = small_frame().assign(constant=1)
    frame = pd.concat([frame, frame.head(3)], ignore_index=True)
    findings = data.check_table(read_table(as_csv(frame), "checked"))["finding"]
    assert findings["duplicate rows"] == "3"
    assert findings["constant columns"] == "constant"
    share = frame["Target"].value_counts().max() / len(frame)
    assert findings["majority class"] == f"{share:.1%} of the rows"
