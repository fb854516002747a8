"""The grid search against scikit-learn's own, cell by cell, and what surrounds it."""

import warnings
from types import SimpleNamespace

import distributed
import joblib
import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, make_scorer
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from helpers import tracking
from helpers.models import search as search_module
from helpers.models import svm
from helpers.models.search import KernelGridSearch
from helpers.workspace import ParameterError
from tests.cells import run_cells

GRID = {"svc__C": [0.125, 1.0, 8.0, 64.0, 512.0], "svc__gamma": [0.02, 0.25, 3.0]}


def make_data(classes=3, rows=150, seed=0, **options):
    return make_classification(
        n_samples=rows,
        n_features=8,
        n_informative=6,
        n_redundant=0,
        n_classes=classes,
        flip_y=0.1,
        random_state=seed,
        **options,
    )


def scaled_svm(**options):
    return Pipeline([("scaler", StandardScaler()), ("svc", SVC(**options))])


def both(estimator, grid, X, y, fit=None, **options):
    """Fit both searches; check that all that they leave behind, times apart, is equal."""
    ours, theirs = (
        kind(estimator, grid, **options).fit(X, y, **(fit or {}))
        for kind in (KernelGridSearch, GridSearchCV)
    )
    assert set(ours.cv_results_) == {*theirs.cv_results_, "extension"}
    for name, expected in theirs.cv_results_.items():
        if name == "params" or name.startswith("param_"):
            assert list(ours.cv_results_[name]) == list(expected)
        elif not name.endswith("_time"):
            np.testing.assert_allclose(
                ours.cv_results_[name], expected, rtol=0, atol=1e-9, err_msg=name
            )
    for name in ("best_index_", "best_params_", "best_score_", "n_splits_", "multimetric_"):
        assert getattr(ours, name, None) == getattr(theirs, name, None)
    assert hasattr(ours, "predict") == hasattr(theirs, "predict")
    if hasattr(theirs, "predict"):
        np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
        assert ours.score(X, y) == theirs.score(X, y)
    return ours


def scores(search):
    folds = range(search.n_splits_)
    return np.array([search.cv_results_[f"split{fold}_test_score"] for fold in folds])


@pytest.fixture
def solved(monkeypatch):
    """The parts (fold, gamma) that were computed, not read."""
    parts, original = [], search_module._solve

    def count(place, *rest):
        parts.append(place)
        return original(place, *rest)

    monkeypatch.setattr(search_module, "_solve", count)
    return parts


def share_right(estimator, X, y):
    return np.mean(estimator.predict(X) == y)


@pytest.mark.parametrize(
    "options",
    [
        {"refit": False, "n_jobs": 2},
        {"scoring": "f1_macro", "cv": 3},
        {"scoring": make_scorer(f1_score, average="weighted")},
        {"scoring": share_right},
        {"cv": StratifiedKFold(4, shuffle=True, random_state=3)},
        {"classes": 2, "scoring": "roc_auc"},
        {"classes": 2, "scoring": "average_precision"},
        {"svc": {"class_weight": "balanced"}},
        {"svc": {"class_weight": {0: 0.05, 1: 4.0, 2: 9.0}}},
        {"svc": {"decision_function_shape": "ovo"}},
        {"svc": {"break_ties": True, "tol": 0.1, "shrinking": False}},
    ],
)
def test_everything_equals_gridsearchcv(options):
    own = {name: value for name, value in options.items() if name not in ("classes", "svc")}
    X, y = make_data(options.get("classes", 3), weights=[0.5, 0.3], rows=160)
    both(scaled_svm(**options.get("svc", {})), GRID, X, y, **own)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 4),
    C=st.lists(st.integers(-5, 8), min_size=1, max_size=4, unique=True),
    gamma=st.lists(st.integers(-7, 2), min_size=1, max_size=3, unique=True),
)
def test_any_grid_in_any_order_equals_gridsearchcv(seed, classes, C, gamma):
    grid = {"svc__C": 2.0 ** np.array(C), "svc__gamma": tuple(2.0**each for each in gamma)}
    both(scaled_svm(), grid, *make_data(classes, rows=90, seed=seed), cv=3)


def test_tables_with_text_labels_and_sparse_inputs_equal_gridsearchcv(small_frame):
    frame = small_frame(rows=120)
    frame["rare"] = np.random.default_rng(1).choice(list("abcdefghijklmnop"), len(frame))
    X, y = frame.drop(columns="Target"), frame["Target"].set_axis(range(1000, 1120))
    encode = OneHotEncoder(handle_unknown="ignore")
    for numbers in ("drop", StandardScaler()):
        preprocessing = make_column_transformer(
            (numbers, ["length", "age"]), (encode, ["city", "course", "rare"])
        )
        both(Pipeline([("preprocessing", preprocessing), ("svc", SVC())]), GRID, X, y)


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("preprocessing", "contains NaN"),
        ("solver", "classes has to be greater than one"),
        ("scorer", "predict_proba"),
    ],
)
def test_an_error_in_any_fold_ends_the_search(broken, error):
    X, y = make_data(2)
    X[140] = np.nan if broken == "preprocessing" else X[140]
    train = np.flatnonzero(y == 0) if broken == "solver" else np.arange(150)
    scoring = "neg_log_loss" if broken == "scorer" else None
    folds = [(np.arange(100), np.arange(100, 150)), (train, np.arange(150))]
    with pytest.raises((ValueError, AttributeError), match=error):
        KernelGridSearch(scaled_svm(), GRID, scoring=scoring, cv=folds, n_jobs=2).fit(X, y)


C_ONLY = {"svc__C": [1.0, 2.0]}
FEW = {"svc__C": [1.0, 2.0], "svc__gamma": [0.1]}


@pytest.mark.filterwarnings("ignore:Scoring failed", "ignore:One or more")
@pytest.mark.parametrize(
    ("estimator", "grid", "options"),
    [
        (scaled_svm(), {**C_ONLY, "svc__gamma": ["scale", 0.1]}, {}),
        (scaled_svm(), C_ONLY, {}),
        (scaled_svm(), [FEW, C_ONLY], {}),
        (scaled_svm(kernel="poly"), FEW, {}),
        (scaled_svm(), {**FEW, "scaler__with_std": [True, False]}, {}),
        (SVC(), {"C": [1.0, 8.0], "gamma": [0.1]}, {}),
        (make_pipeline(SVC()), FEW, {}),
        (make_pipeline(LogisticRegression()), {"logisticregression__C": [0.1, 1.0]}, {}),
        (scaled_svm(), FEW, {"scoring": ["accuracy", "f1_macro"], "refit": "f1_macro"}),
        (scaled_svm(), FEW, {"refit": lambda results: 1, "return_train_score": True}),
        (scaled_svm(), FEW, {"fit": {"groups": np.arange(90) // 5}, "cv": GroupKFold(3)}),
        (scaled_svm(), FEW, {"fit": {"svc__sample_weight": np.linspace(0.1, 5, 90)}}),
    ],
)
def test_what_cannot_share_kernels_is_left_to_gridsearchcv(estimator, grid, options, solved):
    search = both(estimator, grid, *make_data(rows=90), **{"cv": 3, **options})
    assert not solved
    assert search.search_time_ > 0


def test_kernels_that_do_not_fit_into_memory_are_left_to_gridsearchcv(monkeypatch, solved):
    memory = SimpleNamespace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.warns(UserWarning, match="The kernels of 120 training rows need .* GridSearchCV"):
        both(scaled_svm(), FEW, *make_data())
    assert not solved
    memory.available = 10**8
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        both(scaled_svm(), FEW, *make_data())
    assert solved


def test_larger_values_of_c_with_the_same_solution_cost_nothing():
    search = both(scaled_svm(), GRID, *make_data(class_sep=2.0))
    times = search.cv_results_["mean_fit_time"].reshape(5, 3)
    assert (times[-1] == 0).any()
    assert (times[0] > 0).all()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, 0),
        ({"svc__C": [0.5, 1.0]}, 6),
        ({"svc__gamma": [0.02, 0.25, 1.0]}, 2),
        ({"scoring": "f1_macro"}, 6),
        ({"cv": 3}, 9),
        ({"class_weight": "balanced"}, 6),
        ({"seed": 1}, 6),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else None,
)
def test_finished_parts_are_read_unless_something_changed(tmp_path, solved, change, again):
    def search(seed=0, scoring=None, cv=2, class_weight=None, **grid):
        estimator = scaled_svm(class_weight=class_weight)
        searcher = KernelGridSearch(
            estimator, {**GRID, **grid}, scoring=scoring, cv=cv, memory=tmp_path
        )
        return searcher.fit(*make_data(rows=90, seed=seed))

    first = search()
    assert len(solved) == 6
    solved.clear()
    second = search(**change)
    assert len(solved) == again
    if not change:
        np.testing.assert_array_equal(scores(first), scores(second))


def test_an_interrupted_search_goes_on_and_a_damaged_part_is_computed_again(
    tmp_path, monkeypatch, solved, capsys
):
    X, y = make_data(rows=90)
    counted = search_module._solve

    def interrupt(place, *rest):
        if len(solved) == 4:
            raise KeyboardInterrupt
        return counted(place, *rest)

    monkeypatch.setattr(search_module, "_solve", interrupt)
    search = KernelGridSearch(scaled_svm(), GRID, cv=2, memory=tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        search.fit(X, y)
    fits = len(GRID["svc__C"])  # in a part
    assert caught.value.advice.endswith(f"it goes on after {4 * fits} of {6 * fits} fits")
    monkeypatch.setattr(search_module, "_solve", counted)
    search.fit(X, y)
    assert len(solved) == len(set(solved)) == 6
    assert "from an earlier search" not in capsys.readouterr().out
    search.fit(X, y)
    assert f"all {6 * fits} fits are there from an earlier search" in capsys.readouterr().out
    next(tmp_path.rglob("output.pkl")).write_bytes(b"damaged")
    again = KernelGridSearch(scaled_svm(), GRID, cv=2, memory=tmp_path).fit(X, y)
    assert len(solved) == 7
    np.testing.assert_array_equal(scores(again), scores(search))


# --- beyond the edges --------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-8, -4], ids=["from a plateau", "from a slope"])
def test_the_search_goes_on_beyond_an_edge_until_the_best_pair_is_inside(power):
    X, y = make_data(rows=200, class_sep=1.5)
    values = [2.0**power, 2.0 ** (power + 1)]
    grid = {"svc__C": values, "svc__gamma": values}
    plain = KernelGridSearch(scaled_svm(), grid).fit(X, y)
    assert svm.edges(plain) == ["C", "gamma"]
    assert plain.extensions_ == []
    search = KernelGridSearch(scaled_svm(), grid, beyond_edges=True).fit(X, y)
    assert svm.edges(search) == []
    assert search.best_score_ > plain.best_score_ + 0.02
    results = search.cv_results_
    assert search.n_grid_ == 4
    assert results["params"][:4] == plain.cv_results_["params"]
    assert len(results["extension"]) == len(results["params"])
    assert set(results["extension"]) == set(range(len(search.extensions_) + 1))
    # The pairs that were added have the scores of a search of the whole grid.
    tried = pd.DataFrame(results["params"])
    whole = KernelGridSearch(scaled_svm(), {name: sorted(set(tried[name])) for name in tried})
    whole.fit(X, y)
    expected = dict(zip(map(str, whole.cv_results_["params"]), scores(whole).T, strict=True))
    for params, found in zip(results["params"], scores(search).T, strict=True):
        np.testing.assert_array_equal(found, expected[str(params)])


def test_a_winner_inside_needs_no_more():
    grid = {"svc__C": [1, 8, 64], "svc__gamma": [0.01, 0.03, 0.1]}
    inside = KernelGridSearch(scaled_svm(), grid, beyond_edges=True).fit(*make_data())
    assert inside.best_params_ == {"svc__C": 8, "svc__gamma": 0.03}
    assert inside.extensions_ == []
    assert not inside.cv_results_["extension"].any()


def test_the_way_out_ends_at_its_limits(monkeypatch):
    monkeypatch.setattr(search_module, "LIMITS", (2.0**-6, 2.0**-2))
    grid = {"svc__C": [2.0**-4, 2.0**-3], "svc__gamma": [0.125]}
    search = KernelGridSearch(scaled_svm(), grid, beyond_edges=True)
    search.fit(*make_data(rows=200, class_sep=1.5))
    assert search.extensions_ == [{"svc__C": [2.0**-2]}]
    assert svm.edges(search) == ["C"]


def test_the_way_out_works_with_gridsearchcv_too(solved):
    grid = {"svc__C": [2.0**-9, 2.0**-8], "svc__gamma": [0.125]}
    X, y = make_data(rows=90, class_sep=1.5)
    ours = KernelGridSearch(scaled_svm(), grid, beyond_edges=True, cv=3).fit(X, y)
    assert solved
    solved.clear()
    weights = np.ones(len(y))
    theirs = KernelGridSearch(scaled_svm(), grid, beyond_edges=True, cv=3)
    theirs.fit(X, y, svc__sample_weight=weights)
    assert not solved
    assert theirs.extensions_ == ours.extensions_ != []
    np.testing.assert_array_equal(scores(ours), scores(theirs))


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("values", [[], [-1.0], [np.nan], ["a"]])
@pytest.mark.parametrize("name", ["C", "gamma"])
def test_unusable_values_are_refused_naming_the_parameter(name, values):
    with pytest.raises(ValueError, match=name):
        KernelGridSearch(scaled_svm(), {**GRID, f"svc__{name}": values}).fit(*make_data())


def test_long_table_is_searched_on_a_sample_and_the_model_trained_on_all(small_split, workspace):
    small = {"SEARCH_ROWS": 60, "C_EXPONENTS": [0], "GAMMA_EXPONENTS": [-3], "CV_FOLDS": 3}
    names = {"split": small_split, "ws": workspace, "BEYOND_EDGES": False}
    made = run_cells("03_svm_grid_search", "Pipeline(", "classifier.fit(", **names, **small)
    assert made.y.value_counts().tolist() == [20, 20, 20]
    assert list(made.X.index) == list(made.y.index)
    assert made.X.index.isin(small_split.X_train.index).all()
    svc = made.classifier.estimators_[0]
    assert svc.shape_fit_[0] == len(small_split.X_train) > 60


def test_more_folds_than_rows_of_a_class_are_refused_naming_the_parameter():
    split = SimpleNamespace(y_train=pd.Series(["a"] * 9 + ["b"] * 3))
    svm.check_folds(split.y_train, 3)
    with pytest.raises(ParameterError, match="CV_FOLDS = 4 .* class, 'b', has 3"):
        svm.check_folds(split.y_train, 4)


# --- processes, a cluster, the real grid ---------------------------------------------------------


@pytest.mark.slow
def test_processes_and_a_cluster_give_the_same_scores(tmp_path):
    X, y = make_data(rows=120)
    here = KernelGridSearch(scaled_svm(), GRID, n_jobs=2).fit(X, y)
    with joblib.parallel_config("loky", n_jobs=2):
        np.testing.assert_array_equal(
            scores(KernelGridSearch(scaled_svm(), GRID).fit(X, y)), scores(here)
        )
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config("dask"),
    ):
        # As on machines that do not have this project.
        client.run(lambda: __import__("sys").modules.update(helpers=None))
        there = KernelGridSearch(scaled_svm(), GRID, memory=tmp_path / "kept").fit(X, y)
    np.testing.assert_array_equal(scores(there), scores(here))
    assert len(list(tmp_path.rglob("output.pkl"))) == 15


def test_the_grid_of_the_notebook_is_the_documented_one():
    notebook = run_cells("03_svm_grid_search", "param_grid = {", "param_grid = {")
    for name in ("svc__C", "svc__gamma"):
        assert notebook.param_grid[name].tolist() == [2.0**power for power in range(-5, 7)]
    assert notebook.CV_FOLDS == 5


@pytest.mark.slow
def test_the_students_table_gives_all_scores_of_gridsearchcv(real_data):
    table = pd.read_csv(real_data / "kaggle_students.csv")
    X, y = table.drop(columns="Target"), table["Target"]
    rows = np.random.default_rng(0).permutation(len(X))[:1500]
    X, y = X.iloc[rows], y.iloc[rows]
    codes = [name for name in X if X[name].nunique() < 50 and X[name].max() > 30]
    preprocessing = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), codes),
        (StandardScaler(), make_column_selector()),
    )
    pipeline = Pipeline([("preprocessing", preprocessing), ("svc", SVC())])
    grid = {"svc__C": 2.0 ** np.arange(-5, 7, 3), "svc__gamma": 2.0 ** np.arange(-5, 7, 3)}
    both(pipeline, grid, X, y, n_jobs=2)


# --- logging -----------------------------------------------------------------------------------


def test_results_edges_and_the_warning(capsys):
    grid = {"svc__C": [2.0**-9, 2.0**-8], "svc__gamma": [0.25]}
    search = KernelGridSearch(scaled_svm(), grid).fit(*make_data())
    table = svm.results_table(search)
    assert {"C", "gamma", "extension", "mean_test_score", "split4_test_score"} <= set(table)
    assert table["rank_test_score"].is_monotonic_increasing
    assert svm.edges(search) == ["C"]
    svm.warn_on_edge(search)
    assert "C_EXPONENTS" in (shown := capsys.readouterr().out)
    assert "GAMMA_EXPONENTS" not in shown


@pytest.mark.slow
def test_a_search_is_logged_with_all_its_steps_and_its_best_pairs(tracking_server, small_split):
    X, y = small_split.X_train[["length", "width", "age"]], small_split.y_train
    grid = {"svc__C": [2.0**-9, 2.0**-8], "svc__gamma": [2.0**-9, 2.0**-8]}
    search = KernelGridSearch(scaled_svm(), grid, beyond_edges=True, cv=3).fit(X, y)
    with tracking.start_run("svc_model", "svm", small_split.manifest) as run:
        tracking.log_search(search, run, small_split)
    logged = mlflow.get_run(run.info.run_id).data
    assert logged.params["grid_C"] == "0.00195312 0.00390625"
    assert float(logged.params["C"]) == search.best_params_["svc__C"]
    assert logged.params["kernel"] == "rbf"
    assert logged.params["cv_folds"] == "3"
    assert logged.metrics["cv_accuracy"] == search.best_score_
    assert logged.metrics["search_seconds"] == search.search_time_
    uri = f"{run.info.artifact_uri}/grid_search"
    steps = pd.read_csv(mlflow.artifacts.download_artifacts(f"{uri}/cv_results.csv"))["extension"]
    assert len(steps) == len(search.cv_results_["params"])
    assert set(steps) == set(range(len(search.extensions_) + 1))
    mlflow.artifacts.download_artifacts(f"{uri}/heat_map.png")
    children = mlflow.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    assert len(children) == 10
    assert children["metrics.cv_accuracy"].max() == search.best_score_


def test_search_on_very_many_columns_goes_on_until_a_gamma_tells_rows_apart():
    y = np.arange(90) % 2
    X = np.random.default_rng(0).normal(size=(90, 2000)) + 0.15 * y[:, None]
    grid = {"svc__C": [0.5, 1.0], "svc__gamma": [4.0, 8.0]}
    plain = KernelGridSearch(scaled_svm(), grid, cv=3).fit(X, y)
    assert set(plain.cv_results_["mean_test_score"]) == {0.5}
    search = KernelGridSearch(scaled_svm(), grid, beyond_edges=True, cv=3).fit(X, y)
    assert search.best_params_["svc__gamma"] < 0.5
    assert search.best_score_ > 0.6
