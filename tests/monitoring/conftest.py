import json

import pytest
from sklearn.pipeline import make_pipeline

from helpers.registry.reference import make_reference
from tests.scoring import answer_of, fit_svm


class Promoted:
    """A model, its reference, and streams of rows that nobody trained on."""

    def __init__(self, split):
        self.split, self.classifier = split, make_pipeline(*fit_svm(split))
        answer = answer_of(self.classifier, split.X_test, split.labels)
        self.reference = json.loads(json.dumps(make_reference(split, answer)))

    def stream(self, seed=0, n_rows=300, **changed):
        """Draw rows and labelled answers as production might get them, with columns changed."""
        rows = self.split.X_test.sample(n_rows, replace=True, random_state=seed)
        labels = self.split.y_test[rows.index].to_numpy(dtype=object)
        rows = rows.reset_index(drop=True).assign(**changed)
        answers = answer_of(self.classifier, rows, self.split.labels)
        return rows, answers.assign(label=labels)


@pytest.fixture(scope="package")
def promoted(big_split):
    return Promoted(big_split)
