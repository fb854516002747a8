"""The model card: what a registered version is good for, made from its run, after Mitchell [1]_.

What it says is written in ``card.en.md`` and ``card.es.md``, templates of Jinja.

References
----------
.. [1] M. Mitchell et al. (2019). *Model Cards for Model Reporting*. FAT*. arXiv:1810.03993
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2
import mlflow
import pandas as pd

from helpers.models.evaluation import HEADLINE, class_names
from helpers.registry.checks import WARNING
from helpers.registry.groups import ENDS, GroupReport
from helpers.registry.reference import calibration
from helpers.series import MODELS

if TYPE_CHECKING:
    from helpers.registry.candidates import Candidate

ARTIFACT = "model_card.md"  # of the run of a version
LONGEST = 5000  # characters of a description that MLflow's databases keep
UCI = (
    "V. Realinho, M. Vieira Martins, J. Machado, L. Baptista (2021), UCI Machine Learning "
    "Repository, doi:10.24432/C5MC89, CC BY 4.0"
)
MOST_NAMED = 3  # columns that decide
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    undefined=jinja2.StrictUndefined,
    # Names of columns and classes come from outside: a bar would end the cell of a table.
    finalize=lambda value: value.replace("|", "\\|") if isinstance(value, str) else value,
    autoescape=False,
)


def write_card(
    candidate: "Candidate", version: str, checks: pd.DataFrame, language: Literal["en", "es"]
) -> str:
    """Write the card of a candidate that was registered, log it with its run, and return it.

    `checks` are those of `helpers.registry.checks.check_candidate`. What is returned is short
    enough for the description of the version; the artifact has all of it.
    """
    facts = _facts(candidate, version, checks)
    template = TEMPLATES.get_template(f"card.{language}.md")
    card = template.render(facts, short=False)
    mlflow.MlflowClient().log_text(candidate.run.info.run_id, card, ARTIFACT)
    if len(card) > LONGEST:
        card = template.render(facts, short=True)
    return card[:LONGEST]


def _facts(candidate: "Candidate", version: str, checks: pd.DataFrame) -> dict:
    split, run = candidate.split, candidate.run
    names = {name: name for name in HEADLINE} | {
        f"recall_{name}": f"recall of {label}"
        for label, name in zip(split.labels, class_names(split.labels), strict=True)
    }
    logged = mlflow.MlflowClient().get_logged_model(run.outputs.model_outputs[-1].model_id)
    requirements = mlflow.artifacts.load_text(f"{logged.artifact_location}/requirements.txt")
    explanation, found = candidate.explanation, checks["finding"].str
    warned = found.startswith(WARNING)
    model = MODELS.get(candidate.name)
    return {
        "name": candidate.name,
        "version": version,
        "manifest": split.manifest,
        "labels": split.labels,
        "students": split.students,
        "uci": UCI,
        "n_columns": split.X_test.shape[1],
        "metrics": [
            (shown, candidate.metrics[name], candidate.intervals.get(name))
            for name, shown in names.items()
            if name in candidate.metrics  # an earlier edition logged fewer
        ],
        "calibration": calibration(split.y_test, candidate.answer, split.labels),
        **_groups(candidate.groups),
        "deciding": explanation and list(explanation.deciding["mean"].head(MOST_NAMED).items()),
        "n_deciding": explanation and len(explanation.deciding),
        "robustness": candidate.robustness,
        "experiment": f"{model.experiment}/{model.run_name}" if model else run.info.run_name,
        "parameters": sorted(p for p in run.data.params.items() if not p[0].startswith("grid_")),
        "warned": list(checks.index[warned]),
        "failed": list(checks.index[~checks["passed"]]),
        "artifact": ARTIFACT,
        "run": run.info.run_id,
        "python": run.data.tags.get("python", "–"),
        "versions": requirements.split(),
    }


def _groups(report: GroupReport | None) -> dict:
    if report is None:
        return {"groups": [], "gap": None, "alarm": None, "too_small": []}
    names = {
        "accuracy": "accuracy",
        "recall": f"recall_{report.alarm}",
        "selected": "selection_rate",
    }
    rows = [
        {"column": column, "group": group, "rows": int(row["rows"])}
        | {
            key: [row[name + end] for end in ("", *ENDS)]
            for key, name in names.items()
            if name in row
        }
        for (column, group), row in report.table.iterrows()
    ]
    return {
        "groups": rows,
        "gap": report.gap,
        "alarm": None if report.alarm is None else str(report.alarm),
        "too_small": report.too_small,
    }
