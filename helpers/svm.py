"""Notebook 03: the RBF support vector machine and its grid of C and gamma."""

from contextlib import contextmanager
from dataclasses import dataclass

import mlflow
import numpy as np
import pandas as pd
from joblib import parallel_config
from mlflow.models.model import ModelInfo
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC

from helpers import smo, tracking
from helpers.display import new_figure, notice
from helpers.kernel_search import KernelGridSearch
from helpers.preprocessing import make_preprocessor
from helpers.workspace import ParameterError

CLUSTER_TIMEOUT = 20  # seconds to wait for a scheduler


def make_pipeline(split):
    """Make the preprocessing and the RBF SVM, unfitted.

    Parameters
    ----------
    split : helpers.data.Split
        Gives the names of the columns.

    Returns
    -------
    sklearn.pipeline.Pipeline
        Steps ``preprocessing`` and ``svc``.
    """
    preprocessing = make_preprocessor(split.numeric, split.categorical)
    return Pipeline([("preprocessing", preprocessing), ("svc", SVC(kernel="rbf"))])


def prepare():
    """Compile the solver in the background; the first search on a machine waits for it."""
    smo.prepare()


def make_grid(C_exponents, gamma_exponents):
    """Make the grid from powers of two.

    Parameters
    ----------
    C_exponents, gamma_exponents : sequence of int or float
        ``-5`` stands for 2⁻⁵.

    Returns
    -------
    dict
        ``{"C": list of float, "gamma": list of float}``, both ascending.

    Raises
    ------
    ParameterError
        If an exponent is not a number or none is given.
    """
    grid = {}
    for name, exponents in {"C": C_exponents, "gamma": gamma_exponents}.items():
        try:
            values = sorted({2.0 ** float(exponent) for exponent in exponents})
        except (TypeError, ValueError, OverflowError):
            values = []
        if not values or not all(0 < value < np.inf for value in values):
            raise ParameterError(
                f"{name.upper()}_EXPONENTS must be a list of numbers such as [-5, 0, 6], "
                f"not {exponents!r}."
            )
        grid[name] = values
    return grid


@contextmanager
def _cluster(scheduler):
    """Give a client of a dask scheduler, or None."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ParameterError(
            "DASK_SCHEDULER needs the package distributed: pip install distributed. Without "
            "DASK_SCHEDULER the search runs on this machine."
        ) from None
    try:
        client = Client(scheduler, timeout=CLUSTER_TIMEOUT)
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"DASK_SCHEDULER = {scheduler!r} cannot be reached ({error}). Check the address, such "
            "as tcp://10.0.0.5:8786, or leave it out to search on this machine."
        ) from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise ParameterError(
                f"DASK_SCHEDULER = {scheduler!r} has no workers. Start one with: dask worker "
                f"{scheduler}"
            )
        yield client


def search(split, grid, folds=5, n_jobs=-1, keep=None, scheduler=None):
    """Search the grid by cross-validated accuracy on the training rows.

    Parameters
    ----------
    split : helpers.data.Split
    grid : dict
        From `make_grid`.
    folds : int
        Stratified folds, in the order of the rows, which the split has shuffled already.
    n_jobs : int
        Threads; -1: one per core.
    keep : pathlib.Path, optional
        Folder that keeps finished parts: an interrupted search goes on from there.
    scheduler : str, optional
        Address of a dask scheduler whose workers search instead of this machine.

    Returns
    -------
    helpers.kernel_search.KernelGridSearch
        Fitted; not refitted on all rows, see `fit_best`.

    Raises
    ------
    ParameterError
        If a class has too few rows for the folds, or the scheduler cannot be used.
    """
    fewest = int(split.y_train.value_counts().min())
    if fewest < folds:
        raise ParameterError(
            f"CV_FOLDS = {folds} needs {folds} training rows of each class, but the smallest "
            f"class has {fewest}. Use fewer folds."
        )
    with _cluster(scheduler) as client:
        searcher = KernelGridSearch(
            make_pipeline(split),
            {f"svc__{name}": values for name, values in grid.items()},
            scoring="accuracy",
            cv=StratifiedKFold(folds),
            refit=False,
            n_jobs=n_jobs,
            error_score="raise",
            cache_dir=keep,
            client=client,
            progress=True,
        )
        searcher.fit(split.X_train, split.y_train)
    return searcher.set_params(client=None)


def fit_best(split, C, gamma, folds=5, n_jobs=-1):
    """Fit the SVM of one pair on all training rows, with class probabilities.

    An SVM gives scores, not probabilities. Platt's sigmoids [1]_, fitted to the scores of rows
    held out in turn, translate them; the SVM itself is fitted once, on all training rows.

    Parameters
    ----------
    split : helpers.data.Split
    C, gamma : float
    folds : int
        Folds of the calibration.
    n_jobs : int
        Threads; -1: one per core.

    Returns
    -------
    sklearn.calibration.CalibratedClassifierCV
        Fitted; its ``predict`` gives the class of the highest probability.

    References
    ----------
    .. [1] J. Platt (1999). Probabilistic outputs for support vector machines and comparisons
       to regularized likelihood methods. *Advances in Large Margin Classifiers*, 61-74.
    """
    pipeline = make_pipeline(split).set_params(svc__C=C, svc__gamma=gamma)
    calibrated = CalibratedClassifierCV(
        pipeline, method="sigmoid", cv=StratifiedKFold(folds), ensemble=False
    )
    with parallel_config("threading", n_jobs=n_jobs or 1):
        return calibrated.fit(split.X_train, split.y_train)


def best_pair(searcher):
    """Return the winning C and gamma of a search as plain floats."""
    return {
        name.removeprefix("svc__"): float(value) for name, value in searcher.best_params_.items()
    }


def finer_grid(searcher):
    """Make a grid around the winner of a search, with steps of √2.

    Parameters
    ----------
    searcher : KernelGridSearch

    Returns
    -------
    dict
        For `search`: five values each of C and gamma, from half to twice the winner's.
    """
    exponents = (-1, -0.5, 0, 0.5, 1)
    return {
        name: [value * 2.0**exponent for exponent in exponents]
        for name, value in best_pair(searcher).items()
    }


def edges(searcher, grid):
    """Tell which parameters win on the edge of their range.

    Parameters
    ----------
    searcher : KernelGridSearch
    grid : dict

    Returns
    -------
    list of str
        ``C`` and ``gamma`` where the winner is the smallest or largest of several values.
    """
    pair = best_pair(searcher)
    return [
        name
        for name, values in grid.items()
        if len(values) > 1 and pair[name] in (min(values), max(values))
    ]


def warn_on_edge(searcher, grid):
    """Say so if the grid wins on its edge: a better pair may lie outside."""
    for name in edges(searcher, grid):
        notice(
            f"The best {name} = {best_pair(searcher)[name]:g} lies on the edge of the grid "
            f"({min(grid[name]):g} … {max(grid[name]):g}). A better value may lie outside: "
            f"widen {name.upper()}_EXPONENTS and search again.",
            level="warning",
        )


def results_table(searcher):
    """Return ``cv_results_`` as a table, the best pairs first.

    Returns
    -------
    pandas.DataFrame, shape (n_pairs, ...)
    """
    table = pd.DataFrame(searcher.cv_results_).drop(columns="params")
    table = table.rename(columns=lambda name: name.replace("param_svc__", ""))
    return table.sort_values("rank_test_score", kind="stable").reset_index(drop=True)


def _power(value):
    exponent = np.log2(value)
    return f"$2^{{{exponent:g}}}$"


def plot_grid(searcher, grid):
    """Draw the mean accuracy over the grid as a heat map, the winner marked.

    Parameters
    ----------
    searcher : KernelGridSearch
    grid : dict

    Returns
    -------
    matplotlib.figure.Figure
    """
    means = searcher.cv_results_["mean_test_score"].reshape(len(grid["C"]), len(grid["gamma"]))
    figure, axes = new_figure(
        width=1.6 + 0.55 * len(grid["gamma"]), height=1.4 + 0.42 * len(grid["C"])
    )
    image = axes.imshow(means, origin="lower", cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(grid["gamma"])), [_power(value) for value in grid["gamma"]])
    axes.set_yticks(range(len(grid["C"])), [_power(value) for value in grid["C"]])
    row, column = np.unravel_index(searcher.best_index_, means.shape)
    middle = (means.min() + means.max()) / 2
    for (i, j), mean in np.ndenumerate(means):
        colour = "black" if mean > middle else "white"
        axes.text(j, i, f"{mean:.3f}", ha="center", va="center", fontsize=6, color=colour)
    axes.scatter(column, row, s=420, facecolors="none", edgecolors="red", linewidths=2)
    pair = best_pair(searcher)
    axes.set(
        xlabel="gamma",
        ylabel="C",
        title=f"Mean accuracy over {searcher.n_splits_} folds; best: C = {pair['C']:g}, "
        f"gamma = {pair['gamma']:g}",
    )
    figure.colorbar(image, ax=axes, label="accuracy")
    return figure


def plot_savings(searcher, grid):
    """Draw which machines of the grid were solved, and which solutions were known already.

    Parameters
    ----------
    searcher : KernelGridSearch
    grid : dict

    Returns
    -------
    matplotlib.figure.Figure
    """
    shape = len(grid["C"]), len(grid["gamma"])
    seconds = searcher.cv_results_["mean_fit_time"].reshape(shape) * 1000
    solved = searcher.solved_.reshape(shape)
    figure, (left, right) = new_figure(1, 2, width=10, height=1.4 + 0.34 * shape[0])
    panels = {
        "Share of the machines that were solved": (left, solved, "Blues", 0, 1),
        "Milliseconds per fold": (right, seconds, "Oranges", 0, None),
    }
    for title, (axes, values, colours, low, high) in panels.items():
        image = axes.imshow(values, origin="lower", cmap=colours, vmin=low, vmax=high)
        axes.set_aspect("auto")
        axes.set_xticks(range(shape[1]), [_power(value) for value in grid["gamma"]])
        axes.set_yticks(range(shape[0]), [_power(value) for value in grid["C"]])
        axes.set(xlabel="gamma", ylabel="C", title=title)
        figure.colorbar(image, ax=axes)
    return figure


def log_search(searcher, grid):
    """Log the heat map, the table of results and the cost of a search in the active run.

    Parameters
    ----------
    searcher : KernelGridSearch
    grid : dict
    """
    mlflow.log_params({"kernel": "rbf", **best_pair(searcher)})
    mlflow.log_params(
        {
            "grid_C": " ".join(f"{value:g}" for value in grid["C"]),
            "grid_gamma": " ".join(f"{value:g}" for value in grid["gamma"]),
            "cv_folds": searcher.n_splits_,
            "edge": ", ".join(edges(searcher, grid)) or "none",
        }
    )
    mlflow.log_metrics(
        {
            "cv_accuracy": searcher.best_score_,
            "cv_accuracy_std": searcher.cv_results_["std_test_score"][searcher.best_index_],
            "search_seconds": searcher.search_time_,
            "search_fits": searcher.n_fits_,
            "search_fits_saved": searcher.n_fits_saved_,
            "search_parts_resumed": searcher.n_parts_resumed_,
        }
    )
    tracking.log_figure(plot_grid(searcher, grid), "grid_search/heat_map.png")
    mlflow.log_text(results_table(searcher).to_csv(index=False), "grid_search/cv_results.csv")


def _best_pairs(searcher, n_best):
    """Return name, parameters and metrics of the best pairs."""
    for row in results_table(searcher).head(n_best).itertuples():
        params = {"kernel": "rbf", "C": float(row.C), "gamma": float(row.gamma)}
        metrics = {
            "cv_accuracy": row.mean_test_score,
            "cv_accuracy_std": row.std_test_score,
            "fit_seconds": row.mean_fit_time,
        }
        yield f"C={row.C:g} gamma={row.gamma:g}", params, metrics


@dataclass(frozen=True)
class Trained:
    """What a search, and the training that follows it, leave behind.

    Attributes
    ----------
    run : mlflow.ActiveRun
    searcher : KernelGridSearch
    pair : dict
        The winning ``C`` and ``gamma``.
    model_info : mlflow.models.model.ModelInfo
    metrics : dict of str to float
        Of the model loaded back, on the test rows.
    answer : pandas.DataFrame
        Its answers on the test rows.
    """

    run: mlflow.ActiveRun
    searcher: KernelGridSearch
    pair: dict
    model_info: ModelInfo
    metrics: dict
    answer: pd.DataFrame


def train_and_log(split, grid, run_name="svm", folds=5, n_jobs=-1, keep=None, scheduler=None):
    """Search, fit the best pair on all training rows, and log it: all in one MLflow run.

    The ten best pairs become child runs. The model is loaded back as a client would and measured
    on the test rows.

    Parameters
    ----------
    split : helpers.data.Split
    grid : dict
    run_name : str
        In the experiment ``svc_model``.
    folds, n_jobs, keep, scheduler
        See `search`.

    Returns
    -------
    Trained
    """
    with tracking.start_run("svc_model", run_name, split.manifest) as run:
        tracking.log_split(split)
        searcher = search(split, grid, folds, n_jobs, keep, scheduler)
        log_search(searcher, grid)
        tracking.log_child_runs(run, _best_pairs(searcher, n_best=10), split.manifest)
        pair = best_pair(searcher)
        classifier = fit_best(split, **pair, folds=folds, n_jobs=n_jobs)
        model_info = tracking.log_model(split, classifier=classifier)
        metrics, answer = tracking.evaluate_logged_model(model_info, split)
    return Trained(run, searcher, pair, model_info, metrics, answer)
