"""The parameters of the notebooks: what they must be, and how they are checked."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass

from helpers.workspace import ParameterError


@dataclass(frozen=True)
class Setting:
    """One parameter of the notebooks.

    Attributes
    ----------
    kind : type
        What the value must be; ``list`` also takes a JSON list or a comma-separated text, the
        only forms that the papermill command line can pass.
    description : str
        One line for the README's table of settings.
    environment : str or None
        Environment variable used when the parameter is None.
    optional : bool
        Whether None is a value of its own ("use the default").
    minimum, maximum : float or None
        Bounds of the value, or of each item of a list; both included.
    choices : tuple or None
        The only values allowed.
    excluded : tuple
        Values between the bounds that are not allowed.
    items : type
        What a list must hold: texts, or numbers, of which there must be one at least.
    """

    kind: type
    description: str
    environment: str | None = None
    optional: bool = False
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple | None = None
    excluded: tuple = ()
    items: type = str


SETTINGS = {
    "WORKSPACE": Setting(
        str, "folder for data, runs, models and executed notebooks", "WORKSPACE", optional=True
    ),
    "SEED": Setting(
        int,
        "governs the split (and with it the folds), the initial weights and the order of the rows",
        minimum=0,
        maximum=2**32 - 1,
    ),
    "DATA_SOURCE": Setting(str, "`auto`, `uci`, `sample`, or a path or URL of a CSV"),
    "TARGET": Setting(str, "name of the column to predict"),
    "CATEGORICAL": Setting(
        list, "columns whose numbers are codes (default: inferred)", optional=True
    ),
    "DROP": Setting(list, "columns to leave out, such as identifiers", optional=True),
    "TEST_SIZE": Setting(
        float, "share of the rows held out for the test", minimum=0.05, maximum=0.5
    ),
    "FILTERS": Setting(int, "filters of the convolution", minimum=1, maximum=1024),
    "KERNEL_SIZE": Setting(int, "neighbouring inputs seen by one filter", minimum=1, maximum=64),
    "L2": Setting(float, "weight penalty of the network", minimum=0, maximum=1),
    "LEARNING_RATE": Setting(
        float, "step size of Adam at the start; it falls along a cosine", minimum=1e-6, maximum=1
    ),
    "BATCH_SIZE": Setting(int, "rows per training step", minimum=1),
    "EPOCHS": Setting(int, "passes over the training rows; small tables get more", minimum=1),
    "VALIDATION_SIZE": Setting(
        float, "share of the training rows held out in the rehearsal", minimum=0.05, maximum=0.5
    ),
    "CLASS_WEIGHT_POWER": Setting(
        float, "0: no class weights, 1: balanced, between: milder", minimum=0, maximum=1
    ),
    "N_BINS": Setting(
        int,
        "quantile bins of the piecewise-linear codes of each number; 0: no codes",
        minimum=0,
        maximum=64,
    ),
    "C_EXPONENTS": Setting(list, "powers of two tried for C", minimum=-60, maximum=60, items=float),
    "GAMMA_EXPONENTS": Setting(
        list, "powers of two tried for gamma", minimum=-60, maximum=60, items=float
    ),
    "BEYOND_EDGES": Setting(
        bool,
        "go on beyond the grid where the best pair lies on its edge "
        "(default: on for tables other than the students')",
        optional=True,
    ),
    "CV_FOLDS": Setting(int, "folds of the cross-validation", minimum=2, maximum=20),
    "N_JOBS": Setting(int, "threads of the search; -1: one per core", minimum=-1, excluded=(0,)),
    "MIN_GAIN": Setting(
        float,
        "accuracy a candidate must have above the majority class",
        minimum=0,
        maximum=1,
    ),
    "MAX_LOSS": Setting(
        float,
        "macro F1 a candidate may be below the version in Production",
        minimum=0,
        maximum=1,
    ),
    "ALLOW_REPLACE": Setting(
        bool, "promote even where Production was trained on another kind of table"
    ),
    "MIN_ROBUSTNESS": Setting(
        float,
        "share of attacked rows whose answer must hold; 0: any",
        minimum=0,
        maximum=1,
    ),
    "ATTACKED_ROWS": Setting(
        int, "test rows on which robustness is measured; 0: not measured", minimum=0
    ),
    "REASON": Setting(str, "why the candidates are promoted, for the history"),
    "PROMOTED_BY": Setting(
        str, "who promotes, for the history (default: the user name)", optional=True
    ),
    "DEMO_TRAFFIC": Setting(bool, "send the test rows and their labels as a first day of traffic"),
    "PERIOD": Setting(
        str,
        "length of a period of the monitoring: hour, day, week or month",
        choices=("h", "D", "W", "M"),
    ),
    "DRIVE_FOLDER": Setting(
        str,
        "folder of the safe copy, also `MyDrive/…`; `off`: none (default in Colab: by USE_DRIVE)",
        "DRIVE_FOLDER",
        optional=True,
    ),
    "EXPOSE_UI": Setting(
        str,
        "show the MLflow UI at a public address; `auto`: where there is a token",
        choices=("auto", True, False),
    ),
}


def as_list(value):
    """Read a list given as a list, a JSON text or a comma-separated text."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _is_kind(value, kind):
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _within(value, low, high):
    # Written so that NaN, which is neither below nor above, is refused too.
    return (low is None or value >= low) and (high is None or value <= high)


def _checked_items(name, values, setting):
    low, high = setting.minimum, setting.maximum
    if setting.items is str:
        good, wanted = all(isinstance(item, str) for item in values), "a list of texts"
    else:
        with suppress(ValueError):
            values = [float(item) if isinstance(item, str) else item for item in values]
        numbers = all(_is_kind(item, float) and _within(item, low, high) for item in values)
        good = numbers and len(values) > 0
        wanted = f"a list of one or more numbers between {low:g} and {high:g}"
    if not good:
        raise ParameterError(f"{name} must be {wanted} ({setting.description}), not {values!r}.")
    return values


def _checked(name, value):
    setting = SETTINGS[name]
    if value is None and setting.environment and os.environ.get(setting.environment):
        value = os.environ[setting.environment]
    if value is None and setting.optional:
        return None
    if setting.kind is list:
        value = as_list(value)
    if setting.choices is not None:
        if value not in setting.choices:
            allowed = ", ".join(map(repr, setting.choices))
            raise ParameterError(
                f"{name} must be one of {allowed} ({setting.description}), not {value!r}."
            )
        return value
    wanted = {str: "a text", int: "a whole number", float: "a number", list: "a list"}
    if not _is_kind(value, setting.kind):
        raise ParameterError(
            f"{name} must be {wanted.get(setting.kind, 'True or False')} "
            f"({setting.description}), not {value!r}."
        )
    if setting.kind is list:
        return _checked_items(name, value, setting)
    low, high = setting.minimum, setting.maximum
    if not _within(value, low, high) or value in setting.excluded:
        bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        but = "".join(f" and not {each}" for each in setting.excluded)
        raise ParameterError(
            f"{name} must be {bounds}{but} ({setting.description}), not {value!r}."
        )
    if setting.kind is float:
        return float(value)
    return value


def check_parameters(**parameters):
    """Check the parameters of a notebook and fill in environment variables.

    Parameters
    ----------
    **parameters
        Names from `SETTINGS` with the values of the notebook's ``parameters`` cell.

    Returns
    -------
    dict
        The values to use: an explicit value wins over the environment variable, which wins
        over the default. Lists given as text are lists here.

    Raises
    ------
    ParameterError
        If a value is of the wrong type or out of bounds; names the parameter.
    """
    return {name: _checked(name, value) for name, value in parameters.items()}
