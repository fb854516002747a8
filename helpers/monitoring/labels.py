"""Labels that arrive after their rows were scored."""

from os import PathLike

import pandas as pd

from helpers.serving import scored_rows
from helpers.workspace import ProjectError, Workspace


class LabelsError(ProjectError):
    """Labels cannot be matched with scored rows."""


def add_labels(workspace: Workspace, labels: pd.Series) -> int:
    """Keep labels that arrived after the rows were scored; return how many.

    Those of rows that are not kept any more are left out.

    Parameters
    ----------
    labels : pandas.Series
        Labels as in the CSV; index: the ids of the rows, as the scoring server gave them
        (``X-Request-Id`` and the row's position in the request, joined by a hyphen).

    Raises
    ------
    LabelsError
        If none belongs to a scored row, or a label is missing.
    """
    if labels.isna().any():
        raise LabelsError(f"The label of row {labels.index[labels.isna()][0]!r} is missing.")
    known = scored_rows.known_rows(workspace.scored_rows, labels.index)
    if len(labels) and not known:
        raise LabelsError(
            f"No label belongs to a row that was scored here; the first is of "
            f"{labels.index[0]!r}. Use the ids that the scoring server gave the rows."
        )
    kept = labels[labels.index.isin(known)]
    scored_rows.write_labels(workspace.scored_rows, kept.to_dict())
    return len(kept)


def read_labels(path: str | PathLike) -> pd.Series:
    """Read a CSV with the columns ``row_id`` and ``label``; return labels by id of the row.

    Raises
    ------
    LabelsError
        If it is not such a file.
    """
    try:
        table = pd.read_csv(path, dtype={"row_id": str})
    except (OSError, ValueError) as error:
        raise LabelsError(f"{path} cannot be read: {error}") from None
    if not {"row_id", "label"} <= set(table.columns):
        raise LabelsError(f"{path} must have the columns row_id and label.")
    return table.set_index("row_id")["label"]
