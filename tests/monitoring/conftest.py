import json
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
from sklearn.pipeline import make_pipeline

from helpers import monitoring, registry, series
from helpers.registry.rates import reference_rates
from helpers.registry.reference import make_reference
from helpers.serving import scored_rows
from helpers.serving.recorder import Recorder
from helpers.workspace import open_workspace
from tests.scoring import SVM, answer_of, fit_svm, log_svm, put_in_production


class Promoted:
    """A model, its reference, and streams of rows that nobody trained on."""

    def __init__(self, split):
        self.split, self.classifier = split, make_pipeline(*fit_svm(split))
        answer = answer_of(self.classifier, split.X_test, split.labels)
        self.grouping = registry.make_grouping(split, ["city", "age"])
        reference = make_reference(split, answer) | reference_rates(split, answer, self.grouping)
        self.reference = json.loads(json.dumps(reference))

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


@pytest.fixture(scope="package")
def logged(running_server, promoted):
    running_server.connect()
    return log_svm(promoted.split)


class Watched:
    """A model in Production whose scored rows can be written."""

    def __init__(self, name, folder, logged, promoted):
        self.name, self.split = name, promoted.split
        version = put_in_production(name, logged, promoted.split, promoted.grouping)
        self.version = str(version.version)
        self.workspace = open_workspace(folder)

    def score(self, request_id, rows, answers, labels=None):
        """Keep rows as the scoring server does, and their labels."""
        probabilities = answers.filter(like="probability_").to_numpy().tolist()
        with closing(Recorder(self.workspace.scored_rows)) as recorder:
            model = SimpleNamespace(name=self.name, version=self.version, labels=self.split.labels)
            recorder.write(request_id, model, rows, answers["prediction"].tolist(), probabilities)
        if labels is not None:
            self.label(request_id, labels)

    def label(self, request_id, labels):
        ids = scored_rows.row_ids(request_id, len(labels))
        labels = pd.Series(list(labels), index=ids)
        assert monitoring.add_labels(self.workspace, labels) == len(ids)

    def monitor(self):
        return monitoring.monitor(self.workspace)

    def tag(self):
        return registry.production_version(self.name).tags.get("monitoring")

    def runs(self):
        query = f"tags.model = '{self.name}'"
        return mlflow.search_runs(
            experiment_names=["monitoring"], filter_string=query, output_format="list"
        )


@pytest.fixture
def watch(logged, tracking_server, promoted):
    """Put the model into Production under a name: ``watch(name, workspace's folder)``."""
    return partial(Watched, logged=logged, promoted=promoted)


@pytest.fixture
def watched(watch, monkeypatch, tmp_path):
    name = f"model_{tmp_path.name}"
    monkeypatch.setattr(series, "MODELS", {name: series.MODELS[SVM]})
    return watch(name, tmp_path / "ws")
