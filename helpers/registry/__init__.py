"""Notebook 04: register, check, promote, roll back, and the history of it all.

Production is the alias ``production`` (what clients load) together with the stage
``Production`` (what the classic UI shows). Every promotion and rollback is a run of the
experiment ``promotions``, so the history is in MLflow itself and nothing in it is overwritten.
"""

import pickle
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

from helpers import series, tracking
from helpers.data import Split
from helpers.display import COLOURS, notice
from helpers.models.evaluation import compute_metrics
from helpers.registry import behaviour, robustness
from helpers.registry.behaviour import NO_CONDITION
from helpers.registry.reference import make_reference
from helpers.registry.robustness import Robustness
from helpers.workspace import MissingStepError, ProjectError, is_interactive

ALIAS = "production"
STAGE = "Production"
HISTORY = "promotions"
LOADS = "loads back and answers"  # the first check: what fails it is not registered
UNDONE = "Production is as it was before; correct the cell and run it again."
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
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
    zlib.error,
)

# Registered model: (experiment, run, notebook that makes it)
SETTLE = 10  # times that stage and alias are compared after a promotion

# Stages are deprecated since MLflow 2.9 and work in 3; the original document names them.
warnings.filterwarnings("ignore", r".*Model registry stages will be removed", FutureWarning)


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
        Share of attacked rows whose answer must hold, see `helpers.registry.robustness`; 0: any.
    """

    min_gain: float = 0.02
    max_loss: float = 0.01
    allow_replace: bool = False
    min_robustness: float = 0.0


# --- what is there ----------------------------------------------------------------------------


def production_version(name: str) -> ModelVersion | None:
    """Return the version of a registered model that is in Production.

    By alias; where nobody set the alias (a promotion by hand in the UI), by stage.
    """
    staged = (version for version in _versions(name) if version.current_stage == STAGE)
    return _aliased(name) or next(staged, None)


def _aliased(name):
    """Return the version that the alias points to, or None."""
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _versions(name):
    """Return all versions of a model, the newest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: -int(version.version))


def _number(version):
    """Return the number of a version as text, or None; a database gives whole numbers."""
    return None if version is None else str(version.version)


def load_production(name: str) -> PyFuncModel:
    """Load the model in Production as any client would."""
    version = production_version(name)
    if version is not None and ALIAS not in version.aliases:
        # Promoted by hand in the UI, which sets the stage alone.
        return tracking.load_model(f"models:/{name}/{version.version}")
    return tracking.load_model(f"models:/{name}@{ALIAS}")


def require_production() -> list[str]:
    """Return the names of the models of the series that are in Production.

    Raises
    ------
    helpers.workspace.MissingStepError
        If none is.
    """
    names = [name for name in series.MODELS if production_version(name)]
    if not names:
        raise MissingStepError("No model is in Production. Run 04_registry_promotion first.")
    return names


# --- candidates -------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A trained model on its way to Production under the name of a registered model.

    `robustness` is None if not measured, `measures`, baseline and rules, if not checked yet.
    """

    name: str
    run: Run
    split: Split = field(repr=False)
    robustness: Robustness | None = field(default=None, repr=False)
    measures: tuple[dict, Rules] | None = field(default=None, repr=False)

    @property
    def model_uri(self):
        """URI of the logged model; by its id, so that a version links to it and to the run."""
        return f"models:/{self.run.outputs.model_outputs[-1].model_id}"

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
    """The version in Production that a candidate must not fall behind, on the candidate's split.

    The model is loaded as a client would; None if it does not load, its files being lost for
    example.
    """

    version: ModelVersion
    run: Run
    split: Split = field(repr=False)
    model: PyFuncModel | None = field(repr=False)

    def __str__(self):
        return f"version {_number(self.version)} in Production"

    @classmethod
    def find(cls, name: str, split: Split):
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


def find_candidates(split: Split, names: Iterable[str] = series.MODELS) -> dict[str, Candidate]:
    """Find the newest finished run of each model on the prepared split.

    Raises
    ------
    MissingStepError
        If a model was not trained on this split yet; names the notebook to run.
    """
    candidates, missing = {}, []
    for name in names:
        model = series.MODELS[name]
        digest = split.manifest["split_digest"]
        run = tracking.latest_run(model.experiment, model.run_name, digest)
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


def comparison(candidates: dict[str, Candidate], baseline: dict[str, float]) -> dict[str, dict]:
    """Gather the metrics of candidates, of what is in Production, and of the baseline.

    For `helpers.models.evaluation.metrics_table`. A version in Production that takes other
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
        first_line = str(error).partition("\n")[0]
        raise CheckFailedError(f"{type(error).__name__}: {first_line}") from error
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
        return f"{NO_CONDITION}nothing in Production yet"
    if rules.allow_replace:
        return f"{NO_CONDITION}ALLOW_REPLACE is set"
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
        return f"{NO_CONDITION}nothing in Production yet"
    if champion.model is None:
        return f"{NO_CONDITION}{champion} does not load: there is nothing to compare with"
    if not champion.same_columns:
        _require(rules.allow_replace, "cannot be compared with the version in Production")
        return f"{NO_CONDITION}not comparable, ALLOW_REPLACE is set"
    metrics, basis = champion.evaluation
    score, floor = champion.beside(candidate)["f1_macro"], metrics["f1_macro"] - rules.max_loss
    _require(
        score >= floor,
        f"macro F1 {score:.4f} is below {floor:.4f} ({champion} on {basis}, less MAX_LOSS)",
    )
    return f"macro F1 {score:.4f}, {champion} {metrics['f1_macro']:.4f} on {basis}"


def _behaviour(check):
    """Make a check of the promotion rule from one of `helpers.registry.behaviour`."""

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
        return f"{NO_CONDITION}not measured"
    holds = 1 - result.flip_rate
    finding = f"{holds:.0%} of {result.n_rows} attacked rows hold"
    _require(
        holds >= rules.min_robustness, f"{finding}, MIN_ROBUSTNESS is {rules.min_robustness:.0%}"
    )
    return finding if rules.min_robustness else f"{NO_CONDITION}{finding}"


# The promotion rule, in order. A check takes the candidate, the baseline's metrics and the
# rules, returns its finding, and raises CheckFailedError where the candidate must not be promoted.
CHECKS = {
    LOADS: _check_loads,
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


def check_candidate(
    candidate: Candidate, baseline: dict[str, float], rules: Rules | None = None
) -> pd.DataFrame:
    """Run every check on a candidate; `baseline` are the metrics of the majority class.

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


def check_candidates(
    candidates: dict[str, Candidate], baseline: dict[str, float], rules: Rules | None = None
) -> pd.DataFrame:
    """Run every check on every candidate.

    Returns
    -------
    pandas.DataFrame
        As from `check_candidate`, with the model's name as first level of the index.
    """
    tables = {name: check_candidate(c, baseline, rules) for name, c in candidates.items()}
    return pd.concat(tables, names=["model"])


def colour_checks(row: pd.Series) -> list[str]:
    """Colour a row of the table of checks: green passed, red failed, grey could not fail."""
    colour = COLOURS["good" if row["passed"] else "bad"]
    if row["finding"].startswith(NO_CONDITION):
        colour = "grey"
    return [f"color: {colour}"] * len(row)


# --- robustness -------------------------------------------------------------------------------


def attack_candidates(
    candidates: dict[str, Candidate], n_rows: int = robustness.N_ROWS
) -> dict[str, Robustness]:
    """Measure how robust each candidate is, log it with its run, and set it in the candidate.

    What was measured for a run before is read back.

    Parameters
    ----------
    candidates : dict of str to Candidate
    n_rows : int
        Test rows to attack; 0: measure nothing.

    Returns
    -------
    dict of str to helpers.registry.robustness.Robustness
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
    found = Robustness.from_json(text)
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


@dataclass
class Promotion:
    """What `promoting` asks a cell to do.

    Attributes
    ----------
    loads : bool
        The candidate loads: only then it is registered.
    due : bool
        It is to be put in Production: it passed every check and is not there yet.
    version : mlflow.entities.model_registry.ModelVersion or None
        That was registered from the candidate's run; None at first.
    decision : dict of str to str
        After the block: ``version``, ``decision`` and ``why``.
    """

    loads: bool
    due: bool
    version: ModelVersion | None
    decision: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Placement:
    """Where alias and stages of a registered model are at one moment; stages by version."""

    name: str
    alias: str | None
    stages: dict

    @classmethod
    def of(cls, name):
        stages = {_number(version): version.current_stage for version in _versions(name)}
        return cls(name, _number(_aliased(name)), stages)

    def check(self, version, due):
        """Make sure that a version was put in Production since if it was due, and else not."""
        now, number = _Placement.of(self.name), _number(version)
        former, stage = self.stages.get(number, "None"), now.stages.get(number, "None")
        if not due:
            if number == now.alias != self.alias or STAGE == stage != former:
                raise RegistryError(
                    f"{self.name}: version {number} was put in Production, though it failed a "
                    f"check or was there already. {UNDONE}"
                )
            return
        # That both moved is enough: somebody else may have promoted after this cell.
        done = {
            "register_model": version is not None,
            "set_registered_model_alias": now.alias != self.alias,
            "transition_model_version_stage": stage == STAGE or stage != former,
        }
        missing = [call for call, called in done.items() if not called]
        if missing:
            raise RegistryError(
                f"{self.name} passed every check, but the cell lacks {', '.join(missing)}. {UNDONE}"
            )

    def restore(self, version):
        """Put alias and stages back, except where somebody else promoted meanwhile."""
        client, now = mlflow.MlflowClient(), _Placement.of(self.name)
        if now.alias not in (self.alias, _number(version)):
            _settle(self.name)
            return
        if now.alias != self.alias and self.alias is None:
            client.delete_registered_model_alias(self.name, ALIAS)
        elif now.alias != self.alias:
            client.set_registered_model_alias(self.name, ALIAS, self.alias)
        for number, stage in now.stages.items():
            former = self.stages.get(number, "None")
            if stage != former:
                client.transition_model_version_stage(self.name, number, former)


@contextmanager
def promoting(
    candidate: Candidate,
    checks: pd.DataFrame,
    reason: str = "passed all checks",
    by: str | None = None,
) -> Iterator[Promotion]:
    """Guard the lines of a cell that register a candidate and put it in Production.

    Before the block the checks are made anew where another version went into Production since,
    and what the monitoring compares with later is logged. After the block the version gets
    its description and tags, and the history a run. After an error, an interrupt, or a block
    that lacks a line Production is as it was.

    Parameters
    ----------
    candidate : Candidate
    checks : pandas.DataFrame
        From `check_candidates`.
    reason : str
        For the history.
    by : str, optional
        Who promotes; default: the MLflow or system user.

    Yields
    ------
    Promotion

    Raises
    ------
    RegistryError
        If the block did not do what `Promotion` asks for.
    """
    name, table = candidate.name, _still_valid(candidate, checks.loc[candidate.name])
    failed, version, current = table[~table["passed"]], _version_of(candidate), _aliased(name)
    there = version is not None and _number(current) == _number(version)
    client = mlflow.MlflowClient()
    promotion = Promotion(LOADS not in failed.index, failed.empty and not there, version)
    if promotion.loads:
        reference = make_reference(candidate.split, candidate.answer)
        client.log_dict(candidate.run.info.run_id, reference, REFERENCE)

    registered = partial(_version_of, candidate)
    recorded = _recorded("promote", name, reason, by, registered)
    with (
        # What MLflow says about new versions is no error.
        redirect_stderr(sys.stdout),
        recorded if promotion.due else nullcontext(),
        _undone_on_error(name, registered) as before,
    ):
        try:
            yield promotion
        except MlflowException as error:
            usual = _has_no_stages(error) or _came_second(error)
            if not (promotion.due and registered() and usual):
                raise
            # The line after it, which is all that such a server has, or the same once more.
            _set_alias(name, _number(registered()))
        else:
            before.check(registered(), promotion.due)
        if failed.empty:
            _settle(name)
    if promotion.loads:
        promotion.version = _describe_version(candidate, table)
    why = "; ".join(f"{title}: {finding}" for title, finding in failed["finding"].items())
    promotion.decision = {
        "version": _number(promotion.version),
        "decision": "refused" if why else "in Production",
        "why": why or (reason if promotion.due else "already"),
    }


def _still_valid(candidate, table):
    """Return the checks, made anew where another version went into Production since."""
    checked = candidate.champion and _number(candidate.champion.version)
    now = _number(production_version(candidate.name))
    if now in (checked, _number(_version_of(candidate))):
        return table
    notice(f"{candidate.name}: version {now} went into Production meanwhile; checked again.")
    return check_candidate(replace(candidate), *candidate.measures)


def _version_of(candidate):
    """Return the version that was registered from the candidate's run, or None."""
    found = (v for v in _versions(candidate.name) if v.run_id == candidate.run.info.run_id)
    return next(found, None)


def _describe_version(candidate, table):
    """Give a candidate's version its description and tags; what is there is not written again."""
    client, version, name = mlflow.MlflowClient(), _version_of(candidate), candidate.name
    if version is None:
        raise RegistryError(f"{name} loads, but the cell lacks register_model. {UNDONE}")
    failed = ", ".join(table.index[~table["passed"]])
    outcome = {"checks": f"failed: {failed}" if failed else "passed"}
    for key, value in {**tracking.data_tags(candidate.split.manifest), **outcome}.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    if version.description != _describe(candidate):
        client.update_model_version(name, version.version, _describe(candidate))
    return version


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


@contextmanager
def _undone_on_error(name, find):
    """Give where alias and stages are; put them back if the block fails."""
    before = _Placement.of(name)
    try:
        yield before
    except BaseException:
        before.restore(find())
        raise


@contextmanager
def _recorded(action, name, reason, by, find: Callable[[], ModelVersion | None]):
    """Record as a run of the history which version the block puts in Production."""
    before = production_version(name)
    tags = {"reason": reason, "by": tracking.user_name(by)}
    with tracking.start_run(HISTORY, name, tags=tags) as run:
        try:
            yield
        finally:
            after = find()
            first, then = _number(before) or "none", _number(after) or "none"
            mlflow.log_params(
                {"action": action, "model": name, "from_version": first, "to_version": then}
            )
            mlflow.log_metrics({**_metrics(after, "to"), **_metrics(before, "from")})
            title = f"{name}: version {first} → {then}"
            mlflow.MlflowClient().update_run(run.info.run_id, name=title)


def _metrics(version, prefix):
    if version is None or not version.run_id:
        return {}
    metrics = mlflow.MlflowClient().get_run(version.run_id).data.metrics
    chosen = ("accuracy", "f1_macro", "log_loss")
    return {f"{prefix}_{key}": metrics[key] for key in chosen if key in metrics}


def _has_no_stages(error):
    """Tell whether an error means that the server no longer has stages."""
    gone = error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "METHOD_NOT_ALLOWED")
    return gone or "unsupported" in str(error).lower()


def _came_second(error):
    """Tell whether another promotion wrote the same row of the database first."""
    return error.error_code == "BAD_REQUEST" and "unique" in str(error).lower()


def _set_alias(name, version):
    """Point the alias to a version, whoever else makes the alias at the same moment."""
    set_alias = partial(mlflow.MlflowClient().set_registered_model_alias, name, ALIAS, version)
    try:
        set_alias()
    except MlflowException as error:
        if not _came_second(error):
            raise
        set_alias()


def _set_stage(name, version):
    """Move a version to the stage; tell whether the server still has stages."""
    try:
        mlflow.MlflowClient().transition_model_version_stage(
            name, version, STAGE, archive_existing_versions=True
        )
    except MlflowException as error:
        if not _has_no_stages(error):
            raise
        return False
    return True


def _settle(name):
    """Let the stage follow the alias, which names one version whoever else promotes meanwhile.

    Two promotions at once may each archive what they found and leave two versions in the stage.
    Whoever writes last looks once more, and sees what the other one wrote.
    """
    for _ in range(SETTLE):
        now = _Placement.of(name)
        staged = {number for number, stage in now.stages.items() if stage == STAGE}
        if staged == {now.alias} or not _set_stage(name, now.alias):
            return


def _move_to_production(action, version, reason, by):
    """Put a version in Production and record it as a run of the history.

    The alias, which decides what clients load, moves last: until then they get the version
    before.
    """
    client, name, number = mlflow.MlflowClient(), version.name, _number(version)
    with (
        _recorded(action, name, reason, by, lambda: version),
        _undone_on_error(name, lambda: version),
    ):
        _set_stage(name, number)
        _set_alias(name, number)
        _settle(name)
    return client.get_model_version(name, number)


def promote(name: str, version: str | int, reason: str, by: str | None = None) -> ModelVersion:
    """Put a version in Production without a check; archive what was there; record it.

    Unchanged, and nothing recorded, if it is in Production already.

    Raises
    ------
    RegistryError
        If there is no such version.
    """
    versions = {_number(each): each for each in _versions(name)}
    if str(version) not in versions:
        raise RegistryError(
            f"The registered model {name!r} has no version {version}. Versions: "
            f"{', '.join(versions) or 'none'}."
        )
    if _number(_aliased(name)) != str(version):
        return _move_to_production("promote", versions[str(version)], reason, by)
    _settle(name)
    return mlflow.MlflowClient().get_model_version(name, str(version))


def rollback(name: str, reason: str, by: str | None = None) -> ModelVersion:
    """Put the version before back in Production, recorded with who and why, and return it.

    Called again, it goes one version further back: each promotion is undone once. Where
    somebody moved the alias or the stage by hand, the previous version is the last one in the
    history other than the one in Production now.

    Raises
    ------
    RegistryError
        If there is nothing to go back to.
    """
    candidates = {_number(version): version for version in _versions(name)}
    candidates.pop(_number(production_version(name)), None)
    earlier = [number for number in _production_line(name) if number in candidates]
    if not earlier:
        raise RegistryError(f"{name!r} has no earlier version in Production to go back to.")
    return _move_to_production("rollback", candidates[earlier[-1]], reason, by)


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


# Columns of the history, and where a run of it has them.
EVENT = {
    "when": lambda run: pd.to_datetime(run.info.start_time, unit="ms", utc=True),
    "model": lambda run: run.data.params.get("model"),
    "action": lambda run: run.data.params.get("action"),
    "from_version": lambda run: _known(run.data.params.get("from_version")),
    "to_version": lambda run: _known(run.data.params.get("to_version")),
    "by": lambda run: run.data.tags.get("by"),
    "reason": lambda run: run.data.tags.get("reason"),
    "accuracy": lambda run: run.data.metrics.get("to_accuracy"),
    "f1_macro": lambda run: run.data.metrics.get("to_f1_macro"),
    "f1_macro_before": lambda run: run.data.metrics.get("from_f1_macro"),
    "result": lambda run: run.info.status,
}


def _known(number):
    return None if number == "none" else number


def history(name: str | None = None) -> pd.DataFrame:
    """List promotions and rollbacks, of one registered model or of all, the newest first.

    Returns
    -------
    pandas.DataFrame
        Columns ``when`` (UTC), ``model``, ``action``, ``from_version`` (None at first),
        ``to_version``, ``by``, ``reason``, ``accuracy``, ``f1_macro`` (of the version promoted),
        ``f1_macro_before`` and ``result`` (``FINISHED``, or what an interrupt left).
    """
    table = pd.DataFrame(_events(name), columns=list(EVENT), dtype=object)
    numbers = ["accuracy", "f1_macro", "f1_macro_before"]
    return table.astype(dict.fromkeys(numbers, "float64"))


def _events(name=None):
    """Return the events of the history as dicts, the newest first."""
    experiment = mlflow.get_experiment_by_name(HISTORY)
    if experiment is None:
        return []
    runs = mlflow.search_runs(
        [experiment.experiment_id],
        f"params.model = '{name}'" if name else "",
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )
    return [{column: value(run) for column, value in EVENT.items()} for run in runs]


def require_promoted(decisions: dict[str, dict[str, str]]) -> None:
    """Say why candidates were refused; in a batch run, fail.

    Parameters
    ----------
    decisions : dict of str to dict
        `Promotion.decision` by model.

    Raises
    ------
    PromotionRefusedError
        In a batch run, if a candidate was refused.
    """
    refused = {
        name: each["why"] for name, each in decisions.items() if each["decision"] == "refused"
    }
    if not refused:
        notice("Every candidate passed and is in Production.", level="good")
        return
    message = "Not promoted: " + " | ".join(f"{name}: {why}" for name, why in refused.items())
    if not is_interactive():
        raise PromotionRefusedError(message)
    notice(message, level="bad")


def models_table() -> pd.DataFrame:
    """Show the registered models like the UI's Models page, one row per version.

    Returns
    -------
    pandas.DataFrame
        Index name and version, the newest first; stage, aliases, accuracy, macro F1, what it was
        trained on, checks, and when it was made (UTC).
    """
    client, rows = mlflow.MlflowClient(), []
    for name in series.MODELS:
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
