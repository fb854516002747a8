"""The compiled solver beside scikit-learn's libsvm, on the same kernels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from helpers.smo import Path

Cs = [2.0**power for power in range(-5, 9)]


def make_problem(rows=220, columns=6, seed=0, noise=0.15, whole_numbers=False):
    """Return rows, the first class first, and their labels."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(rows, columns))
    if whole_numbers:
        # Few different values: many rows are the same, some with both labels.
        X = np.round(X[:, :2])
    y = (X[:, 0] * X[:, 1] + 0.3 * X[:, 0] > 0.2).astype(int)
    y ^= random.random(rows) < noise
    y[:2] = 0, 1
    order = np.argsort(y, kind="stable")
    return X[order], y[order]


def both(K, y, Cs, weights=(1.0, 1.0), **options):
    """Yield for each C what the path and what libsvm give."""
    n_first = int((y == 0).sum())
    path = Path(K.astype(np.float32), n_first, np.asarray(weights)[y], **options)
    for C in Cs:
        settings = {"class_weight": dict(enumerate(weights)), **options}
        model = SVC(C=C, kernel="precomputed", **settings).fit(K, y)
        expected = np.zeros(len(y))
        expected[model.support_] = model.dual_coef_[0]
        yield C, path.solve(C), (expected, model.intercept_[0])


def assert_same(K, y, Cs, **options):
    solved = 0
    for C, (coefficients, intercept, anew), (expected, offset) in both(K, y, Cs, **options):
        # Another path would end within the tolerance, which is a thousand times this.
        np.testing.assert_allclose(coefficients, expected, rtol=0, atol=1e-6 * C)
        assert intercept == pytest.approx(offset, abs=1e-6)
        solved += anew
    return solved


@pytest.mark.parametrize("gamma", [0.01, 0.2, 2.0, 20.0])
def test_solutions_are_libsvms(gamma):
    X, y = make_problem()
    assert_same(rbf_kernel(X, gamma=gamma), y, Cs)


@pytest.mark.parametrize("rows", [2, 3, 5, 64, 127, 128, 129, 300])
def test_any_number_of_rows(rows):
    X, y = make_problem(rows)
    assert_same(rbf_kernel(X, gamma=0.5), y, Cs)


def test_many_equal_rows_with_both_labels():
    X, y = make_problem(260, whole_numbers=True)
    assert len(np.unique(X, axis=0)) < 60
    for gamma in (0.1, 1.0):
        assert_same(rbf_kernel(X, gamma=gamma), y, Cs)


@pytest.mark.parametrize("weights", [(1.0, 5.0), (0.2, 1.7)])
def test_class_weights(weights):
    X, y = make_problem()
    assert_same(rbf_kernel(X, gamma=0.3), y, Cs[:-3], weights=weights)


@pytest.mark.parametrize("options", [{"tol": 1e-5}, {"tol": 0.1}, {"shrinking": False}])
def test_other_settings(options):
    X, y = make_problem()
    assert_same(rbf_kernel(X, gamma=0.3), y, Cs, **options)


def test_rows_are_set_aside_in_long_problems():
    # More than a thousand steps, after which rows at their bound are set aside for a while.
    X, y = make_problem(1300, columns=10, noise=0.3)
    K = rbf_kernel(X, gamma=0.02)
    model = SVC(C=64, kernel="precomputed").fit(K, y)
    assert model.n_iter_[0] > 3000
    assert_same(K, y, [1.0, 64.0])


def test_solution_that_never_touched_its_bound_is_that_of_every_larger_c():
    X, y = make_problem()
    solved = assert_same(rbf_kernel(X, gamma=20.0), y, Cs)
    assert solved < len(Cs)
    path = Path(np.eye(4, dtype=np.float32), 2, np.ones(4))
    # All four coefficients are 1: below that the bound holds them.
    assert [path.solve(C)[2] for C in (0.5, 1.0, 1.5, 2.0, 2.0, 9.0)] == [
        *(True, True, True),
        *(False, False, False),
    ]


def test_class_without_weight_fails_as_in_libsvm():
    X, y = make_problem(40)
    K = rbf_kernel(X, gamma=0.3)
    with pytest.raises(ValueError, match="not finite"):
        SVC(kernel="precomputed", class_weight={0: 0.0, 1: 1.0}).fit(K, y)
    path = Path(K.astype(np.float32), int((y == 0).sum()), np.asarray([0.0, 1.0])[y])
    with pytest.raises(ValueError, match="not finite"):
        path.solve(1.0)


def test_shrinking_c_is_refused():
    path = Path(np.eye(2, dtype=np.float32), 1, np.ones(2))
    path.solve(2.0)
    with pytest.raises(ValueError, match="must not shrink"):
        path.solve(1.0)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(4, 200),
    columns=st.integers(2, 8),
    seed=st.integers(0, 10_000),
    noise=st.floats(0, 0.5),
    whole_numbers=st.booleans(),
    gamma=st.integers(-8, 5),
    powers=st.lists(st.integers(-8, 12), min_size=1, max_size=6, unique=True),
)
def test_any_problem(rows, columns, seed, noise, whole_numbers, gamma, powers):
    X, y = make_problem(rows, columns, seed, noise, whole_numbers)
    assert_same(rbf_kernel(X, gamma=2.0**gamma), y, sorted(2.0**power for power in powers))
