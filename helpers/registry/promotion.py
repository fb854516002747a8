"""Putting a version in Production, and taking the one before back."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from helpers import tracking
from helpers.display import notice
from helpers.registry.candidates import Candidate
from helpers.registry.card import write_card
from helpers.registry.checks import LOADS, check_candidate
from helpers.registry.history import production_line, recorded
from helpers.registry.production import (
    ALIAS,
    STAGE,
    aliased_version,
    number_of,
    production_version,
    versions_of,
)
from helpers.registry.rates import reference_rates
from helpers.registry.reference import REFERENCE, make_reference
from helpers.workspace import ProjectError, is_interactive

UNDONE = "Production is as it was before; correct the cell and run it again."
SETTLE = 10  # times that stage and alias are compared after a promotion


class RegistryError(ProjectError):
    """The registry cannot do what was asked."""


class PromotionRefusedError(ProjectError):
    """A candidate failed a check and was not promoted."""


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
    def of(cls, name: str) -> "_Placement":
        stages = {number_of(version): version.current_stage for version in versions_of(name)}
        return cls(name, number_of(aliased_version(name)), stages)

    def check(self, version: ModelVersion | None, promotion: Promotion) -> None:
        """Make sure that a cell did since what it was asked to do with a version, and no more."""
        now, number = _Placement.of(self.name), number_of(version)
        former, stage = self.stages.get(number, "None"), now.stages.get(number, "None")
        if not promotion.due and (number == now.alias != self.alias or STAGE == stage != former):
            raise RegistryError(
                f"{self.name}: version {number} was put in Production, though it failed a check "
                f"or was there already. {UNDONE}"
            )
        # That both moved is enough: somebody else may have promoted after this cell.
        missing = {
            "register_model": promotion.loads and version is None,
            "set_registered_model_alias": promotion.due and now.alias == self.alias,
            "transition_model_version_stage": promotion.due and stage == former != STAGE,
        }
        if any(missing.values()):
            calls = ", ".join(call for call, lacks in missing.items() if lacks)
            raise RegistryError(f"{self.name}: the cell lacks {calls}. {UNDONE}")

    def restore(self, version: ModelVersion | None) -> None:
        """Put alias and stages back, except where somebody else promoted meanwhile."""
        client, now = mlflow.MlflowClient(), _Placement.of(self.name)
        if now.alias not in (self.alias, number_of(version)):
            _settle(self.name)
            return
        if self.alias is None and now.alias is not None:
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
    reason: str,
    by: str | None = None,
    language: Literal["en", "es"] = "en",
) -> Iterator[Promotion]:
    """Guard the lines of a cell that register a candidate and put it in Production.

    Before the block the checks (from `check_candidates`) are made anew where another version
    went into Production since, and what the monitoring compares with later is logged. After
    the block the version gets its card, in English or Spanish, and tags, and the history a run,
    with the reason and who promotes (`by`; None: the MLflow or system user). After an error, an
    interrupt, or a block that lacks a line Production is as it was.

    Raises
    ------
    RegistryError
        If the block did not do what `Promotion` asks for.
    """
    name, table = candidate.name, _still_valid(candidate, checks.loc[candidate.name])
    failed, version = table[~table["passed"]], _version_of(candidate)
    there = version is not None and number_of(aliased_version(name)) == number_of(version)
    promotion = Promotion(LOADS not in failed.index, failed.empty and not there, version)
    if promotion.loads:
        reference = make_reference(candidate.split, candidate.answer)
        reference |= reference_rates(candidate.split, candidate.answer, candidate.grouping)
        mlflow.MlflowClient().log_dict(candidate.run.info.run_id, reference, REFERENCE)

    registered = partial(_version_of, candidate)
    event = recorded("promote", name, reason, by, registered) if promotion.due else nullcontext()
    with (
        # What MLflow says about new versions is no error.
        redirect_stderr(sys.stdout),
        event,
        _undone_on_error(name, registered) as before,
    ):
        try:
            yield promotion
        except MlflowException as error:
            usual = _has_no_stages(error) or _came_second(error)
            if not (promotion.due and registered() and usual):
                raise
            # The line after it, which is all that a server without stages has.
            _set_alias(name, number_of(registered()))
        else:
            before.check(registered(), promotion)
        if failed.empty:
            _settle(name)
    if promotion.loads:
        promotion.version = registered()
        _describe_version(promotion.version, candidate, table, language)
    why = "; ".join(f"{title}: {finding}" for title, finding in failed["finding"].items())
    promotion.decision = {
        "version": number_of(promotion.version),
        "decision": "refused" if why else "in Production",
        "why": why or (reason if promotion.due else "already"),
    }


def _still_valid(candidate: Candidate, table: pd.DataFrame) -> pd.DataFrame:
    """Return the checks, made anew where another version went into Production since."""
    checked = candidate.champion and number_of(candidate.champion.version)
    now = number_of(production_version(candidate.name))
    if now in (checked, number_of(_version_of(candidate))):
        return table
    notice(f"{candidate.name}: version {now} went into Production meanwhile; checked again.")
    return check_candidate(replace(candidate), *candidate.measures)


def _version_of(candidate: Candidate) -> ModelVersion | None:
    """Return the version that was registered from the candidate's run."""
    found = (v for v in versions_of(candidate.name) if v.run_id == candidate.run.info.run_id)
    return next(found, None)


def _describe_version(
    version: ModelVersion, candidate: Candidate, checks: pd.DataFrame, language: str
) -> None:
    """Give a version its card and tags.

    What is there is not written again, and a description that somebody changed stays.
    """
    client, failed = mlflow.MlflowClient(), checks.index[~checks["passed"]]
    outcome = f"failed: {', '.join(failed)}" if len(failed) else "passed"
    tags = {**tracking.data_tags(candidate.split.manifest), "checks": outcome}
    card, before = write_card(candidate, number_of(version), checks, language), version.description
    if not before or version.tags.get("card") == _digest(before):
        tags["card"] = _digest(card)
        if card != before:
            client.update_model_version(version.name, version.version, card)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _undone_on_error(name: str, find: Callable[[], ModelVersion | None]) -> Iterator[_Placement]:
    """Give where alias and stages are; put them back if the block fails."""
    before = _Placement.of(name)
    try:
        yield before
    except BaseException:
        before.restore(find())
        raise


def _has_no_stages(error: MlflowException) -> bool:
    """Tell whether an error means that the server no longer has stages."""
    return error.error_code == "ENDPOINT_NOT_FOUND"


def _came_second(error: MlflowException) -> bool:
    """Tell whether another promotion made the alias at the same moment; it stays that one's."""
    return error.error_code == "BAD_REQUEST" and "unique" in str(error).lower()


def _set_alias(name: str, number: str) -> None:
    try:
        mlflow.MlflowClient().set_registered_model_alias(name, ALIAS, number)
    except MlflowException as error:
        if not _came_second(error):
            raise


def _set_stage(name: str, number: str) -> bool:
    """Move a version to the stage; tell whether the server still has stages."""
    try:
        mlflow.MlflowClient().transition_model_version_stage(
            name, number, STAGE, archive_existing_versions=True
        )
    except MlflowException as error:
        if not _has_no_stages(error):
            raise
        return False
    return True


def _settle(name: str) -> None:
    """Let the stage follow the alias, which names one version whoever else promotes meanwhile.

    Two promotions at once may each archive what they found and leave two versions in the stage.
    Whoever writes last looks once more, and sees what the other one wrote.
    """
    for _ in range(SETTLE):
        now = _Placement.of(name)
        staged = {number for number, stage in now.stages.items() if stage == STAGE}
        if staged == {now.alias} or not _set_stage(name, now.alias):
            return


def _move_to_production(
    action: str, version: ModelVersion, reason: str, by: str | None
) -> ModelVersion:
    """Put a version in Production and record it as a run of the history.

    The alias, which decides what clients load, moves last: until then they get the version
    before.
    """
    name, number = version.name, number_of(version)

    def find():
        return version

    with recorded(action, name, reason, by, find), _undone_on_error(name, find):
        _set_stage(name, number)
        _set_alias(name, number)
        _settle(name)
    return mlflow.MlflowClient().get_model_version(name, number)


def promote(name: str, version: str | int, reason: str, by: str | None = None) -> ModelVersion:
    """Put a version in Production without a check; archive what was there; record it.

    Unchanged, and nothing recorded, if it is in Production already.

    Raises
    ------
    RegistryError
        If there is no such version.
    """
    versions = {number_of(each): each for each in versions_of(name)}
    if str(version) not in versions:
        raise RegistryError(
            f"The registered model {name!r} has no version {version}. Versions: "
            f"{', '.join(versions) or 'none'}."
        )
    if number_of(aliased_version(name)) != str(version):
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
    candidates = {number_of(version): version for version in versions_of(name)}
    candidates.pop(number_of(production_version(name)), None)
    earlier = [number for number in production_line(name) if number in candidates]
    if not earlier:
        raise RegistryError(f"{name!r} has no earlier version in Production to go back to.")
    return _move_to_production("rollback", candidates[earlier[-1]], reason, by)


def require_promoted(decisions: dict[str, dict[str, str]]) -> None:
    """Say why candidates were refused (`Promotion.decision` by model); in a batch run, fail.

    Raises
    ------
    PromotionRefusedError
        In a batch run, if a candidate was refused.
    """
    made = decisions.items()
    refused = [f"{name}: {each['why']}" for name, each in made if each["decision"] == "refused"]
    if not refused:
        notice("Every candidate passed and is in Production.", level="good")
        return
    message = f"Not promoted: {' | '.join(refused)}"
    if not is_interactive():
        raise PromotionRefusedError(message)
    notice(message, level="bad")
