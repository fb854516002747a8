import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import joblib
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
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from helpers import access, cnn, data, model_interface, svm, tracking
from helpers.evaluation import compute_metrics
from helpers.preprocessing import make_preprocessor
from helpers.workspace import ParameterError

QUICK = cnn.Settings(epochs=4, batch_size=16)
JUMPY = cnn.Settings(epochs=40, batch_size=8, learning_rate=0.02, l2=1e-4, patience=4, seed=1)


# --- the network and its training --------------------------------------------------------------


def test_network_is_the_documented_one_with_1635_parameters():
    network = cnn.make_network(34, 3)
    assert [type(layer) for layer in network.layers] == [
        keras.layers.Reshape,
        keras.layers.Conv1D,
        keras.layers.MaxPooling1D,
        keras.layers.Flatten,
        keras.layers.Dense,
    ]
    assert network.count_params() == 1635
    assert network.layers[0].output.shape == (None, 34, 1)
    assert network.layers[1].activation is keras.activations.relu
    assert network.layers[4].activation is keras.activations.softmax
    assert network.output_shape == (None, 3)


@pytest.mark.parametrize("n_inputs", [1, 2, 3, 5])
def test_network_takes_tables_with_very_few_inputs(n_inputs):
    network = cnn.make_network(n_inputs, 2, kernel_size=5)
    answer = network(np.ones((4, n_inputs), "float32")).numpy()
    np.testing.assert_allclose(answer.sum(axis=1), 1, atol=1e-6)


def test_network_shown_before_training_is_the_one_that_is_trained(small_split):
    # Two levels of 20 rows each: frequent among all training rows, rare once some are held out.
    levels = np.repeat(["a", "b", "c"], [20, 20, len(small_split.X_train) - 40])
    manifest = {**small_split.manifest, "categorical": ["city", "course", "level"]}
    split = replace(
        small_split, X_train=small_split.X_train.assign(level=levels), manifest=manifest
    )
    settings = replace(QUICK, epochs=1, validation_size=0.3)
    shown, trained = cnn.preview(split, settings), cnn.train(split, settings).network
    assert shown.input_shape == trained.input_shape
    assert shown.count_params() == trained.count_params()


def test_sizes_logged_are_those_of_the_network_that_was_trained(small_split, tracking_server):
    manifest = {**small_split.manifest, "categorical": [], "numeric": ["length", "width", "age"]}
    split = replace(small_split, manifest=manifest)
    settings = replace(QUICK, epochs=1)
    training = cnn.train(split, settings)
    with tracking.start_run("conv_network", "few_inputs") as run:
        cnn.log_training(training, split, settings)
    params = mlflow.get_run(run.info.run_id).data.params
    assert settings.kernel_size == 5
    assert (params["n_inputs"], params["kernel_size"], params["pool_size"]) == ("3", "3", "1")


@pytest.fixture(scope="module")
def noisy_split(small_split):
    """Training rows most of whose labels are wrong: what is learnt late is noise."""
    random = np.random.default_rng(0)
    y = small_split.y_train.to_numpy(dtype=object).copy()
    rows = random.choice(len(y), len(y) * 2 // 3, replace=False)
    y[rows] = random.permutation(y[rows])
    labels = pd.Series(y, index=small_split.y_train.index, name="Target")
    return replace(small_split, y_train=labels)


@pytest.fixture(scope="module")
def jumpy(noisy_split):
    """A training whose late epochs are worse than an early one."""
    return cnn.train(noisy_split, JUMPY)


def test_same_seed_gives_the_same_network(small_split):
    first, again = (cnn.train(small_split, QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(first.history, again.history)
    for one, two in zip(first.network.get_weights(), again.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    other = cnn.train(small_split, replace(QUICK, seed=1))
    assert not other.history.equals(first.history)


class _PulledPlugError(Exception):
    """Stands for a machine that disappears."""


def _pull_the_plug(monkeypatch, epoch):
    """Let a training end, without a goodbye, right after the checkpoint of an epoch."""
    write = cnn.Checkpoint.on_epoch_end

    def pulled(self, number, logs=None):
        write(self, number, logs)
        if number + 1 == epoch:
            raise _PulledPlugError

    monkeypatch.setattr(cnn.Checkpoint, "on_epoch_end", pulled)


@pytest.mark.parametrize("epoch", [5, "last"])
def test_interrupted_training_goes_on_to_the_same_network(
    jumpy, noisy_split, tmp_path, monkeypatch, epoch
):
    epoch = len(jumpy.history) if epoch == "last" else epoch
    with monkeypatch.context() as patch:
        _pull_the_plug(patch, epoch)
        with pytest.raises(_PulledPlugError):
            cnn.train(noisy_split, JUMPY, keep=tmp_path)
    resumed = cnn.train(noisy_split, JUMPY, keep=tmp_path)
    assert resumed.resumed_from == epoch
    pd.testing.assert_frame_equal(resumed.history, jumpy.history)
    pairs = zip(resumed.network.get_weights(), jumpy.network.get_weights(), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    resumed.discard_checkpoint()
    assert cnn.Checkpoint(tmp_path, noisy_split, JUMPY).read() is None


def test_checkpoint_of_another_setting_or_split_is_not_taken(small_split, tmp_path):
    other = replace(small_split, manifest={**small_split.manifest, "split_digest": "another"})
    cnn.train(small_split, QUICK, keep=tmp_path)
    assert cnn.train(small_split, replace(QUICK, epochs=5), keep=tmp_path).resumed_from == 0
    assert cnn.train(other, QUICK, keep=tmp_path).resumed_from == 0
    assert cnn.train(small_split, QUICK, keep=tmp_path).resumed_from == QUICK.epochs


def test_resumed_training_logs_all_epochs_and_where_it_went_on(
    small_split, tmp_path, tracking_server, monkeypatch
):
    with monkeypatch.context() as patch:
        _pull_the_plug(patch, 2)
        with pytest.raises(_PulledPlugError), tracking.start_run("conv_network", "cut_off"):
            cnn.train(small_split, QUICK, keep=tmp_path)
    with tracking.start_run("conv_network", "goes_on") as run:
        training = cnn.train(small_split, QUICK, keep=tmp_path)
        cnn.log_training(training, small_split, QUICK)
    client = mlflow.MlflowClient()
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [each.step for each in losses] == [1, 2, 3, 4]
    assert [each.value for each in losses] == training.history["loss"].tolist()
    logged = client.get_run(run.info.run_id).data
    assert logged.params["resumed_from_epoch"] == "2"
    assert logged.params["precision"] == "float32"
    assert logged.tags["accelerator"]


def test_weights_of_the_best_epoch_are_put_back(jumpy):
    lowest, last = jumpy.history["val_loss"].min(), jumpy.history["val_loss"].iloc[-1]
    assert jumpy.best_epoch < len(jumpy.history)
    assert last > lowest + 1e-3
    assert jumpy.history["val_loss"][jumpy.best_epoch] == lowest
    loss, accuracy = jumpy.network.evaluate(
        jumpy.validation_inputs, jumpy.validation_targets, verbose=0
    )
    assert loss == pytest.approx(lowest, abs=1e-5)
    assert accuracy == pytest.approx(jumpy.history["val_accuracy"][jumpy.best_epoch])
    penalties = float(sum(jumpy.network.losses))
    answer = jumpy.network(jumpy.validation_inputs).numpy().astype("float64")
    surprise = -np.log(answer[range(len(answer)), jumpy.validation_targets]).mean()
    assert penalties > 0
    assert surprise + penalties == pytest.approx(lowest, abs=1e-4)


def test_training_stops_after_patience_epochs_without_a_better_one(jumpy):
    assert len(jumpy.history) == jumpy.best_epoch + JUMPY.patience
    assert len(jumpy.history) < JUMPY.epochs
    assert list(jumpy.history.columns) == ["accuracy", "loss", "val_accuracy", "val_loss"]
    assert jumpy.history.index.tolist() == list(range(1, len(jumpy.history) + 1))


def test_validation_rows_are_training_rows_that_fitted_nothing(noisy_split, jumpy):
    X, y = noisy_split.X_train, noisy_split.y_train
    rows, kept = train_test_split(
        np.arange(len(X)),
        test_size=JUMPY.validation_size,
        stratify=y,
        random_state=JUMPY.seed,
    )
    assert not set(rows) & set(kept)
    preprocessor = make_preprocessor(noisy_split.numeric, noisy_split.categorical)
    preprocessor.fit(X.iloc[rows])
    np.testing.assert_allclose(
        jumpy.validation_inputs, preprocessor.transform(X.iloc[kept]), atol=1e-6
    )
    assert [noisy_split.labels[k] for k in jumpy.validation_targets] == y.iloc[kept].tolist()
    means = jumpy.preprocessor.named_transformers_["numeric"]["standardscaler"].mean_
    names = list(noisy_split.numeric)
    np.testing.assert_allclose(means, X.iloc[rows][names].mean())
    assert not np.allclose(means, X[names].mean())


def test_test_rows_have_no_part_in_training(small_split):
    spoilt = small_split.X_test.assign(length=1e6, width=-1e6, age=10**6, city="nowhere")
    labels = small_split.y_test.sample(frac=1, random_state=0).set_axis(small_split.y_test.index)
    changed = replace(small_split, X_test=spoilt, y_test=labels)
    first, second = cnn.train(small_split, QUICK), cnn.train(changed, QUICK)
    pd.testing.assert_frame_equal(first.history, second.history)
    one, two = (svm.fit_best(split, 1.0, 0.1) for split in (small_split, changed))
    np.testing.assert_array_equal(
        one.predict_proba(small_split.X_train), two.predict_proba(small_split.X_train)
    )


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


def test_validation_part_too_small_for_the_classes_is_refused_by_name(small_split):
    few = small_split.y_train.groupby(small_split.y_train).head(6).index
    tiny = replace(
        small_split, X_train=small_split.X_train.loc[few], y_train=small_split.y_train[few]
    )
    with pytest.raises(ParameterError, match="VALIDATION_SIZE = 0.1 of 18"):
        cnn.train(tiny, QUICK)


def test_preprocessing_survives_outliers_unknown_levels_and_missing_values(small_split):
    preprocessor = make_preprocessor(small_split.numeric, small_split.categorical)
    preprocessor.fit(small_split.X_train)
    strange = small_split.X_test.head(3).assign(length=[1e9, -1e9, np.nan], course=-5, city=None)
    inputs = preprocessor.transform(strange)
    assert np.isfinite(inputs).all()
    assert np.abs(inputs).max() <= 3.0
    median = small_split.X_test.head(1).assign(
        length=small_split.X_train["length"].median(), course=-5, city=None
    )
    filled = strange.iloc[[2]].assign(width=median["width"].iloc[0], age=median["age"].iloc[0])
    np.testing.assert_allclose(preprocessor.transform(filled), preprocessor.transform(median))


# --- the model interface -----------------------------------------------------------------------


def log_network(split, settings=QUICK):
    """Do what notebook 02 does."""
    with tracking.start_run("conv_network", "default_logistic", split.manifest) as run:
        training = cnn.train(split, settings)
        cnn.log_training(training, split, settings)
        parts = {"preprocessor": training.preprocessor, "network": training.network}
        info = tracking.log_model(split, **parts)
        metrics, _ = tracking.evaluate_logged_model(info, split)
    return run, info, metrics


def log_svm(split):
    """Do what notebook 03 does, with a grid of 2 x 2."""
    grid = svm.make_grid([0, 2], [-4, -2])
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        searcher = svm.search(split, grid, folds=3)
        svm.log_search(searcher, grid)
        classifier = svm.fit_best(split, **svm.best_pair(searcher), folds=3)
        info = tracking.log_model(split, classifier=classifier)
        metrics, _ = tracking.evaluate_logged_model(info, split)
    return run, info, metrics


LOGGERS = {"network": log_network, "svm": log_svm}


@pytest.fixture(scope="module", params=LOGGERS)
def logged(request, running_server, small_split, tmp_path_factory):
    """A model as its notebook logs it, loaded back from the server as a client does."""
    running_server.connect()
    run, info, metrics = LOGGERS[request.param](small_split)
    folder = tmp_path_factory.mktemp(request.param)
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
    assert os.environ[tracking.USER] == access.NOTEBOOKS


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
        return
    (calibrated,) = joblib.load(parts / "classifier.joblib").calibrated_classifiers_
    machine = calibrated.estimator[-1]
    assert params["kernel"] == machine.kernel == "rbf"
    assert float(params["C"]) == machine.C
    assert float(params["gamma"]) == machine.gamma


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
    return data.split_table(table)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOGGERS)
def test_table_with_booleans_missing_values_and_integer_labels_gives_a_model(
    kind, mixed_split, tracking_server
):
    run, info, metrics = LOGGERS[kind](mixed_split)
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
    split = data.split_table(table)
    classifier = svm.fit_best(split, 1.0, 0.1, folds=3, n_jobs=1)
    (folder / "parts").mkdir()
    tracking.save_parts(folder / "parts", split, classifier=classifier)
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
    expected = classifier.predict_proba(table.frame.drop(columns="Target"))
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


# --- the fast preprocessing --------------------------------------------------------------------


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


@pytest.mark.parametrize("n_rows", [1, 45, 450])
def test_fast_preprocessing_gives_what_the_fitted_one_gives(small_split, n_rows):
    fitted = make_preprocessor(small_split.numeric, small_split.categorical)
    fitted.fit(small_split.X_train)
    columns = tracking.column_kinds(small_split.X_train)
    fast = model_interface.make_fast(fitted, columns)
    assert isinstance(fast, model_interface.FastPreprocessor)
    many = pd.concat([odd_rows(small_split)] * 10, ignore_index=True).head(n_rows)
    rows = model_interface.convert(many, columns)
    np.testing.assert_array_equal(fast.transform(rows), fitted.transform(rows))


def test_other_preprocessing_is_used_as_it_is(small_split):
    columns = tracking.column_kinds(small_split.X_train)
    numeric = list(small_split.numeric)
    for transformers in (
        [("numeric", StandardScaler(), numeric)],
        [("numbers", SimpleImputer(), numeric)],
        [("categorical", OrdinalEncoder(), list(small_split.categorical))],
    ):
        fitted = ColumnTransformer(transformers).fit(small_split.X_train)
        assert model_interface.make_fast(fitted, columns) is fitted


@pytest.mark.parametrize("value", [np.inf, -np.inf, 10**400])
def test_number_that_is_not_finite_is_refused_by_name(small_split, value):
    columns = tracking.column_kinds(small_split.X_train)
    rows = small_split.X_test.head(2).astype({"age": object})
    rows.iloc[0, rows.columns.get_loc("age")] = value
    with pytest.raises(MlflowException, match="'age'.*finite"):
        model_interface.convert(rows, columns)


def test_column_that_is_there_twice_is_refused_by_name(small_split):
    columns = tracking.column_kinds(small_split.X_train)
    rows = small_split.X_test.head(2)
    rows = pd.concat([rows, rows[["age"]]], axis=1)
    with pytest.raises(MlflowException, match="'age' is there more than once"):
        model_interface.convert(rows, columns)
