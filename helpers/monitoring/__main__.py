"""``python -m helpers.monitoring``: look at everything that was scored, period by period.

Ends with exit code 3 if the newest period of a model in Production raised an alert.
"""

import argparse
import sys

from helpers import tracking
from helpers.monitoring.labels import add_labels, read_labels
from helpers.monitoring.periods import monitor
from helpers.workspace import ProjectError, open_workspace


def main() -> int:
    """Do what the command line says; return 0, 1 with a message, 3 after an alert."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.monitoring", description="Is production what was promoted?"
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument("--labels", metavar="FILE.csv", help="columns row_id and label")
    parser.add_argument("--period", default="D", choices=("h", "D", "W", "M"))
    options = parser.parse_args()
    try:
        workspace = open_workspace(options.workspace)
        tracking.connect(workspace, keep=False)
        if options.labels:
            print(f"{add_labels(workspace, read_labels(options.labels)):,} labels kept")
        report = monitor(workspace, options.period)
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if len(report.periods):
        print(report.table().to_string())
    for message in report.current:
        print(f"ALERT: {message}", file=sys.stderr)
    return 3 if report.current else 0


if __name__ == "__main__":
    sys.exit(main())
