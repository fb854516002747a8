"""Notebook 05: is production still what was promoted? Metrics, drift, and alerts."""

from helpers.monitoring.alerting import alerts
from helpers.monitoring.demo import play_demo, rehearse
from helpers.monitoring.labels import add_labels
from helpers.monitoring.periods import monitor, require_healthy

__all__ = ["add_labels", "alerts", "monitor", "play_demo", "rehearse", "require_healthy"]
