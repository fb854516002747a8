"""The split of a table into training and test rows: its checks, and how it is saved and loaded."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.data.reading import DataError
from helpers.data.students import STUDENT_CATEGORICAL
from helpers.data.table import Table, make_table
from helpers.display import notice
from helpers.workspace import MissingStepError, Workspace, file_digest

MIN_TRAIN_ROWS = 5  # rows of each class among the training rows: one for each fold of five
# The manifest is the last to be written: a folder that has one is complete.
SPLIT_FILES = ("table.parquet", "train.parquet", "test.parquet", "manifest.json")


@dataclass(frozen=True)
class Split:
    """Training and test rows of a table.

    Attributes
    ----------
    X_train, X_test : pandas.DataFrame, shapes (n_train, n_features), (n_test, n_features)
    y_train, y_test : pandas.Series, shapes (n_train,), (n_test,)
        int64 or text labels.
    manifest : dict
        What the split is: source, digest, rows, columns, classes, seed.
    table : pandas.DataFrame, optional
        The table before the split; only where the split was just made.
    """

    X_train: pd.DataFrame
    X_test: pd.DataFrame
    y_train: pd.Series
    y_test: pd.Series
    manifest: dict
    table: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def categorical(self) -> tuple[str, ...]:
        """Names of the categorical features."""
        return tuple(self.manifest["categorical"])

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the other features."""
        return tuple(self.manifest["numeric"])

    @property
    def labels(self) -> list:
        """Class labels, sorted."""
        return list(self.manifest["classes"])

    @property
    def students(self) -> bool:
        """Whether this is the students' table."""
        return set(STUDENT_CATEGORICAL) <= set(self.X_train.columns)

    def encode(self, y) -> np.ndarray:
        """Return the positions of labels in `labels`, int64.

        Raises
        ------
        DataError
            If one of them is no label of this split.
        """
        y = pd.Index(y)
        codes = pd.Index(self.labels).get_indexer(y).astype("int64")
        if (codes < 0).any():
            unknown = y[codes < 0].tolist()[0]
            raise DataError(f"{unknown!r} is no class of the prepared data: {self.labels}.")
        return codes


def repeated_rows(table: Table) -> pd.Series:
    """Tell which rows repeat an earlier one, label included, so that a copy is the likely reason.

    Where the features have so few values that rows of different cases meet by chance, none does:
    by the birthday bound that is to be expected while the number of possible rows is below the
    square of their number.
    """
    values, rows = table.features.nunique(dropna=False), len(table.frame)
    if np.log(values).sum() <= 2 * np.log(rows):
        return pd.Series(False, index=table.frame.index)
    return _keys(table.frame).duplicated()


def _keys(frame: pd.DataFrame) -> pd.Series:
    return pd.util.hash_pandas_object(frame, index=False)


def distinct_rows(table: Table, test_size: float) -> tuple[pd.DataFrame, pd.Series]:
    """Return features and labels to be split by class, repeated rows once.

    Raises
    ------
    DataError
        If a class has too few rows to stand in both parts and in every fold of the training
        rows, or all features are constant.
    """
    if (table.features.nunique(dropna=False) == 1).all():
        raise DataError(
            f"All features of {table.source} are constant: nothing tells its classes apart. Add "
            "columns that differ from row to row."
        )
    once = ~repeated_rows(table)
    X, y = table.features[once], table.labels[once]
    counts = y.value_counts()
    needed = int(np.ceil(max((MIN_TRAIN_ROWS + 0.5) / (1 - test_size), 1.5 / test_size)))
    few = counts[counts < needed]
    if len(few):
        listed = ", ".join(f"{label!r} ({count})" for label, count in few.items())
        counted = ", repeated rows counted once," * (not once.all())
        raise DataError(
            f"Too few rows to split by class: {listed}; each class of {table.target!r}{counted} "
            f"needs at least {needed} rows with TEST_SIZE = {test_size:g}. Collect more, or merge "
            "or remove the class."
        )
    return X, y


def with_repeated(table: Table, X_train: pd.DataFrame, X_test: pd.DataFrame) -> list:
    """Put each repeated row behind the row that it repeats, and say so.

    A row that stood in both parts would be measured on what was learnt by heart.

    Returns
    -------
    list
        ``X_train``, ``X_test``, ``y_train``, ``y_test``: without repeated rows as they were given.
    """
    rows = [part.index for part in (X_train, X_test)]
    n_repeated = len(table.frame) - sum(map(len, rows))
    if n_repeated:
        keys = _keys(table.frame)
        for number, index in enumerate(rows):
            place = pd.Series(range(len(index)), index=keys[index])
            rows[number] = keys.map(place).dropna().sort_values(kind="stable").index
        notice(
            f"{n_repeated:,} of {len(keys):,} rows repeat an earlier one. Each is on the side of "
            "the split where that one is."
        )
    return [each.loc[index] for each in (table.features, table.labels) for index in rows]


def make_split(
    table: Table,
    X_train: pd.DataFrame,
    X_test: pd.DataFrame,
    y_train: pd.Series,
    y_test: pd.Series,
    test_size: float,
    seed: int,
) -> Split:
    """Note what a split is, so that models can tell which rows they have seen.

    The parts are those of `sklearn.model_selection.train_test_split`, with the table's index, and
    what `with_repeated` added.
    """
    counts = table.labels.value_counts().sort_index()
    manifest = {
        "source": table.source,
        "synthetic": table.synthetic,
        "digest": table.digest,
        "rows": len(table.frame),
        "train_rows": len(X_train),
        "test_rows": len(X_test),
        "target": table.target,
        "columns": {name: str(dtype) for name, dtype in X_train.dtypes.items()},
        "categorical": list(table.categorical),
        "numeric": list(table.numeric),
        "drop": list(table.dropped),
        "header": table.header,
        "classes": counts.index.tolist(),
        "class_counts": {str(label): int(count) for label, count in counts.items()},
        "test_size": test_size,
        "seed": seed,
    }
    # With another target or other roles the same rows give other models.
    roles = [table.target, manifest["categorical"], manifest["numeric"]]
    manifest["split_digest"] = hashlib.sha256(
        json.dumps([table.digest, roles, test_size, seed, X_test.index.tolist()]).encode()
    ).hexdigest()
    return Split(X_train, X_test, y_train, y_test, manifest, table.frame)


# --- saving and loading -----------------------------------------------------------------------


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SPLIT_FILES)


def _read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _read_parquet(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    for name in frame.columns:
        # pandas 3 reads text back as its own string type; models see plain Python texts.
        if pd.api.types.is_string_dtype(frame[name].dtype):
            column = frame[name].astype(object)
            frame[name] = column.where(column.notna(), None)
    return frame


def _keep_previous(folder: Path) -> None:
    """Copy a split that is about to be replaced to a folder of its own in ``previous``."""
    kept = folder / "previous" / file_digest(folder / "manifest.json")[:16]
    if not _is_complete(kept):
        kept.mkdir(parents=True, exist_ok=True)
        for name in SPLIT_FILES:
            shutil.copy2(folder / name, kept / name)


def save_split(split: Split, workspace: Workspace) -> Path:
    """Save a split in the workspace: ``data/*.parquet`` and ``data/manifest.json``.

    A split that is there already is left as it is when it is the same, and moved to
    ``data/previous/`` when it is another. Returns the path of the manifest.
    """
    folder, target = workspace.data, split.manifest["target"]
    manifest = folder / "manifest.json"
    text = json.dumps(split.manifest, indent=2, ensure_ascii=False) + "\n"
    complete = _is_complete(folder)
    if complete and manifest.read_text(encoding="utf-8") == text:
        return manifest
    with tempfile.TemporaryDirectory(prefix=".staging.", dir=folder) as name:
        staging = Path(name)
        split.table.to_parquet(staging / "table.parquet")
        split.X_train.assign(**{target: split.y_train}).to_parquet(staging / "train.parquet")
        split.X_test.assign(**{target: split.y_test}).to_parquet(staging / "test.parquet")
        (staging / "manifest.json").write_text(text, encoding="utf-8")
        if complete:
            _keep_previous(folder)
        # The manifest goes first and comes back last: without it there is no split to read.
        manifest.unlink(missing_ok=True)
        for name in SPLIT_FILES:
            os.replace(staging / name, folder / name)
    return manifest


def load_split(workspace: Workspace) -> Split:
    """Load the split that notebook 01 saved.

    Raises
    ------
    MissingStepError
        If there is none yet.
    """
    folder = workspace.data
    if not _is_complete(folder):
        raise MissingStepError(
            f"There is no prepared data in {folder}. Run notebook 01_data_preparation "
            "first (with the same WORKSPACE)."
        )
    manifest = _read_manifest(folder)
    train, test = (_read_parquet(folder / name) for name in ("train.parquet", "test.parquet"))
    target = manifest["target"]
    features = (part.drop(columns=target) for part in (train, test))
    return Split(*features, train[target], test[target], manifest)


def prepared_table(
    workspace: Workspace,
    target: str,
    categorical: Sequence[str] | None,
    drop: Sequence[str] | None,
) -> Table | None:
    """Return the table whose split was saved before, or None.

    Raises
    ------
    DataError
        If the parameters ask for what the saved table does not have (any more).
    """
    if not _is_complete(workspace.data):
        return None
    manifest = _read_manifest(workspace.data)
    frame = _read_parquet(workspace.data / "table.parquet")
    source, dropped = manifest["source"], set(manifest["drop"])
    copy = f"The prepared copy of {source}"
    if target != manifest["target"] or (drop is not None and not dropped <= set(drop)):
        raise DataError(
            f"{copy} was made with TARGET = {manifest['target']!r} and DROP = {sorted(dropped)}, "
            "and what was left out is gone. Repeat these, or name the CSV in DATA_SOURCE to "
            "prepare it otherwise."
        )
    named = manifest["categorical"] if categorical is None else set(categorical) - dropped
    more = set(drop or ()) - dropped
    table = make_table(frame, manifest["header"], copy, target, named, more)
    return replace(table, source=source, dropped=tuple(sorted(dropped | more)))
