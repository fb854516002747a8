import json
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.metrics import f1_score, make_scorer
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from helpers import svm
from helpers.kernel_search import KernelGridSearch
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


def both(pipeline, grid, X, y, **options):
    """Fit both searches on the same data with the same folds."""
    ours = KernelGridSearch(clone(pipeline), grid, **options).fit(X, y)
    step = pipeline.steps[-1][0]
    theirs = GridSearchCV(
        clone(pipeline), {f"{step}__{name}": values for name, values in grid.items()}, n_jobs=1
    )
    named = {"scoring": "accuracy", "cv": 5, **options}
    theirs.set_params(scoring=named["scoring"], cv=named["cv"], refit=named.get("refit", True))
    return ours, theirs.fit(X, y)


def assert_equal_searches(ours, theirs):
    assert ours.n_splits_ == theirs.n_splits_
    assert ours.cv_results_["params"] == theirs.cv_results_["params"]
    for name, expected in theirs.cv_results_.items():
        if name.startswith("split") or name in ("mean_test_score", "std_test_score"):
            np.testing.assert_allclose(ours.cv_results_[name], expected, rtol=0, atol=1e-12)
        elif name.startswith("param_"):
            assert list(ours.cv_results_[name]) == list(expected)
    np.testing.assert_array_equal(
        ours.cv_results_["rank_test_score"], theirs.cv_results_["rank_test_score"]
    )
    assert ours.best_index_ == theirs.best_index_
    assert ours.best_params_ == theirs.best_params_
    assert ours.best_score_ == pytest.approx(theirs.best_score_, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_ranks_and_winner_equal_gridsearchcv(classes):
    ours, theirs = both(scaled_svm(), GRID, *make_data(classes, rows=200))
    assert_equal_searches(ours, theirs)
    assert len(set(ours.cv_results_["mean_test_score"])) > 3


def test_balanced_class_weights_equal_gridsearchcv():
    X, y = make_data(3, weights=[0.7, 0.2, 0.1])
    ours, theirs = both(scaled_svm(class_weight="balanced"), GRID, X, y)
    assert_equal_searches(ours, theirs)
    plain = KernelGridSearch(scaled_svm(), GRID).fit(X, y)
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
    one, two = (KernelGridSearch(scaled_svm(), GRID, n_jobs=n).fit(X, y) for n in (1, 2))
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
    assert KernelGridSearch(scaled_svm(), grid).fit(X, y).n_fits_ == 2 * 2 * 5


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
    ours = KernelGridSearch(scaled_svm(), GRID, refit=False).fit(X, y)
    assert not hasattr(ours, "predict")
    assert not hasattr(ours, "best_estimator_")


def test_estimator_and_grid_given_are_left_as_they_were():
    X, y = make_data()
    pipeline, grid = scaled_svm(C=7.0), {"C": [2.0, 1.0], "gamma": [0.1]}
    KernelGridSearch(pipeline, grid).fit(X, y)
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


def test_error_inside_a_fold_reaches_the_caller():
    X, y = make_data()
    with pytest.raises(ValueError, match="C"):
        KernelGridSearch(scaled_svm(), {"C": [-1.0, 1.0], "gamma": [0.1]}).fit(X, y)


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


def test_notebook_keeps_its_number_of_threads_for_the_calibration(small_split):
    path = PROJECT_ROOT / "notebooks" / "03_svm_grid_search.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (cell,) = [source for cell in cells if "svm.fit_best(" in (source := "".join(cell["source"]))]
    machine, mlflow_side = MagicMock(), MagicMock()
    machine.best_pair.return_value = {"C": 1.0, "gamma": 0.1}
    mlflow_side.evaluate_logged_model.return_value = ({}, None)
    names = {"svm": machine, "tracking": mlflow_side, "split": small_split}
    exec(cell, {**names, "grid": {}, "folds": 3, "parameters": {"N_JOBS": 3}})
    assert machine.search.call_args.args[-1] == 3
    assert machine.fit_best.call_args.kwargs["n_jobs"] == 3


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
