"""How often a model is right, by class and by group: as labels say, or as it expects itself.

Before labels arrive the probabilities stand for them, which gives the expected confusion matrix:
confidence-based performance estimation (CBPE), as NannyML describes it [1]_. It holds as far as
the probabilities are calibrated, and while only the rows change, not what follows from them.

References
----------
.. [1] NannyML, *Estimation of Performance of the Monitored Model*.
   https://nannyml.readthedocs.io/en/stable/how_it_works/performance_estimation.html
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from helpers.data import Split
from helpers.models.evaluation import class_names
from helpers.registry.groups import FEWEST_ROWS, group_labels

KEYS = ["column", "group", "metric"]
ALL = ""  # column and group of all rows together


def count_rates(
    rows: pd.DataFrame,
    answer: pd.DataFrame,
    labels: Sequence,
    grouping: dict[str, dict],
    y_true: ArrayLike | None = None,
) -> pd.DataFrame:
    """Count right answers of all, for accuracy and the recall of each class.

    Parameters
    ----------
    rows : pandas.DataFrame, shape (n_rows, n_columns)
    answer : pandas.DataFrame, shape (n_rows, 1 + n_classes)
        ``prediction`` and ``probability_<label>``.
    grouping
        From `helpers.registry.groups.make_grouping`.
    y_true : array-like, shape (n_rows,), optional
        None: not known; the counts are those that the probabilities let expect.

    Returns
    -------
    pandas.DataFrame
        Index: `KEYS`, all rows first; ``hits`` of ``whole``.
    """
    classes = np.asarray(labels)
    said = answer["prediction"].to_numpy()[:, None] == classes
    truth = answer[[f"probability_{label}" for label in labels]].to_numpy()
    if y_true is not None:
        truth = np.asarray(y_true)[:, None] == classes
    hits = truth * said
    hits = np.column_stack([hits.sum(axis=1), hits])
    whole = np.column_stack([np.ones(len(hits)), truth])
    names = ["accuracy", *(f"recall_{name}" for name in class_names(labels))]
    members = {(ALL, ALL): slice(None)}
    for column, of in group_labels(rows, grouping).items():
        members |= {(column, group): (of == group).to_numpy() for group in of.unique()}
    counts = {
        (*key, name): pair
        for key, chosen in members.items()
        for name, *pair in zip(
            names, hits[chosen].sum(axis=0), whole[chosen].sum(axis=0), strict=True
        )
    }
    index = pd.MultiIndex.from_tuples(counts, names=KEYS)
    return pd.DataFrame(counts.values(), index, ["hits", "whole"])


def reference_rates(split: Split, answer: pd.DataFrame, grouping: dict[str, dict]) -> dict:
    """Summarise the answer to the test rows by group, without those of few rows, for JSON.

    Returns
    -------
    dict
        ``grouping``, and `count_rates` as lists, ``labelled`` and ``estimated``.
    """
    reference = {"grouping": grouping}
    for name, y_true in {"labelled": split.y_test, "estimated": None}.items():
        counts = count_rates(split.X_test, answer, split.labels, grouping, y_true)
        enough = counts[counts["whole"] >= FEWEST_ROWS]
        reference[name] = enough.reset_index().to_numpy().tolist()
    return reference


def read_rates(reference: dict, name: str) -> pd.DataFrame:
    """Return what `reference_rates` kept under a name, as from `count_rates`."""
    return pd.DataFrame(reference[name], columns=[*KEYS, "hits", "whole"]).set_index(KEYS)
