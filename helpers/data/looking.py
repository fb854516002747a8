"""Looking at a table: its columns, what deserves a look in them, and its checks."""

import warnings

import numpy as np
import pandas as pd

from helpers.data.table import MAX_CLASSES, Table
from helpers.display import notice

DATE = r"^\s*\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}"
MANY = 50  # values of an identifier, at least
RARE = 0.05  # share of the rows below which a class is rare
MOST_DESCRIBED = 60  # columns, as many as pandas shows


def most_telling(X: pd.DataFrame, y: pd.Series, most: int | None = None) -> list[str]:
    """Return numeric columns, first those whose class means differ most in units of their spread.

    Where there are more columns than anyone can look at, these are looked at.

    Parameters
    ----------
    X : pandas.DataFrame, shape (n_rows, n_numeric)
    y : pandas.Series, shape (n_rows,)
        Labels.
    most
        How many to return; None: all.
    """
    numbers = X.astype("float64")
    means, spread = numbers.groupby(y).mean(), numbers.std().replace(0, np.nan)
    difference = ((means.max() - means.min()) / spread).fillna(0)
    return list(difference.sort_values(ascending=False, kind="stable").index[:most])


def describe_columns(table: Table) -> pd.DataFrame:
    """Describe each column of a table in a row.

    Its meaning (of the students' table only), role, type, missing values, distinct values,
    smallest, median and largest value, and a remark where a column deserves a look. Of many
    columns those with a remark and the most telling ones are described.
    """
    frame = table.frame
    roles = {table.target: "target", **dict.fromkeys(table.categorical, "category")}
    described = pd.DataFrame(
        {
            "role": [roles.get(name, "numeric") for name in frame],
            "type": frame.dtypes.astype(str).replace("object", "text"),
            "missing": frame.isna().sum(),
            "distinct": frame.nunique(),
        }
    ).rename_axis("column")
    numbers = frame.select_dtypes(exclude=object).astype(float)
    for figure in ("min", "median", "max"):
        texts = numbers.agg(figure).map("{:.10g}".format)
        described[figure] = texts.reindex(frame.columns, fill_value="")
    described["remark"] = remarks(table)
    if table.meanings:
        described.insert(0, "meaning", frame.columns.map(table.meanings).fillna(""))
    if len(described) <= MOST_DESCRIBED:
        return described
    notice(f"{len(described):,} columns: those with a remark and the most telling ones are shown.")
    telling = most_telling(frame[list(table.numeric)], table.labels, MOST_DESCRIBED)
    first = [
        table.target,
        *described.index[described["remark"] != ""],
        *telling,
        *table.categorical,
    ]
    return described.loc[list(dict.fromkeys(first))[:MOST_DESCRIBED]]


def remarks(table: Table) -> pd.Series:
    """Return by column what deserves a look in it, as a sentence; mostly empty."""
    return pd.Series({name: _remark(table, name, n) for name, n in table.frame.nunique().items()})


def _remark(table: Table, name: str, distinct: int) -> str:
    """Return what deserves a look in a column: it says nothing, too much, or not what it seems."""
    column, rows = table.frame[name], len(table.frame)
    known = column.dropna()
    if name == table.target:
        return ""
    if distinct <= 1:
        return "constant"
    if _tells_target(column, table.labels):
        return f"tells {table.target} without fail: a copy of it, or known only afterwards? (DROP)"
    if column.dtype == object and (varying := _dates(known)):
        return (
            f"dates: a model knows only those it has seen. Put {', '.join(varying)} into columns "
            "of their own, or leave it out (DROP)"
        )
    if column.dtype.kind == "i" and distinct == rows and rows >= MANY:
        return "all values differ: an identifier? (DROP)"
    if name in table.categorical and distinct > max(MANY, rows / 2):
        return "almost all values differ: an identifier? (DROP)"
    return ""


def _tells_target(column: pd.Series, labels: pd.Series) -> bool:
    """Tell whether each value, of which there are few, belongs to one class."""
    values, classes = column.factorize(use_na_sentinel=False)[0], labels.factorize()[0]
    n_values = values.max() + 1
    return (
        n_values <= len(column) / 5 and len(np.unique(values * MAX_CLASSES + classes)) == n_values
    )


def _dates(texts: pd.Series) -> list[str]:
    """Return the parts of dates that vary, or nothing if texts are no dates."""
    if not texts.str.contains(DATE).all():
        return []
    with warnings.catch_warnings():
        # pandas says that it does not know which of two numbers is the month.
        warnings.simplefilter("ignore")
        dates = pd.to_datetime(texts, format="mixed", errors="coerce", utc=True)
    if dates.isna().any():
        return []
    return [part for part in ("year", "month", "weekday") if getattr(dates.dt, part).nunique() > 1]


def check_table(table: Table) -> pd.DataFrame:
    """Summarise what a table that can be used is like, one finding a row."""
    frame = table.frame
    counts = table.labels.value_counts()
    rare = "; judge by macro F1 and its recall, not by accuracy"
    rare = rare * bool(counts.min() < RARE * len(frame))
    constant = frame.columns[frame.nunique() == 1]
    listed = ", ".join(
        constant[:MOST_DESCRIBED]
    ) + f" and {len(constant) - MOST_DESCRIBED} more" * (len(constant) > MOST_DESCRIBED)
    findings = {
        "rows": f"{len(frame):,}",
        "features": f"{len(table.numeric)} numeric, {len(table.categorical)} categorical",
        "missing values": f"{frame.isna().sum().sum():,}",
        "duplicate rows": f"{frame.duplicated().sum():,}",
        "constant columns": listed or "none",
        "classes": ", ".join(f"{label}: {count:,}" for label, count in counts.items()),
        "majority class": f"{counts.max() / len(frame):.1%} of the rows",
        "rarest class": f"{counts.index[-1]}: {counts.min() / len(frame):.1%} of the rows{rare}",
        "source": table.source + (" (SYNTHETIC)" if table.synthetic else ""),
        "digest": table.digest,
    }
    return pd.DataFrame({"finding": findings}).rename_axis("check")
