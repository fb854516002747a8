import os
import sysconfig

import pytest

from helpers.registry import environment
from helpers.registry.behaviour import CheckFailedError
from tests.registry.conftest import failed


@pytest.mark.slow
def test_model_answers_where_there_is_nothing_but_what_it_requires(model, runs, monkeypatch):
    own = sysconfig.get_path("scripts")
    elsewhere = [folder for folder in os.get_exec_path() if folder != own]  # not activated
    monkeypatch.setenv("PATH", os.pathsep.join(elsewhere))
    checks = model.findings(runs.good[0], check_environment=True)
    assert failed(checks) == []
    assert (
        "answers 20 rows with nothing but its requirements" in checks["finding"]["runs elsewhere"]
    )


def test_model_that_answers_otherwise_or_not_at_all_elsewhere_is_refused(model, runs, monkeypatch):
    candidate = model.candidate(runs.good[0])

    def check():
        environment.check(candidate.model_uri, runs.split, candidate.answer)

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: "")
    with pytest.raises(CheckFailedError, match="does not answer .* uv"):
        check()

    def swapped(folder, rows, env_manager, output_path):
        answer = candidate.answer.head(len(rows))
        names = answer.columns[1:]
        answer = answer.set_axis(["prediction", *names[::-1]], axis=1)
        text = answer.to_json(orient="records")
        environment.Path(output_path).write_text(f'{{"predictions": {text}}}', encoding="utf-8")

    monkeypatch.setattr(environment.mlflow.models, "predict", swapped)
    with pytest.raises(CheckFailedError, match="differs by 0"):
        check()
