"""The series: its notebooks in order, and the experiments, runs and models that they make."""

from dataclasses import dataclass
from pathlib import Path

from helpers.workspace import PROJECT_ROOT


@dataclass(frozen=True)
class Step:
    """One notebook of the series; `needs` are the numbers of those to be done before."""

    name: str
    needs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The notebook."""
        return PROJECT_ROOT / "notebooks" / f"{self.name}.ipynb"


STEPS = {
    "01": Step("01_data_preparation"),
    "02": Step("02_cnn_training", ("01",)),
    "03": Step("03_svm_grid_search", ("01",)),
    "04": Step("04_registry_promotion", ("02", "03")),
    "05": Step("05_serving_and_monitoring", ("04",)),
}


@dataclass(frozen=True)
class Model:
    """A registered model: the experiment and the name of its runs, and the step that trains it."""

    experiment: str
    run_name: str
    step: str


MODELS = {
    "model_conv_network": Model("conv_network", "default_logistic", "02"),
    "model_svm_rbf": Model("svc_model", "svm", "03"),
}

PROMOTIONS = "promotions"  # experiment: every promotion and rollback is a run of it
