import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    StandardScaler,
)
from sklearn.utils.estimator_checks import check_estimator

from helpers import data, tracking
from helpers.models import cnn
from helpers.models.evaluation import compute_metrics
from helpers.models.interface import TabularPreprocessor, convert
from helpers.server import credentials
from helpers.workspace import PROJECT_ROOT, ParameterError, open_workspace
from tests.cells import train_network
from tests.conftest import split_table
from tests.scoring import fit_svm

QUICK = {"EPOCHS": 4, "BATCH_SIZE": 16, "FILTERS": 8, "steps": 200}
LONGER = {**QUICK, "steps": 600}


# --- preprocessing ----------------------------------------------------------------------------


def reference(split):
    """Return the same preprocessing made of scikit-learn's parts."""
    encoder = OneHotEncoder(
        min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    numbers = make_pipeline(
        SimpleImputer(strategy="median"),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -2, "a_max": 2}),
    )
    return ColumnTransformer(
        [
            ("numeric", numbers, list(split.numeric)),
            ("categorical", encoder, list(split.categorical)),
        ]
    )


def odd_rows(split):
    """Return test rows with gaps, unseen levels and extreme numbers in them."""
    rows = split.X_test.copy()
    for number, name in enumerate(rows.columns):
        if rows[name].dtype.kind in "if":
            rows[name] = rows[name].astype("float64")
            rows.iloc[number, number] = np.nan
            rows.iloc[number + 10, number] = -1e12
        else:
            rows.iloc[number, number] = None
            rows.iloc[number + 10, number] = "Évora"
    return rows


@pytest.mark.parametrize("n_bins", [0, 8])
@pytest.mark.filterwarnings("ignore")
def test_preprocessing_passes_the_checks_of_scikit_learn(n_bins):
    check_estimator(TabularPreprocessor(n_bins=n_bins))


@pytest.mark.parametrize("n_rows", [1, 45, 450])
def test_preprocessing_gives_what_the_parts_of_scikit_learn_give(small_split, n_rows):
    own = TabularPreprocessor(small_split.categorical).fit(small_split.X_train)
    fitted = reference(small_split).fit(small_split.X_train)
    rows = pd.concat([odd_rows(small_split)] * 10, ignore_index=True).head(n_rows)
    np.testing.assert_allclose(own.transform(rows), fitted.transform(rows), rtol=0, atol=1e-12)
    assert len(own.get_feature_names_out()) == fitted.transform(rows).shape[1]


def test_preprocessing_learns_from_gaps_rare_levels_and_pandas_own_types(small_frame):
    frame = small_frame(rows=300, seed=2).drop(columns="Target")
    frame.loc[::7, "city"] = None
    frame.loc[1:9, "city"] = "Évora"
    frame.loc[::5, "width"] = np.nan
    frame["paid"] = frame["length"] > 1
    roles = SimpleNamespace(
        categorical=["city", "course"], numeric=["length", "width", "age", "paid"]
    )
    own = TabularPreprocessor(roles.categorical)
    expected = reference(roles).fit_transform(frame)
    np.testing.assert_allclose(own.fit_transform(frame), expected, rtol=0, atol=1e-12)
    names = ["city_Faro", "city_Lisboa", "city_Porto", "city_None", "city_other"]
    assert own.get_feature_names_out()[4:9].tolist() == names
    np.testing.assert_array_equal(own.fit_transform(frame.convert_dtypes()), own.transform(frame))


@pytest.mark.parametrize("n_bins", [0, 8])
def test_preprocessing_comes_back_from_json(small_split, n_bins):
    own = TabularPreprocessor(small_split.categorical, n_bins).fit(small_split.X_train)
    again = TabularPreprocessor.from_dict(json.loads(json.dumps(own.to_dict())))
    rows = odd_rows(small_split)
    np.testing.assert_array_equal(own.transform(rows), again.transform(rows))
    assert own.get_feature_names_out().tolist() == again.get_feature_names_out().tolist()


def test_codes_of_a_number_fill_one_after_the_other_between_its_quantiles():
    own = TabularPreprocessor(n_bins=4).fit(np.arange(101.0)[:, None])
    assert own.get_feature_names_out().tolist() == ["x0", *(f"x0_bin{n}" for n in range(1, 5))]
    codes = own.transform([[-9.0], [0.0], [25.0], [60.0], [100.0], [999.0]])[:, 1:]
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0.4, 0], [1] * 4, [1] * 4]
    np.testing.assert_allclose(codes, expected, atol=1e-12)
    few = TabularPreprocessor(n_bins=4).fit(np.repeat([0.0, 1.0], [80, 20])[:, None])
    assert few.transform([[0.5]]).shape == (1, 2)


def test_columns_that_say_nothing_give_finite_inputs():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "constant": np.full(300, 7.0),
            "empty": np.full(300, np.nan),
            "number": random.normal(size=300),
            "different": [f"level {number}" for number in range(300)],
        }
    )
    own = TabularPreprocessor(["different"], n_bins=8)
    inputs = own.fit_transform(frame)
    assert np.isfinite(inputs).all()
    assert own.get_feature_names_out()[[0, 1, 2, -1]].tolist() == [
        "constant",
        "empty",
        "number",
        "different_other",
    ]
    assert np.ptp(inputs[:, [0, 1, -1]], axis=0).tolist() == [0, 0, 0]
    many = pd.DataFrame({"different": [f"level {number % 10_000}" for number in range(20_000)]})
    assert TabularPreprocessor(["different"]).fit_transform(many).shape == (20_000, 1)
    assert TabularPreprocessor(["different"], min_frequency=1).fit(many).levels_[0][0] == "level 0"


@pytest.mark.parametrize(
    ("values", "categorical", "message"),
    [
        ([1.0, "two"], (), "'column' has texts"),
        ([1.0, np.inf], (), "'column' has infinite numbers"),
        ([1.0, 2.0], ["colour"], "no categorical column 'colour'"),
    ],
)
def test_table_that_cannot_be_preprocessed_is_refused_by_column(values, categorical, message):
    frame = pd.DataFrame({"column": pd.Series(values * 9)})
    with pytest.raises(ValueError, match=message):
        TabularPreprocessor(categorical).fit(frame)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 10**400])
def test_number_that_is_not_finite_is_refused_by_name(small_split, value):
    columns = tracking.column_kinds(small_split.X_train)
    rows = small_split.X_test.head(2).astype({"age": object})
    rows.iloc[0, rows.columns.get_loc("age")] = value
    with pytest.raises(MlflowException, match="'age'.*finite"):
        convert(rows, columns)


def test_column_that_is_there_twice_is_refused_by_name(small_split):
    columns = tracking.column_kinds(small_split.X_train)
    rows = small_split.X_test.head(2)
    rows = pd.concat([rows, rows[["age"]]], axis=1)
    with pytest.raises(MlflowException, match="'age' is there more than once"):
        convert(rows, columns)


# --- the network and its training --------------------------------------------------------------


def test_network_is_the_documented_one(small_split, workspace, tracking_server):
    made = train_network(small_split, workspace, **QUICK, KERNEL_SIZE=5)
    assert [type(layer) for layer in made.network.layers] == [
        keras.layers.Reshape,
        keras.layers.Conv1D,
        keras.layers.MaxPooling1D,
        keras.layers.Flatten,
        keras.layers.Dense,
    ]
    assert made.network.layers[0].output.shape == (None, made.X_train.shape[1], 1)
    assert made.network.layers[1].activation is keras.activations.relu
    assert made.network.layers[4].activation is keras.activations.softmax
    table = cnn.history_table(made.history)
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} == set(table.columns)
    assert table.index[0] == 1
    assert len(table) == made.epochs
    assert not list(workspace.training.rglob("*.h5"))


def test_same_seed_gives_the_same_network(small_split, workspace, tracking_server):
    first, again = (train_network(small_split, workspace, **QUICK) for _ in range(2))
    assert first.history.history == again.history.history
    for one, two in zip(first.network.get_weights(), again.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_test_rows_have_no_part_in_training(small_split, workspace, tracking_server):
    spoilt = small_split.X_test.assign(length=1e6, width=-1e6, age=10**6, city="nowhere")
    changed = replace(small_split, X_test=spoilt, y_test=small_split.y_test[::-1])
    first, second = (train_network(split, workspace, **QUICK) for split in (small_split, changed))
    for one, two in zip(first.network.get_weights(), second.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("n_inputs", [1, 2, 3])
def test_network_takes_tables_with_very_few_inputs(
    small_split, workspace, tracking_server, n_inputs
):
    names = ["length", "width", "age"][:n_inputs]
    manifest = {**small_split.manifest, "categorical": [], "numeric": names}
    split = replace(
        small_split,
        X_train=small_split.X_train[names],
        X_test=small_split.X_test[names],
        manifest=manifest,
    )
    made = train_network(split, workspace, **QUICK, N_BINS=0)
    params = mlflow.get_run(made.run.info.run_id).data.params
    sizes = {"n_inputs": n_inputs, "kernel_size": n_inputs, "pool_size": 1}
    assert {name: int(params[name]) for name in sizes} == sizes


def test_small_table_gets_enough_steps():
    assert cnn.epochs_for(3096, 30, 64) == 30
    assert cnn.epochs_for(105, 30, 64) == 300
    assert cnn.epochs_for(5, 1000, 64) == 1000


def test_class_weights_average_one_over_the_rows_and_favour_small_classes():
    targets = np.repeat([0, 1, 2], [70, 20, 10])
    for power in (0.0, 0.3, 1.0):
        weights = cnn.class_weights(targets, power)
        assert np.mean([weights[target] for target in targets]) == pytest.approx(1)
    assert set(cnn.class_weights(targets, 0.0).values()) == {1.0}
    mild, full = cnn.class_weights(targets, 0.3), cnn.class_weights(targets, 1.0)
    assert mild[0] < mild[1] < mild[2]
    assert full[2] / full[0] == pytest.approx(7)
    assert mild[2] / mild[0] == pytest.approx(7**0.3)


def test_network_larger_than_memory_is_refused_by_name():
    cnn.check_memory(200, 3, 32, 9, 64)
    with pytest.raises(ParameterError, match=r"FILTERS = 10000000.*GiB.*Make FILTERS"):
        cnn.check_memory(200, 3, 10**7, 9, 64)


class _PulledPlugError(Exception):
    """Stands for a machine that disappears."""


def test_interrupted_training_goes_on_but_only_with_the_same_settings(
    small_split, workspace, tracking_server, monkeypatch
):
    class Pulled(cnn.LogToMlflow):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            if epoch == 40:
                raise _PulledPlugError

    with monkeypatch.context() as patch, pytest.raises(_PulledPlugError):
        patch.setattr(cnn, "LogToMlflow", Pulled)
        train_network(small_split, workspace, **LONGER)
    first = {}
    for seed in (1, 0):
        made = train_network(small_split, workspace, **LONGER, SEED=seed)
        losses = mlflow.MlflowClient().get_metric_history(made.run.info.run_id, "train_loss")
        first[seed] = losses[0].step
        assert losses[-1].step == made.epochs
    assert first[1] == 1
    assert 20 < first[0] <= 41
    other = replace(small_split, manifest={**small_split.manifest, "split_digest": "another"})
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    folders = {
        cnn.backup_folder(workspace.training, each, network, seed=0)
        for each in (small_split, other)
    }
    assert len(folders) == 2


def test_network_that_answers_otherwise_once_converted_is_not_logged(
    small_split, workspace, tracking_server, monkeypatch
):
    convert = cnn.to_litert

    def spoilt(network):
        other = keras.models.clone_model(network)
        return convert(other)

    monkeypatch.setattr(cnn, "to_litert", spoilt)
    with pytest.raises(tracking.ModelError, match="answers otherwise"):
        train_network(small_split, workspace, **QUICK)


# --- the model interface -----------------------------------------------------------------------


def log_network(split, folder):
    """Do what notebook 02 does."""
    made = train_network(split, open_workspace(folder), **QUICK)
    return made.run, made.model_info, made.metrics


def log_svm(split, folder):
    """Do what notebook 03 does, without the search."""
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        tracking.log_split(split)
        info = tracking.log_model(split, *fit_svm(split))
        metrics, _ = tracking.evaluate_logged_model(info, split)
    return run, info, metrics


LOGGERS = {"network": log_network, "svm": log_svm}


@pytest.fixture(scope="module", params=LOGGERS)
def logged(request, running_server, small_split, tmp_path_factory):
    """A model as its notebook logs it, loaded back from the server as a client does."""
    running_server.connect()
    folder = tmp_path_factory.mktemp(request.param)
    run, info, metrics = LOGGERS[request.param](small_split, folder / "ws")
    return SimpleNamespace(
        kind=request.param,
        run=mlflow.get_run(run.info.run_id),
        metrics=metrics,
        uri=info.model_uri,
        model=mlflow.pyfunc.load_model(info.model_uri),
        folder=Path(mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(folder))),
    )


def probabilities(answer, labels=("high", "low", "middle")):
    return answer[[f"probability_{label}" for label in labels]].to_numpy()


def same_answer(one, two):
    np.testing.assert_allclose(probabilities(one), probabilities(two), atol=1e-6)
    assert one["prediction"].tolist() == two["prediction"].tolist()


def test_answer_has_prediction_and_one_probability_per_class(logged, small_split):
    answer = logged.model.predict(small_split.X_test)
    assert list(answer.columns) == [
        "prediction",
        "probability_high",
        "probability_low",
        "probability_middle",
    ]
    assert len(answer) == len(small_split.X_test)
    values = probabilities(answer)
    assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-9)
    winners = np.array(["high", "low", "middle"])[values.argmax(axis=1)]
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
    answer = logged.model.predict(small_split.X_test)
    assert answer.index.tolist() == small_split.X_test.index.tolist()
    one = small_split.X_test.iloc[[3]].set_axis([777])
    alone = logged.model.predict(one)
    assert alone.index.tolist() == [777]
    same_answer(alone, answer.iloc[[3]])
    named = small_split.X_test.head(3).set_axis(["a", "b", "c"])
    assert logged.model.predict(named).index.tolist() == ["a", "b", "c"]


def test_rows_as_they_come_from_a_csv_are_answered(logged, small_split, tmp_path):
    path = tmp_path / "rows.csv"
    small_split.X_test.to_csv(path, index=False)
    same_answer(
        logged.model.predict(pd.read_csv(path)),
        logged.model.predict(small_split.X_test),
    )


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


# --- what is logged ----------------------------------------------------------------------------


def test_logged_metrics_are_those_of_the_model_loaded_back(logged, small_split):
    answer, y = logged.model.predict(small_split.X_test), small_split.y_test
    guess, chances = answer["prediction"], probabilities(answer)
    expected = {
        "accuracy": accuracy_score(y, guess),
        "log_loss": log_loss(y, chances),
        "roc_auc_ovr": roc_auc_score(y, chances, multi_class="ovr"),
    }
    scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    for name, score in scores.items():
        for average in ("micro", "macro"):
            expected[f"{name}_{average}"] = score(y, guess, average=average, zero_division=0)
        each = score(y, guess, average=None, labels=small_split.labels, zero_division=0)
        expected |= {
            f"{name}_{label}": value for label, value in zip(small_split.labels, each, strict=True)
        }
    assert logged.metrics == pytest.approx(expected, abs=1e-6)
    stored = {name: logged.run.data.metrics[name] for name in expected}
    assert stored == pytest.approx(expected, abs=1e-6)
    assert expected["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["macro", "micro", "other"], ["macro_2", "micro_2", "other"]),
        (["A*", "A+", "B"], ["A_", "A__2", "B"]),
        (["A*", "A+", "A__2"], ["A_", "A__2", "A__2_2"]),
    ],
)
def test_metrics_of_classes_overwrite_neither_averages_nor_each_other(labels, names):
    truth = np.array(labels)[[0, 0, 0, 0, 1, 1, 1, 2, 2]]
    guess = np.array(labels)[[0, 0, 0, 1, 1, 2, 2, 2, 0]]
    answer = pd.DataFrame({"prediction": guess})
    for label in labels:
        answer[f"probability_{label}"] = np.where(guess == label, 0.8, 0.1)
    metrics = compute_metrics(truth, answer, labels)
    for score, function in {"f1": f1_score, "recall": recall_score}.items():
        for average in ("micro", "macro"):
            assert metrics[f"{score}_{average}"] == function(truth, guess, average=average)
        each = function(truth, guess, average=None, labels=labels)
        assert [metrics[f"{score}_{name}"] for name in names] == each.tolist()


def test_empty_tracking_uri_names_no_server(tracking_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv(tracking.USER, raising=False)
    assert tracking.connect(tracking_server.workspace, keep=False) == tracking_server.url
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ[tracking.USER] == credentials.NOTEBOOKS


def test_run_says_what_it_ran_on(logged):
    tags = logged.run.data.tags
    assert tags["python"] == platform.python_version()
    assert tags["platform"] == platform.platform()
    assert int(tags["cores"]) == os.cpu_count()
    assert tags["runtime"] == "local"


def test_run_says_what_it_was_trained_on_and_holds_the_documented_files(logged, small_split):
    tags = logged.run.data.tags
    assert tags["data_digest"] == small_split.manifest["digest"]
    assert tags["split_digest"] == small_split.manifest["split_digest"]
    assert tags["data_source"] == small_split.manifest["source"]
    assert tags["synthetic_data"] == "false"
    assert logged.run.info.status == "FINISHED"
    files = {path.name for path in logged.folder.iterdir()}
    assert {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"} <= files
    picture = mlflow.artifacts.download_artifacts(
        f"runs:/{logged.run.info.run_id}/confusion_matrix/confusion_matrix.png"
    )
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_logged_parameters_are_those_of_the_logged_model(logged):
    params = logged.run.data.params
    (parts,) = {path.parent for path in logged.folder.rglob("interface.json")}
    if logged.kind == "network":
        network = keras.saving.load_model(parts / "network.keras")
        assert int(params["n_parameters"]) == network.count_params()
        assert int(params["filters"]) == network.layers[1].filters
        assert int(params["kernel_size"]) == network.layers[1].kernel_size[0]


CLIENT = """
import importlib.util, json, sys
import mlflow, pandas as pd
assert importlib.util.find_spec("helpers") is None
answer = mlflow.pyfunc.load_model("model").predict(pd.read_csv("rows.csv"))
assert "helpers" not in sys.modules
print(json.dumps(answer.to_dict("list")))
"""


@pytest.mark.slow
def test_model_answers_in_a_process_that_knows_nothing_of_the_project(
    logged, small_split, tmp_path
):
    small_split.X_test.to_csv(tmp_path / "rows.csv", index=False)
    shutil.copytree(logged.folder, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/x.db"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
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
    small_split.X_test.to_csv(tmp_path / "rows.csv", index=False)
    shutil.copytree(logged.folder, tmp_path / "model")
    code = f"{CLIENT}assert importlib.util.find_spec('tensorflow') is None\n"
    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/x.db"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    same_answer(answer, logged.model.predict(small_split.X_test))


@pytest.mark.parametrize("module", ["helpers.tracking", "helpers.models.interface"])
def test_what_clients_import_does_not_import_tensorflow(module):
    code = f"import sys, {module}; assert not {{'tensorflow', 'keras'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT_ROOT)


# --- another kind of table ---------------------------------------------------------------------


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
    run, info, metrics = LOGGERS[kind](mixed_split, tmp_path)
    model = mlflow.pyfunc.load_model(info.model_uri)
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
def untidy(small_frame, tmp_path_factory):
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
    preprocessing, classifier = fit_svm(split)
    (folder / "parts").mkdir()
    tracking.save_parts(folder / "parts", split, preprocessing, classifier)
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=str(tracking.INTERFACE),
        artifacts={"model": str(folder / "parts")},
        signature=tracking.make_signature(
            tracking.column_kinds(split.X_train), split.labels, split.manifest["header"]
        ),
        input_example=split.X_train.head(8),
        pip_requirements=["mlflow"],
    )
    rows = table.frame.drop(columns="Target")
    expected = classifier.predict_proba(preprocessing.transform(rows))
    model = mlflow.pyfunc.load_model(str(folder / "model"))
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
