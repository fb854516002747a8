"""Running the cells of a notebook that do what its title says, without those around them."""

import json
from types import SimpleNamespace
from unittest.mock import patch

from helpers.workspace import PROJECT_ROOT

SERVERS = ("ngrok", "tracking.connect(", "server.start(", "open_notebook(")


def _code(name):
    path = PROJECT_ROOT / "notebooks" / f"{name}.ipynb"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), cell["metadata"].get("tags", [])


def run_cells(name, first, last, **names):
    """Run a notebook's parameters and the cells from one to another; return all that they name.

    `first` and `last` are something that is in these cells, `names` what earlier cells would have
    made, such as ``split``, and values of parameters.
    """
    cells = list(_code(name))
    texts = [text for text, _ in cells]
    begin, end = (next(n for n, text in enumerate(texts) if part in text) for part in (first, last))
    space = {"copy": SimpleNamespace(save=lambda: None)}
    exec(next(text for text, tags in cells if "parameters" in tags), space)
    space.update(names)
    for number, text in enumerate(texts[: end + 1]):
        if number < begin or any(each in text for each in SERVERS):
            # Later cells use what these import.
            text = "\n".join(line for line in text.splitlines() if line.startswith("from helpers"))
        exec(compile(text, f"<a cell of {name}>", "exec"), space)
    return SimpleNamespace(**space)


def train_network(split, ws, steps=None, **parameters):
    """Do what notebook 02 does from the preprocessing to the logged model.

    `steps` are the fewest of the training, for tests that need no good network.
    """
    from helpers.models import cnn

    with patch.object(cnn, "FEWEST_STEPS", steps or cnn.FEWEST_STEPS):
        cells = ("02_cnn_training", "TabularPreprocessor(", "log_model(")
        return run_cells(*cells, split=split, ws=ws, **parameters)
