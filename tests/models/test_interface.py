"""The logged models as clients use them: what they take, what they answer, what they refuse."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from sklearn.metrics import accuracy_score, roc_auc_score

from helpers import data, tracking
from helpers.models.interface import convert
from tests.conftest import split_table
from tests.models.conftest import LOGGERS, log
from tests.scoring import fit_svm


def probabilities(answer):
    return answer.filter(like="probability_").to_numpy()


def same_answer(one, two):
    np.testing.assert_allclose(probabilities(one), probabilities(two), atol=1e-6)
    assert one["prediction"].tolist() == two["prediction"].tolist()


def test_answer_has_prediction_and_one_probability_per_class(logged, small_split):
    answer = logged.model.predict(small_split.X_test)
    labels = ["high", "low", "middle"]
    assert list(answer.columns) == ["prediction", *(f"probability_{label}" for label in labels)]
    assert len(answer) == len(small_split.X_test)
    values = probabilities(answer)
    assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-9)
    winners = np.array(labels)[values.argmax(axis=1)]
    assert answer["prediction"].tolist() == winners.tolist()
    assert len(set(winners)) == 3


def test_answer_does_not_depend_on_the_order_of_columns_or_rows(logged, small_split):
    X = small_split.X_test
    answer = logged.model.predict(X)
    same_answer(logged.model.predict(X[X.columns[::-1]]), answer)
    same_answer(logged.model.predict(X.iloc[::-1]).iloc[::-1], answer)
    one_by_one = pd.concat([logged.model.predict(X.iloc[[row]]) for row in range(5)])
    same_answer(one_by_one, answer.head(5))


def test_integers_and_floats_get_the_same_answer(logged, small_split):
    X = small_split.X_test.round({"length": 0, "width": 0})
    whole = X.astype({"length": "int64", "width": "int32", "age": "int64", "course": "int16"})
    broken = X.astype({"age": "float64", "course": "float32"})
    same_answer(logged.model.predict(whole), logged.model.predict(broken))
    objects = X.astype({"age": object, "course": object})
    same_answer(logged.model.predict(objects), logged.model.predict(broken))


@pytest.mark.parametrize(("column", "value"), [("city", "Atlantis"), ("course", 123456)])
def test_category_never_seen_is_answered(logged, small_split, column, value):
    answer = logged.model.predict(small_split.X_test.assign(**{column: value}))
    assert answer.notna().all(axis=None)
    np.testing.assert_allclose(probabilities(answer).sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize("column", ["length", "age", "city", "course"])
def test_missing_column_is_refused_by_name(logged, small_split, column):
    with pytest.raises(MlflowException, match=column):
        logged.model.predict(small_split.X_test.drop(columns=column))


@pytest.mark.parametrize(
    ("column", "value"), [("length", "long"), ("age", "40"), ("course", "law"), ("city", 5.5)]
)
def test_wrong_type_is_refused_by_name(logged, small_split, column, value):
    rows = small_split.X_test.head(4).astype({column: object})
    rows.iloc[2, rows.columns.get_loc(column)] = value
    with pytest.raises(MlflowException, match=f"'{column}'.*{value!r}"):
        logged.model.predict(rows)


def test_column_that_the_model_does_not_know_is_ignored(logged, small_split):
    X = small_split.X_test
    more = X.assign(Target="high", **{"something else": 1.5})
    same_answer(logged.model.predict(more), logged.model.predict(X))


@pytest.mark.parametrize("column", ["length", "age", "city", "course"])
@pytest.mark.parametrize("rows", [1, 20])
def test_missing_value_is_answered(logged, small_split, column, rows):
    X = small_split.X_test.head(rows).assign(**{column: None if column == "city" else np.nan})
    answer = logged.model.predict(X)
    assert len(answer) == rows
    assert answer.notna().all(axis=None)


def test_no_rows_give_no_rows_with_the_right_columns(logged, small_split):
    answer = logged.model.predict(small_split.X_test.head(0))
    assert answer.shape == (0, 4)
    assert list(answer.columns) == list(logged.model.predict(small_split.X_test.head(1)).columns)


def test_answer_keeps_the_index_of_the_rows(logged, small_split):
    for index in ([777, 5, 6], ["a", "b", "c"]):
        rows = small_split.X_test.head(3).set_axis(index)
        assert logged.model.predict(rows).index.tolist() == index


def test_rows_as_they_come_from_a_csv_are_answered(logged, small_split, tmp_path):
    path = tmp_path / "rows.csv"
    small_split.X_test.to_csv(path, index=False)
    answer = logged.model.predict(pd.read_csv(path))
    same_answer(answer, logged.model.predict(small_split.X_test))


def test_answering_leaves_the_clients_rows_as_they_were(logged, small_split):
    rows = small_split.X_test.copy()
    logged.model.predict(rows)
    pd.testing.assert_frame_equal(rows, small_split.X_test)


def test_larger_values_move_the_answer_to_the_higher_class(logged, small_split):
    rows = small_split.X_test.assign(course=171, city="Lisboa", age=30)
    low = probabilities(logged.model.predict(rows.assign(length=-1.0, width=14.0)))
    high = probabilities(logged.model.predict(rows.assign(length=4.0, width=2.0)))
    assert (high[:, 0] > low[:, 0]).all()
    assert (high[:, 1] < low[:, 1]).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, 10**400])
def test_number_that_is_not_finite_is_refused_by_name(small_split, value):
    rows = small_split.X_test.head(2).astype({"age": object})
    rows.iloc[0, rows.columns.get_loc("age")] = value
    with pytest.raises(MlflowException, match="'age'.*finite"):
        convert(rows, tracking.column_kinds(small_split.X_train))


def test_column_that_is_there_twice_is_refused_by_name(small_split):
    rows = small_split.X_test.head(2)
    rows = pd.concat([rows, rows[["age"]]], axis=1)
    with pytest.raises(MlflowException, match="'age' is there more than once"):
        convert(rows, tracking.column_kinds(small_split.X_train))


CLIENT = """
import importlib.util, json, sys
import mlflow, pandas as pd
assert importlib.util.find_spec("helpers") is None
answer = mlflow.pyfunc.load_model("model").predict(pd.read_csv("rows.csv"))
assert "helpers" not in sys.modules
print(json.dumps(answer.to_dict("list")))
"""


def answer_elsewhere(logged, split, folder, python=sys.executable, code=CLIENT):
    """Ask a model in another process, in a folder with nothing but the model and rows."""
    split.X_test.to_csv(folder / "rows.csv", index=False)
    shutil.copytree(logged.folder, folder / "model")
    done = subprocess.run(
        [python, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/x.db"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_model_answers_in_a_process_that_knows_nothing_of_the_project(
    logged, small_split, tmp_path
):
    answer = answer_elsewhere(logged, small_split, tmp_path)
    same_answer(answer, logged.model.predict(small_split.X_test))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("uv") is None, reason="needs uv")
def test_network_answers_where_only_its_requirements_are_installed(logged, small_split, tmp_path):
    if logged.kind != "network":
        pytest.skip("one model is enough")
    requirements = logged.folder / "requirements.txt"
    assert "tensorflow" not in requirements.read_text(encoding="utf-8")
    python = tmp_path / "env" / "bin" / "python"
    for command in (
        ["venv", "--python", sys.executable, str(tmp_path / "env")],
        ["pip", "install", "--python", str(python), "-r", str(requirements)],
    ):
        subprocess.run([sys.executable, "-m", "uv", *command], check=True, capture_output=True)
    code = f"{CLIENT}assert importlib.util.find_spec('tensorflow') is None\n"
    answer = answer_elsewhere(logged, small_split, tmp_path, python, code)
    same_answer(answer, logged.model.predict(small_split.X_test))


@pytest.fixture(scope="module")
def mixed_split(small_frame):
    """Two integer labels, booleans, missing texts, numbers and booleans, and a code."""
    frame = small_frame(seed=4)
    frame["Target"] = (frame["Target"] == "high").astype(int)
    frame["debtor"] = np.where(frame["width"] > 7, "True", "False")
    frame["paid"] = frame["debtor"].where(frame.index % 4 != 0)
    frame["city"] = frame["city"].where(frame.index % 6 != 0)
    frame["width"] = frame["width"].where(frame.index % 5 != 0)
    table = data.read_table(frame.to_csv(index=False).encode(), "mixed", categorical=["course"])
    return split_table(table)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOGGERS)
def test_table_with_booleans_missing_values_and_integer_labels_gives_a_model(
    kind, mixed_split, tracking_server, tmp_path
):
    made = log(kind, mixed_split, tmp_path)
    model, metrics = made.model, made.run.data.metrics
    answer = model.predict(mixed_split.X_test)
    assert list(answer.columns) == ["prediction", "probability_0", "probability_1"]
    assert answer["prediction"].dtype == "int64"
    assert metrics["accuracy"] == accuracy_score(mixed_split.y_test, answer["prediction"])
    assert metrics["roc_auc_ovr"] == pytest.approx(
        roc_auc_score(mixed_split.y_test, answer["probability_1"])
    )
    texts = mixed_split.X_test.assign(debtor=mixed_split.X_test["debtor"].map(str))
    numbers = mixed_split.X_test.assign(debtor=mixed_split.X_test["debtor"].astype(int))
    for rows in (texts, numbers):
        np.testing.assert_allclose(model.predict(rows)["probability_1"], answer["probability_1"])
    with pytest.raises(MlflowException, match="'debtor'"):
        model.predict(mixed_split.X_test.assign(debtor="perhaps"))


@pytest.fixture(scope="module")
def untidy(small_frame, running_server, tmp_path_factory):
    """A CSV whose rows pandas reads with other types and names than training, and its model."""
    frame = small_frame(seed=4)
    frame["paid"] = np.where(frame["width"] > 7, "True", "False")
    frame.loc[::4, "paid"] = None
    frame["code"] = np.where(frame["length"] > 1.5, "2", "3")
    frame.loc[::10, "code"] = "A1"
    frame.loc[5::10, "code"] = None
    frame = frame.rename(columns={"age": "age\t"})
    folder = tmp_path_factory.mktemp("untidy")
    frame.to_csv(folder / "untidy.csv", sep=";", index=False)
    table = data.read_table((folder / "untidy.csv").read_bytes(), "untidy", categorical=["code"])
    split = split_table(table)
    running_server.connect()
    model = log("svm", split, folder).model
    preprocessing, classifier = fit_svm(split)
    rows = table.frame.drop(columns="Target")
    expected = classifier.predict_proba(preprocessing.transform(rows))
    return SimpleNamespace(path=folder / "untidy.csv", model=model, expected=expected)


def test_file_of_the_training_rows_gets_the_answers_of_the_fitted_classifier(untidy):
    rows = pd.read_csv(untidy.path, sep=";")
    assert rows["paid"].isna().any()
    assert True in set(rows["paid"])
    answer = untidy.model.predict(rows)
    np.testing.assert_allclose(probabilities(answer), untidy.expected, atol=1e-9)


@pytest.mark.parametrize("gaps", [True, False])
def test_codes_that_pandas_reads_as_numbers_are_the_texts_of_training(untidy, gaps, tmp_path):
    rows = pd.read_csv(untidy.path, sep=";")
    rows = rows[rows["code"].isin(["2", "3"]) | (rows["code"].isna() & gaps)]
    rows.to_csv(tmp_path / "batch.csv", index=False)
    batch = pd.read_csv(tmp_path / "batch.csv")
    assert batch["code"].dtype == ("float64" if gaps else "int64")
    answer = untidy.model.predict(batch)
    np.testing.assert_allclose(probabilities(answer), untidy.expected[rows.index], atol=1e-9)
    with pytest.raises(MlflowException, match="'code'.*texts.*2.5"):
        untidy.model.predict(batch.assign(code=2.5))
    with pytest.raises(MlflowException, match="'code'.*texts.*True"):
        untidy.model.predict(batch.assign(code=True))


def test_column_may_come_with_the_blanks_that_training_removed_or_without(untidy):
    rows = pd.read_csv(untidy.path, sep=";")
    assert "age\t" in rows
    clean = rows.rename(columns=str.strip)
    same_answer(untidy.model.predict(rows), untidy.model.predict(clean))
    both = clean.assign(**{"age\t": -1})
    same_answer(untidy.model.predict(both), untidy.model.predict(clean))
    for few in (rows.drop(columns="age\t"), rows.drop(columns="length")):
        with pytest.raises(MlflowException, match="missing inputs"):
            untidy.model.predict(few)
