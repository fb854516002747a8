"""Make the README's picture of the result from the newest runs of a workspace.

``python -m tests.tools.readme_picture WORKSPACE``
"""

import sys

import mlflow
from matplotlib.figure import Figure
from matplotlib.image import imread

from helpers.series import MODELS
from helpers.tracking import latest_run
from helpers.workspace import PROJECT_ROOT
from tests.series import connected

PICTURES = (
    ("model_svm_rbf", "grid_search/heat_map.png"),
    ("model_svm_rbf", "confusion_matrix/confusion_matrix.png"),
    ("model_conv_network", "learning_curves.png"),
    ("model_conv_network", "confusion_matrix/confusion_matrix.png"),
)


def main(workspace):
    """Join the artifacts of both runs into one picture."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(1.5, 1))
    with connected(workspace):
        for axis, (name, artifact) in zip(axes.flat, PICTURES, strict=True):
            run_id = latest_run(MODELS[name].experiment, MODELS[name].run_name).info.run_id
            path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=artifact)
            axis.imshow(imread(path))
            axis.set_title(name if "confusion" not in artifact else "", loc="left", fontsize=10)
            axis.axis("off")
    target = PROJECT_ROOT / "notebooks" / "images" / "result.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=90)
    print(target)


if __name__ == "__main__":
    main(sys.argv[1])
