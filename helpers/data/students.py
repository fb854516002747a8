"""The columns of the students' table and what they mean, from the description of its makers.

They stand in `students.csv` in UCI's order; the Kaggle variant has no grade of admission or of the
previous qualification, and numbers the codes of a column 1, 2, 3, … in the order of UCI's codes.

References
----------
.. [1] V. Realinho, M. Vieira Martins, J. Machado, L. Baptista (2021). *Predict Students'
   Dropout and Academic Success*. UCI Machine Learning Repository. doi:10.24432/C5MC89
   (CC BY 4.0).
.. [2] V. Realinho, J. Machado, L. Baptista, M. V. Martins (2022). *Predicting Student Dropout
   and Academic Success*. Data 7(11), 146. doi:10.3390/data7110146
"""

from pathlib import Path

import pandas as pd

_COLUMNS = pd.read_csv(Path(__file__).with_name("students.csv"), index_col="column")

STUDENT_COLUMNS: dict[str, str] = _COLUMNS["meaning"].to_dict()
STUDENT_CATEGORICAL = tuple(_COLUMNS.index[_COLUMNS["role"] == "category"])
# Groups whose metrics are compared: the name of a group by value, or where numbers are cut.
STUDENT_GROUPS: dict[str, dict] = {
    "Gender": {"levels": {"0": "female", "1": "male"}},
    "Age at enrollment": {"edges": [21, 26]},
    "Nacionality": {"levels": {"1": "home"}},
    "Scholarship holder": {"levels": {"0": "none", "1": "scholarship"}},
    "Displaced": {"levels": {"0": "at home", "1": "away from home"}},
}
