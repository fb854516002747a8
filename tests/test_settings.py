"""Values of the notebooks' parameters are taken, or refused naming the parameter."""

import pytest

from helpers.settings import SETTINGS, check_parameters
from helpers.workspace import ParameterError

NAN = float("nan")
WRONG = {
    "WORKSPACE": [5, ["a"]],
    "SEED": ["0", 0.5, -1, 2**32, True, None],
    "DATA_SOURCE": [None, 3, ["a.csv"]],
    "TARGET": [None, 1],
    "CATEGORICAL": [5, "[broken", True, [3]],
    "DROP": [5, "[broken", {"a": 1}, [3]],
    "TEST_SIZE": ["0.3", 0, 1, 0.9, -0.1, None, True, NAN],
    "FILTERS": [0, 1.5, "32", None, 5000],
    "KERNEL_SIZE": [0, 2.0, None, 65],
    "L2": [-1, "0", 2, None, NAN],
    "LEARNING_RATE": [0, -0.1, "fast", None, 2, NAN],
    "BATCH_SIZE": [0, 1.5, None],
    "EPOCHS": [0, "30", None, 2.5],
    "VALIDATION_SIZE": [0, 0.9, "0.1", None, NAN],
    "CLASS_WEIGHT_POWER": [-0.1, 1.1, "0", None, NAN],
    "N_BINS": [-1, 65, 0.5, "8", None, True],
    "C_EXPONENTS": [None, 3, "[broken", [], "", [1, "a"], [61], [-61], [NAN], [True]],
    "GAMMA_EXPONENTS": [None, 3, "[broken", [], "a,b", [[1]], [1e400]],
    "BEYOND_EDGES": ["yes", 1],
    "CV_FOLDS": [1, 21, 2.5, None, "5"],
    "N_JOBS": [0, -2, 1.5, None, "2"],
    "MIN_GAIN": [-0.1, 1.1, "0", None, NAN],
    "MAX_LOSS": [-0.1, 1.1, "0", None, NAN],
    "ALLOW_REPLACE": ["yes", 1, None],
    "MIN_ROBUSTNESS": [-0.1, 1.1, "0", None, NAN],
    "DRIVE_FOLDER": [1, ["MyDrive"], True],
    "ATTACKED_ROWS": [-1, 0.5, "30", None],
    "REASON": [None, 5],
    "PROMOTED_BY": [5, ["me"]],
    "DEMO_TRAFFIC": ["yes", 1, None],
    "PERIOD": ["day", "d", 1, None],
    "EXPOSE_UI": ["yes", None, 2],
}


def test_wrong_values_are_listed_for_every_setting():
    assert set(SETTINGS) - set(WRONG) == set()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_is_refused_naming_the_parameter(name, value):
    with pytest.raises(ParameterError, match=f"^{name} "):
        check_parameters(**{name: value})


def test_right_values_are_taken_and_lists_may_be_texts(monkeypatch):
    monkeypatch.setenv("WORKSPACE", "/from/environment")
    checked = check_parameters(
        WORKSPACE=None,
        TEST_SIZE=0.25,
        SEED=3,
        CATEGORICAL="a, b",
        DROP='["c, d"]',
        L2=0,
        C_EXPONENTS="-1, 0.5",
        GAMMA_EXPONENTS=[-5],
        BEYOND_EDGES=None,
    )
    assert checked == {
        "WORKSPACE": "/from/environment",
        "TEST_SIZE": 0.25,
        "SEED": 3,
        "CATEGORICAL": ["a", "b"],
        "DROP": ["c, d"],
        "L2": 0.0,
        "C_EXPONENTS": [-1, 0.5],
        "GAMMA_EXPONENTS": [-5],
        "BEYOND_EDGES": None,
    }
    assert check_parameters(WORKSPACE="/explicit")["WORKSPACE"] == "/explicit"
