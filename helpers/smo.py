"""The dual problem of a two-class support vector machine, solved as LIBSVM does, compiled.

Sequential minimal optimisation [1]_ changes two dual coefficients at a time: the one that violates
the optimality conditions most, and the one that promises the largest gain with it [2]_. This
module follows LIBSVM's description [3]_ step by step, with its rules for ties, for shrinking and
for putting the gradient together again, and like LIBSVM it rounds the kernel to single precision.
So it takes the same steps and ends at the same solution. What is different is how the work is laid
out: the kernel is there already, and each step is a few loops without branches, which a processor
does several rows at a time.

Solutions for growing C share their first steps: until a coefficient would exceed C, the bound has
no effect. A `Path` keeps the state before that first touch, and the next C goes on from there. A
solution whose steps never touched the bound is that of every larger C.

References
----------
.. [1] J. Platt (1998). Sequential minimal optimization. Microsoft Research MSR-TR-98-14.
.. [2] R.-E. Fan, P.-H. Chen, C.-J. Lin (2005). Working set selection using second order
   information for training support vector machines. *JMLR* 6, 1889-1918.
.. [3] C.-C. Chang, C.-J. Lin (2011). LIBSVM: A library for support vector machines. *ACM TIST*
   2(3), 27. Sections 4 and 5.
"""

import threading

import numpy as np
from numba import njit

TAU = 1e-12  # stands for a curvature that is not positive [3]_
BLOCK = 128  # rows among which the one with the largest value is looked for
SHRINK_EVERY = 1000  # steps
# Reductions may assume that there is no NaN and that zeros have no sign; no operation is
# reordered or contracted, which would change the last digits.
OPTIONS = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz"},
}

# Places in the array of whole numbers that belongs to the state.
ACTIVE, COUNTER, UNSHRUNK = range(3)


@njit(inline="always")
def _is_up(y, status):
    """Return whether the coefficient can move in the direction of its label."""
    return (y > 0 and status < 1) or (y < 0 and status > -1)


@njit(inline="always")
def _is_low(y, status):
    return (y > 0 and status > -1) or (y < 0 and status < 1)


@njit(**OPTIONS)
def _mark(t, y, status, position, n_active, up, low):
    """Note in both masks whether a row may be chosen: 0 if so, else minus infinity."""
    active = position[t] < n_active
    up[t] = 0.0 if active and _is_up(y[t], status[t]) else -np.inf
    low[t] = 0.0 if active and _is_low(y[t], status[t]) else -np.inf


@njit(**OPTIONS)
def _mark_all(y, status, position, n_active, up, low):
    for t in range(len(y)):
        _mark(t, y, status, position, n_active, up, low)


# Each loop either fills or reduces: compilers do several rows at a time only in such loops.


@njit(**OPTIONS)
def _largest(values):
    top = -np.inf
    for t in range(len(values)):
        top = values[t] if values[t] > top else top
    return top


@njit(**OPTIONS)
def _last_largest(values, position):
    """Return the largest value and its row; of several, the last in LIBSVM's order."""
    n = len(values)
    top, first, last = -np.inf, 0, 0
    for start in range(0, n, BLOCK):
        here = _largest(values[start : min(start + BLOCK, n)])
        if here > top:
            top, first = here, start
        if here == top:
            last = start + BLOCK
    best, place = -1, -1
    if top > -np.inf:
        for t in range(first, min(last, n)):
            if values[t] == top and position[t] > place:
                best, place = t, position[t]
    return top, best


@njit(**OPTIONS)
def _sums(a, b, out):
    for t in range(len(out)):
        out[t] = a[t] + b[t]


@njit(**OPTIONS)
def _differences(a, b, out):
    for t in range(len(out)):
        out[t] = a[t] - b[t]


@njit(**OPTIONS)
def _gains(force, low, row, largest, out):
    """Fill in what each row promises as the second of the pair."""
    for t in range(len(out)):
        difference = largest - force[t]
        curvature = 2.0 - 2.0 * np.float64(row[t])
        curvature = curvature if curvature > 0 else TAU
        gain = (difference * difference) / curvature
        out[t] = (gain if difference > 0 else -np.inf) + low[t]


@njit(**OPTIONS)
def _select(K, force, up, low, position, eps, values):
    """Return the pair of rows to change, or -1 where all are optimal within eps."""
    _sums(force, up, values)
    largest, i = _last_largest(values, position)
    if i < 0:
        return -1, -1
    _differences(low, force, values)
    opposite = _largest(values)
    if largest + opposite < eps:
        return -1, -1
    _gains(force, low, K[i], largest, values)
    _, j = _last_largest(values, position)
    return (i, j) if j >= 0 else (-1, -1)


@njit(**OPTIONS)
def _step(force, row_i, row_j, weight_i, weight_j):
    for t in range(len(force)):
        force[t] -= np.float64(row_i[t]) * weight_i + np.float64(row_j[t]) * weight_j


@njit(**OPTIONS)
def _add(force, row, weight):
    for t in range(len(force)):
        force[t] -= weight * np.float64(row[t])


@njit(**OPTIONS)
def _rebuild(K, y, alpha, status, force, bound_force, order, n_active):
    """Compute the force on the rows that were set aside."""
    n = len(y)
    for place in range(n_active, n):
        t = order[place]
        force[t] = bound_force[t] + y[t]
    if n_active == n:
        return
    for place in range(n_active):
        i = order[place]
        if status[i] == 0:
            weight, row = alpha[i] * y[i], K[i]
            for rest in range(n_active, n):
                t = order[rest]
                force[t] -= weight * np.float64(row[t])


@njit(**OPTIONS)
def _is_out(y, status, force, top, bottom):
    """Return whether a row at its bound will stay there, as far as can be seen."""
    if status == 0:
        return False
    if _is_up(y, status):
        return -force > bottom
    return force > top


@njit(**OPTIONS)
def _shrink(K, y, alpha, status, force, bound_force, order, position, numbers, eps, up, low):
    """Set rows aside that are at their bound and will stay there."""
    n = len(y)
    n_active = numbers[ACTIVE]
    top, bottom = -np.inf, -np.inf
    for t in range(n):
        top = max(top, force[t] + up[t])
        bottom = max(bottom, low[t] - force[t])
    if numbers[UNSHRUNK] == 0 and top + bottom <= eps * 10:
        numbers[UNSHRUNK] = 1
        _rebuild(K, y, alpha, status, force, bound_force, order, n_active)
        n_active = n
    place = 0
    while place < n_active:
        t = order[place]
        if _is_out(y[t], status[t], force[t], top, bottom):
            n_active -= 1
            while n_active > place:
                other = order[n_active]
                if not _is_out(y[other], status[other], force[other], top, bottom):
                    order[place], order[n_active] = other, t
                    position[other], position[t] = place, n_active
                    break
                n_active -= 1
        place += 1
    numbers[ACTIVE] = n_active
    _mark_all(y, status, position, n_active, up, low)


@njit(**OPTIONS)
def _move(y, alpha, force, bounds, K, i, j):
    """Return the new values of two coefficients, and whether a bound other than 0 was met."""
    curvature = 2.0 - 2.0 * np.float64(K[i, j])
    if curvature <= 0:
        curvature = TAU
    a, b = alpha[i], alpha[j]
    gradient_i, gradient_j = -y[i] * force[i], -y[j] * force[j]
    touched = False
    if y[i] != y[j]:
        step = (-gradient_i - gradient_j) / curvature
        difference = a - b
        a, b = a + step, b + step
        if difference > 0:
            if b < 0:
                a, b = difference, 0.0
        elif a < 0:
            a, b = 0.0, -difference
        if difference > bounds[i] - bounds[j]:
            if a > bounds[i]:
                a, b = bounds[i], bounds[i] - difference
                touched = True
        elif b > bounds[j]:
            a, b = bounds[j] + difference, bounds[j]
            touched = True
    else:
        step = (gradient_i - gradient_j) / curvature
        total = a + b
        a, b = a - step, b + step
        if total > bounds[i]:
            if a > bounds[i]:
                a, b = bounds[i], total - bounds[i]
                touched = True
        elif b < 0:
            a, b = total, 0.0
        if total > bounds[j]:
            if b > bounds[j]:
                a, b = total - bounds[j], bounds[j]
                touched = True
        elif a < 0:
            a, b = 0.0, total
    return a, b, touched or a >= bounds[i] or b >= bounds[j]


@njit(**OPTIONS)
def _status(alpha, bound):
    if alpha >= bound:
        return 1
    return -1 if alpha <= 0 else 0


@njit(**OPTIONS)
def _offset(y, status, force, order):
    """Return rho: the mean over the free rows, else the middle of what is possible."""
    n_free, total = 0, 0.0
    above, below = np.inf, -np.inf
    for place in range(len(order)):
        t = order[place]
        value = -force[t]
        if status[t] == 0:
            n_free += 1
            total += value
        elif _is_up(y[t], status[t]):
            above = min(above, value)
        else:
            below = max(below, value)
    return total / n_free if n_free else (above + below) / 2


@njit(**OPTIONS)
def _solve(K, y, bounds, eps, shrinking, state, numbers, kept, kept_numbers):
    """Go on from a state until it is optimal; keep the state before the first touch of C."""
    n = len(y)
    alpha, force = state[0], state[1]
    bound_force = np.zeros(n)
    order, position, status = numbers[0, :n], numbers[1, :n], numbers[2, :n]
    scalars = numbers[3]
    up, low, values = np.empty(n), np.empty(n), np.empty(n)
    untouched = True
    _mark_all(y, status, position, scalars[ACTIVE], up, low)
    while True:
        scalars[COUNTER] -= 1
        if scalars[COUNTER] == 0:
            scalars[COUNTER] = min(n, SHRINK_EVERY)
            if shrinking:
                _shrink(
                    K, y, alpha, status, force, bound_force, order, position, scalars, eps, up, low
                )
        i, j = _select(K, force, up, low, position, eps, values)
        if i < 0:
            _rebuild(K, y, alpha, status, force, bound_force, order, scalars[ACTIVE])
            scalars[ACTIVE] = n
            _mark_all(y, status, position, n, up, low)
            i, j = _select(K, force, up, low, position, eps, values)
            if i < 0:
                break
            scalars[COUNTER] = 1
        new_i, new_j, touched = _move(y, alpha, force, bounds, K, i, j)
        if touched and untouched:
            untouched = False
            kept[:] = state
            kept_numbers[:] = numbers
            # The next C takes this step again, with the same preparation.
            kept_numbers[3, COUNTER] += 1
        weight_i, weight_j = (new_i - alpha[i]) * y[i], (new_j - alpha[j]) * y[j]
        _step(force, K[i], K[j], weight_i, weight_j)
        alpha[i], alpha[j] = new_i, new_j
        for t in (i, j):
            before = status[t]
            status[t] = _status(alpha[t], bounds[t])
            if (before == 1) != (status[t] == 1):
                weight = bounds[t] * y[t]
                _add(bound_force, K[t], -weight if before == 1 else weight)
            _mark(t, y, status, position, scalars[ACTIVE], up, low)
    return _offset(y, status, force, order), untouched


class Path:
    """Solutions of one two-class machine for growing C.

    Parameters
    ----------
    K : numpy.ndarray, shape (n_rows, n_rows), float32
        Kernel with ones on its diagonal; rows of the first class come first.
    n_first : int
        Rows of the first class.
    weights : numpy.ndarray, shape (n_rows,), float64
        Class weight of each row: its coefficient is at most C times that.
    tol : float
        Largest violation of the optimality conditions at the end.
    shrinking : bool
        As in `sklearn.svm.SVC`.
    """

    def __init__(self, K, n_first, weights, tol=1e-3, shrinking=True):
        n = len(weights)
        self._K, self._weights, self._tol, self._shrinking = K, weights, float(tol), shrinking
        self._y = np.ones(n)
        self._y[n_first:] = -1.0
        # Coefficients, and for each row minus its label times the gradient.
        self._state = np.stack([np.zeros(n), self._y])
        self._numbers = np.zeros((4, max(n, 3)), dtype=np.int32)
        self._numbers[0, :n] = self._numbers[1, :n] = np.arange(n)
        # At its lower bound, which is also the upper one where the weight is 0.
        self._numbers[2, :n] = np.where(weights > 0, -1, 1)
        self._numbers[3, [ACTIVE, COUNTER]] = n, min(n, SHRINK_EVERY) + 1
        self._C, self._final, self._solution = 0.0, False, None

    def solve(self, C):
        """Solve for a C that is not smaller than those before.

        Parameters
        ----------
        C : float

        Returns
        -------
        coefficients : numpy.ndarray, shape (n_rows,)
            Positive for rows of the second class, as in `SVC.dual_coef_`.
        intercept : float
        solved : bool
            False if the solution was known from a smaller C.

        Raises
        ------
        ValueError
            If C is smaller than before, or there is no finite solution.
        """
        if C < self._C:
            raise ValueError(f"C must not shrink: {C} comes after {self._C}.")
        if self._final or C == self._C:
            return *self._solution, False
        self._C = C
        state, numbers = self._state.copy(), self._numbers.copy()
        rho, untouched = _solve(
            self._K,
            self._y,
            C * self._weights,
            self._tol,
            self._shrinking,
            state,
            numbers,
            self._state,
            self._numbers,
        )
        if not np.isfinite(rho):
            raise ValueError(
                "The dual coefficients or intercepts are not finite: there is no boundary between "
                "these rows, as where a class has no weight."
            )
        self._solution = -state[0] * self._y, float(rho)
        self._final = untouched
        return *self._solution, True


def prepare():
    """Compile the solver in the background, once per machine; what needs it waits until then."""
    tiny = Path(np.eye(2, dtype=np.float32), 1, np.ones(2))
    threading.Thread(target=tiny.solve, args=(1.0,), daemon=True).start()
