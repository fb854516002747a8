from copy import deepcopy
from importlib import metadata

import mlflow

from helpers import registry
from helpers.registry import card
from tests.registry.conftest import HALF_HOLDS, promote_by_cell


def promoted(model, run, measured=False, **parameters):
    """Promote a candidate; return its version and the card among its run's artifacts."""
    candidate, checks = model.check(run, robustness=HALF_HOLDS)
    if measured:
        candidates = {model.name: candidate}
        registry.explain_candidates(candidates, "low")
        registry.measure_groups(candidates, ["city"], "low")
        checks = registry.check_candidates(candidates, model.runs.baselines, model.rules())
    decision = promote_by_cell(candidate, checks, **parameters)
    version = mlflow.MlflowClient().get_model_version(model.name, decision["version"])
    return version, mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{card.ARTIFACT}")


def test_card_says_what_was_measured_and_is_description_and_artifact(model, runs):
    version, artifact = promoted(model, runs.good[0], measured=True)
    assert version.description == artifact
    candidate = model.candidate(runs.good[0])
    low, high = candidate.intervals["brier"]
    brier = candidate.metrics["brier"]
    assert f"| Brier score | {brier:.4f} | {low:.3f} – {high:.3f} |" in artifact
    assert f"Digest of the table `{runs.split.manifest['digest'][:16]}`" in artifact
    for group in ("Faro", "Lisboa", "Porto"):
        assert f"| city: {group} |" in artifact
    for text in (
        f"# {model.name}, version 1",
        "What decides most: ",
        "50 % of 10 attacked rows",
        "Not made for** decisions without a person",
        "The licence is not known here",
        "Groups with too few rows to be judged: ",
        f"scikit-learn=={metadata.version('scikit-learn')}",
    ):
        assert text in artifact
    assert "support early to students" not in artifact


def test_card_in_spanish_says_the_same(model, runs):
    candidate, checks = model.check(runs.good[0], robustness=HALF_HOLDS)
    registry.measure_groups({model.name: candidate}, ["city"], "low")
    english, spanish = (
        card.write_card(candidate, "1", checks.loc[model.name], language)
        for language in ("en", "es")
    )
    assert english.count("\n## ") == spanish.count("\n## ") == 6
    assert english.count("\n|") == spanish.count("\n|")
    for word in ("rows", "the ", "interval |", "accuracy", "recall"):
        assert word in english
        assert word not in spanish


def test_card_of_a_run_from_before_a_metric_was_logged_lacks_it(model, runs):
    candidate = model.candidate(deepcopy(runs.good[0]))
    del candidate.run.data.metrics["brier"]
    checks = registry.check_candidates({model.name: candidate}, runs.baselines, model.rules())
    assert checks.loc[(model.name, "metrics reproduced"), "finding"] == (
        "not logged: brier; train again"
    )
    assert promote_by_cell(candidate, checks)["decision"] != "in Production"
    artifact = mlflow.artifacts.load_text(f"runs:/{runs.good[0].info.run_id}/{card.ARTIFACT}")
    assert "| accuracy |" in artifact and "Brier" not in artifact


def test_what_was_not_measured_is_said(model, runs):
    artifact = promoted(model, runs.good[0])[1]
    assert "Not measured by group." in artifact
    assert "Not explained." in artifact


def test_description_that_somebody_changed_stays(model, runs):
    version, _ = promoted(model, runs.good[0])
    client = mlflow.MlflowClient()
    again, spanish = promoted(model, runs.good[0], CARD_LANGUAGE="es")
    assert again.description == spanish != version.description
    client.update_model_version(model.name, version.version, "For the faculty of arts.")
    again, artifact = promoted(model, runs.good[0])
    assert again.description == "For the faculty of arts."
    assert artifact == version.description


def test_names_do_not_break_the_tables_and_a_long_card_is_cut_where_it_says_so(
    model, runs, monkeypatch
):
    candidate, checks = model.check(runs.good[0])
    registry.measure_groups({model.name: candidate}, ["city"], "low")
    table = candidate.groups.table
    table.index = table.index.set_levels(table.index.levels[1].astype(str) + "|x", level=1)
    whole = card.write_card(candidate, "1", checks.loc[model.name], "en")
    assert "| city: Porto\\|x |" in whole
    monkeypatch.setattr(card, "LONGEST", len(whole) - 1)
    short = card.write_card(candidate, "1", checks.loc[model.name], "en")
    assert len(short) < len(whole)
    assert "| city" not in short
    assert "is in the run's artifact `model_card.md`" in short
    run_id = runs.good[0].info.run_id
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/{card.ARTIFACT}") == whole
