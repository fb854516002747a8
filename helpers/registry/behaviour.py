"""Behaviour that a model must show before it is promoted, whatever its metrics.

Three kinds, after Ribeiro et al. [1]_: minimum functionality (a case that nobody may get wrong),
direction (a change that may move the answer one way only), and invariance (a change that may
not move it). To add one, for the students' table or another, add an entry to `CASES` or
`DIRECTIONS`. What names a column or a label that a table does not have is not applied to it.
Each check returns what it found, or raises `CheckFailedError`.

References
----------
.. [1] M. T. Ribeiro, T. Wu, C. Guestrin, S. Singh (2020). *Beyond Accuracy: Behavioral Testing
   of NLP Models with CheckList*. ACL. doi:10.18653/v1/2020.acl-main.442
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from mlflow.pyfunc import PyFuncModel

from helpers.data import Split
from helpers.registry.production import LOAD_ERRORS

FIRST, SECOND = "Curricular units 1st sem", "Curricular units 2nd sem"
MOST_ROWS = 400  # test rows that a behaviour is tried on
CASE_TOLERANCE = 0.02  # share of the changed rows of a case that may fail
DIRECTION_TOLERANCE = 0.01  # mean change of a probability against the direction
INVARIANCE_TOLERANCE = 1e-5  # change of a probability where nothing may change
NO_CONDITION = "no condition: "  # in front of the finding of a check that could not fail
NONE_KNOWN = f"{NO_CONDITION}none is known for this table"
NEW_CODES = (10_001, 20_002)  # two codes that no table has


class CheckFailedError(Exception):
    """A candidate must not be promoted; the message says why."""


@dataclass(frozen=True)
class Case:
    """Rows changed in a way whose effect on a label is known.

    Attributes
    ----------
    description : str
    changes : dict
        By column: its new value, or a function from the column to the new one.
    label : str
        In `CASES` it may not be predicted for the changed rows; in `DIRECTIONS` its
        probability must not fall, on average.
    """

    description: str
    changes: dict[str, float | Callable[[pd.Series], pd.Series]]
    label: str

    def change(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return rows with the changes made."""
        changes = self.changes.items()
        return rows.assign(**{n: new(rows[n]) if callable(new) else new for n, new in changes})


def _of_both_semesters(changes):
    return {f"{name} ({part})": new for name in (FIRST, SECOND) for part, new in changes.items()}


SIX_APPROVED = {
    "enrolled": 6,
    "evaluations": 6,
    "approved": 6,
    "grade": 15.0,
    "without evaluations": 0,
}
CASES = (
    Case(
        "every unit approved and fees paid: not Dropout",
        {**_of_both_semesters(SIX_APPROVED), "Tuition fees up to date": 1, "Debtor": 0},
        "Dropout",
    ),
)
DIRECTIONS = (
    Case(
        "fewer approved units never make Dropout less likely",
        _of_both_semesters({"approved": lambda units: (units - 2).clip(lower=0)}),
        "Dropout",
    ),
    Case(
        "unpaid fees never make Dropout less likely",
        {"Tuition fees up to date": 0},
        "Dropout",
    ),
)


def _applying(cases: Iterable[Case], split: Split) -> list[Case]:
    columns = set(split.X_test.columns)
    return [each for each in cases if set(each.changes) <= columns and each.label in split.labels]


def check_cases(model: PyFuncModel, split: Split) -> str:
    """Make sure that none of `CASES` gets the label that is out of the question.

    Some rows may fail: one with a few columns changed may be unlike any real one in the others.
    """
    used = _applying(CASES, split)
    for case in used:
        rows = case.change(split.X_test.head(MOST_ROWS))
        wrong = int((model.predict(rows)["prediction"] == case.label).sum())
        if wrong > CASE_TOLERANCE * len(rows):
            raise CheckFailedError(f"{case.description}, but {wrong} of {len(rows)} rows are")
    return "; ".join(case.description for case in used) or NONE_KNOWN


def check_directions(model: PyFuncModel, split: Split) -> str:
    """Make sure that the changes of `DIRECTIONS` move probabilities the right way, on average."""
    found, rows = [], split.X_test.head(MOST_ROWS)
    for each in _applying(DIRECTIONS, split):
        changed = each.change(rows)
        moved = (changed != rows).any(axis=1)
        if not moved.any():
            continue
        before, after = (
            model.predict(table[moved])[f"probability_{each.label}"].to_numpy()
            for table in (rows, changed)
        )
        change = float((after - before).mean())
        if change < -DIRECTION_TOLERANCE:
            raise CheckFailedError(f"{each.description}, but by {change:+.3f} on average")
        found.append(f"{each.description} ({change:+.3f})")
    return "; ".join(found) or NONE_KNOWN


def _with_code(rows, categorical, code):
    """Put a code that was never seen into every category that can hold one."""
    changed = rows.copy()
    for name in categorical:
        kind = rows[name].dtype.kind
        if kind != "b":
            changed[name] = code if kind in "iuf" else f"never seen {code}"
    return changed


def check_invariances(model: PyFuncModel, split: Split) -> str:
    """Make sure that what carries no information moves nothing.

    The order of the rows, the order of the columns, whether whole numbers are integers or
    floats, and which code a category has that was never seen: an unrelated one must be treated
    like any other.
    """
    rows = split.X_test.head(MOST_ROWS)
    names = [f"probability_{label}" for label in split.labels]

    def answer(changed):
        try:
            return model.predict(changed)[names].to_numpy()
        except LOAD_ERRORS as error:
            raise CheckFailedError(f"{type(error).__name__}: {error}") from error

    expected = answer(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    floats = rows.astype(dict.fromkeys(rows.select_dtypes("int64"), "float64"))
    one, other = (answer(_with_code(rows, split.categorical, code)) for code in NEW_CODES)
    pairs = {
        "the order of the rows": (answer(rows.iloc[order]), expected[order]),
        "the order of the columns": (answer(rows[rows.columns[::-1]]), expected),
        "writing whole numbers as floats": (answer(floats), expected),
        "which unseen code a category has": (one, other),
    }
    for title, (given, wanted) in pairs.items():
        gap = np.abs(given - wanted).max()
        if not gap <= INVARIANCE_TOLERANCE:
            raise CheckFailedError(f"{title} changes a probability by {gap:.2g}")
    return f"{', '.join(pairs)}: no change"
