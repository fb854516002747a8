"""The bundled sample: synthetic, made from committed figures, and like the real table."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from helpers import data
from helpers.data.sample_data import make_sample
from helpers.data.students import STUDENT_CATEGORICAL
from helpers.models.interface import TabularPreprocessor
from tests.conftest import split_table


@pytest.fixture(scope="module")
def sample():
    return data.read_table(data.SAMPLE.read_bytes(), "sample")


def test_sample_has_the_schema_size_and_class_counts_of_the_kaggle_variant(sample):
    assert sample.frame.shape == (4424, 35)
    counts = sample.frame["Target"].value_counts().to_dict()
    assert counts == {"Graduate": 2209, "Dropout": 1421, "Enrolled": 794}
    assert sample.categorical == STUDENT_CATEGORICAL
    assert not sample.frame.isna().any(axis=None)
    assert data.SAMPLE.stat().st_size <= 300 * 1024


def test_sample_is_made_from_the_committed_figures_alone(tmp_path):
    figures = json.loads(make_sample.SUMMARY_FILE.read_text(encoding="utf-8"))
    make_sample.write_sample(make_sample.generate(figures), tmp_path / "again.csv.gz")
    again = gzip.decompress((tmp_path / "again.csv.gz").read_bytes())
    assert again == gzip.decompress(data.SAMPLE.read_bytes())


def test_sample_has_the_columns_and_types_of_the_real_table(sample, real_data):
    real = data.read_table((real_data / "kaggle_students.csv").read_bytes(), "real")
    assert list(sample.frame.columns) == list(real.frame.columns)
    assert sample.frame.dtypes.to_dict() == real.frame.dtypes.to_dict()


def test_no_row_of_the_sample_equals_a_real_one(sample, real_data):
    real = data.read_table((real_data / "kaggle_students.csv").read_bytes(), "real").frame
    rounded = pd.concat([sample.frame.round(2), real.round(2)], keys=["sample", "real"])
    assert not rounded.duplicated(keep=False).loc["sample"].any()


@pytest.mark.slow
@pytest.mark.parametrize("model", [SVC(C=2, gamma=2**-5), LogisticRegression(max_iter=2000)])
def test_models_trained_on_the_sample_behave_like_those_on_the_real_table(sample, real_data, model):
    real = data.read_table((real_data / "kaggle_students.csv").read_bytes(), "real")
    accuracies = {}
    for name, table in {"sample": sample, "real": real}.items():
        scores = []
        for seed in range(2):
            split = split_table(table, 0.3, seed)
            preprocessor = TabularPreprocessor(split.categorical)
            fitted = make_pipeline(preprocessor, model).fit(split.X_train, split.y_train)
            scores.append(accuracy_score(split.y_test, fitted.predict(split.X_test)))
        accuracies[name] = np.mean(scores)
    assert accuracies["sample"] == pytest.approx(accuracies["real"], abs=0.04)
