"""The preprocessing against scikit-learn's parts, and what it learns from odd columns."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from helpers.models.interface import TabularPreprocessor


def reference(split):
    """Return the same preprocessing made of scikit-learn's parts."""
    encoder = OneHotEncoder(
        min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    numbers = make_pipeline(
        SimpleImputer(strategy="median"),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -2, "a_max": 2}),
    )
    return make_column_transformer(
        (numbers, list(split.numeric)), (encoder, list(split.categorical))
    )


def odd_rows(split):
    """Return test rows with gaps, unseen levels and extreme numbers in them."""
    rows = split.X_test.copy()
    for number, name in enumerate(rows.columns):
        if rows[name].dtype.kind in "if":
            rows[name] = rows[name].astype("float64")
            rows.iloc[number, number] = np.nan
            rows.iloc[number + 10, number] = -1e12
        else:
            rows.iloc[number, number] = None
            rows.iloc[number + 10, number] = "Évora"
    return rows


@pytest.mark.parametrize("n_bins", [0, 8])
@pytest.mark.filterwarnings("ignore")
def test_preprocessing_passes_the_checks_of_scikit_learn(n_bins):
    check_estimator(TabularPreprocessor(n_bins=n_bins))


@pytest.mark.parametrize("n_rows", [1, 45])
def test_preprocessing_gives_what_the_parts_of_scikit_learn_give(small_split, n_rows):
    own = TabularPreprocessor(small_split.categorical).fit(small_split.X_train)
    fitted = reference(small_split).fit(small_split.X_train)
    rows = odd_rows(small_split).head(n_rows)
    np.testing.assert_allclose(own.transform(rows), fitted.transform(rows), rtol=0, atol=1e-12)
    assert len(own.get_feature_names_out()) == fitted.transform(rows).shape[1]


def test_preprocessing_learns_from_gaps_rare_levels_and_pandas_own_types(small_frame):
    frame = small_frame(rows=300, seed=2).drop(columns="Target")
    frame.loc[::7, "city"] = None
    frame.loc[1:9, "city"] = "Évora"
    frame.loc[::5, "width"] = np.nan
    frame["paid"] = frame["length"] > 1
    roles = SimpleNamespace(
        categorical=["city", "course"], numeric=["length", "width", "age", "paid"]
    )
    own = TabularPreprocessor(roles.categorical)
    expected = reference(roles).fit_transform(frame)
    np.testing.assert_allclose(own.fit_transform(frame), expected, rtol=0, atol=1e-12)
    names = ["city_Faro", "city_Lisboa", "city_Porto", "city_None", "city_other"]
    assert own.get_feature_names_out()[4:9].tolist() == names
    np.testing.assert_array_equal(own.fit_transform(frame.convert_dtypes()), own.transform(frame))


@pytest.mark.parametrize("n_bins", [0, 8])
def test_preprocessing_comes_back_from_json(small_split, n_bins):
    own = TabularPreprocessor(small_split.categorical, n_bins).fit(small_split.X_train)
    again = TabularPreprocessor.from_dict(json.loads(json.dumps(own.to_dict())))
    rows = odd_rows(small_split)
    np.testing.assert_array_equal(own.transform(rows), again.transform(rows))
    assert own.get_feature_names_out().tolist() == again.get_feature_names_out().tolist()


def test_codes_of_a_number_fill_one_after_the_other_between_its_quantiles():
    own = TabularPreprocessor(n_bins=4).fit(np.arange(101.0)[:, None])
    assert own.get_feature_names_out().tolist() == ["x0", *(f"x0_bin{n}" for n in range(1, 5))]
    codes = own.transform([[-9.0], [0.0], [25.0], [60.0], [100.0], [999.0]])[:, 1:]
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0.4, 0], [1] * 4, [1] * 4]
    np.testing.assert_allclose(codes, expected, atol=1e-12)
    few = TabularPreprocessor(n_bins=4).fit(np.repeat([0.0, 1.0], [80, 20])[:, None])
    assert few.transform([[0.5]]).shape == (1, 2)


def test_columns_that_say_nothing_give_finite_inputs():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "constant": np.full(300, 7.0),
            "empty": np.full(300, np.nan),
            "number": random.normal(size=300),
            "different": [f"level {number}" for number in range(300)],
        }
    )
    own = TabularPreprocessor(["different"], n_bins=8)
    inputs = own.fit_transform(frame)
    assert np.isfinite(inputs).all()
    names = own.get_feature_names_out()[[0, 1, 2, -1]].tolist()
    assert names == ["constant", "empty", "number", "different_other"]
    assert np.ptp(inputs[:, [0, 1, -1]], axis=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "categorical", "message"),
    [
        ([1.0, "two"], (), "could not convert .* 'two'"),
        ([1.0, np.inf], (), "infinity"),
        ([1.0, 2.0], ["colour"], "'colour' is not"),
    ],
)
def test_table_that_cannot_be_preprocessed_is_refused(values, categorical, message):
    frame = pd.DataFrame({"column": pd.Series(values * 9)})
    with pytest.raises(ValueError, match=message):
        TabularPreprocessor(categorical).fit(frame)
