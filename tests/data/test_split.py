"""A split knows what it is, comes back from the disk as it was, and is never lost."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from helpers.data import DataError, load_split, read_table, save_split
from helpers.data.split import SPLIT_FILES
from helpers.workspace import MissingStepError
from tests.conftest import split_table
from tests.data.conftest import as_csv


def saved_files(workspace):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in workspace.data.iterdir()
        if path.is_file()
    }


def test_split_digest_tells_rows_roles_and_targets_apart(small_frame):
    content = as_csv(small_frame())
    options = [{}, {"categorical": ["course"]}, {"categorical": ["age"]}, {"target": "city"}]
    tables = [read_table(content, "x", **each) for each in options]
    manifests = [split_table(table, seed=0).manifest for table in tables]
    manifests.append(split_table(tables[0], seed=1).manifest)
    assert len({manifest["split_digest"] for manifest in manifests}) == 5
    assert len({manifest["digest"] for manifest in manifests}) == 1
    assert split_table(tables[0], seed=0).manifest == manifests[0]


def test_manifest_says_what_the_split_is(small_frame):
    table = read_table(as_csv(small_frame()), "mine.csv", categorical=["course"])
    manifest = split_table(table, test_size=0.2, seed=7).manifest
    assert manifest["source"] == "mine.csv"
    assert manifest["digest"] == table.digest
    assert (manifest["rows"], manifest["train_rows"], manifest["test_rows"]) == (150, 120, 30)
    assert manifest["categorical"] == ["city", "course"]
    assert manifest["class_counts"] == {"high": 50, "low": 50, "middle": 50}
    assert (manifest["seed"], manifest["test_size"], manifest["synthetic"]) == (7, 0.2, False)


def test_class_with_too_few_rows_is_refused_by_name(small_frame):
    frame = small_frame()
    frame.loc[:2, "Target"] = "rare"
    with pytest.raises(DataError, match=r"'rare' \(3\).*'Target'.*TEST_SIZE = 0.3"):
        split_table(read_table(as_csv(frame), "x"))


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
    wide["paid"] = wide["debtor"].where(wide.index % 4 != 0)
    split = split_table(read_table(as_csv(wide), "round trip", categorical=["course"]))
    save_split(split, workspace)
    back = load_split(workspace)
    pd.testing.assert_frame_equal(back.X_train, split.X_train)
    pd.testing.assert_frame_equal(back.X_test, split.X_test)
    pd.testing.assert_series_equal(back.y_train, split.y_train)
    pd.testing.assert_series_equal(back.y_test, split.y_test)
    assert back.manifest == split.manifest
    assert back.X_train["nickname"].isna().any()
    assert all(value is None or type(value) is str for value in back.X_train["nickname"])
    types = back.X_train.dtypes.map(str)[["debtor", "paid", "course", "score"]]
    assert types.tolist() == ["bool", "boolean", "int64", "float64"]


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2],
        [-1, 0, 1],
        ["01", "02", "03"],
        ["FALSE", "TRUE", "maybe"],
        ["1.0", "2.0", "3.0"],
        ["+1", "+2", "+3"],
        ["None", "no", "yes"],
    ],
)
def test_labels_stay_as_in_the_csv(small_frame, workspace, labels):
    frame = small_frame()
    frame["Target"] = frame["Target"].map(dict(zip(["high", "low", "middle"], labels, strict=True)))
    table = read_table(as_csv(frame), "labels")
    assert table.labels.tolist() == frame["Target"].tolist()
    assert table.labels.dtype == ("int64" if isinstance(labels[0], int) else object)
    save_split(split_table(table), workspace)
    assert load_split(workspace).labels == labels
    assert set(load_split(workspace).y_test) == set(labels)


def test_saving_the_same_split_again_touches_nothing(small_frame, workspace):
    content = as_csv(small_frame())
    save_split(split_table(read_table(content, "same")), workspace)
    before = saved_files(workspace)
    assert set(before) == set(SPLIT_FILES)
    save_split(split_table(read_table(content, "same")), workspace)
    assert saved_files(workspace) == before
    assert not (workspace.data / "previous").exists()


def test_no_replaced_split_is_lost(small_frame, workspace):
    content = as_csv(small_frame())
    tables = [read_table(content, source) for source in ("a", "b", "c")]
    tables += [read_table(content, "c", categorical=["course"]), tables[0], tables[1], tables[0]]
    manifests = {}
    for table in tables:
        manifest = save_split(split_table(table), workspace)
        manifests[manifest.read_text()] = {p: c for p, (c, _) in saved_files(workspace).items()}
    folders = list((workspace.data / "previous").iterdir())
    assert len(folders) == len(manifests) == 4
    for folder in folders:
        kept = manifests[(folder / "manifest.json").read_text()]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert load_split(workspace).manifest == split_table(tables[-1]).manifest


@pytest.mark.parametrize("missing", [*SPLIT_FILES, "all"])
def test_loading_what_is_not_complete_names_the_notebook_to_run(small_frame, workspace, missing):
    if missing != "all":
        save_split(split_table(read_table(as_csv(small_frame()), "x")), workspace)
        (workspace.data / missing).unlink()
    with pytest.raises(MissingStepError, match="01_data_preparation"):
        load_split(workspace)


def test_save_that_fails_leaves_the_previous_split(small_frame, workspace):
    table = read_table(as_csv(small_frame()), "interrupted")
    save_split(split_table(table, seed=0), workspace)
    before = saved_files(workspace)
    second = split_table(table, seed=1)
    mixed = second.X_test.assign(city=[1, *["Faro"] * (len(second.X_test) - 1)])
    with pytest.raises((ValueError, TypeError)):
        save_split(replace(second, X_test=mixed), workspace)
    assert saved_files(workspace) == before
    assert not list(workspace.data.glob(".staging*"))


def test_save_that_is_killed_leaves_a_whole_split_or_none(small_frame, workspace, monkeypatch):
    table = read_table(as_csv(small_frame()), "killed")
    first, second = (split_table(table, seed=seed) for seed in (0, 1))
    save_split(first, workspace)
    monkeypatch.setattr("os.replace", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_split(second, workspace)
    monkeypatch.undo()
    with pytest.raises(MissingStepError):
        load_split(workspace)
    (kept,) = (workspace.data / "previous").glob("*/manifest.json")
    assert json.loads(kept.read_text()) == first.manifest
    save_split(second, workspace)
    assert load_split(workspace).manifest == second.manifest


# --- repeated rows -----------------------------------------------------------------------------


def test_repeated_rows_are_on_one_side_of_the_split_and_the_others_where_they_were(
    small_frame, capsys
):
    frame = small_frame()
    plain = split_table(read_table(as_csv(frame), "x"))
    assert capsys.readouterr().out == ""
    copied = pd.concat([frame, frame.head(60), frame.head(30)])
    split = split_table(read_table(as_csv(copied), "x"))
    assert "90 of 240 rows repeat an earlier one" in capsys.readouterr().out
    parts = [split.X_train.join(split.y_train), split.X_test.join(split.y_test)]
    assert sum(map(len, parts)) == 240
    assert pd.concat([part.drop_duplicates() for part in parts]).duplicated().sum() == 0
    once = [part.drop_duplicates().index.tolist() for part in parts]
    assert once == [plain.X_train.index.tolist(), plain.X_test.index.tolist()]
    # A copy comes right after its row: so it is in the same fold of a cross-validation.
    assert (parts[0].duplicated() <= (parts[0].shift() == parts[0]).all(axis=1)).all()


def test_equal_rows_of_few_values_are_cases_of_their_own(small_frame, capsys):
    frame = small_frame()
    few = pd.DataFrame({"old": frame["age"] > 40, "city": frame["city"], "Target": frame["Target"]})
    assert few.duplicated().sum() > 100
    split = split_table(read_table(as_csv(few), "x"))
    assert len(split.X_test) == 45
    assert split.y_test.value_counts().tolist() == [15, 15, 15]
    assert capsys.readouterr().out == ""


def test_class_of_copies_is_too_small(small_frame):
    frame = small_frame()
    rare = frame.head(1).assign(Target="rare")
    copied = pd.concat([frame, *[rare] * 30])
    with pytest.raises(DataError, match=r"'rare' \(1\).*repeated rows counted once"):
        split_table(read_table(as_csv(copied), "x"))
