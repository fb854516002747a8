"""Notebook 04: register, check, promote, roll back, and the history of it all."""

from helpers.registry.candidates import (
    calibration_curves,
    comparison,
    find_candidates,
    intervals_by_model,
)
from helpers.registry.checks import PromotionRules, check_candidates, colour_checks
from helpers.registry.explanations import explain_candidates
from helpers.registry.groups import group_labels, make_grouping, measure_groups
from helpers.registry.history import history
from helpers.registry.production import (
    LOAD_ERRORS,
    load_production,
    models_table,
    production_version,
    require_production,
)
from helpers.registry.promotion import promote, promoting, require_promoted, rollback
from helpers.registry.reference import REFERENCE
from helpers.registry.robustness import attack_candidates

__all__ = [
    "LOAD_ERRORS",
    "REFERENCE",
    "PromotionRules",
    "attack_candidates",
    "calibration_curves",
    "check_candidates",
    "colour_checks",
    "comparison",
    "explain_candidates",
    "find_candidates",
    "group_labels",
    "history",
    "intervals_by_model",
    "load_production",
    "make_grouping",
    "measure_groups",
    "models_table",
    "production_version",
    "promote",
    "promoting",
    "require_production",
    "require_promoted",
    "rollback",
]
