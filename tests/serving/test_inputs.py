import json
import os

import numpy as np
import pytest

from helpers.serving import inputs
from tests.scoring import NETWORK, SVM, assert_same, post


def as_forms(rows):
    """Write rows in every form of MLflow's protocol, with their content types."""
    split = json.loads(rows.to_json(orient="split", index=False))
    forms = {
        "dataframe_split": {"dataframe_split": split},
        "dataframe_records": {"dataframe_records": rows.to_dict("records")},
        "instances by name": {"instances": rows.to_dict("records")},
        "instances by position": {"instances": rows.to_numpy(object).tolist()},
        "inputs": {"inputs": rows.to_dict("list")},
        "inputs of one row": {"inputs": rows.head(1).to_dict("records")[0]},
    }
    forms = {
        form: (json.dumps(content, default=float), "application/json")
        for form, content in forms.items()
    }
    forms["csv"] = rows.to_csv(index=False), "text/csv; charset=utf-8"
    forms["csv with semicolons"] = rows.to_csv(index=False, sep=";"), "text/csv"
    return forms


@pytest.mark.parametrize("model", [NETWORK, SVM])
def test_every_form_gets_the_answer_of_the_loaded_model(served, local_models, model):
    rows = served.split.X_test.head(20)
    for form, (body, kind) in as_forms(rows).items():
        answer = post(served.client, body, model, kind)
        assert answer.status_code == 200, (form, answer.text)
        asked = rows.head(1) if form == "inputs of one row" else rows
        assert_same(answer.json()["predictions"], local_models[model].predict(asked))


def test_texts_of_a_csv_that_look_like_numbers_stay_texts(loaded_svm):
    body = b"length,width,age,city,course\n1,2,30,007,33\n"
    (frame,) = inputs.parse(body, "text/csv", loaded_svm.columns)
    assert frame["city"].tolist() == ["007"]
    assert frame["course"].tolist() == [33]


# --- what cannot be answered -------------------------------------------------------------------

BAD_JSON = {
    "empty body": (b"", "not JSON"),
    "cut off": (b'{"instances": [', "not JSON"),
    "not UTF-8": (b'{"instances": "\xff"}', "not JSON"),
    "no form": (b'{"rows": []}', "exactly one of"),
    "a list": (b"[1, 2]", "exactly one of"),
    "two forms": (b'{"inputs": [], "instances": []}', "exactly one of"),
    "nested": (b"[" * 100_000, "nested"),
    "10 MB of garbage": (os.urandom(10_000_000), "not JSON"),
    "10 MB of brackets": (b"[" * 10_000_000, "nested"),
    "numbers": (b'{"instances": [1, 2]}', "Row 0 has no list"),
    "a number": (b'{"inputs": 1}', "rows, or lists by column"),
    "short row": (b'{"instances": [[1, 2]]}', "2 values"),
    "uneven columns": (b'{"inputs": {"a": [1], "b": [1, 2]}}', "different numbers"),
    "no data": (b'{"dataframe_split": {"columns": []}}', "'data'"),
    "odd names": (b'{"dataframe_split": {"columns": [[]], "data": [[1]]}}', "must be texts"),
    "a text": (b'{"dataframe_records": "rows"}', "list of objects"),
    "rows without names": (b'{"dataframe_records": [[1, 2]]}', "list of objects"),
    "column twice": (
        b'{"dataframe_split": {"columns": ["age", "age"], "data": [[1, 2]]}}',
        "'age' is there more than once",
    ),
    "missing column": (
        b'{"dataframe_records": [{"length": 1, "width": 2}]}',
        "missing inputs ['age', 'city', 'course']",
    ),
}
BAD_CSV = {
    "10 MB of a CSV": (os.urandom(10_000_000), "not UTF-8"),
    "10 MB of letters": (b"x" * 10_000_000, "cannot be read"),
    "10 MB of lines": (b"x\n" * 5_000_000, "missing inputs"),
    "empty CSV": (b"", "empty"),
    "CSV of wider rows": (b"length,width\n1,2,3\n", "more fields"),
}
BAD = {
    **{case: (body, "application/json", 400, said) for case, (body, said) in BAD_JSON.items()},
    **{case: (body, "text/csv", 400, said) for case, (body, said) in BAD_CSV.items()},
    "too much": (b"x" * (65 * 2**20), "application/json", 413, "64 MB"),
    "no type": (b"{}", "", 415, "Content-Type"),
    "other type": (b"{}", "application/xml", 415, "application/xml"),
}


@pytest.mark.parametrize("case", BAD)
def test_request_that_cannot_be_answered_says_why(served, case):
    body, kind, status, message = BAD[case]
    answer = post(served.client, body, SVM, kind)
    assert answer.status_code == status
    assert message in answer.json()["message"]
    assert "Traceback" not in answer.text
    assert len(answer.text) < 2000


def test_compressed_request_is_refused(served):
    answer = post(served.client, b"{}", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "Compressed" in answer.json()["message"]


def changed(rows, **columns):
    records = rows.to_dict("records")
    records[0].update(columns)
    return json.dumps({"dataframe_records": records}, default=float)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("age", "old", "'age'"),
        ("age", [1], "'age'"),
        ("age", {"years": 1}, "'age'"),
        ("age", np.inf, "finite"),
        ("age", 10**400, "finite"),
        ("city", 1.5, "'city'"),
        ("city", True, "'city'"),
    ],
)
def test_wrong_type_names_the_column(served, column, value, message):
    answer = post(served.client, changed(served.split.X_test.head(2), **{column: value}))
    assert answer.status_code == 400
    assert message in answer.json()["message"]


@pytest.mark.parametrize("model", [NETWORK, SVM])
def test_gaps_unseen_categories_and_extra_columns_are_answered(served, model):
    rows = served.split.X_test.head(2)
    plain = post(served.client, changed(rows), model).json()["predictions"]
    extra = post(served.client, changed(rows, name="Ana", number=7), model)
    assert extra.json()["predictions"] == plain
    gaps = {"age": None, "length": np.nan, "city": "Évora", "course": 1}
    for column, value in gaps.items():
        answer = post(served.client, changed(rows, **{column: value}), model)
        assert answer.status_code == 200
        first, second = answer.json()["predictions"]
        assert second == pytest.approx(plain[1])
        assert sum(v for k, v in first.items() if k != "prediction") == pytest.approx(1)


@pytest.mark.parametrize(
    "body",
    [
        '{"instances": []}',
        '{"dataframe_records": []}',
        '{"dataframe_split": {"columns": [], "data": []}}',
    ],
)
def test_no_rows_get_an_empty_answer(served, body):
    answer = post(served.client, body)
    assert (answer.status_code, answer.json()) == (200, {"predictions": []})
