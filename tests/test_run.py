"""The command line of the series, and what it says when a notebook cannot do its work."""

import pytest

from tests.series import run_notebook, run_series


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "SEDE", "1"), "Did you mean SEED?"),
        (("-p", "GAMMA_EXPONENTS", "[5000]"), "GAMMA_EXPONENTS must be a list of one or more"),
        (("--only", "09"), "there is no notebook '09'"),
        (("--only", ""), "--only: the value is empty"),
        (("--data", ""), "--data: the value is empty"),
        (("--data", "nowhere.csv"), "There is no file nowhere.csv"),
        (("--data", "{one_class}", "-p", "DROP", "b"), "has one class only"),
        (("--data", "sample", "-p", "TARGET", "nope"), "sample has no column 'nope'"),
        (("--data", "sample", "-p", "GROUPS", '["Age"]'), "GROUPS names 'Age', which is no column"),
        (("--data", "sample", "-p", "ALARM_CLASS", "drop"), "ALARM_CLASS must be one of the"),
    ],
)
def test_wrong_command_line_is_refused_before_anything_is_made(tmp_path, arguments, message):
    table = tmp_path / "table.csv"
    table.write_text("a,b,Target\n" + "1,2,x\n" * 50, encoding="utf-8")
    result = run_series(tmp_path / "ws", *(each.format(one_class=table) for each in arguments))
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "ws").exists()


def test_wrong_setting_of_the_environment_is_refused_before_anything_is_made(tmp_path):
    result = run_series(tmp_path / "ws", UI_USERS="bob")
    assert result.returncode == 1
    assert "UI_USERS: 'bob' is no entry 'name:role'" in result.stderr
    assert not (tmp_path / "ws").exists()


def test_no_server_at_the_tracking_uri_is_said_before_training(tmp_path):
    result = run_series(
        tmp_path / "ws", "--data", "sample", MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert result.returncode == 1
    assert "No MLflow server answers at MLFLOW_TRACKING_URI = http://127.0.0.1:9" in result.stderr
    assert not (tmp_path / "ws" / ".server").exists()


@pytest.mark.parametrize("name", ["02_cnn_training", "03_svm_grid_search", "04_registry_promotion"])
def test_notebook_without_its_input_names_the_one_to_run_first(tmp_path, name):
    result = run_notebook(name, tmp_path / "out.ipynb", WORKSPACE=str(tmp_path / "ws"))
    assert result.returncode != 0
    assert f"MissingStepError: There is no prepared data in {tmp_path / 'ws'}" in result.stderr
    assert "01_data_preparation" in result.stderr
    assert 'File "' not in result.stderr.split("MissingStepError")[-1]


@pytest.mark.slow
def test_promotion_without_trained_models_names_both_notebooks(tmp_path):
    place = ("-p", "WORKSPACE", str(tmp_path / "ws"))
    run_notebook("01_data_preparation", tmp_path / "1.ipynb", *place, "-p", "DATA_SOURCE", "sample")
    result = run_notebook("04_registry_promotion", tmp_path / "4.ipynb", *place)
    assert result.returncode != 0
    assert "02_cnn_training" in result.stderr
    assert "03_svm_grid_search" in result.stderr


@pytest.mark.slow
def test_failing_notebook_is_named_with_cell_and_error_and_what_needs_it_is_not_run(tmp_path):
    # What `auto` finds is not looked at before.
    result = run_series(tmp_path / "ws", "-p", "TARGET", "nope", "--html")
    assert result.returncode == 1
    assert "FAILED: 01_data_preparation, cell" in result.stderr
    assert "has no column 'nope'" in result.stderr
    assert "02_cnn_training: not run" in result.stdout
    assert not list((tmp_path / "ws" / "data").iterdir())
    executed = tmp_path / "ws" / "executed" / "01_data_preparation"
    assert f"as far as it got: {executed}.ipynb" in result.stderr
    assert "has no column 'nope'" in executed.with_suffix(".html").read_text(encoding="utf-8")
    assert not (executed.parent / "02_cnn_training.html").exists()
