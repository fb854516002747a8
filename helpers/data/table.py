"""A table: the types and roles of its columns, its checks and its description."""

import difflib
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from helpers.data.reading import DataError, parse
from helpers.data.students import STUDENT_CATEGORICAL, STUDENT_COLUMNS

THOUSANDS = r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"
MAX_CLASSES = 50


@dataclass(frozen=True)
class Table:
    """A table as read, with what is known about it.

    Attributes
    ----------
    frame : pandas.DataFrame, shape (n_rows, n_columns)
        Features (int64, float64, bool, text, or pandas' boolean where a truth value is
        missing) and the target (int64 or text), in file order.
    categorical : tuple of str
        Features that are categories, whether written as text or as number codes.
    source : str
        ``uci``, ``sample``, or the path or URL of the CSV.
    digest : str
        SHA-256 of the table's content as CSV, independent of the file's dialect.
    dropped : tuple of str
        Columns of the file that were left out, sorted.
    header : dict of str to str
        Names as pandas reads them from the file, for columns where blanks were removed.
    """

    frame: pd.DataFrame
    target: str
    categorical: tuple[str, ...]
    source: str
    digest: str
    dropped: tuple[str, ...] = ()
    header: dict[str, str] = field(default_factory=dict)

    @property
    def features(self) -> pd.DataFrame:
        """All columns but the target."""
        return self.frame.drop(columns=self.target)

    @property
    def labels(self) -> pd.Series:
        """The target column: int64 or text."""
        return self.frame[self.target]

    @property
    def numeric(self) -> tuple[str, ...]:
        """Features that are not categories."""
        return tuple(name for name in self.features if name not in self.categorical)

    @property
    def meanings(self) -> dict[str, str]:
        """What the columns of the students' table mean; empty for any other table."""
        known = [name for name in self.frame.columns if name in STUDENT_COLUMNS]
        if len(known) <= self.frame.shape[1] / 2:
            return {}
        return {name: STUDENT_COLUMNS[name] for name in known}

    @property
    def synthetic(self) -> bool:
        """Whether this is the bundled synthetic sample."""
        return self.source == "sample"


# --- types of columns -------------------------------------------------------------------------


def _to_numbers(column: pd.Series, source: str) -> pd.Series:
    """Convert texts to float64, also with a decimal comma; what is no number becomes NaN."""
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    texts = column[values.isna()].dropna()
    commas = texts[texts.str.contains(",", regex=False)]
    if commas.empty:
        return values
    if commas.str.fullmatch(THOUSANDS).all():
        if len(texts) - len(commas) > column.count() / 2:
            return values
        raise DataError(
            f"Column {column.name!r} of {source} has numbers such as {commas.iloc[0]!r}, whose "
            "comma may separate thousands or decimals. Write them without thousands separators "
            "and with a decimal point, or leave the column out with DROP."
        )
    decimals = pd.to_numeric(column.str.replace(",", ".", regex=False), errors="coerce")
    return decimals.astype("float64") if decimals.count() > values.count() else values


def _to_truth_or_text(column: pd.Series) -> pd.Series:
    known = column.notna()
    truth = column.str.lower().map({"true": True, "false": False})
    if truth.count() < known.sum():
        return column.astype(object).where(known, None)
    # pandas' own boolean has a missing value; models take it for a boolean column too.
    return truth.astype(bool if known.all() else "boolean")


def _convert_feature(column: pd.Series, categorical: bool, source: str) -> pd.Series:
    """Give a feature its type: bool, boolean, int64, float64 or text (object)."""
    known = column.notna()
    if not known.any():
        raise DataError(
            f"Column {column.name!r} of {source} has no value at all. Leave it out with "
            f"DROP = [{column.name!r}]."
        )
    values = _to_numbers(column, source)
    wrong = known & values.isna()
    if not wrong.any():
        if np.isinf(values).any():
            raise DataError(f"Column {column.name!r} of {source} has infinite values.")
        whole = known.all() and column.str.fullmatch(r"[+-]?\d+").all()
        return values.astype("int64") if whole and values.abs().max() < 2**53 else values
    if categorical or wrong.sum() > known.sum() / 2:
        return _to_truth_or_text(column)
    examples = ", ".join(f"{column[row]!r} (row {row + 2})" for row in column.index[wrong][:3])
    raise DataError(
        f"Column {column.name!r} of {source} is numeric but has text in {wrong.sum()} of "
        f"{len(column)} rows: {examples}. Correct these rows, leave the column out with DROP, "
        "or name it in CATEGORICAL."
    )


def _convert_target(column: pd.Series, source: str) -> pd.Series:
    """Keep labels as they stand in the CSV; whole numbers become int64."""
    missing = column.index[column.isna()]
    if len(missing):
        rows = ", ".join(str(row + 2) for row in missing[:5])
        raise DataError(
            f"The target column {column.name!r} of {source} has {len(missing)} missing "
            f"values (rows {rows}{', …' if len(missing) > 5 else ''}). Remove these rows or "
            "fill in their label."
        )
    classes = column.unique()
    if len(classes) == 1:
        raise DataError(
            f"The target column {column.name!r} of {source} has one class only "
            f"({classes[0]!r}); a classifier needs at least two."
        )
    if len(classes) > MAX_CLASSES:
        raise DataError(
            f"The target column {column.name!r} of {source} has {len(classes)} different values; "
            f"at most {MAX_CLASSES} classes are supported. Is it a number to be predicted, or "
            "an identifier? Choose another TARGET."
        )
    whole = column.str.fullmatch(r"-?(0|[1-9]\d{0,15})").all()
    return column.astype("int64" if whole else object)


# --- roles of columns -------------------------------------------------------------------------


def make_table(
    frame: pd.DataFrame,
    header: dict[str, str],
    source: str,
    target: str,
    categorical: Collection[str] | None,
    drop: Collection[str],
) -> Table:
    """Give columns their types and roles; those that are no texts have their type already."""
    if target in drop:
        raise DataError(
            f"DROP names {target!r}, the column to predict. Take it out of DROP, or choose "
            "another TARGET."
        )
    parameters = {"TARGET": [target], "DROP": drop, "CATEGORICAL": categorical or ()}
    for parameter, names in parameters.items():
        for name in names:
            if name not in frame:
                close = difflib.get_close_matches(name, frame.columns, n=1, cutoff=0.6)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise DataError(
                    f"{source} has no column {name!r} (parameter {parameter}).{hint} Its columns: "
                    f"{', '.join(frame.columns)}."
                )
    if categorical is None:
        # Before columns are dropped: the students' table is known by all its code columns.
        students = set(STUDENT_CATEGORICAL) <= set(frame.columns)
        categorical = STUDENT_CATEGORICAL if students else ()
    frame = frame.drop(columns=list(drop))
    if frame.shape[1] < 2:
        raise DataError(f"{source} has no column besides the target {target!r}.")
    texts = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    # The target first: where it cannot be used, the features do not matter.
    for name in sorted(texts, key=lambda name: name != target):
        if name == target:
            frame[name] = _convert_target(frame[name], source)
        else:
            frame[name] = _convert_feature(frame[name], name in categorical, source)
    frame = frame.copy()  # one block per type again: many columns made one by one are slow
    digest = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()
    features = frame.drop(columns=target)
    categorical = tuple(n for n in features if n in categorical or features[n].dtype == object)
    header = {name: raw for name, raw in header.items() if name in features}
    return Table(frame, target, categorical, source, digest, tuple(sorted(drop)), header)


def read_table(
    content: bytes,
    source: str,
    target: str = "Target",
    categorical: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
) -> Table:
    """Read the bytes of a CSV file.

    The delimiter (comma, semicolon, tab, ``|``), the encoding (UTF-8 with or without BOM,
    UTF-16, Latin-1), gzip or zip packing and a decimal comma are recognised; blanks and tabs
    around header names are removed.

    Parameters
    ----------
    source
        What to call it in messages and logs.
    categorical
        Features whose values are categories. Default: for the students' table its nine code
        columns, for any other table the text columns.
    drop
        Columns to leave out.

    Raises
    ------
    DataError
        If this is not a table with that target; see the message.
    """
    frame, header = parse(content, target, source)
    return make_table(frame, header, source, target, categorical, set(drop or ()))
