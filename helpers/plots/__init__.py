"""Every picture of the series, by notebook; `style` is the look of all."""

from helpers.plots.models import confusion_matrix, grid_map, learning_curves
from helpers.plots.production import activity, estimates, periods
from helpers.plots.promotion import (
    calibration,
    comparison,
    groups,
    importance,
    robustness,
    waterfall,
)
from helpers.plots.table import class_balance, correlations, numeric_by_class

__all__ = [
    "activity",
    "calibration",
    "class_balance",
    "comparison",
    "confusion_matrix",
    "correlations",
    "estimates",
    "grid_map",
    "groups",
    "importance",
    "learning_curves",
    "numeric_by_class",
    "periods",
    "robustness",
    "waterfall",
]
