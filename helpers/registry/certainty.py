"""How sure the figures of a candidate are: intervals and calibration.

The intervals are those of the bootstrap over the test rows.
"""

from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import binom

from helpers.data import Split
from helpers.models.evaluation import bootstrap_interval, class_names, macro_f1

BINS = 10  # of equally many rows, for the calibration curve
QUANTILES = (0.025, 0.975)  # of an interval of 95 %
TINY = np.finfo("float64").eps  # as scikit-learn's log loss


def intervals(split: Split, answer: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of the metrics of an answer to the test rows.

    Of ``accuracy``, ``f1_macro``, ``log_loss``, ``brier`` and each ``recall_<label>``, which are
    quick to compute for a thousand draws; the area under the ROC curve is not.
    """
    truth, guess = split.encode(split.y_test), split.encode(answer["prediction"])
    probabilities = answer[[f"probability_{label}" for label in split.labels]].to_numpy()
    errors = np.square(probabilities - np.eye(len(split.labels))[truth]).sum(axis=1)
    losses = -np.log(np.clip(probabilities[np.arange(len(truth)), truth], TINY, 1))
    means = {"accuracy": truth == guess, "log_loss": losses, "brier": errors}
    for number, name in enumerate(class_names(split.labels)):
        means[f"recall_{name}"] = guess[truth == number] == number
    found = {
        name: bootstrap_interval(lambda _, rows: rows.mean(), rows, rows)
        for name, rows in means.items()
    }
    score = partial(macro_f1, size=len(split.labels))
    return found | {"f1_macro": bootstrap_interval(score, truth, guess)}


def calibration_curve(split: Split, answer: pd.DataFrame, label=None) -> pd.DataFrame:
    """Compare how sure an answer is with how often it is right, in bins of equally many rows.

    Parameters
    ----------
    answer : pandas.DataFrame
        To the test rows.
    label
        The class whose probability is compared with its share; None: the probability of the
        predicted class with the share of right predictions.

    Returns
    -------
    pandas.DataFrame
        A row per bin: ``rows``, mean ``probability``, ``share``, and the ends ``low`` and ``high``
        of the share's interval.
    """
    truth = split.y_test.to_numpy()
    if label is None:
        named = answer[[f"probability_{each}" for each in split.labels]]
        probability, hit = named.max(axis=1), answer["prediction"].to_numpy() == truth
    else:
        probability, hit = answer[f"probability_{label}"], truth == label
    rows = pd.DataFrame({"probability": probability.to_numpy(), "share": hit})
    bins = pd.qcut(rows["probability"], BINS, labels=False, duplicates="drop")
    curve = rows.groupby(bins).mean()
    curve.insert(0, "rows", bins.value_counts())
    low, high = (
        binom.ppf(each, curve["rows"], curve["share"]) / curve["rows"] for each in QUANTILES
    )
    return curve.assign(low=low, high=high).reset_index(drop=True)
