"""``python -m helpers.serving``: start or stop the scoring server, or score a file."""

import argparse
import sys

from helpers import series
from helpers.server import credentials, processes
from helpers.serving import process
from helpers.serving.batch import score_csv
from helpers.workspace import ProjectError, open_workspace


def main() -> int:
    """Do what the command line says; return 0, 1 with a message, 130 after an interrupt."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.serving", description="Serve the models in Production."
    )
    parser.add_argument("--workspace", metavar="DIR", help="default: $WORKSPACE or ./workspace")
    parser.add_argument("--host", default=processes.HOST, help="0.0.0.0: for other machines, too")
    parser.add_argument("--port", type=int, default=process.PORT)
    parser.add_argument("--stop", action="store_true", help="stop the server")
    parser.add_argument("--score", nargs=2, metavar=("IN.csv", "OUT"), help="score a file")
    parser.add_argument("--model", default=next(iter(series.MODELS)), help="for --score")
    parser.add_argument("--keep", action="append", default=[], help="column to copy; repeatable")
    options = parser.parse_args()
    try:
        workspace = open_workspace(options.workspace)
        if options.stop:
            print("Stopped." if process.stop(workspace) else "No scoring server was running.")
            return 0
        client = process.start(workspace, options.port, not options.score, options.host)
        if options.score:
            rows = score_csv(client, options.model, *options.score, keep=options.keep)
            print(f"{rows:,} rows scored into {options.score[1]}")
            return 0
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from there.", file=sys.stderr)
        return 130
    print(client.table().to_string())
    if client.password and credentials.find_secret(credentials.SCORING_PASSWORD) is None:
        print(f"The password of the models is in {workspace.passwords}, under 'scoring'.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
