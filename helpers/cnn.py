"""Notebook 02: the convolutional network and its training."""

import hashlib
import json
import os

# Read by TensorFlow when it starts: no start-up remarks, and sums in one order whatever the
# number of cores, so that the same seed gives the same network. One thread is also the fastest
# for a network this small.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.display import COLOURS, new_figure, silenced_libraries

with silenced_libraries():
    import keras
    import tensorflow as tf

    # On a machine with a GPU, too, a network this small is trained on the CPU, in single
    # precision: the same seed gives the same metrics on both kinds of machines.
    # A program that has used TensorFlow before keeps the devices that it chose.
    with suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    # Wakes the devices up, so that TensorFlow says here, not in a notebook, what is missing.
    keras.distribution.list_devices()

import mlflow
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from helpers import tracking
from helpers.preprocessing import make_preprocessor
from helpers.workspace import ParameterError, atomic_path

POOL_SIZE = 2
STEPS_PER_CALL = 8  # training steps between two visits to Python; results are the same


@dataclass(frozen=True)
class Settings:
    """What can be chosen about the network and its training.

    Attributes
    ----------
    filters, kernel_size : int
        Of the convolution.
    l2 : float
        Weight penalty of the convolution and the output layer.
    learning_rate : float
        Of Adam at the first step; it falls to zero along a cosine.
    batch_size : int
        Rows per step.
    epochs : int
        Most passes over the training rows.
    patience : int
        Epochs without a lower validation loss before training stops.
    validation_size : float
        Share of the training rows that is kept for validation.
    class_weight_power : float
        Weights of the classes: (balanced weight) to this power; 0: none.
    seed : int
        Governs the validation part, the initial weights and the order of the rows.
    """

    filters: int = 32
    kernel_size: int = 5
    l2: float = 0.003
    learning_rate: float = 0.002
    batch_size: int = 64
    epochs: int = 30
    patience: int = 10
    validation_size: float = 0.1
    class_weight_power: float = 0.2
    seed: int = 0


@dataclass
class Training:
    """A trained network with its preprocessing.

    Attributes
    ----------
    preprocessor : sklearn.compose.ColumnTransformer
        Fitted on the rows used for training, without the validation part.
    network : keras.Model
        With the weights of `best_epoch`.
    history : pandas.DataFrame
        Index ``epoch`` from 1; columns ``loss``, ``accuracy``, ``val_loss``, ``val_accuracy``.
    best_epoch : int
        Epoch with the lowest validation loss.
    validation_inputs : numpy.ndarray, shape (n_validation, n_inputs), float32
    validation_targets : numpy.ndarray, shape (n_validation,), int64
        Positions in the sorted labels.
    resumed_from : int
        Epochs that an interrupted training had done before; 0: none.
    checkpoint : Checkpoint or None
    """

    preprocessor: ColumnTransformer
    network: keras.Model
    history: pd.DataFrame
    best_epoch: int
    validation_inputs: np.ndarray
    validation_targets: np.ndarray
    resumed_from: int = 0
    checkpoint: "Checkpoint | None" = None

    def discard_checkpoint(self):
        """Delete the checkpoint: the model is logged and needs it no more."""
        if self.checkpoint is not None:
            self.checkpoint.path.unlink(missing_ok=True)


def make_network(n_inputs, n_classes, filters=32, kernel_size=2, l2=0.0):
    """Make the network: Conv1D → MaxPooling1D → Flatten → Dense softmax.

    Parameters
    ----------
    n_inputs : int
        Preprocessed inputs; they become (n_inputs, 1) for the convolution.
    n_classes : int
    filters, kernel_size : int
        Of the convolution; the original had 32 and 2.
    l2 : float
        Weight penalty.

    Returns
    -------
    keras.Sequential
        Not compiled. With 34 inputs, 3 classes and the defaults it has 1,635 parameters, as
        the original.
    """
    # A table with very few inputs gets a shorter kernel and no pooling rather than an error.
    kernel_size = min(kernel_size, n_inputs)
    pool_size = min(POOL_SIZE, n_inputs - kernel_size + 1)
    penalty = keras.regularizers.L2(l2) if l2 else None
    return keras.Sequential(
        [
            keras.layers.Input((n_inputs,)),
            keras.layers.Reshape((n_inputs, 1)),
            keras.layers.Conv1D(
                filters, kernel_size, activation="relu", kernel_regularizer=penalty
            ),
            keras.layers.MaxPooling1D(pool_size),
            keras.layers.Flatten(),
            keras.layers.Dense(n_classes, activation="softmax", kernel_regularizer=penalty),
        ],
        name="model_conv_network",
    )


def class_weights(targets, power):
    """Return the weight of each class: its balanced weight to a power, 1 on average.

    Parameters
    ----------
    targets : numpy.ndarray, shape (n_rows,)
        Positions of the labels.
    power : float
        0: all classes weigh the same; 1: every class weighs the same in sum.

    Returns
    -------
    dict of int to float
    """
    counts = np.bincount(targets)
    weights = (len(targets) / (len(counts) * counts)) ** power
    weights *= len(targets) / (weights * counts).sum()
    return dict(enumerate(weights.tolist()))


class _Progress(keras.callbacks.Callback):
    """Show a bar with losses, and log each epoch to MLflow as it ends."""

    def __init__(self, epochs, done):
        super().__init__()
        for epoch, logs in enumerate(done):
            self._log(epoch, logs)
        self._bar = tqdm(
            total=epochs,
            initial=len(done),
            desc="Training",
            unit="epoch",
            ncols=100,
            mininterval=1,
        )

    @staticmethod
    def _log(epoch, logs):
        if mlflow.active_run():
            names = {"loss": "train_loss", "accuracy": "train_accuracy"}
            values = {names.get(name, name): value for name, value in logs.items()}
            mlflow.log_metrics(values, step=epoch + 1)

    def on_epoch_end(self, epoch, logs=None):
        self._log(epoch, logs)
        self._bar.set_postfix_str(
            f"loss {logs['loss']:.4f}, validation {logs['val_loss']:.4f} "
            f"(accuracy {logs['val_accuracy']:.3f})"
        )
        self._bar.update()

    def on_train_end(self, logs=None):
        self._bar.close()


class _EarlyStopping(keras.callbacks.EarlyStopping):
    """Early stopping that goes on where an interrupted training was.

    Parameters
    ----------
    patience : int
    state : State or None
    """

    def __init__(self, patience, state):
        super().__init__(monitor="val_loss", patience=patience, restore_best_weights=True)
        self._state = state

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self._state is not None:
            losses = self._state.validation_losses
            self.best, self.best_epoch = min(losses), int(np.argmin(losses))
            self.best_weights = self._state.best_weights
            self.wait = self._state.waited


@dataclass
class State:
    """Where a training is after an epoch.

    Attributes
    ----------
    history : list of dict of str to float
        Losses and accuracies of each epoch so far.
    variables, optimizer, best_weights : list of numpy.ndarray
        Of the network and of the optimizer after the last epoch; the network's weights after
        the best one.
    """

    history: list
    variables: list
    optimizer: list
    best_weights: list

    @property
    def validation_losses(self):
        """One per epoch."""
        return [logs["val_loss"] for logs in self.history]

    @property
    def waited(self):
        """Epochs since the best one."""
        return len(self.history) - 1 - int(np.argmin(self.validation_losses))

    def restore(self, network):
        """Put a network and its optimizer where they were."""
        network.optimizer.build(network.trainable_variables)
        pairs = ((network.variables, self.variables), (network.optimizer.variables, self.optimizer))
        for variables, values in pairs:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


class Checkpoint(keras.callbacks.Callback):
    """Keep the state of a training in a file after each epoch.

    Parameters
    ----------
    folder : path-like
        The file's name in it is a digest of all that the training depends on: with another
        setting, split or version of Keras a training starts anew.
    split : helpers.data.Split
    settings : Settings
    stopper : _EarlyStopping or None
        Knows the best weights.
    """

    def __init__(self, folder, split, settings, stopper=None):
        super().__init__()
        key = [asdict(settings), split.manifest["split_digest"], keras.__version__, tf.__version__]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path, self.stopper, self._history = Path(folder) / f"{digest[:24]}.npz", stopper, []

    def read(self):
        """Return the `State` that is kept, or None."""
        if not self.path.is_file():
            return None
        with np.load(self.path) as content:
            parts = {
                kind: [content[f"{kind}{n}"] for n in range(int(content[f"n_{kind}"]))]
                for kind in ("variables", "optimizer", "best_weights")
            }
            self._history = json.loads(str(content["history"]))
        return State(self._history, **parts)

    def on_epoch_end(self, epoch, logs=None):
        """Write the state; a file that is there already stays until the new one is whole."""
        self._history = [*self._history, {name: float(value) for name, value in logs.items()}]
        parts = {
            "variables": [variable.numpy() for variable in self.model.variables],
            "optimizer": [variable.numpy() for variable in self.model.optimizer.variables],
            "best_weights": self.stopper.best_weights,
        }
        content = {"history": json.dumps(self._history)}
        for kind, arrays in parts.items():
            content[f"n_{kind}"] = len(arrays)
            content |= {f"{kind}{n}": array for n, array in enumerate(arrays)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **content)


class _Batches(keras.callbacks.Callback):
    """Training rows in batches, in an order that the seed and the epoch decide.

    An epoch that is trained after an interrupt has the order that it would have had without.

    Parameters
    ----------
    inputs : numpy.ndarray, shape (n_rows, n_inputs), float32
    targets : numpy.ndarray, shape (n_rows,), int64
    settings : Settings
    """

    def __init__(self, inputs, targets, settings):
        super().__init__()
        self._epoch = tf.Variable(0)
        n_rows, rows = len(inputs), (tf.constant(inputs), tf.constant(targets))

        def shuffled(_):
            seed = tf.stack([settings.seed % 2**31, self._epoch.read_value()])
            return tf.data.Dataset.from_tensor_slices(
                tf.random.experimental.stateless_shuffle(tf.range(n_rows), seed)
            )

        def gather(places):
            return tuple(tf.gather(part, places) for part in rows)

        batches = tf.data.Dataset.range(1).flat_map(shuffled).batch(settings.batch_size)
        size = tf.data.experimental.assert_cardinality(-(-n_rows // settings.batch_size))
        self.dataset = batches.map(gather).apply(size).prefetch(2)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch.assign(epoch)


def _split_validation(split, settings):
    targets = np.searchsorted(split.labels, split.y_train)
    rows = np.arange(len(targets))
    try:
        return targets, *train_test_split(
            rows,
            test_size=settings.validation_size,
            stratify=targets,
            random_state=settings.seed,
        )
    except ValueError:
        raise ParameterError(
            f"VALIDATION_SIZE = {settings.validation_size:g} of {len(rows)} training rows "
            f"leaves fewer than one row for each of {len(split.labels)} classes. Make it larger."
        ) from None


def train(split, settings=None, keep=None):
    """Train the network; stop early and keep the best weights.

    The validation part is taken from the training rows; test rows are not touched.

    Parameters
    ----------
    split : helpers.data.Split
    settings : Settings, optional
    keep : path-like, optional
        Folder for a checkpoint after each epoch. A training that was interrupted goes on from
        there, and ends with the same network as one that was not.

    Returns
    -------
    Training
    """
    settings = settings or Settings()
    targets, rows, validation_rows = _split_validation(split, settings)
    preprocessor = make_preprocessor(split.numeric, split.categorical)
    inputs = preprocessor.fit_transform(split.X_train.iloc[rows]).astype("float32")
    held_out = preprocessor.transform(split.X_train.iloc[validation_rows]).astype("float32")
    keras.utils.set_random_seed(settings.seed)
    network = make_network(
        inputs.shape[1], len(split.labels), settings.filters, settings.kernel_size, settings.l2
    )
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    network.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps)
        ),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=STEPS_PER_CALL,
        jit_compile=False,
    )
    checkpoint = None if keep is None else Checkpoint(keep, split, settings)
    state = checkpoint.read() if checkpoint else None
    done = state.history if state else []
    if state:
        print(f"Going on after epoch {len(done)}, where the training was interrupted.")
        state.restore(network)
    stopper = _EarlyStopping(settings.patience, state)
    batches, progress = _Batches(inputs, targets[rows], settings), _Progress(settings.epochs, done)
    callbacks = [stopper, batches, progress]
    if checkpoint:
        checkpoint.stopper = stopper
        callbacks.append(checkpoint)
    if state and (state.waited >= settings.patience or len(done) == settings.epochs):
        network.set_weights(state.best_weights)
        progress.on_train_end()
        epochs = []
    else:
        fitted = network.fit(
            batches.dataset,
            validation_data=(held_out, targets[validation_rows]),
            validation_batch_size=settings.batch_size,
            epochs=settings.epochs,
            initial_epoch=len(done),
            shuffle=False,
            class_weight=class_weights(targets[rows], settings.class_weight_power),
            callbacks=callbacks,
            verbose=0,
        ).history
        epochs = [
            dict(zip(fitted, values, strict=True)) for values in zip(*fitted.values(), strict=True)
        ]
    history = pd.DataFrame([*done, *epochs])
    history.index = pd.RangeIndex(1, len(history) + 1, name="epoch")
    return Training(
        preprocessor,
        network,
        history,
        int(history["val_loss"].idxmin()),
        held_out,
        targets[validation_rows],
        len(done),
        checkpoint,
    )


def preview(split, settings):
    """Make the network that `train` would train, for a look at its layers.

    Parameters
    ----------
    split : helpers.data.Split
    settings : Settings

    Returns
    -------
    keras.Sequential
    """
    # The number of inputs depends on which levels are rare among the rows fitted.
    _, rows, _ = _split_validation(split, settings)
    preprocessor = make_preprocessor(split.numeric, split.categorical)
    n_inputs = preprocessor.fit_transform(split.X_train.iloc[rows]).shape[1]
    return make_network(
        n_inputs, len(split.labels), settings.filters, settings.kernel_size, settings.l2
    )


def log_training(training, split, settings):
    """Log parameters and learning curves of a training in the active run.

    Parameters
    ----------
    training : Training
    split : helpers.data.Split
    settings : Settings
    """
    # With few inputs both sizes are smaller than what was set.
    convolution, pooling = training.network.layers[1:3]
    mlflow.log_params(
        {
            **vars(settings),
            "kernel_size": convolution.kernel_size[0],
            "optimizer": "Adam, cosine decay",
            "pool_size": pooling.pool_size[0],
            "n_inputs": training.network.input_shape[1],
            "n_parameters": training.network.count_params(),
            "epochs_trained": len(training.history),
            "best_epoch": training.best_epoch,
            "resumed_from_epoch": training.resumed_from,
            "precision": training.network.dtype_policy.name,
        }
    )
    tracking.log_figure(plot_history(training), "learning_curves.png")


def plot_history(training):
    """Draw the learning curves, the best epoch marked.

    Parameters
    ----------
    training : Training

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = new_figure(1, 2, width=9, height=3.4)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        axis.plot(training.history[name], label="training", color=COLOURS["info"])
        axis.plot(training.history[f"val_{name}"], label="validation", color=COLOURS["warning"])
        axis.axvline(training.best_epoch, color="grey", linestyle=":", label="best epoch")
        axis.set(xlabel="epoch", ylabel=name)
    axes[0].legend(frameon=False)
    figure.suptitle(f"Learning curves; best weights from epoch {training.best_epoch}")
    return figure
