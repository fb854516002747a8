"""Notebook 02: what surrounds the training of the network."""

import hashlib
import io
import json
import os
import signal
import threading
import time

# Read by TensorFlow when it starts: no start-up remarks, and sums in one order whatever the
# number of cores, so that the same seed gives the same network. One thread is also the fastest
# for a network this small.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

from contextlib import redirect_stdout, suppress
from pathlib import Path

from helpers.data import Split
from helpers.display import notice, progress, silenced_libraries

with silenced_libraries():
    import keras
    import tensorflow as tf

    # On a machine with a GPU, too, a network this small is trained on the CPU, in single
    # precision: the same seed gives the same metrics on both kinds of machines.
    # A program that has used TensorFlow before keeps the devices that it chose.
    with suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    # Its remarks while a network is converted are notes to its authors.
    tf.get_logger().setLevel("ERROR")
    # Wakes the devices up, so that TensorFlow says here, not in a notebook, what is missing.
    keras.distribution.list_devices()

import mlflow
import numpy as np
import pandas as pd
import psutil
from mlflow.entities import Metric

from helpers.workspace import ParameterError

FEWEST_STEPS = 600  # of a training; a small table has few batches, and gets more epochs
USUAL_POWER, MOST_UNEQUAL = 0.2, 9.0  # of the class weights
MOST_INPUTS = 1000  # of numbers with their codes
STILL_FALLING = 0.01  # share of the loss gained in the last tenth of the epochs
COPIES = 8  # of its activations and weights that a training holds at once, roughly


def class_weights(y: np.ndarray, power: float) -> dict[int, float]:
    """Return the weight of each class: its balanced weight to a power, 1 on average.

    With power 0 all classes weigh the same, with 1 every class weighs the same in sum; `y` has
    the labels' positions.
    """
    counts = np.bincount(y)
    weights = (len(y) / (len(counts) * counts)) ** power
    weights *= len(y) / (weights * counts).sum()
    return dict(enumerate(weights.tolist()))


def weight_power(y: np.ndarray, power: float | None) -> float:
    """Return the power for `class_weights`: as given, or more than usual for a rare class.

    With it the sums of the weights of two classes differ by a factor of `MOST_UNEQUAL` at most:
    where one weighs next to nothing, the network always answers the other.
    """
    if power is not None:
        return power
    counts = np.bincount(y)
    ratio = counts.max() / counts.min()
    return max(USUAL_POWER, 1 - np.log(MOST_UNEQUAL) / np.log(ratio)) if ratio > 1 else USUAL_POWER


def bins_for(split: Split, n_bins: int) -> int:
    """Return `n_bins`, or 0 where codes would make more inputs of the numbers than `MOST_INPUTS`.

    A table of many columns gains little by codes, and its training takes minutes with them.
    """
    return n_bins if len(split.numeric) * (n_bins + 1) <= MOST_INPUTS else 0


def warn_if_unfinished(curves: pd.DataFrame) -> None:
    """Say so if the validation loss of `history_table` still falls when the training ends."""
    losses = curves["val_loss"].to_numpy()
    before = losses[: -max(1, len(losses) // 10)].min(initial=np.inf)
    if losses.argmin() == len(losses) - 1 and losses[-1] < before * (1 - STILL_FALLING):
        notice(
            f"The network has not converged: its best epoch is the last one, {len(losses)}. "
            "More EPOCHS or a larger LEARNING_RATE would go on.",
            "warning",
        )


def epochs_for(n_rows: int, epochs: int, batch_size: int) -> int:
    """Return `epochs`, or as many as it takes to `FEWEST_STEPS` steps on a small table."""
    return max(epochs, -(-FEWEST_STEPS // -(-n_rows // batch_size)))


class Progress(keras.callbacks.Callback):
    """A bar of one line with the losses; with `backup`, an interrupt says where it goes on."""

    def __init__(self, epochs: int, backup: keras.callbacks.BackupAndRestore | None = None):
        super().__init__()
        self._epochs, self._backup = epochs, backup

    def on_train_begin(self, logs=None):
        """Show the bar."""
        advice = self._advice if self._backup else None
        self._bar = progress(self._epochs, "Training", "epoch", advice)

    def _advice(self) -> str:
        saved = Path(self._backup.backup_dir, "training_metadata.json")
        if not saved.is_file():
            return "run the cell again"
        epoch = json.loads(saved.read_text(encoding="utf-8"))["epoch"]
        return f"run the cell again, it goes on after epoch {epoch}"

    def on_epoch_end(self, epoch, logs=None):
        """Show the losses; after an interrupted training the first epoch is a later one."""
        self._bar.set_postfix_str(
            ", ".join(f"{name} {logs[name]:.3f}" for name in ("loss", "val_loss") if name in logs)
        )
        self._bar.update(epoch + 1 - self._bar.n)

    def on_train_end(self, logs=None):
        """Leave the bar as it is."""
        self._bar.close()


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Keras' own, whose backups no interrupt cuts in two: the optimizer's half would be lost.

    Without a backup a training begins with what network and optimizer hold now, however often
    the cell is run; `options` are those of Keras.

    Raises
    ------
    ParameterError
        If the network is trained already.
    """

    def __init__(self, folder: Path, network: keras.Model, **options):
        super().__init__(folder, **options)
        if int(network.optimizer.iterations):
            raise ParameterError(
                "The network is trained already. Run the notebook again from 'The network' on."
            )
        network.optimizer.build(network.trainable_variables)
        everything = [*network.variables, *network.optimizer.variables]
        self._untrained = [(variable, variable.numpy()) for variable in everything]

    def on_train_begin(self, logs=None):
        """Begin anew, or after the backup if there is one."""
        for variable, value in self._untrained:
            variable.assign(value)
        super().on_train_begin(logs)

    def on_train_batch_end(self, batch, logs=None):
        """Save every so often; an interrupt meanwhile comes after it."""
        if threading.current_thread() is not threading.main_thread():
            super().on_train_batch_end(batch, logs)
            return
        came = []
        before = {
            number: signal.signal(number, lambda number, frame: came.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            super().on_train_batch_end(batch, logs)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class LogToMlflow(keras.callbacks.Callback):
    """Log the epochs to the active MLflow run as they end, those of a second at once.

    Epochs before an interrupt are in the run that was interrupted.
    """

    def __init__(self):
        super().__init__()
        self._waiting, self._sent = [], 0.0

    def on_epoch_end(self, epoch, logs=None):
        """Log the metrics of an epoch, or keep them for the next call."""
        now = time.time()
        self._waiting += [
            Metric(f"train_{name}", float(value), int(now * 1000), epoch + 1)
            for name, value in logs.items()
        ]
        if now > self._sent + 1:
            self._send()

    def on_train_end(self, logs=None):
        """Log what is left."""
        self._send()

    def _send(self):
        mlflow.MlflowClient().log_batch(mlflow.active_run().info.run_id, self._waiting)
        self._waiting, self._sent = [], time.time()


def backup_folder(folder: Path, split: Split, network: keras.Model, **settings) -> Path:
    """Return a folder below `folder` for `keras.callbacks.BackupAndRestore`.

    Its name is a digest of all that the training depends on: with another setting, split or
    version of Keras a training starts anew.
    """
    shapes = [list(weight.shape) for weight in network.weights]
    key = [settings, shapes, split.manifest["split_digest"], keras.__version__, tf.__version__]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / digest[:24]


def check_memory(n_inputs: int, n_classes: int, filters: int, kernel_size: int, batch_size: int):
    """Raise ParameterError if a network is too large for this machine, before it is built."""
    activations = batch_size * max(1, n_inputs - kernel_size + 1) * filters
    weights = filters * (kernel_size + n_inputs // 2 * n_classes)
    needed = 4 * COPIES * (activations + weights)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ParameterError(
            f"FILTERS = {filters} with {n_inputs} inputs and BATCH_SIZE = {batch_size} needs about "
            f"{needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free. Make "
            "FILTERS or BATCH_SIZE smaller."
        )


def to_litert(network: keras.Model) -> bytes:
    """Convert a network to the format that LiteRT runs, for any number of rows at once."""
    converter = tf.lite.TFLiteConverter.from_keras_model(network)
    # What it prints are its own notes.
    with silenced_libraries(), redirect_stdout(io.StringIO()):
        return converter.convert()


def history_table(history: keras.callbacks.History) -> pd.DataFrame:
    """Return the learning curves of a training: one row per epoch, counted from 1.

    A training that was interrupted begins where it went on.
    """
    epochs = pd.Index(history.epoch, name="epoch", dtype=int) + 1
    return pd.DataFrame(history.history, index=epochs)


def log_training(network: keras.Model, rehearsal: pd.DataFrame, **settings):
    """Log settings, size and validation curves of a trained network in the active run.

    The curves are those of a training with a held-out part, from `history_table`.
    """
    sizes = {
        "pool_size": network.layers[2].pool_size[0],  # 1 where there is one place only
        "n_inputs": network.input_shape[1],
        "n_parameters": network.count_params(),
        "optimizer": type(network.optimizer).__name__.lower(),
        "precision": network.dtype_policy.name,
    }
    mlflow.log_params({**settings, **sizes})
    now = int(time.time() * 1000)
    curves = rehearsal.filter(like="val_").items()
    metrics = [
        Metric(name, value, now, epoch) for name, curve in curves for epoch, value in curve.items()
    ]
    mlflow.MlflowClient().log_batch(mlflow.active_run().info.run_id, metrics)
