"""Columns get the right types and roles, or a sentence that says what is wrong with them."""

import numpy as np
import pandas as pd
import pytest

from helpers.data import DataError, check_table, describe_columns, read_table
from helpers.data.students import STUDENT_CATEGORICAL, STUDENT_COLUMNS
from tests.conftest import split_table
from tests.data.conftest import as_csv

# --- the two variants of the students' table ---------------------------------------------------


@pytest.mark.parametrize(
    ("file", "features", "other"), [("kaggle_students.csv", 34, ";"), ("uci697.csv", 36, ",")]
)
def test_real_variant_is_read_with_clean_header_and_nine_categories(
    real_data, file, features, other
):
    table = read_table((real_data / file).read_bytes(), file)
    names = list(table.features)
    assert len(names) == features
    assert set(names) <= set(STUDENT_COLUMNS)
    assert table.categorical == STUDENT_CATEGORICAL
    assert len(table.categorical) == 9
    assert len(table.numeric) == features - 9
    assert table.labels.value_counts().to_dict() == {
        "Dropout": 1421,
        "Enrolled": 794,
        "Graduate": 2209,
    }
    assert not table.frame.isna().any(axis=None)
    assert all(table.frame[name].dtype.kind in "if" for name in names)
    assert read_table(as_csv(table.frame, sep=other), "copy").digest == table.digest
    assert not table.synthetic
    meanings = describe_columns(table)["meaning"]
    assert list(meanings.index) == list(table.frame.columns)
    assert meanings.str.len().min() > 10
    assert meanings["Gender"] == "1 male, 0 female"


def test_meanings_are_those_of_both_real_variants_and_no_more(real_data):
    files = [real_data / name for name in ("kaggle_students.csv", "uci697.csv")]
    names = {name for file in files for name in read_table(file.read_bytes(), "real").frame}
    assert names == set(STUDENT_COLUMNS)
    assert len(names) == 37


# --- types of columns --------------------------------------------------------------------------


def numbers_as(written, delimiter):
    rows = [f'"{text}"{delimiter}{label}' for text in written for label in ("high", "low")]
    return "\n".join([f"price{delimiter}Target", *rows]).encode()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("written", "read"),
    [(["1,5", "2,25", "3", "-0,125"], [1.5, 2.25, 3, -0.125]), (["0,125", "0,250"], [0.125, 0.25])],
)
def test_decimal_comma_is_read_whatever_the_delimiter(delimiter, written, read):
    frame = read_table(numbers_as(written, delimiter), "commas").frame
    assert frame["price"].tolist() == [number for number in read for _ in range(2)]


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


@pytest.mark.parametrize(("gaps", "dtype"), [([], "bool"), (slice(None, None, 4), "boolean")])
def test_true_and_false_become_booleans_also_with_gaps(small_frame, gaps, dtype):
    frame = small_frame()
    truth = pd.Series(frame["length"] > 1.5, dtype=object)
    frame["debtor"] = truth.map({True: "true", False: "FALSE"})
    truth.iloc[gaps] = frame.loc[frame.index[gaps], "debtor"] = None
    table = read_table(as_csv(frame), "booleans")
    pd.testing.assert_series_equal(table.frame["debtor"], truth.astype(dtype).rename("debtor"))
    assert "debtor" in table.numeric


@pytest.mark.parametrize("mark", ["", "NA", "NaN", "null", "#N/A"])
def test_missing_values_are_recognised_in_numbers_texts_and_codes(wide, mark):
    table = read_table(as_csv(wide, na_rep=mark), "missing")
    for name in ("nickname", "score"):
        assert table.frame[name].isna().tolist() == wide[name].isna().tolist()
    assert table.frame["score"].dtype == "float64"
    assert table.frame["nickname"].dropna().isin(["Faro", "Lisboa", "Porto"]).all()
    assert "nickname" in table.categorical


# --- roles of columns --------------------------------------------------------------------------


def test_text_columns_are_categories_and_codes_are_where_named(small_frame):
    named = read_table(as_csv(small_frame()), "named", categorical=["course"])
    assert named.categorical == ("city", "course")
    assert named.frame["course"].dtype == "int64"
    assert set(named.numeric) == {"length", "width", "age"}


def test_dropped_columns_are_gone_and_the_students_others_stay_categories():
    codes = {name: [1, 2] for name in STUDENT_CATEGORICAL}
    content = as_csv(pd.DataFrame({**codes, "Debtor": [0, 1], "Target": ["a", "b"]}))
    table = read_table(content, "students", drop=["Debtor", "Course"])
    assert not {"Debtor", "Course"} & set(table.frame)
    assert table.dropped == ("Course", "Debtor")
    assert table.categorical == tuple(n for n in STUDENT_CATEGORICAL if n != "Course")


def test_another_value_gives_another_digest(small_frame):
    frame = small_frame()
    first = read_table(as_csv(frame), "first").digest
    frame.loc[3, "age"] += 1
    assert read_table(as_csv(frame), "second").digest != first


def with_value(name, value, rows=slice(None)):
    def change(frame):
        frame = frame.astype({name: object})
        frame.loc[frame.index[rows], name] = value
        return frame

    return change


UNUSABLE = {
    "close target": (
        lambda frame: frame.rename(columns={"Target": "target"}),
        "'Target' .parameter TARGET.*Did you mean 'target'",
    ),
    "no target": (lambda frame: frame.drop(columns="Target"), "'Target'.*length.*course"),
    "one class": (with_value("Target", "high"), "'Target'.*one class.*'high'"),
    "continuous target": (
        lambda frame: frame.assign(Target=np.linspace(0, 1, len(frame))),
        "'Target'.*150 different",
    ),
    "target missing": (with_value("Target", np.nan, slice(4, 6)), "'Target'.*2 missing.*6, 7"),
    "column all missing": (with_value("width", np.nan), "'width'.*DROP"),
    "text in a number": (with_value("width", "n.a.", slice(9, 10)), "'width'.*'n.a.' .row 11"),
    "infinite": (with_value("length", "inf", slice(3, 4)), "'length'.*infinite"),
    "too large": (with_value("length", "1e999", slice(3, 4)), "'length'"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_column_is_refused_by_name(small_frame, fault):
    change, words = UNUSABLE[fault]
    with pytest.raises(DataError, match=words) as caught:
        read_table(as_csv(change(small_frame())), "bad.csv")
    assert "bad.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"categorical": ["corse"]}, "'corse' .parameter CATEGORICAL.*'course'"),
        ({"drop": ["corse"]}, "'corse' .parameter DROP.*'course'"),
        ({"drop": ["age", "Target"]}, "DROP names 'Target'.*TARGET"),
        ({"drop": ["age", "length", "width", "city", "course"]}, "no column besides the target"),
    ],
)
def test_roles_that_cannot_be_are_refused_naming_the_parameter(small_frame, options, words):
    with pytest.raises(DataError, match=words):
        read_table(as_csv(small_frame()), "bad.csv", **options)


# --- describing --------------------------------------------------------------------------------


def test_description_names_roles_missing_values_and_identifiers(wide):
    wide["id"] = [f"student {number}" for number in wide.index]
    table = read_table(as_csv(wide), "described", categorical=["course"])
    described = describe_columns(table)
    roles = {"course": "category", "Target": "target", "length": "numeric", "city": "category"}
    assert described["role"][list(roles)].to_dict() == roles
    assert described.loc["score", "missing"] == wide["score"].isna().sum()
    assert described.loc["age", "max"] == str(wide["age"].max())
    assert described.loc["city", "max"] == ""
    assert "DROP" in described.loc["id", "remark"]
    assert described.loc["city", "remark"] == ""
    assert "meaning" not in described.columns


def test_students_columns_keep_their_meaning_beside_columns_of_ones_own(small_frame):
    own = small_frame().iloc[:, :2].assign(Target=small_frame()["Target"])
    frame = own.assign(Debtor=own.index % 2, Displaced=own.index % 3)
    meanings = describe_columns(read_table(as_csv(frame), "more"))["meaning"]
    assert meanings["width"] == ""
    assert meanings["Debtor"].startswith("1 owes")


def test_checks_report_duplicates_constants_and_the_majority_class(small_frame):
    frame = small_frame().assign(constant=1)
    frame = pd.concat([frame, frame.head(3)], ignore_index=True)
    findings = check_table(read_table(as_csv(frame), "checked"))["finding"]
    assert findings["duplicate rows"] == "3"
    assert findings["constant columns"] == "constant"
    share = frame["Target"].value_counts().max() / len(frame)
    assert findings["majority class"] == f"{share:.1%} of the rows"
    assert findings["rarest class"].endswith("% of the rows")
    frame.loc[5:, "Target"] = "high"
    rare = check_table(read_table(as_csv(frame), "rare"))["finding"]["rarest class"]
    assert "judge by macro F1" in rare


def test_columns_that_are_not_what_they_seem_get_a_remark_and_others_none(small_frame):
    frame = small_frame()
    days = pd.Timestamp("2024-01-30") + pd.to_timedelta(frame.index % 90, "D")
    frame = frame.assign(
        number=range(1000, 1150),
        copy=frame["Target"].map({"low": 3, "middle": 1, "high": 2}),
        day=days.strftime("%d/%m/%Y"),
        moment=days.strftime("%Y-%m-%d %H:%M"),
        version="1.2 beta",
        same=7,
    )
    remarks = describe_columns(read_table(as_csv(frame), "x"))["remark"]
    assert remarks["number"] == "all values differ: an identifier? (DROP)"
    assert remarks["copy"].startswith("tells Target without fail")
    assert remarks["same"] == remarks["version"] == "constant"
    for name in ("day", "moment"):
        assert "Put month, weekday into columns of their own" in remarks[name]
    assert set(remarks[list(small_frame())]) == {""}


def test_real_students_table_gets_no_remark(real_data):
    for file in ("kaggle_students.csv", "uci697.csv"):
        table = read_table((real_data / file).read_bytes(), file)
        assert set(describe_columns(table)["remark"]) == {""}


def test_of_many_columns_the_target_remarks_and_the_most_telling_are_described(small_frame, capsys):
    noise = np.random.default_rng(0).normal(size=(150, 200)).round(3)
    many = pd.DataFrame(noise).add_prefix("noise ").join(small_frame()).assign(same=1)
    described = describe_columns(read_table(as_csv(many), "wide"))
    assert list(described.index[:4]) == ["Target", "same", "length", "width"]
    assert len(described) == 60
    assert "207 columns: those with a remark" in capsys.readouterr().out


def test_table_whose_features_are_all_constant_is_refused(small_frame):
    frame = small_frame()[["Target"]].assign(a=1, b="x")
    with pytest.raises(DataError, match="All features of x are constant"):
        split_table(read_table(as_csv(frame), "x"))
