"""For whom a model works less well: its metrics by group of rows, and the gap between groups.

A grouping says how a column's values become groups, the same for any rows: learnt from training
rows, kept as JSON. What is compared are shares of rows, by fairlearn's `MetricFrame`; their
intervals come from the bootstrap, which takes seconds in `MetricFrame` and here milliseconds.
"""

import difflib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import pandas as pd
from scipy.stats import binom
from sklearn.metrics import accuracy_score

from helpers.data import Split
from helpers.data.students import STUDENT_GROUPS
from helpers.display import notice
from helpers.registry.production import LOAD_ERRORS
from helpers.registry.reference import levels
from helpers.workspace import ParameterError

if TYPE_CHECKING:
    from helpers.registry.candidates import Candidate

ARTIFACT = "groups/groups.json"  # what was measured
STUDENT_ALARM = "Dropout"
OTHER, MISSING = "other", "missing"
MOST_LEVELS = 8  # different values up to which each is a group; of numbers above: thirds
FEWEST_ROWS = 20  # of a group, or of a class in it, below which a share says nothing
CONFIDENCE = 0.95
QUANTILES = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
ENDS = ("_low", "_high")
RESAMPLES = 2000


# --- rows into groups -------------------------------------------------------------------------


def make_grouping(split: Split, columns: Sequence[str] | None) -> dict[str, dict]:
    """Learn from the training rows how the values of columns become groups.

    Parameters
    ----------
    columns
        None: those of `STUDENT_GROUPS` for the students' table, none for another.

    Returns
    -------
    dict of str to dict
        By column, for JSON: ``edges`` of groups of numbers, or ``levels``, the name of the
        group by value.

    Raises
    ------
    ParameterError
        If the table has no such column.
    """
    known = STUDENT_GROUPS if split.students else {}
    rows = split.X_train
    check_columns(columns, rows.columns)
    chosen = [name for name in known if name in rows] if columns is None else columns
    return {name: known.get(name) or _learn(rows[name], name in split.numeric) for name in chosen}


def check_columns(columns: Sequence[str] | None, features: Sequence[str]) -> None:
    """Raise `ParameterError` where `columns` of GROUPS are none of the features."""
    for name in columns or ():
        if name not in features:
            close = difflib.get_close_matches(name, features, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ParameterError(f"GROUPS names {name!r}, which is no column of the data.{hint}")


def _learn(values: pd.Series, numeric: bool) -> dict:
    counts = levels(values[values.notna()]).value_counts()
    if numeric and values.dtype.kind in "iuf" and len(counts) > MOST_LEVELS:
        return {"edges": np.unique(values.quantile([1 / 3, 2 / 3])).tolist()}
    return {"levels": {level: level for level in counts.index[:MOST_LEVELS]}}


def group_labels(rows: pd.DataFrame, grouping: dict[str, dict]) -> pd.DataFrame:
    """Return the group of each row by each column of a grouping, as ordered categories."""
    return pd.DataFrame({name: _labels(rows[name], how) for name, how in grouping.items()})


def _labels(values: pd.Series, how: dict) -> pd.Series:
    if "edges" in how:
        edges = how["edges"]
        middle = [f"{low:g} to under {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
        names = [f"under {edges[0]:g}", *middle, f"{edges[-1]:g} and above"]
        labels = np.array(names, object)[np.digitize(values.astype("float64"), edges)]
    else:
        names = [*how["levels"].values(), OTHER]
        labels = levels(values).map(how["levels"]).fillna(OTHER)
    labels = pd.Series(labels, values.index).mask(values.isna(), MISSING)
    return labels.astype(pd.CategoricalDtype(dict.fromkeys([*names, MISSING]), ordered=True))


def alarm_label(labels: Sequence, alarm_class: str | None):
    """Return the label that ALARM_CLASS names as text, or None if no class matters most.

    None is `STUDENT_ALARM` where it is a class.

    Raises
    ------
    ParameterError
        If none of the labels reads so.
    """
    found = [each for each in labels if str(each) == (alarm_class or STUDENT_ALARM)]
    if not found and alarm_class:
        known = ", ".join(map(str, labels))
        raise ParameterError(
            f"ALARM_CLASS must be one of the classes ({known}), not {alarm_class!r}."
        )
    return found[0] if found else None


# --- metrics by group -------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """A difference in the recall of the class that matters between two groups of a column.

    `low` and `high` are the ends of its interval, which allows for all pairs that were compared.
    """

    column: str
    better: str
    worse: str
    size: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether it is there, and not by chance of a few rows."""
        return self.low > 0

    def __str__(self):
        return (
            f"{self.size:.2f} ({self.low:.2f} to {self.high:.2f}) by {self.column!r}: higher for "
            f"{self.better!r} than for {self.worse!r}"
        )


@dataclass(frozen=True)
class GroupReport:
    """Metrics of a model by group.

    Attributes
    ----------
    table : pandas.DataFrame
        Index: ``column``, ``group``. ``rows``, and of ``accuracy``, of each ``recall_<label>``
        and of ``selection_rate`` (the share of the rows that get `alarm`) the value and the ends
        of its interval, ``<metric>_low`` and ``<metric>_high``; NaN where rows are too few.
    overall : pandas.Series
        The same metrics on all rows.
    gap : Gap or None
        In the recall of `alarm`, the largest that is surely there, else the largest; None where
        there are no two groups to compare.
    alarm : str or int or None
        The label of the class that matters.
    """

    table: pd.DataFrame
    overall: pd.Series
    gap: Gap | None
    alarm: str | int | None

    def __str__(self):
        if self.alarm is None:
            return "ALARM_CLASS names no class whose recall could differ between groups"
        if self.gap is None:
            return f"no two groups have {FEWEST_ROWS} test rows of {self.alarm} each"
        chance = "" if self.gap.sure else "; perhaps by chance"
        return f"recall of {self.alarm} differs by {self.gap}{chance}"

    @property
    def too_small(self) -> list[str]:
        """Groups that have too few rows of the class that matters, or too few at all."""
        metric = "accuracy" if self.alarm is None else f"recall_{self.alarm}"
        return [
            f"{group} ({column})" for column, group in self.table.index[self.table[metric].isna()]
        ]

    def interval(self, metric: str) -> tuple[pd.Series, pd.Series]:
        """Return the ends of the intervals of a metric, by column and group."""
        return tuple(self.table[metric + end] for end in ENDS)

    def to_json(self) -> str:
        """Return everything as a JSON text."""
        table = json.loads(self.table.reset_index().to_json(orient="records"))
        gap = None if self.gap is None else asdict(self.gap)
        content = {"groups": table, "overall": self.overall.to_dict(), "largest_gap": gap}
        return json.dumps(content | {"alarm_class": self.alarm}, indent=2, ensure_ascii=False)


def measure(
    y_true: pd.Series, answer: pd.DataFrame, labels: Sequence, groups: pd.DataFrame, alarm=None
) -> GroupReport:
    """Measure an answer by group; `groups` are from `group_labels`, `alarm` from `alarm_label`."""
    from fairlearn.metrics import MetricFrame, count, selection_rate  # here: it takes a second

    metrics = {"rows": count, "accuracy": accuracy_score}
    metrics |= {f"recall_{each}": partial(_recall, label=each) for each in labels}
    # What each share is a share of.
    wholes = {f"recall_{each}": partial(_count, label=each) for each in labels}
    if alarm is not None:
        metrics["selection_rate"] = partial(selection_rate, pos_label=alarm)
    metrics |= {f"rows of {name}": whole for name, whole in wholes.items()}
    given = {"y_true": y_true.to_numpy(), "y_pred": answer["prediction"].to_numpy()}
    frames = {
        name: MetricFrame(metrics=metrics, sensitive_features=column.to_numpy(), **given)
        for name, column in groups.items()
    }
    by_group = {}
    for name, frame in frames.items():
        there = groups[name].cat.remove_unused_categories().cat.categories
        by_group[name] = frame.by_group.loc[list(there)].rename_axis("group")
    table = pd.concat(by_group, names=["column"])
    overall = next(iter(frames.values())).overall
    columns, counts = {"rows": table["rows"].astype(int)}, {}
    for name in table.columns.drop(["rows", *(f"rows of {name}" for name in wholes)]):
        counts[name] = table[f"rows of {name}" if name in wholes else "rows"].astype(int)
        share = table[name].where(counts[name] >= FEWEST_ROWS)
        columns[name] = share
        # A bootstrap draws rows of which each is right or wrong: the number of right ones is
        # binomial, so there is nothing to simulate.
        for end, quantile in zip(ENDS, QUANTILES, strict=True):
            columns[f"{name}{end}"] = binom.ppf(quantile, counts[name], share) / counts[name]
    report, recall = pd.DataFrame(columns), f"recall_{alarm}"
    gap = None if alarm is None else _largest_gap(report[recall].dropna(), counts[recall])
    return GroupReport(report, overall[[*counts]], gap, alarm)


def _count(y_true, y_pred, label) -> int:
    return int((y_true == label).sum())


def _recall(y_true, y_pred, label) -> float:
    of_class = y_true == label
    return float((y_pred[of_class] == label).mean()) if of_class.any() else np.nan


def _largest_gap(recall: pd.Series, counts: pd.Series) -> Gap | None:
    """Compare the groups of each column in pairs, by the bootstrap."""
    counts = counts[recall.index]
    random = np.random.default_rng(0)
    drawn = random.binomial(counts, recall, (RESAMPLES, len(recall))) / counts.to_numpy()
    places = dict(enumerate(recall.index))
    pairs = [(a, b) for a, b in combinations(places, 2) if places[a][0] == places[b][0]]
    gaps = []
    for pair in pairs:
        # With more pairs one of them is more likely to look different by chance.
        better, worse = sorted(pair, key=lambda place: -recall.iloc[place])
        rest = (1 - CONFIDENCE) / len(pairs) / 2
        low, high = np.quantile(drawn[:, better] - drawn[:, worse], [rest, 1 - rest])
        (column, one), (_, other) = places[better], places[worse]
        size = float(recall.iloc[better] - recall.iloc[worse])
        gaps.append(Gap(column, one, other, size, float(low), float(high)))
    return max(gaps, key=lambda gap: (gap.sure, gap.size), default=None)


def measure_groups(
    candidates: dict[str, "Candidate"], columns: Sequence[str] | None, alarm_class: str | None
) -> dict[str, GroupReport]:
    """Measure each candidate by group, log it with its run, and set it in the candidate.

    The monitoring will watch the same groups.

    Parameters
    ----------
    columns
        As in `make_grouping`; where there is none, nothing is measured, and a notice says so.
    alarm_class
        As in `alarm_label`.

    Raises
    ------
    ParameterError
        If the table lacks a column or the class; before anything is logged.
    """
    # Here: the scoring server, which needs no pictures, starts sooner.
    from helpers import plots

    split = next(iter(candidates.values())).split
    grouping, alarm = make_grouping(split, columns), alarm_label(split.labels, alarm_class)
    if not grouping:
        notice("GROUPS names no column: for whom the models work less well is not measured.")
        return {}
    groups = group_labels(split.X_test, grouping)
    for name in groups.columns[(groups == MISSING).any()]:
        rows = int((groups[name] == MISSING).sum())
        notice(f"{name!r} is missing in {rows:,} test rows; they are a group of their own.")
    client = mlflow.MlflowClient()
    for candidate in candidates.values():
        candidate.grouping = grouping
        # A candidate that does not load is refused by the checks, which say why.
        with suppress(*LOAD_ERRORS):
            candidate.groups = measure(split.y_test, candidate.answer, split.labels, groups, alarm)
    reports = {name: each.groups for name, each in candidates.items() if each.groups is not None}
    for name, report in reports.items():
        run_id = candidates[name].run.info.run_id
        client.log_text(run_id, report.to_json(), ARTIFACT)
        client.log_figure(run_id, plots.groups(report, name), "groups/groups.png")
        known = candidates[name].run.data.metrics.get("largest_group_gap")
        if report.gap is not None and report.gap.size != known:
            client.log_metric(run_id, "largest_group_gap", report.gap.size)
    if reports and (small := report.too_small):
        what = "rows" if alarm is None else f"rows of class {alarm}"
        notice(f"Not judged, fewer than {FEWEST_ROWS} {what}: {', '.join(small)}.")
    return reports
