"""The parameters of the notebooks: read from their cells, checked, and shown as a table.

The cell tagged ``parameters`` of a notebook says name, type, default and meaning of each; `BOUNDS`
says what a cell cannot. ``python -m helpers.settings`` writes the table into
``helpers/README.md``.
"""

import ast
import difflib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache

from helpers.series import STEPS
from helpers.workspace import PROJECT_ROOT, ParameterError

README = PROJECT_ROOT / "helpers" / "README.md"
KINDS = {
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
    "list": (list, "a list"),
}
# As papermill reads a line of the cell; papermill itself takes seconds to import.
LINE = re.compile(r"(?P<name>\w+): (?P<kind>\w+) = (?P<default>.*?)  # (?P<help>.+)")


def _written(number: float | None) -> str | None:
    """Return a number as people write it, such as 0.000001 and 4,294,967,295."""
    return None if number is None else f"{Decimal(str(number)):,f}"


@dataclass(frozen=True)
class Bounds:
    """What a parameter may be, besides its type.

    Attributes
    ----------
    minimum, maximum : float or None
        Of the value, or of each number of a list; both included.
    excluded : tuple
        Values between them that are not allowed.
    choices : tuple
        The only values allowed, of any type.
    environment : bool
        Whether an environment variable of the parameter's name is used where it is None.
    """

    minimum: float | None = None
    maximum: float | None = None
    excluded: tuple = ()
    choices: tuple = ()
    environment: bool = False

    def __str__(self):
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        if self.minimum is None:
            return ""
        low, high = _written(self.minimum), _written(self.maximum)
        between = f"at least {low}" if high is None else f"between {low} and {high}"
        return between + "".join(f" and not {each}" for each in self.excluded)

    def hold(self, value: float) -> bool:
        """Tell whether a number is within the bounds; NaN is not."""
        above = self.minimum is None or value >= self.minimum
        below = self.maximum is None or value <= self.maximum
        return above and below and value not in self.excluded


BOUNDS = {
    "WORKSPACE": Bounds(environment=True),
    "DRIVE_FOLDER": Bounds(environment=True),
    "EXPOSE_UI": Bounds(choices=("auto", True, False)),
    "SEED": Bounds(0, 2**32 - 1),
    "TEST_SIZE": Bounds(0.05, 0.5),
    "FILTERS": Bounds(1, 1024),
    "KERNEL_SIZE": Bounds(1, 64),
    "N_BINS": Bounds(0, 64),
    "L2": Bounds(0, 1),
    "LEARNING_RATE": Bounds(1e-6, 1),
    "BATCH_SIZE": Bounds(1),
    "EPOCHS": Bounds(1),
    "VALIDATION_SIZE": Bounds(0.05, 0.5),
    "CLASS_WEIGHT_POWER": Bounds(0, 1),
    "C_EXPONENTS": Bounds(-60, 60),
    "GAMMA_EXPONENTS": Bounds(-60, 60),
    "CV_FOLDS": Bounds(2, 20),
    "SEARCH_ROWS": Bounds(100),
    "N_JOBS": Bounds(-1, excluded=(0,)),
    "MIN_GAIN": Bounds(0, 1),
    "GAIN_OVER": Bounds(choices=("majority class", "logistic regression")),
    "MAX_LOSS": Bounds(0, 1),
    "MIN_ROBUSTNESS": Bounds(0, 1),
    "ATTACKED_ROWS": Bounds(0),
    "MAX_GAP": Bounds(0, 1),
    "CARD_LANGUAGE": Bounds(choices=("en", "es")),
    "PERIOD": Bounds(choices=("h", "D", "W", "M")),
}


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A parameter as the notebooks declare it, and its bounds; one with default None is optional.

    Attributes
    ----------
    kind : str
        A key of `KINDS`. A list with bounds holds numbers, one at least; another one texts.
    meanings : list of str
        The comment on its line in each notebook, where they differ.
    notebooks : list of str
        Numbers of the notebooks that have it.
    """

    name: str
    kind: str
    default: object
    bounds: Bounds
    meanings: list[str] = field(default_factory=list)
    notebooks: list[str] = field(default_factory=list)

    @property
    def meaning(self) -> str:
        """What it means, on one line."""
        return "; ".join(self.meanings)

    @property
    def allowed(self) -> str:
        """Bounds and environment variable, for tables."""
        variable = f"None: ${self.name}" if self.bounds.environment else ""
        return str(self.bounds) or variable

    @property
    def shown_default(self) -> str:
        """The default as source code, a long list cut short."""
        if isinstance(self.default, list) and len(self.default) > 3:
            return f"[{self.default[0]}, …, {self.default[-1]}]"
        return repr(self.default)


def parameters_cell(path) -> str:
    """Return the source of a notebook's cell that is tagged ``parameters``; "" without one."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return "".join(next(tagged, {"source": ""})["source"])


@cache
def declared_parameters() -> dict[str, Parameter]:
    """Return all parameters by name, in the order of the notebooks."""
    found = {}
    for number, step in STEPS.items():
        for line in LINE.finditer(parameters_cell(step.path)):
            name, kind, default, meaning = line.groups()
            new = Parameter(name, kind, ast.literal_eval(default), BOUNDS.get(name, Bounds()))
            parameter = found.setdefault(name, new)
            parameter.notebooks.append(number)
            if meaning not in parameter.meanings:
                parameter.meanings.append(meaning)
    return found


# --- checking ---------------------------------------------------------------------------------


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


def _is_kind(value, kind: str) -> bool:
    # In Python True is a whole number, too.
    return isinstance(value, KINDS[kind][0]) and (kind == "bool") == isinstance(value, bool)


def _checked(name: str, value):
    parameter = declared_parameters()[name]
    bounds = parameter.bounds

    def require(good, wanted):
        if not good:
            raise ParameterError(f"{name} must be {wanted} ({parameter.meaning}), not {value!r}.")

    if value is None and bounds.environment:
        value = os.environ.get(name) or None
    if bounds.choices:
        require(value in bounds.choices, bounds)
        return value
    if value is None and parameter.default is None:
        return None
    if parameter.kind == "list":
        value = as_list(value)
    require(_is_kind(value, parameter.kind), KINDS[parameter.kind][1])
    require(not isinstance(value, str) or value.strip(), "a text that is not empty")
    if parameter.kind == "list" and str(bounds):
        with suppress(ValueError):
            value = [float(item) if isinstance(item, str) else item for item in value]
        numbers = all(_is_kind(item, "float") and bounds.hold(item) for item in value)
        require(value and numbers, f"a list of one or more numbers {bounds}")
    elif parameter.kind == "list":
        require(all(isinstance(item, str) for item in value), "a list of texts")
    elif str(bounds):
        require(bounds.hold(value), bounds)
    return float(value) if parameter.kind == "float" else value


def check_parameters(**values) -> dict:
    """Check values of parameters and fill in environment variables.

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
    return {name: _checked(name, value) for name, value in values.items()}


def read_value(text: str):
    """Read a value of the command line: JSON, True, False, None, or else a text."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def distribute(parameters: dict) -> dict[str, dict]:
    """Check parameters and give each step those that its notebook declares, by its number.

    Raises
    ------
    ParameterError
        If no notebook has a parameter of that name, or its value cannot be used.
    """
    declared = declared_parameters()
    for name in parameters:
        if name not in declared:
            close = difflib.get_close_matches(name.upper(), declared, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ParameterError(
                f"No notebook has a parameter {name}.{hint} "
                f"There are: {', '.join(sorted(declared))}."
            )
    check_parameters(**parameters)
    by_step = {number: {} for number in STEPS}
    for name, value in parameters.items():
        for number in declared[name].notebooks:
            by_step[number][name] = value
    return by_step


# --- showing ----------------------------------------------------------------------------------


def help_text() -> str:
    """Return the parameters for a command line's help."""
    lines = ["parameters (-p NAME VALUE):"]
    for each in declared_parameters().values():
        bounds = f", {each.allowed}" if each.allowed else ""
        lines.append(f"  {each.name}: {each.kind} = {each.shown_default}{bounds}")
        lines.append(f"      {each.meaning} [{', '.join(each.notebooks)}]")
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the parameters as a table in Markdown."""
    lines = [
        "| parameter | default | type | notebooks | meaning | allowed |",
        "|---|---|---|---|---|---|",
    ]
    for each in declared_parameters().values():
        notebooks = "all" if len(each.notebooks) == len(STEPS) else ", ".join(each.notebooks)
        cells = (f"`{each.name}`", f"`{each.shown_default}`", each.kind, notebooks)
        lines.append(f"| {' | '.join((*cells, each.meaning, each.allowed))} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Return a text in Markdown with today's table between its two marks."""
    marks = r"(<!-- parameters -->\n).*(\n<!-- /parameters -->)"
    return re.sub(marks, lambda mark: mark[1] + markdown_table() + mark[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
