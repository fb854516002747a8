"""Runs of models that are good, weak or useless, and a name for each test to promote them under."""

import uuid
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier

from helpers import registry, tracking
from helpers.models import evaluation
from helpers.models.interface import TabularPreprocessor
from helpers.registry import PromotionRules
from helpers.registry.candidates import Candidate
from helpers.registry.robustness import Robustness
from tests.cells import run_cells
from tests.scoring import PASSED, fit_svm, put_in_production

RULES = PromotionRules(min_gain=0.02, max_loss=0.01, allow_replace=False, min_robustness=0.0)
HALF_HOLDS = Robustness(np.array([1.0, np.nan] * 5), pd.Series(dtype=float))


def with_manifest(split, **changes):
    return replace(split, manifest={**split.manifest, **changes})


def fit(split, classifier):
    preprocessing = TabularPreprocessor(split.categorical)
    return preprocessing, classifier.fit(preprocessing.fit_transform(split.X_train), split.y_train)


def log_run(split, parts, with_rows=False, **falsified):
    """Log preprocessing and classifier as notebook 03 does.

    `falsified` metrics are logged over the real ones.
    Runs from before training rows were logged are as those without `with_rows`.
    """
    with tracking.start_run("svc_model", "svm", split.manifest) as run:
        if with_rows:
            tracking.log_split(split)
        info = tracking.log_model(split, *parts)
        tracking.evaluate_logged_model(info, split)
        mlflow.log_metrics(falsified)
    return mlflow.get_run(run.info.run_id)


def partly_shuffled(y, share):
    random = np.random.default_rng(0)
    rows = random.choice(len(y), int(share * len(y)), replace=False)
    values = y.to_numpy(dtype=object).copy()
    values[rows] = random.permutation(values[rows])
    return pd.Series(values, index=y.index, name=y.name)


def by_rule(split, chance):
    """Return a model of two labels, and its answer to rows: `chance` is the first one's."""
    one, other, never = split.labels

    def predict(context, rows):
        p = np.asarray(chance(rows), dtype="float64")
        answer = pd.DataFrame({"prediction": np.where(p > 0.5, one, other)})
        shares = {one: p, other: 1 - p, never: 0.0}
        return answer.assign(**{f"probability_{label}": share for label, share in shares.items()})

    return SimpleNamespace(unwrap_python_model=lambda: SimpleNamespace(predict=predict)), predict


def promote_by_cell(candidate, checks, **parameters):
    """Run the cell of notebook 04 that registers and promotes; return the decision."""
    made = run_cells(
        "04_registry_promotion",
        "registry.promoting(",
        "registry.promoting(",
        candidates={candidate.name: candidate},
        checks=checks,
        **parameters,
    )
    return made.decisions[candidate.name]


def failed(checks):
    return list(checks.index[~checks["passed"]])


@pytest.fixture(scope="package")
def runs(running_server, small_split):
    """Runs of good, weak, useless and narrow models on a split of this package's own."""
    running_server.connect()
    split = with_manifest(small_split, split_digest=uuid.uuid4().hex)
    good = fit_svm(split)
    shuffled = replace(split, y_train=partly_shuffled(split.y_train, 0.75))
    narrow = with_manifest(
        replace(
            split,
            X_train=split.X_train.drop(columns="age"),
            X_test=split.X_test.drop(columns="age"),
        ),
        numeric=[name for name in split.numeric if name != "age"],
        digest="narrow",
    )
    synthetic = with_manifest(split, synthetic=True, source="sample", digest="synthetic")
    return SimpleNamespace(
        split=split,
        fitted=good,
        good=[log_run(split, good) for _ in range(3)],
        weak=log_run(split, fit_svm(shuffled)),
        useless=log_run(split, fit(split, DummyClassifier())),
        narrow_split=narrow,
        narrow=log_run(narrow, fit_svm(narrow)),
        synthetic_split=synthetic,
        synthetic=log_run(synthetic, good),
        baselines=evaluation.baselines(split),
    )


class RegisteredModel:
    """A registered model's name that no other test uses, and what is done under it."""

    def __init__(self, runs):
        self.name, self.runs = f"model_{uuid.uuid4().hex[:12]}", runs

    def candidate(self, run, split=None, robustness=None):
        return Candidate(self.name, run, split or self.runs.split, robustness)

    def rules(self, **changes):
        return replace(RULES, **changes)

    def check(self, run, split=None, robustness=None, **rules):
        """Return a candidate and the table of its checks."""
        candidate = self.candidate(run, split, robustness)
        simple = evaluation.baselines(split) if split else self.runs.baselines
        checks = registry.check_candidates({self.name: candidate}, simple, replace(RULES, **rules))
        return candidate, checks

    def findings(self, *arguments, **options):
        """Return the checks of one candidate."""
        return self.check(*arguments, **options)[1].loc[self.name]

    def passed(self, run):
        """Return a candidate and a table of checks that it passed, without making them."""
        return self.candidate(run), pd.concat({self.name: PASSED})

    def put(self, run):
        """Put a run in Production without checks."""
        return put_in_production(self.name, run, self.runs.split)

    def try_to_promote(self, run, split=None, **rules):
        """Check and promote one candidate; return the checks and the decision."""
        candidate, checks = self.check(run, split, **rules)
        return checks.loc[self.name], promote_by_cell(candidate, checks)

    def register(self, *runs):
        """Register runs as versions 1, 2, … without promoting them."""
        for number, run in enumerate(runs, 1):
            version = mlflow.register_model(self.candidate(run).model_uri, self.name)
            assert version.version == str(number)

    def promote(self, *versions):
        for version in versions:
            registry.promote(self.name, version, "promoted")

    def rollback(self):
        return registry.rollback(self.name, "complaint")

    def set_alias(self, version):
        mlflow.MlflowClient().set_registered_model_alias(self.name, "production", version)

    @property
    def stages(self):
        found = mlflow.MlflowClient().search_model_versions(f"name = '{self.name}'")
        return {version.version: version.current_stage for version in found}

    @property
    def aliased(self):
        return mlflow.MlflowClient().get_model_version_by_alias(self.name, "production").version

    @property
    def history(self):
        return registry.history(self.name)


@pytest.fixture
def model(tracking_server, runs):
    return RegisteredModel(runs)
