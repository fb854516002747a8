"""What may go to Production, and what it is compared with there."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.pyfunc import PyFuncModel

from helpers import series, tracking
from helpers.data import Split
from helpers.display import notice
from helpers.models.evaluation import Baselines, compute_metrics, paired_gain
from helpers.registry.certainty import calibration_curve, intervals
from helpers.registry.explanations import Explanation
from helpers.registry.groups import GroupReport, alarm_label
from helpers.registry.production import LOAD_ERRORS, metrics_of, number_of, production_version
from helpers.registry.robustness import Robustness
from helpers.workspace import MissingStepError

MIN_UNSEEN = 30  # test rows new to the version in Production, to measure it on these alone


@dataclass
class Candidate:
    """A trained model on its way to Production under the name of a registered model.

    `robustness`, `explanation` and `groups` are None if not measured; `grouping` says how rows
    become groups, empty if they do not; `measures` are the baselines and the promotion rules that
    it was checked by, empty before.
    """

    name: str
    run: Run
    split: Split = field(repr=False)
    robustness: Robustness | None = field(default=None, repr=False)
    explanation: Explanation | None = field(default=None, repr=False)
    groups: GroupReport | None = field(default=None, repr=False)
    grouping: dict[str, dict] = field(default_factory=dict, repr=False)
    measures: tuple = field(default=(), repr=False)

    @property
    def model_uri(self) -> str:
        """URI of the logged model; by its id, so that a version links to it and to the run."""
        return f"models:/{self.run.outputs.model_outputs[-1].model_id}"

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics that the run logged on the test rows."""
        return self.run.data.metrics

    @cached_property
    def model(self) -> PyFuncModel:
        """The model, loaded back from the server as a client would."""
        return tracking.load_model(self.model_uri)

    @cached_property
    def answer(self) -> pd.DataFrame:
        """Its answer to the test rows."""
        return self.model.predict(self.split.X_test)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of some of its metrics, see `helpers.registry.certainty`."""
        return intervals(self.split, self.answer)

    @cached_property
    def champion(self) -> "Champion | None":
        """What is in Production under its name."""
        version = production_version(self.name)
        return None if version is None else Champion(version, self.split)

    @cached_property
    def beside_champion(self) -> tuple[dict[str, float], dict[str, float], str]:
        """Its metrics, those of the champion, and which rows the champion's are from.

        On those of the test rows that the champion was not trained on: what it has seen it may
        know by heart. Where these are too few or not known, the metrics that each logged on its
        own test rows.
        """
        champion, split, rows = self.champion, self.split, self.champion.new_rows
        if rows is None:
            basis = "its own test rows (too few of these are known to be new to it)"
            return self.metrics, metrics_of(champion.version), basis
        y = split.y_test[rows]
        production = compute_metrics(y, champion.answer, split.labels)
        if rows.all():
            return self.metrics, production, "the same test rows"
        own = compute_metrics(y, self.answer[rows], split.labels)
        return own, production, f"the {len(y):,} test rows that are new to it"

    @cached_property
    def gain(self) -> tuple[float, float, float] | None:
        """Its macro F1 less the champion's on the same rows, and the ends of the 95 % interval.

        None where there are no such rows.
        """
        rows = self.champion.new_rows
        if rows is None:
            return None
        answers = self.answer["prediction"][rows], self.champion.answer["prediction"]
        return paired_gain(self.split, *answers, rows)


@dataclass
class Champion:
    """The version in Production that a candidate must not fall behind, on the candidate's split."""

    version: ModelVersion
    split: Split = field(repr=False)

    def __str__(self) -> str:
        return f"version {number_of(self.version)} in Production"

    @cached_property
    def tags(self) -> dict[str, str]:
        """Tags of its run: what it was trained on."""
        return mlflow.MlflowClient().get_run(self.version.run_id).data.tags

    @cached_property
    def model(self) -> PyFuncModel | None:
        """The model, loaded as a client would; None if its files are lost, for example."""
        try:
            return tracking.load_model(f"models:/{self.version.name}/{self.version.version}")
        except LOAD_ERRORS:
            return None

    @cached_property
    def answer(self) -> pd.DataFrame:
        """Its answer to those of the test rows that are new to it."""
        return self.model.predict(self.split.X_test[self.new_rows])

    @property
    def same_columns(self) -> bool:
        """Whether it loads, takes the candidate's columns and gives the same labels."""
        if self.model is None:
            return False
        wanted = {
            "columns": tracking.column_kinds(self.split.X_train),
            "labels": [str(label) for label in self.split.labels],
        }
        return wanted.items() <= (self.model.metadata.metadata or {}).items()

    @cached_property
    def new_rows(self) -> np.ndarray | None:
        """The test rows that it was not trained on, an array of bool.

        None if they are not known, or too few: less than `MIN_UNSEEN`, or without some class.
        """
        X, y = self.split.X_test, self.split.y_test
        if self.tags.get("split_digest") == self.split.manifest["split_digest"]:
            return np.ones(len(X), dtype=bool)
        seen = tracking.training_rows(self.version.run_id)
        if seen is None:
            return None
        new = ~tracking.row_hashes(X).isin(seen).to_numpy()
        enough = new.sum() >= MIN_UNSEEN and set(y[new]) == set(self.split.labels)
        return new if enough or new.all() else None


def find_candidates(split: Split) -> dict[str, Candidate]:
    """Find the newest finished run of each model of the series on the prepared split.

    Raises
    ------
    MissingStepError
        If a model was not trained on this split yet; names the notebook to run.
    """
    candidates, missing = {}, []
    for name, model in series.MODELS.items():
        run = tracking.latest_run(model.experiment, model.run_name, split.manifest["split_digest"])
        if run is None:
            missing.append(f"{series.STEPS[model.step].name} (for {name})")
            continue
        candidates[name] = Candidate(name, run, split)
        if not tracking.is_own(run):
            notice(
                f"{name}: this workspace has no run on the prepared split; the candidate is "
                f"{run.info.run_id}, the newest one of another workspace."
            )
    if missing:
        raise MissingStepError(
            f"Not trained yet on the prepared data: run notebook {' and '.join(missing)} first."
        )
    return candidates


def intervals_by_model(candidates: dict[str, Candidate]) -> dict[str, dict]:
    """Return the intervals of the metrics of candidates, without those that do not load."""
    found = {}
    for name, candidate in candidates.items():
        with suppress(*LOAD_ERRORS):
            found[name] = candidate.intervals
    return found


def calibration_curves(
    candidates: dict[str, Candidate], alarm_class: str | None
) -> dict[str, pd.DataFrame]:
    """Return the calibration curves of candidates, without those that do not load.

    Of the class that matters, as in `helpers.registry.groups.alarm_label`; where none does, of
    the predicted class.
    """
    found = {}
    for name, candidate in candidates.items():
        label = alarm_label(candidate.split.labels, alarm_class)
        with suppress(*LOAD_ERRORS):
            found[name] = calibration_curve(candidate.split, candidate.answer, label)
    return found


def comparison(
    candidates: dict[str, Candidate], baselines: Baselines
) -> dict[str, dict[str, float]]:
    """Gather the metrics of candidates, of what is in Production, and of the baselines.

    For `helpers.models.evaluation.metrics_table`. A version in Production that takes other
    columns or does not load is left out: it cannot be measured on these rows. Where it is
    measured on a part of the rows, the candidate stands beside it on the same part too.
    """
    metrics = {}
    for name, candidate in candidates.items():
        metrics[name], champion = candidate.metrics, candidate.champion
        if champion is None:
            continue
        if champion.model is None:
            notice(f"{name}: {champion} does not load; it is not compared.", level="warning")
        if not champion.same_columns:
            continue
        try:
            own, production, _ = candidate.beside_champion
        except LOAD_ERRORS:
            # A candidate that does not load is refused by the checks, which say why.
            continue
        rows, on = champion.new_rows, ""
        if rows is None:
            on = " on its own test rows"
        elif not rows.all():
            on = f" on {rows.sum():,} rows"
            metrics[name + on] = own
        metrics[f"{name} in Production (version {number_of(champion.version)}){on}"] = production
    return {**metrics, **baselines.metrics}
