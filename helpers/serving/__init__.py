"""Notebook 05: the scoring server of the production models, and clients of it.

``python -m helpers.serving`` starts the server; ``--stop`` ends it; ``--score IN.csv OUT.csv``
has it score a file of any size. What runs in the server's process is `helpers.serving.app`.
"""

from helpers.serving.batch import score_csv
from helpers.serving.client import ScoringClient, ServingError, ask, ask_with_curl, connect
from helpers.serving.process import start, stop

__all__ = [
    "ScoringClient",
    "ServingError",
    "ask",
    "ask_with_curl",
    "connect",
    "score_csv",
    "start",
    "stop",
]
