import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from unittest.mock import MagicMock

import distributed
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, make_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    RepeatedStratifiedKFold,
    StratifiedKFold,
)
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator

from helpers import svm
from helpers.kernel_parts import Work
from helpers.kernel_search import KernelGridSearch, LargeSearchWarning
from helpers.preprocessing import make_preprocessor
from helpers.workspace import PROJECT_ROOT

GRID = {"C": [0.1, 1.0, 8.0, 64.0], "gamma": [0.01, 0.1, 1.0]}


def scaled_svm(**options):
    return Pipeline([("scaler", StandardScaler()), ("svc", SVC(kernel="rbf", **options))])


def make_data(classes=3, rows=150, columns=8, seed=0, **options):
    return make_classification(
        n_samples=rows,
        n_features=columns,
        n_informative=min(columns, 6),
        n_redundant=0,
        n_classes=classes,
        flip_y=0.1,
        random_state=seed,
        **options,
    )


def named(pipeline, grid):
    """Return a grid under the names of the pipeline's parameters."""
    step = f"{pipeline.steps[-1][0]}__" if isinstance(pipeline, Pipeline) else ""
    return {f"{step}{name}": values for name, values in grid.items()}


def search(pipeline, grid, X, y, **options):
    return KernelGridSearch(clone(pipeline), named(pipeline, grid), **options).fit(X, y)


def both(pipeline, grid, X, y, **options):
    """Fit both searches on the same data with the same folds."""
    ours = search(pipeline, grid, X, y, **options)
    theirs = GridSearchCV(clone(pipeline), named(pipeline, grid), n_jobs=1, **options)
    return ours, theirs.fit(X, y)


def assert_equal_searches(ours, theirs):
    assert ours.n_splits_ == theirs.n_splits_
    assert set(ours.cv_results_) == set(theirs.cv_results_)
    for name, expected in theirs.cv_results_.items():
        values = ours.cv_results_[name]
        if name == "params" or name.startswith("param_"):
            assert list(values) == list(expected)
        elif not name.endswith("_time"):
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12, err_msg=name)
    assert ours.best_index_ == theirs.best_index_
    assert ours.best_params_ == theirs.best_params_
    assert ours.best_score_ == pytest.approx(theirs.best_score_, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_ranks_and_winner_equal_gridsearchcv(classes):
    ours, theirs = both(scaled_svm(), GRID, *make_data(classes, rows=200))
    assert_equal_searches(ours, theirs)
    assert len(set(ours.cv_results_["mean_test_score"])) > 3


def test_balanced_class_weights_equal_gridsearchcv():
    X, y = make_data(3, weights=[0.7, 0.2, 0.1])
    ours, theirs = both(scaled_svm(class_weight="balanced"), GRID, X, y)
    assert_equal_searches(ours, theirs)
    plain = search(scaled_svm(), GRID, X, y)
    assert (plain.cv_results_["mean_test_score"] != ours.cv_results_["mean_test_score"]).any()


def test_explicit_class_weights_equal_gridsearchcv():
    X, y = make_data(3, weights=[0.7, 0.2, 0.1])
    weights = {0: 0.05, 1: 4.0, 2: 9.0}
    assert_equal_searches(*both(scaled_svm(class_weight=weights), GRID, X, y))


def test_preprocessing_of_rare_categories_is_fitted_inside_each_fold(small_frame):
    frame = small_frame(rows=180)
    random = np.random.default_rng(1)
    frame["rare"] = random.choice(list("abcdefghijklmnop"), len(frame)).astype(object)
    frame.loc[::9, "length"] = np.nan
    X, y = frame.drop(columns="Target"), frame["Target"]
    preprocessing = make_preprocessor(["length", "width", "age"], ["city", "course", "rare"])
    pipeline = Pipeline([("preprocessing", preprocessing), ("svc", SVC(kernel="rbf"))])
    ours, theirs = both(pipeline, GRID, X, y)
    assert_equal_searches(ours, theirs)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


def test_fewer_rows_than_columns_equal_gridsearchcv():
    X, y = make_data(3, rows=45, columns=120)
    assert_equal_searches(*both(scaled_svm(), GRID, X, y, cv=3))


@pytest.mark.parametrize(
    "grid",
    [
        {"C": [1.0], "gamma": [0.1]},
        {"C": [0.5, 2.0], "gamma": [0.1]},
        {"C": [1.0], "gamma": [0.05, 0.2]},
    ],
)
def test_ranges_of_one_value_equal_gridsearchcv(grid):
    assert_equal_searches(*both(scaled_svm(), grid, *make_data()))


def test_values_in_any_order_and_of_any_number_type_equal_gridsearchcv():
    grid = {"C": np.array([8.0, 0.5, 2.0]), "gamma": (1, 0.03125)}
    assert_equal_searches(*both(scaled_svm(), grid, *make_data()))


@pytest.mark.parametrize("gamma", ["scale", "auto"])
def test_named_gammas_equal_gridsearchcv(gamma):
    X, y = make_data()
    pipeline = Pipeline([("scaler", StandardScaler(with_std=False)), ("svc", SVC())])
    assert_equal_searches(*both(pipeline, {"C": [0.5, 4.0], "gamma": [gamma]}, 3 * X, y))


@pytest.mark.parametrize(
    ("scoring", "classes"),
    [
        ("f1_macro", 3),
        ("balanced_accuracy", 3),
        ("roc_auc", 2),
        ("average_precision", 2),
        (make_scorer(f1_score, average="weighted"), 3),
    ],
    ids=["f1_macro", "balanced_accuracy", "roc_auc", "average_precision", "callable"],
)
def test_other_scores_equal_gridsearchcv(scoring, classes):
    assert_equal_searches(*both(scaled_svm(), GRID, *make_data(classes), scoring=scoring))


@pytest.mark.parametrize(
    "cv",
    [
        3,
        StratifiedKFold(4, shuffle=True, random_state=3),
        KFold(3, shuffle=True, random_state=1),
    ],
    ids=["number", "stratified and shuffled", "plain and shuffled"],
)
def test_other_folds_equal_gridsearchcv(cv):
    assert_equal_searches(*both(scaled_svm(), GRID, *make_data(), cv=cv))


def test_text_labels_and_series_equal_gridsearchcv():
    X, y = make_data()
    names = pd.Series(np.array(["low", "middle", "high"])[y], index=range(1000, 1000 + len(y)))
    ours, theirs = both(scaled_svm(), GRID, X, names)
    assert_equal_searches(ours, theirs)
    assert set(ours.predict(X)) <= {"low", "middle", "high"}


def test_decision_shape_and_tie_breaking_of_the_estimator_are_kept():
    options = {"decision_function_shape": "ovr", "break_ties": True}
    assert_equal_searches(*both(scaled_svm(**options), GRID, *make_data(5, rows=200)))


def test_threads_do_not_change_the_answer():
    X, y = make_data()
    one, two = (search(scaled_svm(), GRID, X, y, n_jobs=n) for n in (1, 2))
    for name, values in one.cv_results_.items():
        if "time" not in name:
            np.testing.assert_array_equal(values, two.cv_results_[name])
    assert one.n_fits_ == two.n_fits_


def test_fits_are_saved_once_c_no_longer_binds():
    X, y = make_data(2, rows=120, class_sep=3.0)
    grid = {"C": [2.0**power for power in range(-2, 12)], "gamma": [0.5, 2.0]}
    ours, theirs = both(scaled_svm(), grid, X, y)
    assert ours.n_fits_ < 14 * 2 * 5 / 2
    assert_equal_searches(ours, theirs)


def test_every_pair_is_fitted_while_c_binds():
    X, y = make_data(2, rows=120)
    grid = {"C": [1e-4, 1e-3], "gamma": [0.01, 0.1]}
    assert search(scaled_svm(), grid, X, y).n_fits_ == 2 * 2 * 5


def test_refitted_model_predicts_as_that_of_gridsearchcv():
    X, y = make_data()
    ours, theirs = both(scaled_svm(), GRID, X[:100], y[:100])
    np.testing.assert_array_equal(ours.predict(X[100:]), theirs.predict(X[100:]))
    np.testing.assert_allclose(
        ours.best_estimator_.decision_function(X[100:]),
        theirs.best_estimator_.decision_function(X[100:]),
    )


def test_without_refit_there_is_no_prediction():
    X, y = make_data()
    ours = search(scaled_svm(), GRID, X, y, refit=False)
    assert not hasattr(ours, "predict")
    assert not hasattr(ours, "best_estimator_")


def test_estimator_and_grid_given_are_left_as_they_were():
    X, y = make_data()
    pipeline, grid = scaled_svm(C=7.0), {"C": [2.0, 1.0], "gamma": [0.1]}
    search(pipeline, grid, X, y)
    assert pipeline.get_params()["svc__C"] == 7.0
    assert not hasattr(pipeline[-1], "support_")
    assert grid == {"C": [2.0, 1.0], "gamma": [0.1]}


def no_score_of_a_fold(y_true, y_pred):
    return np.nan if len(y_true) == 51 else float(np.mean(y_true == y_pred))


def no_score_of_one_class(y_true, y_pred):
    return np.nan if len(set(y_pred)) == 1 else float(np.mean(y_true == y_pred))


@pytest.mark.filterwarnings("ignore:One or more of the test scores are non-finite")
@pytest.mark.parametrize("score", [no_score_of_a_fold, no_score_of_one_class])
def test_scores_that_are_no_numbers_stay_with_their_fold_and_pair(score):
    X, y = make_data(2, rows=151, weights=[0.7, 0.3])
    grid = {"C": [1e-3, 1.0, 8.0], "gamma": [0.01, 0.1]}
    ours, theirs = both(scaled_svm(), grid, X, y, scoring=make_scorer(score), cv=KFold(3))
    missing = np.isnan(ours.cv_results_["split0_test_score"])
    assert missing.any()
    for fold in range(3):
        name = f"split{fold}_test_score"
        np.testing.assert_allclose(ours.cv_results_[name], theirs.cv_results_[name], atol=1e-12)
    assert ours.cv_results_["rank_test_score"].tolist() == (
        theirs.cv_results_["rank_test_score"].tolist()
    )
    assert ours.best_params_ == theirs.best_params_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning", "ignore:One or more")
def test_fold_in_which_a_c_fails_gets_the_error_score_and_the_others_their_own():
    X, y = make_data()
    grid = {"C": [-1.0, 0.5, 8.0], "gamma": [0.1, 1.0]}
    for error_score in (np.nan, 0.125):
        ours, theirs = both(scaled_svm(), grid, X, y, error_score=error_score)
        assert_equal_searches(ours, theirs)
    with pytest.raises(ValueError, match="'C' parameter of SVC"):
        search(scaled_svm(), grid, X, y, error_score="raise")
    with pytest.raises(ValueError, match="All the 10 fits failed"):
        search(scaled_svm(), {"C": [-1.0], "gamma": [0.1, 1.0]}, X, y)


@pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.FitFailedWarning", "ignore:One or more", "ignore:The least"
)
def test_fold_without_a_second_class_fails_alone():
    X, y = make_data(2, rows=60)
    y = np.sort(y)
    folds = [(np.flatnonzero(y == 0), np.flatnonzero(y == 1)), (np.arange(0, 60, 2), [1, 3, 57])]
    ours, theirs = both(scaled_svm(), GRID, X, y, cv=folds)
    assert np.isnan(ours.cv_results_["split0_test_score"]).all()
    assert_equal_searches(ours, theirs)


def fails_on_large_answers(y_true, y_pred):
    if np.mean(y_pred) > 0.9:
        raise RuntimeError("no score for this")
    return np.mean(y_true == y_pred)


@pytest.mark.filterwarnings("ignore:Scoring failed", "ignore:One or more")
def test_scorer_that_fails_for_some_gives_them_the_error_score():
    X, y = make_data(2, weights=[0.2, 0.8])
    options = {"scoring": make_scorer(fails_on_large_answers), "error_score": 0.25}
    ours, theirs = both(scaled_svm(), GRID, X, y, **options)
    assert (ours.cv_results_["split0_test_score"] == 0.25).any()
    assert_equal_searches(ours, theirs)


@pytest.mark.parametrize("classes", [2, 3])
def test_train_scores_equal_gridsearchcv(classes):
    X, y = make_data(classes)
    assert_equal_searches(*both(scaled_svm(), GRID, X, y, return_train_score=True))


@pytest.mark.parametrize("shape", ["ovr", "ovo"])
def test_several_scores_at_once_equal_gridsearchcv(shape):
    X, y = make_data(3)
    pipeline = scaled_svm(decision_function_shape=shape)
    several = {"accuracy": "accuracy", "f1": "f1_macro"}
    for scoring in (several, ["accuracy", "f1_macro"]):
        refit = list(scoring)[1]
        ours, theirs = both(pipeline, GRID, X, y, scoring=scoring, refit=refit)
        assert_equal_searches(ours, theirs)
        assert ours.score(X, y) == theirs.score(X, y)
    with pytest.raises(ValueError, match="refit must be set to a scorer key"):
        search(pipeline, GRID, X, y, scoring=several)


def both_scores(estimator, X, y):
    answers = estimator.predict(X)
    return {"right": np.mean(answers == y), "first": np.mean(answers == 0)}


def test_callables_for_scoring_and_refit_equal_gridsearchcv():
    X, y = make_data(3)
    ours, theirs = both(scaled_svm(), GRID, X, y, scoring=both_scores, refit="right")
    assert_equal_searches(ours, theirs)
    options = {"refit": lambda results: int(np.argmin(results["mean_test_score"]))}
    ours, theirs = both(scaled_svm(), GRID, X, y, **options)
    assert ours.best_params_ == theirs.best_params_
    assert not hasattr(ours, "best_score_")


@pytest.mark.filterwarnings("ignore:The `probability` parameter")
@pytest.mark.parametrize("scoring", ["neg_log_loss", "roc_auc_ovr", "accuracy"])
def test_scores_of_libsvms_probabilities_equal_gridsearchcv(scoring):
    X, y = make_data(3, rows=120)
    grid = {"C": [0.5, 8.0], "gamma": [0.05, 0.5]}
    pipeline = scaled_svm(probability=True, random_state=4)
    options = {"scoring": scoring, "return_train_score": True}
    for budget in (None, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LargeSearchWarning)
            ours = search(pipeline, grid, X, y, memory_budget=budget, **options)
        theirs = GridSearchCV(clone(pipeline), named(pipeline, grid), **options).fit(X, y)
        # The probabilities come from fits inside libsvm, which end at its tolerance.
        for name, expected in theirs.cv_results_.items():
            if name.endswith("_score") and "rank" not in name:
                np.testing.assert_allclose(ours.cv_results_[name], expected, atol=1e-6)


def test_sparse_one_hot_input_equals_gridsearchcv(small_frame):
    frame = small_frame(rows=150)
    X, y = frame[["city", "course"]].astype(str), frame["Target"]
    for svc in (SVC(), SVC(class_weight="balanced", gamma="scale")):
        pipeline = Pipeline([("encoder", OneHotEncoder(handle_unknown="ignore")), ("svc", svc)])
        grid = {"C": [0.5, 4.0, 64.0], "gamma": [0.05, 0.5, "scale"]}
        ours, theirs = both(pipeline, grid, X, y, return_train_score=True)
        assert_equal_searches(ours, theirs)


def test_repeated_and_grouped_folds_equal_gridsearchcv():
    X, y = make_data(3, rows=90)
    cv = RepeatedStratifiedKFold(n_splits=3, n_repeats=2, random_state=5)
    assert_equal_searches(*both(scaled_svm(), GRID, X, y, cv=cv))
    groups = np.arange(90) // 5
    options = {"cv": GroupKFold(3), "refit": False}
    ours = KernelGridSearch(scaled_svm(), named(scaled_svm(), GRID), **options)
    theirs = GridSearchCV(scaled_svm(), named(scaled_svm(), GRID), **options)
    assert_equal_searches(ours.fit(X, y, groups=groups), theirs.fit(X, y, groups=groups))


def test_plain_svc_and_lists_of_grids_equal_gridsearchcv():
    X, y = make_data(3)
    assert_equal_searches(*both(SVC(tol=1e-4, shrinking=False), GRID, X, y))
    grids = [{"svc__C": [1.0, 4.0]}, {"svc__C": [0.5], "svc__gamma": [0.1, 0.2]}]
    ours = KernelGridSearch(scaled_svm(), grids).fit(X, y)
    assert_equal_searches(ours, GridSearchCV(scaled_svm(), grids).fit(X, y))


@pytest.mark.parametrize(
    ("estimator", "grid", "reason"),
    [
        (SVC(kernel="linear"), {"C": [1.0]}, "kernel='rbf'"),
        (LogisticRegression(), {"C": [1.0]}, "kernel='rbf'"),
        (SVC(), {"C": [1.0], "tol": [0.1]}, "not tol"),
        (scaled_svm(), {"C": [1.0]}, "svc__C and svc__gamma, not C"),
    ],
)
def test_other_estimators_and_parameters_are_refused(estimator, grid, reason):
    with pytest.raises(ValueError, match=reason):
        KernelGridSearch(estimator, grid).fit(*make_data())


@pytest.mark.slow
def test_scikit_learns_own_checks_of_estimators():
    names = {"C": [0.5, 2.0], "gamma": [0.1, 1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(KernelGridSearch(SVC(), names, cv=3), on_fail=None)
    assert len(results) > 40
    assert [each["check_name"] for each in results if each["status"] == "failed"] == []


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_without_memory_for_kernels_the_scores_are_the_same_and_the_time_is_said(sparse):
    X, y = make_data(3, rows=160)
    X = scipy.sparse.csr_matrix(np.where(X > 0.5, X, 0)) if sparse else X
    pipeline = Pipeline([("svc", SVC())])
    with pytest.warns(LargeSearchWarning, match=r"about \d+ min on 2 threads.*memory_budget"):
        ours = search(pipeline, GRID, X, y, memory_budget=1000, n_jobs=2, return_train_score=True)
    theirs = GridSearchCV(pipeline, named(pipeline, GRID), return_train_score=True).fit(X, y)
    assert_equal_searches(ours, theirs)


def test_memory_budget_bounds_the_number_of_threads():
    X, y = make_data(3, rows=150)
    splits = list(StratifiedKFold(5).split(X, y))
    work = Work(scaled_svm(), X, y, splits, [(0.1, [1.0])], {}, False, np.nan, None)
    distances, kernel = work.sizes()
    assert distances == 8 * 120 * 150
    for threads, folds in ((1, 1), (2, 1), (3, 1)):
        work.budget = distances + threads * kernel
        assert work.plan(8) == (True, threads, folds)
    work.budget = 2 * distances + 4 * kernel
    assert work.plan(4) == (True, 4, 2)
    work.budget = distances
    assert work.plan(4) == (False, 4, 1)


# --- going on after an interrupt ------------------------------------------------------------------


def same_scores(first, second):
    for name, values in first.cv_results_.items():
        if "time" not in name:
            np.testing.assert_array_equal(values, second.cv_results_[name])


def test_finished_parts_are_not_searched_again(tmp_path):
    X, y = make_data()
    first = search(scaled_svm(), GRID, X, y, cache_dir=tmp_path)
    again = search(scaled_svm(), GRID, X, y, cache_dir=tmp_path)
    assert (first.n_parts_resumed_, again.n_parts_resumed_) == (0, 15)
    same_scores(first, again)
    assert again.n_fits_ == first.n_fits_
    (folder,) = tmp_path.iterdir()
    (folder / "0-0.json").write_text("")
    (folder / "1-2.json").unlink()
    repaired = search(scaled_svm(), GRID, X, y, cache_dir=tmp_path)
    assert repaired.n_parts_resumed_ == 13
    same_scores(first, repaired)


CHANGES = {
    "a value": lambda given: given["X"].__setitem__((3, 2), given["X"][3, 2] + 1e-9),
    "a label": lambda given: given["y"].__setitem__(0, (given["y"][0] + 1) % 3),
    "another fold": lambda given: given.update(cv=4),
    "other rows in the folds": lambda given: given.update(
        cv=StratifiedKFold(5, shuffle=True, random_state=0)
    ),
    "another C": lambda given: given["grid"].update(C=[0.1, 1.0, 8.0, 65.0]),
    "another gamma": lambda given: given["grid"].update(gamma=[0.01, 0.1, 1.5]),
    "another setting of the SVC": lambda given: given.update(pipeline=scaled_svm(tol=1e-4)),
    "another preprocessing": lambda given: given["pipeline"].set_params(scaler__with_std=False),
    "another score": lambda given: given.update(scoring="f1_macro"),
    "train scores": lambda given: given.update(return_train_score=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_input_never_takes_old_parts(change, tmp_path):
    X, y = make_data()
    given = {"pipeline": scaled_svm(), "grid": dict(GRID), "X": X, "y": y, "cache_dir": tmp_path}
    search(**given)
    change(given)
    changed = search(**given)
    assert changed.n_parts_resumed_ == 0
    given.pop("cache_dir")
    same_scores(changed, search(**given))


KILLED = """
import sys
import numpy as np
from sklearn.datasets import make_classification
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from helpers.kernel_search import KernelGridSearch
X, y = make_classification(500, 12, n_informative=6, n_classes=3, flip_y=0.2, random_state=0)
grid = {"svc__C": [2.0**e for e in range(-3, 6)], "svc__gamma": [2.0**e for e in range(-6, 2)]}
pipeline = make_pipeline(StandardScaler(), SVC())
found = KernelGridSearch(pipeline, grid, n_jobs=2, cache_dir=sys.argv[1]).fit(X, y)
np.save(sys.argv[2], found.cv_results_["mean_test_score"])
print(found.n_parts_resumed_)
"""


@pytest.mark.slow
def test_search_killed_in_the_middle_goes_on_in_another_process(tmp_path):
    def start(folder, result):
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(tmp_path / result)]
        return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)

    process = start("kept", "a.npy")
    while len(list((tmp_path / "kept").rglob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = len(list((tmp_path / "kept").rglob("*.json")))
    assert 5 <= finished < 40
    output, _ = start("kept", "b.npy").communicate()
    assert int(output) == finished
    output, _ = start("new", "c.npy").communicate()
    assert int(output) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), np.load(tmp_path / "c.npy"))


# --- on a cluster ------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two worker processes on loopback, which do not have the project."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "10"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def start(*command):
        return subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    place = ["--host", "127.0.0.1"]
    port = address.rsplit(":", 1)[1]
    scheduler = start("dask_scheduler", *place, "--port", port, "--no-dashboard")
    workers = [
        start("dask_worker", address, *place, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        for _ in range(2)
    ]
    with distributed.Client(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
    yield address, workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


@pytest.mark.slow
def test_cluster_gives_the_same_scores_though_one_of_two_workers_is_killed(
    cluster, tmp_path, small_split
):
    address, workers = cluster
    small_grid = svm.make_grid([-2, 0, 3], [-5, -2])
    here, there = (
        svm.search(small_split, small_grid, folds=3, scheduler=scheduler)
        for scheduler in (None, address)
    )
    same_scores(here, there)
    X, y = make_data(3, rows=500, columns=12)
    grid = {"C": [2.0**e for e in range(-3, 6)], "gamma": [2.0**e for e in range(-6, 2)]}

    def kill_one():
        while len(list(tmp_path.rglob("*.json"))) < 6:
            time.sleep(0.01)
        workers[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with distributed.Client(address) as client:
        there = search(scaled_svm(), grid, X, y, client=client, cache_dir=tmp_path)
        assert len(client.scheduler_info()["workers"]) == 1
    killer.join()
    assert workers[0].poll() is not None
    same_scores(there, search(scaled_svm(), grid, X, y, n_jobs=2))


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 4),
    rows=st.integers(60, 110),
    columns=st.integers(6, 30),
    powers=st.lists(st.integers(-5, 8), min_size=1, max_size=4, unique=True),
    gammas=st.lists(st.integers(-7, 2), min_size=1, max_size=3, unique=True),
)
def test_any_small_table_gives_the_scores_of_gridsearchcv(
    seed, classes, rows, columns, powers, gammas
):
    X, y = make_data(classes, rows=rows, columns=columns, seed=seed)
    grid = {"C": [2.0**p for p in powers], "gamma": [2.0**p for p in gammas]}
    assert_equal_searches(*both(scaled_svm(), grid, X, y, cv=3))


# --- the search of notebook 03 -----------------------------------------------------------------


def test_notebook_search_equals_gridsearchcv_on_the_training_rows(small_split):
    grid = svm.make_grid([-2, 0, 3], [-5, -2])
    searcher = svm.search(small_split, grid, folds=3, n_jobs=2)
    expected = GridSearchCV(
        svm.make_pipeline(small_split),
        {f"svc__{name}": values for name, values in grid.items()},
        cv=StratifiedKFold(3),
        n_jobs=1,
    ).fit(small_split.X_train, small_split.y_train)
    assert_equal_searches(searcher, expected)
    assert svm.best_pair(searcher) == {
        "C": expected.best_params_["svc__C"],
        "gamma": expected.best_params_["svc__gamma"],
    }


def test_training_passes_the_number_of_threads_and_what_to_keep_on(small_split, monkeypatch):
    searcher, fitted = MagicMock(), MagicMock()
    searcher.return_value = svm.search(small_split, svm.make_grid([0, 1], [-5]), folds=3)
    monkeypatch.setattr(svm, "search", searcher)
    monkeypatch.setattr(svm, "fit_best", fitted)
    monkeypatch.setattr(svm, "log_search", MagicMock())
    tracked = MagicMock()
    tracked.evaluate_logged_model.return_value = ({}, None)
    monkeypatch.setattr(svm, "tracking", tracked)
    svm.train_and_log(small_split, {}, "svm", folds=3, n_jobs=3, keep="here", scheduler="there")
    assert searcher.call_args.args[2:] == (3, 3, "here", "there")
    assert fitted.call_args.kwargs["n_jobs"] == 3


def test_finer_grid_surrounds_the_winner_with_steps_of_root_two(small_split):
    searcher = svm.search(small_split, svm.make_grid([0, 1], [-5, -4]), folds=3)
    best, fine = svm.best_pair(searcher), svm.finer_grid(searcher)
    for name, values in fine.items():
        np.testing.assert_allclose(np.divide(values[1:], values[:-1]), np.sqrt(2))
        assert values[2] == best[name]
    again = svm.search(small_split, fine, folds=3)
    assert again.best_score_ >= searcher.best_score_


def test_plot_of_savings_shows_what_was_solved(small_split):
    grid = svm.make_grid([-3, 6, 9], [-5, 3])
    searcher = svm.search(small_split, grid, folds=3)
    figure = svm.plot_savings(searcher, grid)
    share, seconds = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert share.shape == seconds.shape == (3, 2)
    assert share[0].tolist() == [1, 1]
    assert share[2, 1] < 1
    assert (seconds > 0).all()


def test_scheduler_that_is_not_there_is_said_naming_the_parameter(small_split, monkeypatch):
    monkeypatch.setattr(svm, "CLUSTER_TIMEOUT", 1)
    grid = svm.make_grid([0], [0])
    for address in ("tcp://127.0.0.1:9", "nowhere at all"):
        with pytest.raises(svm.ParameterError, match=f"DASK_SCHEDULER = '{address}' cannot"):
            svm.search(small_split, grid, folds=3, scheduler=address)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(svm.ParameterError, match="DASK_SCHEDULER needs .* pip install"):
        svm.search(small_split, grid, folds=3, scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize("n_jobs", [0, 1, -1])
def test_number_of_threads_does_not_change_the_calibrated_model(small_split, n_jobs):
    model = svm.fit_best(small_split, 1.0, 0.1, folds=3, n_jobs=n_jobs)
    same = svm.fit_best(small_split, 1.0, 0.1, folds=3)
    answers = [each.predict_proba(small_split.X_test) for each in (model, same)]
    np.testing.assert_array_equal(*answers)


def test_default_grid_is_the_documented_one():
    grid = svm.make_grid(range(-5, 7), range(-5, 7))
    assert grid["C"] == grid["gamma"] == [2.0**power for power in range(-5, 7)]
    assert len(grid["C"]) * len(grid["gamma"]) == 144


@pytest.mark.parametrize("exponents", [[], ["a"], [None], [5000], [-5000], [float("nan")], "x"])
def test_unusable_exponents_are_refused_naming_the_parameter(exponents):
    with pytest.raises(svm.ParameterError, match="C_EXPONENTS"):
        svm.make_grid(exponents, [0])
    with pytest.raises(svm.ParameterError, match="GAMMA_EXPONENTS"):
        svm.make_grid([0], exponents)


def test_more_folds_than_rows_of_a_class_are_refused_naming_the_parameter(small_split):
    fewest = small_split.y_train.value_counts().min()
    with pytest.raises(svm.ParameterError, match=f"CV_FOLDS = {fewest + 1} .*has {fewest}"):
        svm.search(small_split, svm.make_grid([0], [0]), folds=fewest + 1)


def test_winner_on_the_edge_is_said(small_split, capsys):
    grid = svm.make_grid([-9, -8], [-5])
    searcher = svm.search(small_split, grid, folds=3)
    svm.warn_on_edge(searcher, grid)
    shown = capsys.readouterr().out
    assert "C_EXPONENTS" in shown
    assert "GAMMA_EXPONENTS" not in shown
