"""Notebook 04: register, check, promote, roll back, and the history of it all.

Production is the alias ``production`` (what clients load) together with the stage
``Production`` (what the classic UI shows). Every promotion and rollback is a run of the
experiment ``promotions``, so the history is in MLflow itself and nothing in it is overwritten.
"""

import pickle
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from helpers import behaviour, drift, robustness, tracking
from helpers.display import COLOURS, notice
from helpers.evaluation import compute_metrics
from helpers.workspace import MissingStepError, ProjectError, is_interactive

ALIAS = "production"
STAGE = "Production"
HISTORY = "promotions"
REFERENCE = "monitoring/reference.json"  # artifact: what production is compared with later
ROBUSTNESS = "robustness/robustness.json"  # artifact: what the attack achieved
REPRODUCED = 1e-4  # largest difference between a logged metric and the same one recomputed
SUM_TOLERANCE = 1e-6  # how far the probabilities of a row may be from summing to 1
MIN_UNSEEN = 30  # test rows new to the version in Production, to measure it on these alone
LOAD_ERRORS = (
    MlflowException,
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    pickle.UnpicklingError,
    zlib.error,
)

# Registered model: (experiment, run, notebook that makes it)
MODELS = {
    "model_conv_network": ("conv_network", "default_logistic", "02_cnn_training"),
    "model_svm_rbf": ("svc_model", "svm", "03_svm_grid_search"),
}
SETTLE = 10  # times that stage and alias are compared after a promotion
FINE = "_fine"  # at the end of the name of a run that refines another


class RegistryError(ProjectError):
    """The registry cannot do what was asked."""


class PromotionRefusedError(ProjectError):
    """A candidate failed a check and was not promoted."""


class CheckFailedError(Exception):
    """A check of a candidate failed; the message says why."""


@dataclass(frozen=True)
class Rules:
    """The promotion rule.

    Attributes
    ----------
    min_gain : float
        Accuracy that a candidate must have above the majority class.
    max_loss : float
        Macro F1 that it may be below the version in Production. Above 0, because the same
        training on another machine differs by a few rows.
    allow_replace : bool
        Promote even where Production was trained on another kind of table.
    min_robustness : float
        Share of attacked rows whose answer must hold, see `helpers.robustness`; 0: any.
    """

    min_gain: float = 0.02
    max_loss: float = 0.01
    allow_replace: bool = False
    min_robustness: float = 0.0


# --- what is there ----------------------------------------------------------------------------


def production_version(name):
    """Return the version of a registered model that is in Production, or None.

    Parameters
    ----------
    name : str

    Returns
    -------
    mlflow.entities.model_registry.ModelVersion or None
        By alias; where nobody set the alias (a promotion by hand in the UI), by stage.
    """
    client = mlflow.MlflowClient()
    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    staged = [v for v in _versions(name) if v.current_stage == STAGE]
    return staged[0] if staged else None


def _versions(name):
    """Return all versions of a model, the newest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: -int(version.version))


def _number(version):
    """Return the number of a version as text, or None; a database gives whole numbers."""
    return None if version is None else str(version.version)


def load_production(name):
    """Load the model in Production as any client would.

    Parameters
    ----------
    name : str

    Returns
    -------
    mlflow.pyfunc.PyFuncModel
    """
    version = production_version(name)
    if version is not None and ALIAS not in version.aliases:
        # Promoted by hand in the UI, which sets the stage alone.
        return tracking.load_model(f"models:/{name}/{version.version}")
    return tracking.load_model(f"models:/{name}@{ALIAS}")


def load_all_production():
    """Load every model of the series that is in Production, as a client would.

    Returns
    -------
    dict of str to mlflow.pyfunc.PyFuncModel
        By name.

    Raises
    ------
    helpers.workspace.MissingStepError
        If none is.
    """
    return {name: load_production(name) for name in require_production()}


def require_production():
    """Return the names of the models of the series that are in Production.

    Returns
    -------
    list of str

    Raises
    ------
    helpers.workspace.MissingStepError
        If none is.
    """
    names = [name for name in MODELS if production_version(name)]
    if not names:
        raise MissingStepError("No model is in Production. Run 04_registry_promotion first.")
    return names


# --- candidates -------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A trained model on its way to Production.

    Attributes
    ----------
    name : str
        Of the registered model.
    run : mlflow.entities.Run
        That logged it.
    split : helpers.data.Split
        Training and test rows that the run used.
    robustness : helpers.robustness.Robustness or None
        From `attack_candidates`; None if not measured.
    measures : tuple of (dict, Rules) or None
        Baseline and rules that it was checked with; None if not checked yet.
    """

    name: str
    run: mlflow.entities.Run
    split: object = field(repr=False)
    robustness: object = field(default=None, repr=False)
    measures: tuple = field(default=None, repr=False)

    @property
    def model_uri(self):
        """URI of the logged model."""
        return f"runs:/{self.run.info.run_id}/model"

    @property
    def metrics(self):
        """Metrics that the run logged on the test rows."""
        return self.run.data.metrics

    @cached_property
    def model(self):
        """The model, loaded back from the server as a client would."""
        return tracking.load_model(self.model_uri)

    @cached_property
    def answer(self):
        """Its answer to the test rows."""
        return self.model.predict(self.split.X_test)

    def metrics_on(self, rows):
        """Return its metrics on some of the test rows; `rows` is an array of bool."""
        if rows.all():
            return self.metrics
        return compute_metrics(self.split.y_test[rows], self.answer[rows], self.split.labels)

    @cached_property
    def champion(self):
        """What is in Production under its name, or None."""
        return Champion.find(self.name, self.split)


@dataclass
class Champion:
    """The version in Production that a candidate must not fall behind.

    Attributes
    ----------
    version : mlflow.entities.model_registry.ModelVersion
    run : mlflow.entities.Run
        That logged it.
    split : helpers.data.Split
        Of the candidate.
    model : mlflow.pyfunc.PyFuncModel or None
        Loaded as a client would; None if it does not load, its files being lost for example.
    """

    version: object
    run: mlflow.entities.Run
    split: object = field(repr=False)
    model: object = field(repr=False)

    def __str__(self):
        return f"version {_number(self.version)} in Production"

    @classmethod
    def find(cls, name, split):
        """Return the champion of a name, or None."""
        version = production_version(name)
        if version is None:
            return None
        try:
            model = tracking.load_model(f"models:/{name}/{version.version}")
        except LOAD_ERRORS:
            model = None
        return cls(version, mlflow.MlflowClient().get_run(version.run_id), split, model)

    @property
    def same_columns(self):
        """Whether it loads, takes the candidate's columns and gives the same labels."""
        if self.model is None:
            return False
        known = self.model.metadata.metadata or {}
        return known.get("columns") == tracking.column_kinds(self.split.X_train) and known.get(
            "labels"
        ) == [str(label) for label in self.split.labels]

    @cached_property
    def unseen(self):
        """The test rows that it was not trained on, an array of bool; None if not known."""
        if self.run.data.tags.get("split_digest") == self.split.manifest["split_digest"]:
            return np.ones(len(self.split.X_test), dtype=bool)
        seen = tracking.training_rows(self.run.info.run_id)
        if seen is None:
            return None
        return ~tracking.row_hashes(self.split.X_test).isin(seen).to_numpy()

    @property
    def measurable(self):
        """Whether enough test rows of every class are known to be new to it."""
        if self.unseen is None or self.unseen.all():
            return self.unseen is not None
        classes = set(self.split.y_test[self.unseen])
        return self.unseen.sum() >= MIN_UNSEEN and classes == set(self.split.labels)

    @cached_property
    def evaluation(self):
        """Its metrics and where they are from, a pair ``(metrics, basis)``.

        On those of the candidate's test rows that it was not trained on: what it has seen it
        may know by heart. Where these are too few or not known, the metrics that it logged on
        its own test rows.
        """
        if not self.measurable:
            basis = "its own test rows (too few of these are known to be new to it)"
            return self.run.data.metrics, basis
        X, y = self.split.X_test[self.unseen], self.split.y_test[self.unseen]
        metrics = compute_metrics(y, self.model.predict(X), self.split.labels)
        if self.unseen.all():
            return metrics, "the same test rows"
        return metrics, f"the {len(y):,} test rows that are new to it"

    def beside(self, candidate):
        """Return a candidate's metrics on the rows that its own are from, where possible."""
        return candidate.metrics_on(self.unseen) if self.measurable else candidate.metrics


def _newest_run(name, split_digest):
    """Return the newest finished run of a model, or its refinement where that is better.

    Better by cross-validation, as the test rows may not be used for a choice.
    """
    experiment, run_name, _ = MODELS[name]
    run = tracking.latest_run(experiment, run_name, split_digest)
    finer = tracking.latest_run(experiment, f"{run_name}{FINE}", split_digest)
    if run is None or finer is None or finer.info.start_time < run.info.start_time:
        return run
    first, second = (each.data.metrics["cv_accuracy"] for each in (run, finer))
    chosen, compared = (finer, ">") if second > first else (run, "<=")
    notice(
        f"{name}: the candidate is the run {chosen.info.run_name}, as its cross-validated "
        f"accuracy decides: {run_name}{FINE} {second:.4f} {compared} {run_name} {first:.4f}."
    )
    return chosen


def find_candidates(split, names=tuple(MODELS)):
    """Find the newest finished run of each model on the prepared split.

    Parameters
    ----------
    split : helpers.data.Split
    names : sequence of str
        Keys of `MODELS`.

    Returns
    -------
    dict of str to Candidate

    Raises
    ------
    MissingStepError
        If a model was not trained on this split yet; names the notebook to run.
    """
    candidates, missing = {}, []
    for name in names:
        run, notebook = _newest_run(name, split.manifest["split_digest"]), MODELS[name][2]
        if run is None:
            missing.append(f"{notebook} (for {name})")
        else:
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


def comparison(candidates, baseline):
    """Gather the metrics of candidates, of what is in Production, and of the baseline.

    Parameters
    ----------
    candidates : dict of str to Candidate
    baseline : dict of str to float

    Returns
    -------
    dict of str to dict
        For `helpers.evaluation.metrics_table`. A version in Production that takes other
        columns or does not load is left out: it cannot be measured on these rows. Where it is
        measured on a part of the rows, the candidate stands beside it on the same part too.
    """
    metrics = {}
    for name, candidate in candidates.items():
        metrics[name] = candidate.metrics
        champion = candidate.champion
        if champion is None:
            continue
        if champion.model is None:
            notice(f"{name}: {champion} does not load; it is not compared.", level="warning")
        if not champion.same_columns:
            continue
        rows = ""
        if not champion.measurable:
            rows = " on its own test rows"
        elif not champion.unseen.all():
            rows = f" on {champion.unseen.sum():,} rows"
            # A candidate that does not load is refused by the checks, which say why.
            with suppress(*LOAD_ERRORS):
                metrics[name + rows] = champion.beside(candidate)
        title = f"{name} in Production (version {_number(champion.version)})"
        metrics[title + rows] = champion.evaluation[0]
    return {**metrics, "majority class": baseline}


# --- checks -----------------------------------------------------------------------------------


def _check_loads(candidate, baseline, rules):
    try:
        answer = candidate.answer
    except LOAD_ERRORS as error:
        raise CheckFailedError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return f"answers {len(answer):,} test rows"


def _require(condition, complaint):
    if not condition:
        raise CheckFailedError(complaint)


def _probabilities(answer, labels):
    return answer[[f"probability_{label}" for label in labels]].to_numpy()


def _check_interface(candidate, baseline, rules):
    labels, answer = candidate.split.labels, candidate.answer
    wanted = ["prediction", *(f"probability_{label}" for label in labels)]
    _require(list(answer.columns) == wanted, f"answers {list(answer.columns)}, not {wanted}")
    _require(set(answer["prediction"]) <= set(labels), "predicts labels that are not in the CSV")
    sums = _probabilities(answer, labels).sum(axis=1)
    _require(np.abs(sums - 1).max() < SUM_TOLERANCE, "probabilities do not sum to 1")
    return "prediction and one probability per class"


def _check_schema(candidate, baseline, rules):
    wanted = list(candidate.split.X_test.columns)
    inputs = candidate.model.metadata.get_input_schema()
    _require(inputs is not None, "the model has no signature")
    names = [*wanted, *candidate.split.manifest.get("header", {}).values()]
    _require(inputs.input_names() == names, "its signature has other columns than the data")
    few = candidate.split.X_test.head(20)
    expected = _probabilities(candidate.answer.head(20), candidate.split.labels)
    numbers = list(few.select_dtypes("int64"))
    changed = few[few.columns[::-1]].astype(dict.fromkeys(numbers, "float64"))
    again = _probabilities(candidate.model.predict(changed), candidate.split.labels)
    _require(np.allclose(again, expected, atol=1e-5), "answers change with the column order")
    try:
        candidate.model.predict(few.drop(columns=wanted[0]))
    except MlflowException:
        return f"{len(wanted)} columns in any order, integers or floats"
    raise CheckFailedError(f"answers although column {wanted[0]!r} is missing")


def _check_unseen_category(candidate, baseline, rules):
    few = candidate.split.X_test.head(5).copy()
    for name in candidate.split.categorical:
        # True and false are all that such a column can hold.
        if few[name].dtype.kind != "b":
            few[name] = "never seen" if few[name].dtype == object else few[name].max() + 10_000
    try:
        answer = candidate.model.predict(few)
    except LOAD_ERRORS as error:
        raise CheckFailedError(f"an unseen category fails: {error}") from error
    _require(answer.notna().all(axis=None), "an unseen category gives no probability")
    return "answered"


def _check_reproduced(candidate, baseline, rules):
    recomputed = compute_metrics(candidate.split.y_test, candidate.answer, candidate.split.labels)
    logged = candidate.metrics
    missing = sorted(set(recomputed) - set(logged))
    _require(not missing, f"not logged: {', '.join(missing)}")
    worst = max(recomputed, key=lambda name: abs(recomputed[name] - logged[name]))
    gap = abs(recomputed[worst] - logged[worst])
    _require(
        gap <= REPRODUCED,
        f"{worst} is {recomputed[worst]:.4f} when loaded back, but {logged[worst]:.4f} was logged",
    )
    return f"{len(recomputed)} metrics, largest difference {gap:.1e}"


def _check_baseline(candidate, baseline, rules):
    accuracy, floor = candidate.metrics["accuracy"], baseline["accuracy"] + rules.min_gain
    _require(
        accuracy >= floor,
        f"accuracy {accuracy:.4f} is below {floor:.4f} (majority class + MIN_GAIN)",
    )
    return f"accuracy {accuracy:.4f}, majority class {baseline['accuracy']:.4f}"


def _check_replaceable(candidate, baseline, rules):
    champion = candidate.champion
    if champion is None:
        return "nothing in Production yet"
    if rules.allow_replace:
        return "ALLOW_REPLACE is set"
    _require(
        champion.same_columns or champion.model is None,
        f"{champion} takes other columns or gives other labels; its clients would break. Use "
        "another WORKSPACE, or set ALLOW_REPLACE",
    )
    synthetic = candidate.split.manifest["synthetic"]
    _require(
        not synthetic or champion.run.data.tags.get("synthetic_data") == "true",
        f"{champion} was trained on real data, the candidate on the synthetic sample. Set "
        "ALLOW_REPLACE if that is meant",
    )
    if champion.model is None:
        return f"{champion} does not load: it serves nobody"
    return f"same columns and labels as {champion}"


def _check_champion(candidate, baseline, rules):
    champion = candidate.champion
    if champion is None:
        return "nothing in Production yet"
    if champion.model is None:
        return f"{champion} does not load: there is nothing to compare with"
    if not champion.same_columns:
        _require(rules.allow_replace, "cannot be compared with the version in Production")
        return "not comparable; ALLOW_REPLACE is set"
    metrics, basis = champion.evaluation
    score, floor = champion.beside(candidate)["f1_macro"], metrics["f1_macro"] - rules.max_loss
    _require(
        score >= floor,
        f"macro F1 {score:.4f} is below {floor:.4f} ({champion} on {basis}, less MAX_LOSS)",
    )
    return f"macro F1 {score:.4f}, {champion} {metrics['f1_macro']:.4f} on {basis}"


def _behaviour(check):
    """Make a check of the promotion rule from one of `helpers.behaviour`."""

    def checked(candidate, baseline, rules):
        try:
            return check(candidate.model, candidate.split)
        except behaviour.BehaviourError as error:
            raise CheckFailedError(str(error)) from error

    return checked


def _check_robustness(candidate, baseline, rules):
    result = candidate.robustness
    if result is None:
        _require(not rules.min_robustness, "not measured, but MIN_ROBUSTNESS asks for it")
        return "not measured"
    holds = 1 - result.flip_rate
    _require(
        holds >= rules.min_robustness,
        f"{holds:.0%} of {result.n_rows} attacked rows hold, MIN_ROBUSTNESS is "
        f"{rules.min_robustness:.0%}",
    )
    return f"{holds:.0%} of {result.n_rows} attacked rows hold"


# The promotion rule, in order. A check takes the candidate, the baseline's metrics and the
# rules, returns its finding, and raises CheckFailedError where the candidate must not be promoted.
CHECKS = {
    "loads back and answers": _check_loads,
    "interface": _check_interface,
    "schema": _check_schema,
    "unseen category": _check_unseen_category,
    "metrics reproduced": _check_reproduced,
    "better than the majority class": _check_baseline,
    "minimum functionality": _behaviour(behaviour.check_cases),
    "direction": _behaviour(behaviour.check_directions),
    "invariance": _behaviour(behaviour.check_invariances),
    "robustness": _check_robustness,
    "may replace Production": _check_replaceable,
    "not worse than Production": _check_champion,
}


def check_candidate(candidate, baseline, rules=None):
    """Run every check on a candidate.

    Parameters
    ----------
    candidate : Candidate
    baseline : dict of str to float
        Metrics of the majority class.
    rules : Rules, optional

    Returns
    -------
    pandas.DataFrame
        Index ``check``; columns ``passed`` (bool) and ``finding``. After a model that does not
        load the other checks are left out.
    """
    rows, candidate.measures = {}, (baseline, rules or Rules())
    for title, check in CHECKS.items():
        try:
            rows[title] = (True, check(candidate, *candidate.measures))
        except CheckFailedError as failure:
            rows[title] = (False, str(failure))
            if check is _check_loads:
                break
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["passed", "finding"])
    return table.rename_axis("check")


def check_candidates(candidates, baseline, rules=None):
    """Run every check on every candidate.

    Parameters
    ----------
    candidates : dict of str to Candidate
    baseline : dict of str to float
    rules : Rules, optional

    Returns
    -------
    pandas.DataFrame
        As from `check_candidate`, with the model's name as first level of the index.
    """
    tables = {name: check_candidate(c, baseline, rules) for name, c in candidates.items()}
    return pd.concat(tables, names=["model"])


def colour_checks(row):
    """Colour a row of the table of checks: green where passed, red where failed."""
    colour = COLOURS["good" if row["passed"] else "bad"]
    return [f"color: {colour}"] * len(row)


# --- robustness -------------------------------------------------------------------------------


def attack_candidates(candidates, n_rows=robustness.N_ROWS):
    """Measure how robust each candidate is, and log it with its run.

    What was measured for a run before is read back.

    Parameters
    ----------
    candidates : dict of str to Candidate
        Their `Candidate.robustness` is set.
    n_rows : int
        Test rows to attack; 0: measure nothing.

    Returns
    -------
    dict of str to helpers.robustness.Robustness
        By name, without candidates that do not load or have no numeric column.
    """
    measured = {}
    for name, candidate in candidates.items():
        known = _known_robustness(candidate, n_rows)
        # A candidate that does not load is refused by the checks, which say why.
        with suppress(*LOAD_ERRORS):
            if n_rows and known is None:
                known = robustness.measure(candidate.model, candidate.split, n_rows)
                if known is not None:
                    _log_robustness(candidate, known)
        candidate.robustness = known
        if known is not None:
            measured[name] = known
    return measured


def _known_robustness(candidate, n_rows):
    logged = candidate.metrics.get("robustness_rows")
    if logged is None or not n_rows:
        return None
    text = mlflow.artifacts.load_text(f"runs:/{candidate.run.info.run_id}/{ROBUSTNESS}")
    found = robustness.Robustness.from_json(text)
    return found if found.asked == n_rows else None


def _log_robustness(candidate, measured):
    from helpers import plots

    client, run_id = mlflow.MlflowClient(), candidate.run.info.run_id
    client.log_text(run_id, measured.to_json(), ROBUSTNESS)
    figure = plots.robustness(measured, candidate.name)
    client.log_figure(run_id, figure, "robustness/robustness.png")
    for key, value in measured.metrics().items():
        client.log_metric(run_id, key, value)


# --- registering and promoting ----------------------------------------------------------------


@contextmanager
def _stages_are_deprecated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _describe(candidate):
    manifest = candidate.split.manifest
    text = (
        f"Trained on {manifest['train_rows']:,} rows of {manifest['source']}; accuracy "
        f"{candidate.metrics['accuracy']:.4f}, macro F1 {candidate.metrics['f1_macro']:.4f} on "
        f"{manifest['test_rows']:,} test rows."
    )
    if manifest["synthetic"]:
        text = "Trained on the SYNTHETIC sample; for practice only. " + text
    return text


def register(candidate, checks):
    """Register a candidate as a new version; the same run is never registered twice.

    Parameters
    ----------
    candidate : Candidate
    checks : pandas.DataFrame
        From `check_candidate`; the outcome becomes a tag of the version.

    Returns
    -------
    mlflow.entities.model_registry.ModelVersion
    """
    client, run_id = mlflow.MlflowClient(), candidate.run.info.run_id
    client.log_dict(run_id, drift.make_reference(candidate.split, candidate.answer), REFERENCE)
    known = [v for v in _versions(candidate.name) if v.run_id == run_id]
    version = known[0] if known else _create_version(candidate)
    failed = ", ".join(checks.index[~checks["passed"]])
    tags = {
        **tracking.data_tags(candidate.split.manifest),
        "checks": f"failed: {failed}" if failed else "passed",
    }
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(candidate.name, version.version, key, value)
    if version.description != _describe(candidate):
        client.update_model_version(candidate.name, version.version, _describe(candidate))
    return client.get_model_version(candidate.name, version.version)


def _create_version(candidate):
    client = mlflow.MlflowClient()
    try:
        client.create_registered_model(candidate.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # By way of the model's id: the version then links to the logged model and to the run.
    model_id = candidate.model.metadata.model_id
    return client.create_model_version(
        candidate.name, f"models:/{model_id}", candidate.run.info.run_id, model_id=model_id
    )


def _set_stage(name, version):
    """Move a version to the stage; tell whether the server still has stages."""
    try:
        with _stages_are_deprecated():
            mlflow.MlflowClient().transition_model_version_stage(
                name, version, STAGE, archive_existing_versions=True
            )
    except MlflowException as error:
        gone = error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "METHOD_NOT_ALLOWED")
        if not (gone or "unsupported" in str(error).lower()):
            raise
        return False
    return True


def _move_to_production(action, name, to_version, reason, by):
    """Put a version in Production and record it as a run of the history.

    The alias, which decides what clients load, moves last: after an error clients still get the
    version before, and the same promotion can be asked for again.
    """
    client = mlflow.MlflowClient()
    from_version = _number(production_version(name))
    params = {
        "action": action,
        "model": name,
        "from_version": from_version or "none",
        "to_version": to_version,
    }
    title = f"{name}: version {from_version or '–'} → {to_version}"
    with tracking.start_run(HISTORY, title, tags={"reason": reason, "by": by}):
        mlflow.log_params(params)
        mlflow.log_metrics(_version_metrics(name, to_version, "to"))
        if from_version:
            mlflow.log_metrics(_version_metrics(name, from_version, "from"))
        mlflow.set_tag("stage_set", str(_set_stage(name, to_version)).lower())
        client.set_registered_model_alias(name, ALIAS, to_version)
        _settle(name)
    return client.get_model_version(name, to_version)


def _settle(name):
    """Let the stage follow the alias, which names one version whoever else promotes meanwhile.

    Two promotions at once may each archive what they found and leave two versions in the stage.
    Whoever writes last looks once more, and sees what the other one wrote.
    """
    client = mlflow.MlflowClient()
    for _ in range(SETTLE):
        aliased = _number(client.get_model_version_by_alias(name, ALIAS))
        staged = {_number(each) for each in _versions(name) if each.current_stage == STAGE}
        if staged == {aliased} or not _set_stage(name, aliased):
            return


def _version_metrics(name, version, prefix):
    client = mlflow.MlflowClient()
    metrics = client.get_run(client.get_model_version(name, version).run_id).data.metrics
    chosen = ("accuracy", "f1_macro", "log_loss")
    return {f"{prefix}_{key}": metrics[key] for key in chosen if key in metrics}


def promote(name, version, reason, by=None):
    """Put a version in Production: alias and stage; archive what was there; record it.

    Parameters
    ----------
    name : str
        Of the registered model.
    version : str or int
    reason : str
        For the history.
    by : str, optional
        Who promotes; default: the MLflow or system user.

    Returns
    -------
    mlflow.entities.model_registry.ModelVersion
        Unchanged, and nothing recorded, if it is in Production already.

    Raises
    ------
    RegistryError
        If there is no such version.
    """
    version = str(version)
    _require_version(name, version)
    current = production_version(name)
    if _number(current) == version and ALIAS in current.aliases:
        if current.current_stage != STAGE:
            _set_stage(name, version)
        return mlflow.MlflowClient().get_model_version(name, version)
    return _move_to_production("promote", name, version, reason, tracking.user_name(by))


def _require_version(name, version):
    known = [_number(each) for each in _versions(name)]
    if version not in known:
        raise RegistryError(
            f"The registered model {name!r} has no version {version}. Versions: "
            f"{', '.join(known) or 'none'}."
        )


def rollback(name, reason, by=None):
    """Put the previous version back in Production, in one call.

    Called again, it goes one version further back: each promotion is undone once. Where
    somebody moved the alias or the stage by hand, the previous version is the last one in the
    history other than the one in Production now.

    Parameters
    ----------
    name : str
        Of the registered model.
    reason : str
        For the history.
    by : str, optional
        Who rolls back; default: the MLflow or system user.

    Returns
    -------
    mlflow.entities.model_registry.ModelVersion
        The version that is in Production now.

    Raises
    ------
    RegistryError
        If there is nothing to go back to.
    """
    candidates = {_number(version) for version in _versions(name)}
    candidates.discard(_number(production_version(name)))
    earlier = [version for version in _production_line(name) if version in candidates]
    if not earlier:
        raise RegistryError(f"{name!r} has no earlier version in Production to go back to.")
    return _move_to_production("rollback", name, earlier[-1], reason, tracking.user_name(by))


def _production_line(name):
    """Return the versions that were promoted on top of each other, the newest last.

    The version in Production now is not among them where somebody put it there by hand.
    """
    line = []
    for event in reversed(_events(name)):
        before, after = event["from_version"], event["to_version"]
        if event["result"] != "FINISHED":
            continue
        if event["action"] == "rollback":
            while line and line[-1] != after:
                line.pop()
        elif before and (not line or line[-1] != before):
            # Somebody moved versions by hand in between.
            line.append(before)
        if not line or line[-1] != after:
            line.append(after)
    return line


def history(name=None):
    """List promotions and rollbacks, the newest first.

    Parameters
    ----------
    name : str, optional
        Only those of one registered model.

    Returns
    -------
    pandas.DataFrame
        Columns ``when`` (UTC), ``model``, ``action``, ``from_version`` (None at first),
        ``to_version``, ``by``, ``reason``, ``accuracy``, ``f1_macro`` (of the version promoted),
        ``f1_macro_before`` and ``result`` (``FINISHED``, or what an interrupt left).
    """
    table = pd.DataFrame(_events(name), columns=EVENT, dtype=object)
    numbers = ["accuracy", "f1_macro", "f1_macro_before"]
    return table.astype(dict.fromkeys(numbers, "float64"))


EVENT = (
    "when",
    "model",
    "action",
    "from_version",
    "to_version",
    "by",
    "reason",
    "accuracy",
    "f1_macro",
    "f1_macro_before",
    "result",
)


def _events(name=None):
    """Return the events of the history as dicts, the newest first."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(HISTORY)
    if experiment is None:
        return []
    query = f"params.model = '{name}'" if name else ""
    runs = mlflow.search_runs(
        [experiment.experiment_id],
        query,
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )
    return [_event(run) for run in runs]


def _event(run):
    params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
    before = params.get("from_version")
    values = (
        pd.to_datetime(run.info.start_time, unit="ms", utc=True),
        params.get("model"),
        params.get("action"),
        None if before == "none" else before,
        params.get("to_version"),
        tags.get("by"),
        tags.get("reason"),
        metrics.get("to_accuracy"),
        metrics.get("to_f1_macro"),
        metrics.get("from_f1_macro"),
        run.info.status,
    )
    return dict(zip(EVENT, values, strict=True))


def promote_candidates(candidates, checks, reason="passed all checks", by=None):
    """Register every candidate and promote those that passed every check.

    Parameters
    ----------
    candidates : dict of str to Candidate
    checks : pandas.DataFrame
        From `check_candidates`.
    reason : str
        For the history.
    by : str, optional
        Who promotes.

    Returns
    -------
    pandas.DataFrame
        Index ``model``; columns ``version``, ``decision`` and ``why``.
    """
    decisions = {}
    for name, candidate in candidates.items():
        table = _still_valid(candidate, checks.loc[name])
        failed = table[~table["passed"]]
        if "loads back and answers" in failed.index:
            decisions[name] = (None, "refused", failed["finding"].iloc[0])
            continue
        version = register(candidate, table)
        if len(failed):
            why = "; ".join(f"{title}: {finding}" for title, finding in failed["finding"].items())
            decisions[name] = (_number(version), "refused", why)
        else:
            before = production_version(name)
            promote(name, version.version, reason, by)
            same = _number(before) == _number(version)
            decisions[name] = (_number(version), "in Production", "already" if same else reason)
    table = pd.DataFrame.from_dict(
        decisions, orient="index", columns=["version", "decision", "why"]
    )
    return table.rename_axis("model")


def _still_valid(candidate, table):
    """Return the checks, made anew where another version went into Production since."""
    checked = candidate.champion and _number(candidate.champion.version)
    now = _number(production_version(candidate.name))
    if checked == now or now == _number_of_run(candidate):
        return table
    notice(f"{candidate.name}: version {now} went into Production meanwhile; checked again.")
    return check_candidate(replace(candidate), *candidate.measures)


def _number_of_run(candidate):
    """Return the number of the version that was registered from the candidate's run, or None."""
    run_id = candidate.run.info.run_id
    return next((_number(v) for v in _versions(candidate.name) if v.run_id == run_id), None)


def require_promoted(decisions):
    """Say why candidates were refused; in a batch run, fail.

    Parameters
    ----------
    decisions : pandas.DataFrame
        From `promote_candidates`.

    Raises
    ------
    PromotionRefusedError
        In a batch run, if a candidate was refused.
    """
    refused = decisions[decisions["decision"] == "refused"]
    if refused.empty:
        notice("Every candidate passed and is in Production.", level="good")
        return
    message = "Not promoted: " + " | ".join(
        f"{row.Index}: {row.why}" for row in refused.itertuples()
    )
    if not is_interactive():
        raise PromotionRefusedError(message)
    notice(message, level="bad")


def models_table():
    """Show the registered models like the UI's Models page.

    Returns
    -------
    pandas.DataFrame
        One row per version, the newest first: name, version, stage, aliases, accuracy, macro
        F1, what it was trained on, checks, and when it was made (UTC).
    """
    client, rows = mlflow.MlflowClient(), []
    for name in MODELS:
        for version in _versions(name):
            metrics = client.get_run(version.run_id).data.metrics if version.run_id else {}
            # A search leaves the aliases out.
            aliases = client.get_model_version(name, version.version).aliases
            rows.append(
                {
                    "name": name,
                    "version": _number(version),
                    "stage": version.current_stage,
                    "aliases": ", ".join(f"@{alias}" for alias in aliases),
                    "accuracy": metrics.get("accuracy"),
                    "f1_macro": metrics.get("f1_macro"),
                    "data": version.tags.get("data_source"),
                    "checks": version.tags.get("checks"),
                    "created": pd.to_datetime(version.creation_timestamp, unit="ms", utc=True),
                }
            )
    return pd.DataFrame(rows).set_index(["name", "version"]) if rows else pd.DataFrame()
