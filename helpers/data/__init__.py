"""Notebook 01: fetch, read, check, split and save a table.

Any CSV with a target column will do. The first data set is the students' table of the UCI
repository [1]_, in its original variant (UCI) and in its re-coded one (Kaggle).

References
----------
.. [1] V. Realinho, M. Vieira Martins, J. Machado, L. Baptista (2021). *Predict Students'
   Dropout and Academic Success*. UCI Machine Learning Repository. doi:10.24432/C5MC89
   (CC BY 4.0).
"""

from helpers.data.looking import check_table, describe_columns, most_telling, remarks
from helpers.data.reading import CSV_OPTIONS, CsvChunks, DataError
from helpers.data.sources import SAMPLE, UCI_URL, load_table
from helpers.data.split import (
    Split,
    distinct_rows,
    load_split,
    make_split,
    repeated_rows,
    save_split,
    with_repeated,
)
from helpers.data.table import Table, read_table

__all__ = [
    "CSV_OPTIONS",
    "SAMPLE",
    "UCI_URL",
    "CsvChunks",
    "DataError",
    "Split",
    "Table",
    "check_table",
    "describe_columns",
    "distinct_rows",
    "load_split",
    "load_table",
    "make_split",
    "most_telling",
    "read_table",
    "remarks",
    "repeated_rows",
    "save_split",
    "with_repeated",
]
