"""Notebook 02's network: its layers, its training, and what surrounds it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import mlflow
import numpy as np
import pandas as pd
import pytest

from helpers import display
from helpers.models import cnn
from helpers.tracking.logged_models import ModelError
from helpers.workspace import ParameterError, open_workspace
from tests.cells import train_network

QUICK = {"EPOCHS": 4, "BATCH_SIZE": 16, "FILTERS": 8, "steps": 1}


@pytest.fixture(scope="module")
def made(small_split, running_server, tmp_path_factory):
    """What the cells of the notebook make."""
    running_server.connect()
    folder = tmp_path_factory.mktemp("network")
    return train_network(small_split, open_workspace(folder), **QUICK, KERNEL_SIZE=5)


def test_network_is_the_documented_one(made, tmp_path, tracking_server):
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
    params = mlflow.get_run(made.run.info.run_id).data.params
    (path,) = Path(
        mlflow.artifacts.download_artifacts(made.model_info.model_uri, dst_path=tmp_path)
    ).rglob("network.keras")
    stored = keras.saving.load_model(path)
    sizes = {
        "n_parameters": stored.count_params(),
        "filters": stored.layers[1].filters,
        "kernel_size": stored.layers[1].kernel_size[0],
    }
    assert {name: int(params[name]) for name in sizes} == sizes


def test_same_seed_gives_the_same_network_whatever_the_test_rows(
    made, small_split, workspace, tracking_server
):
    spoilt = small_split.X_test.assign(length=1e6, width=-1e6, age=10**6, city="nowhere")
    changed = replace(small_split, X_test=spoilt, y_test=small_split.y_test[::-1])
    again = train_network(changed, workspace, **QUICK, KERNEL_SIZE=5)
    assert made.history.history == again.history.history
    for one, two in zip(made.network.get_weights(), again.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_network_takes_a_table_with_a_single_input(small_split, workspace, tracking_server):
    X_train, X_test = small_split.X_train[["length"]], small_split.X_test[["length"]]
    manifest = {**small_split.manifest, "categorical": [], "numeric": ["length"]}
    split = replace(small_split, X_train=X_train, X_test=X_test, manifest=manifest)
    made = train_network(split, workspace, **QUICK, N_BINS=0)
    params = mlflow.get_run(made.run.info.run_id).data.params
    assert [params[name] for name in ("n_inputs", "kernel_size", "pool_size")] == ["1"] * 3


def test_small_table_gets_enough_steps():
    assert cnn.epochs_for(3096, 30, 64) == 30
    assert cnn.epochs_for(105, 30, 64) == 300
    assert cnn.epochs_for(5, 1000, 64) == 1000


def test_class_weights_average_one_over_the_rows_and_favour_small_classes():
    targets = np.repeat([0, 1, 2], [70, 20, 10])
    for power in (0.0, 0.3, 1.0):
        weights = cnn.class_weights(targets, power)
        assert np.mean([weights[target] for target in targets]) == pytest.approx(1)
        assert weights[2] / weights[0] == pytest.approx(7**power)


def test_network_larger_than_memory_is_refused_by_name():
    cnn.check_memory(200, 3, 32, 9, 64)
    with pytest.raises(ParameterError, match=r"FILTERS = 10000000.*GiB.*Make FILTERS"):
        cnn.check_memory(200, 3, 10**7, 9, 64)


def test_interrupted_training_goes_on_but_only_with_the_same_settings(
    small_split, workspace, tracking_server, monkeypatch
):
    class Pulled(cnn.LogToMlflow):
        started_at, ends_at = [], 18

        def on_epoch_begin(self, epoch, logs=None):
            self.started_at.append(epoch)

        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            if epoch >= self.ends_at:
                raise KeyboardInterrupt

    # A backup every 100 steps; an epoch has 14 of them.
    settings = {**QUICK, "EPOCHS": 22, "BATCH_SIZE": 8}
    # As in a kernel.
    shell, advice = SimpleNamespace(showtraceback=lambda error: None), {}
    with monkeypatch.context() as patch:
        patch.setattr(cnn, "LogToMlflow", Pulled)
        for seed in (0, 1):
            Pulled.started_at.clear()
            with pytest.raises(KeyboardInterrupt) as caught:
                train_network(small_split, workspace, **settings, SEED=seed)
            display._show_interrupt(shell, KeyboardInterrupt, caught.value, None)
            advice[seed] = caught.value.advice
            assert Pulled.started_at[0] == 0
            Pulled.ends_at = 0
    made = train_network(small_split, workspace, **settings)
    losses = mlflow.MlflowClient().get_metric_history(made.run.info.run_id, "train_loss")
    assert 8 < losses[0].step <= 19
    assert losses[-1].step == made.epochs == 22
    assert advice[0] == f"run the cell again, it goes on after epoch {losses[0].step - 1}"
    other = replace(small_split, manifest={**small_split.manifest, "split_digest": "another"})
    one, two = (
        cnn.backup_folder(workspace.training, split, made.network, seed=0)
        for split in (small_split, other)
    )
    assert one != two


def test_training_cell_that_is_run_again_begins_anew(small_split, workspace, tracking_server):
    made = train_network(small_split, workspace, **QUICK)
    run_id = made.run.info.run_id
    losses = mlflow.MlflowClient().get_metric_history(run_id, "train_loss")
    first, last = losses[0].value, losses[-1].value
    options = {"batch_size": made.BATCH_SIZE, "class_weight": made.class_weight, "verbose": 0}
    again = made.network.fit(made.X_train, made.y_train, callbacks=[made.backup], **options)
    assert again.history["loss"][0] == pytest.approx(first, abs=(first - last) / 3)
    with pytest.raises(ParameterError, match="trained already.*from 'The network' on"):
        cnn.BackupAndRestore(workspace.training, made.network)


def test_training_keeps_a_fixed_learning_rate(tmp_path):
    network = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    network.compile(keras.optimizers.SGD(0.1), loss="mse")
    backup = cnn.BackupAndRestore(tmp_path, network)
    X = np.random.default_rng(0).normal(size=(64, 2))
    losses = network.fit(X, X.sum(axis=1), epochs=5, callbacks=[backup], verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2


def test_network_that_answers_otherwise_once_converted_is_not_logged(
    small_split, workspace, tracking_server, monkeypatch
):
    convert = cnn.to_litert

    monkeypatch.setattr(
        cnn, "to_litert", lambda network: convert(keras.models.clone_model(network))
    )
    with pytest.raises(ModelError, match="answers otherwise"):
        train_network(small_split, workspace, **QUICK)


@pytest.mark.parametrize(
    ("counts", "power"),
    [((100, 100), 0.2), ((50, 18, 32), 0.2), ((990, 10), 0.52), ((9990, 10), 0.68)],
)
def test_weight_of_a_rare_class_is_no_less_than_a_ninth(counts, power):
    y = np.repeat(range(len(counts)), counts)
    assert cnn.weight_power(y, None) == pytest.approx(power, abs=0.01)
    assert cnn.weight_power(y, 0.0) == 0
    weights = cnn.class_weights(y, cnn.weight_power(y, None))
    sums = [weight * count for weight, count in zip(weights.values(), counts, strict=True)]
    assert max(sums) / min(sums) <= 9.0001


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (np.linspace(2, 1, 30), True),
        (np.r_[np.linspace(2, 1, 20), np.full(10, 1.0)], False),
        (np.r_[np.linspace(2, 1, 20), np.linspace(1, 0.999, 10)], False),
        (np.r_[np.linspace(2, 1, 20), np.linspace(1, 1.2, 10)], False),
    ],
)
def test_training_that_ends_while_the_loss_falls_is_not_converged(losses, said, capsys):
    cnn.warn_if_unfinished(pd.DataFrame({"val_loss": losses}))
    assert ("best epoch is the last one, 30. More EPOCHS" in capsys.readouterr().out) == said


def test_codes_are_for_tables_of_few_columns(small_split):
    assert cnn.bins_for(small_split, 8) == 8
    many = {**small_split.manifest, "numeric": [f"x{number}" for number in range(300)]}
    assert cnn.bins_for(replace(small_split, manifest=many), 8) == 0
