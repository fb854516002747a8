"""Raw columns → model inputs, the same for both models and fitted on training rows only."""

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

# Both numbers were chosen by cross-validation on training rows of the students' table.
RARE_LEVEL = 20  # training rows below which levels of a category are pooled
OUTLIER = 2.0  # standard deviations at which numbers are cut off


def make_preprocessor(numeric, categorical):
    """Make the transformer that both models put in front.

    Numbers: missing values become the median, then zero mean and unit variance, cut off at
    ±`OUTLIER`, so that a few extreme values do not decide distances. Categories: one column
    per level; levels seen in fewer than `RARE_LEVEL` training rows share one column, which is
    also where levels go that were never seen.

    Parameters
    ----------
    numeric, categorical : sequence of str
        Names of the columns; at least one in all.

    Returns
    -------
    sklearn.compose.ColumnTransformer
        Unfitted; gives a dense float64 array of shape (n_rows, n_inputs).
    """
    encoder = OneHotEncoder(
        min_frequency=RARE_LEVEL, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    scaler = make_pipeline(
        SimpleImputer(strategy="median"),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -OUTLIER, "a_max": OUTLIER}),
    )
    return ColumnTransformer(
        [("categorical", encoder, list(categorical)), ("numeric", scaler, list(numeric))]
    )
