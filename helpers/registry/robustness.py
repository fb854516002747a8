"""How few small changes to a row flip a model's answer; the attack is in `attack`."""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import pandas as pd

from helpers.registry.production import LOAD_ERRORS

if TYPE_CHECKING:
    from helpers.registry.candidates import Candidate

ARTIFACT = "robustness/robustness.json"  # what the attack achieved
MOST_COLUMNS = 6  # changed columns up to which a flip counts


@dataclass(frozen=True)
class Robustness:
    """What the attack achieved.

    Attributes
    ----------
    columns : numpy.ndarray, shape (n_rows,), float64
        For each row attacked, one that the model classifies correctly, the columns that had to
        be changed to flip the answer; NaN where none of the attacks did.
    flips : pandas.Series
        By column that could be changed: share of the flips in which it was.
    """

    columns: np.ndarray
    flips: pd.Series

    @property
    def n_rows(self) -> int:
        """Rows attacked."""
        return len(self.columns)

    def to_json(self) -> str:
        """Return everything as a JSON text."""
        columns = [None if np.isnan(each) else int(each) for each in self.columns]
        return json.dumps({"columns": columns, "flips": self.flips.to_dict()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Robustness":
        """Read what `to_json` wrote."""
        content = json.loads(text)
        return cls(np.array(content["columns"], "float64"), pd.Series(content["flips"]))

    @property
    def flip_rate(self) -> float:
        """Share of the rows whose answer flipped."""
        return float(np.mean(~np.isnan(self.columns)))

    @property
    def one_column_rate(self) -> float:
        """Share of the rows whose answer flipped by a change of one column."""
        return float(np.mean(self.columns == 1))

    def flipped(self) -> pd.Series:
        """Return the share of answers flipped, by the number of columns changed at most."""
        numbers = range(1, MOST_COLUMNS + 1)
        return pd.Series({number: np.mean(self.columns <= number) for number in numbers})

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log."""
        values = {
            "robustness": 1 - self.flip_rate,
            "robustness_one_column": 1 - self.one_column_rate,
            "robustness_rows": float(self.n_rows),
            "robustness_columns": float(len(self.flips)),
        }
        if self.flip_rate:
            values["robustness_median_columns"] = float(np.nanmedian(self.columns))
        return values


def attack_candidates(candidates: dict[str, "Candidate"], n_rows: int) -> dict[str, Robustness]:
    """Measure how robust each candidate is, log it with its run, and set it in the candidate.

    What was measured for a run before is read back. With 0 rows nothing is measured. Candidates
    that do not load or have no numeric column are left out of what is returned.
    """
    for candidate in candidates.values():
        candidate.robustness = None
        if n_rows and candidate.metrics.get("robustness_rows") == n_rows:
            path = f"runs:/{candidate.run.info.run_id}/{ARTIFACT}"
            candidate.robustness = Robustness.from_json(mlflow.artifacts.load_text(path))
        elif n_rows:
            _measure(candidate, n_rows)
    return {name: c.robustness for name, c in candidates.items() if c.robustness is not None}


def _measure(candidate: "Candidate", n_rows: int) -> None:
    # Here: the scoring server, which needs neither pictures nor the toolbox, starts sooner.
    from helpers import plots
    from helpers.registry import attack

    # A candidate that does not load is refused by the checks, which say why.
    with suppress(*LOAD_ERRORS):
        candidate.robustness = attack.measure(candidate.model, candidate.split, n_rows)
    if candidate.robustness is None:
        return
    client, run_id = mlflow.MlflowClient(), candidate.run.info.run_id
    client.log_text(run_id, candidate.robustness.to_json(), ARTIFACT)
    figure = plots.robustness(candidate.robustness, candidate.name)
    client.log_figure(run_id, figure, "robustness/robustness.png")
    mlflow.log_metrics(candidate.robustness.metrics(), run_id=run_id)
