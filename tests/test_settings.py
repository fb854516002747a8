"""The parameters: as the notebooks declare them, as they are checked, as they are shown."""

import papermill
import pytest

from helpers.series import STEPS
from helpers.settings import (
    BOUNDS,
    README,
    check_parameters,
    declared_parameters,
    help_text,
    with_table,
)
from helpers.workspace import ParameterError

NAN = float("nan")
WRONG = {
    "WORKSPACE": [5, ["a"], ""],
    "SEED": ["0", 0.5, -1, 2**32, True, None],
    "DATA_SOURCE": [None, 3, ["a.csv"], ""],
    "TARGET": [None, 1, ""],
    "CATEGORICAL": [5, "[broken", True],
    "DROP": [5, "[broken", {"a": 1}],
    "TEST_SIZE": ["0.3", 0, 1, 0.9, -0.1, None, True, NAN],
    "FILTERS": [0, 1.5, "32", None, 5000],
    "KERNEL_SIZE": [0, 2.0, None, 65],
    "L2": [-1, "0", 2, None, NAN],
    "LEARNING_RATE": [0, -0.1, "fast", None, 2, NAN],
    "BATCH_SIZE": [0, 1.5, None],
    "EPOCHS": [0, "30", None, 2.5],
    "VALIDATION_SIZE": [0, 0.9, "0.1", None, NAN],
    "CLASS_WEIGHT_POWER": [-0.1, 1.1, "0", NAN],
    "N_BINS": [-1, 65, 0.5, "8", None, True],
    "C_EXPONENTS": [None, 3, "[broken", [], "", [1, "a"], [61], [-61], [NAN], [True]],
    "GAMMA_EXPONENTS": [None, 3, "[broken", [], "a,b", [[1]], [1e400]],
    "BEYOND_EDGES": ["yes", 1],
    "CV_FOLDS": [1, 21, 2.5, None, "5"],
    "SEARCH_ROWS": [99, "all"],
    "N_JOBS": [0, -2, 1.5, None, "2"],
    "GAIN_OVER": ["svm", None, 1],
    "MIN_GAIN": [-0.1, 1.1, "0", None, NAN],
    "MAX_LOSS": [-0.1, 1.1, "0", None, NAN],
    "ALLOW_REPLACE": ["yes", 1, None],
    "MIN_ROBUSTNESS": [-0.1, 1.1, "0", None, NAN],
    "DRIVE_FOLDER": [1, ["MyDrive"], True, ""],
    "ATTACKED_ROWS": [-1, 0.5, "30", None],
    "EXPLAIN": ["yes", 1, None],
    "GROUPS": [5, "[broken", True],
    "ALARM_CLASS": [5, ["Dropout"]],
    "MAX_GAP": [-0.1, 1.1, "0", None, NAN],
    "CHECK_ENVIRONMENT": ["yes", 1, None],
    "CARD_LANGUAGE": ["fr", None, 1],
    "REASON": [None, 5],
    "PROMOTED_BY": [5, ["me"]],
    "DEMO_TRAFFIC": ["yes", 1, None],
    "PERIOD": ["day", "d", 1, None],
    "EXPOSE_UI": ["yes", None, 2],
}


def test_wrong_values_are_listed_for_every_parameter():
    assert set(WRONG) == set(declared_parameters())


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_is_refused_with_name_and_meaning(name, value):
    with pytest.raises(ParameterError, match=f"^{name} must be ") as caught:
        check_parameters(**{name: value})
    assert f" ({declared_parameters()[name].meaning}), not " in str(caught.value)


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


@pytest.mark.parametrize("number", STEPS)
def test_parameters_are_those_that_papermill_shows_with_type_default_and_help(number):
    shown = papermill.inspect_notebook(STEPS[number].path)
    declared = {
        name: each for name, each in declared_parameters().items() if number in each.notebooks
    }
    assert set(shown) == set(declared)
    for name, each in declared.items():
        assert shown[name]["inferred_type_name"] == each.kind
        assert shown[name]["default"] == repr(each.default).replace("'", '"')
        assert shown[name]["help"] in each.meanings


def test_every_bound_is_of_a_parameter_and_admits_the_defaults():
    assert set(BOUNDS) <= set(declared_parameters())
    check_parameters(**{name: each.default for name, each in declared_parameters().items()})


def test_table_in_the_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "python -m helpers.settings"
    assert "| `EPOCHS` | `30` | int | 02 | passes over" in text


def test_bounds_are_written_as_people_write_numbers():
    with pytest.raises(ParameterError, match="between 0 and 4,294,967,295 "):
        check_parameters(SEED=-1)
    assert str(BOUNDS["LEARNING_RATE"]) == "between 0.000001 and 1"
    assert str(BOUNDS["C_EXPONENTS"]) == "between -60 and 60"


def test_help_of_the_command_line_tells_all_about_a_parameter():
    assert "  L2: float = 0.003, between 0 and 1\n      weight penalty [02]" in help_text()
