"""Behaviour that a model must show before it is promoted, whatever its metrics.

Three kinds, after Ribeiro et al. [1]_: minimum functionality (a case that nobody may get wrong),
direction (a change that may move the answer one way only), and invariance (a change that may
not move it). To add one, for the students' table or another, add an entry to `CASES` or
`DIRECTIONS`. What names a column or a label that a table does not have is not applied to it.

References
----------
.. [1] M. T. Ribeiro, T. Wu, C. Guestrin, S. Singh (2020). *Beyond Accuracy: Behavioral Testing
   of NLP Models with CheckList*. ACL. doi:10.18653/v1/2020.acl-main.442
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from mlflow.pyfunc import PyFuncModel

from helpers.data import Split

FIRST, SECOND = "Curricular units 1st sem", "Curricular units 2nd sem"
MOST_ROWS = 400  # test rows that a behaviour is tried on
CASE_TOLERANCE = 0.02  # share of the changed rows of a case that may fail
DIRECTION_TOLERANCE = 0.01  # mean change of a probability against the direction
INVARIANCE_TOLERANCE = 1e-5  # change of a probability where nothing may change
NO_CONDITION = "no condition: "  # in front of the finding of a check that could not fail
NONE_KNOWN = f"{NO_CONDITION}none is known for this table"
NEW_CODES = (10_001, 20_002)  # two codes that no table has


class BehaviourError(Exception):
    """A model does not behave as it must; the message says how."""


@dataclass(frozen=True)
class Case:
    """Rows changed in a way whose effect on a label is known.

    Attributes
    ----------
    description : str
    change : callable
        From rows to changed rows; a pandas.DataFrame each.
    label : str
        In `CASES` it may not be predicted for the changed rows; in `DIRECTIONS` its
        probability must not fall, on average.
    columns : tuple of str
        That the table must have.
    """

    description: str
    change: Callable[[pd.DataFrame], pd.DataFrame]
    label: str
    columns: tuple[str, ...]


def _all_approved(rows):
    """Give every student six units in both semesters, all approved with a good grade."""
    changed = rows.copy()
    for name in (FIRST, SECOND):
        changed[f"{name} (enrolled)"] = 6
        changed[f"{name} (evaluations)"] = 6
        changed[f"{name} (approved)"] = 6
        changed[f"{name} (grade)"] = 15.0
        changed[f"{name} (without evaluations)"] = 0
    return changed.assign(**{"Tuition fees up to date": 1, "Debtor": 0})


def _fewer_approved(rows):
    """Take two approved units of each semester away, where there are any."""
    columns = [f"{name} (approved)" for name in (FIRST, SECOND)]
    return rows.assign(**{name: (rows[name] - 2).clip(lower=0) for name in columns})


def _fees_not_paid(rows):
    return rows.assign(**{"Tuition fees up to date": 0})


def _units(*parts):
    return tuple(f"{name} ({part})" for name in (FIRST, SECOND) for part in parts)


CASES = (
    Case(
        "every unit approved and fees paid: not Dropout",
        _all_approved,
        "Dropout",
        (
            *_units("enrolled", "evaluations", "approved", "grade", "without evaluations"),
            "Tuition fees up to date",
            "Debtor",
        ),
    ),
)
DIRECTIONS = (
    Case(
        "fewer approved units never make Dropout less likely",
        _fewer_approved,
        "Dropout",
        _units("approved"),
    ),
    Case(
        "unpaid fees never make Dropout less likely",
        _fees_not_paid,
        "Dropout",
        ("Tuition fees up to date",),
    ),
)


def _applying(cases, split):
    columns = set(split.X_test.columns)
    return [each for each in cases if set(each.columns) <= columns and each.label in split.labels]


def check_cases(model: PyFuncModel, split: Split) -> str:
    """Make sure that none of `CASES` gets the label that is out of the question.

    Some rows may fail: one with a few columns changed may be unlike any real one in the others.

    Returns
    -------
    str
        What was found.

    Raises
    ------
    BehaviourError
        Names the case and says how often it failed.
    """
    used = _applying(CASES, split)
    for case in used:
        rows = case.change(split.X_test.head(MOST_ROWS))
        wrong = int((model.predict(rows)["prediction"] == case.label).sum())
        if wrong > CASE_TOLERANCE * len(rows):
            raise BehaviourError(f"{case.description}, but {wrong} of {len(rows)} rows are")
    return "; ".join(case.description for case in used) or NONE_KNOWN


def check_directions(model: PyFuncModel, split: Split) -> str:
    """Make sure that the changes of `DIRECTIONS` move probabilities the right way, on average.

    Returns
    -------
    str
        What was found.

    Raises
    ------
    BehaviourError
        Names the direction and the mean change.
    """
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
            raise BehaviourError(f"{each.description}, but by {change:+.3f} on average")
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

    The order of the rows, the order of the columns, and which code a category has that was
    never seen: an unrelated one must be treated like any other.

    Returns
    -------
    str
        What was found.

    Raises
    ------
    BehaviourError
        Names what moved the answers.
    """
    rows = split.X_test.head(MOST_ROWS)
    names = [f"probability_{label}" for label in split.labels]
    expected = model.predict(rows)[names]
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = model.predict(rows.iloc[order])[names]
    one, other = (
        model.predict(_with_code(rows, split.categorical, code))[names] for code in NEW_CODES
    )
    pairs = {
        "the order of the rows": (shuffled, expected.iloc[order]),
        "the order of the columns": (model.predict(rows[rows.columns[::-1]])[names], expected),
        "which unseen code a category has": (one, other),
    }
    for title, (given, wanted) in pairs.items():
        gap = float(np.abs(given.to_numpy() - wanted.to_numpy()).max())
        if not gap <= INVARIANCE_TOLERANCE:
            raise BehaviourError(f"{title} changes a probability by {gap:.2g}")
    return f"{', '.join(pairs)}: no change"
