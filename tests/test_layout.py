"""The direction of imports: a room knows only those on the floors below it."""

import ast

from helpers.workspace import PROJECT_ROOT

HELPERS = PROJECT_ROOT / "helpers"
FLOORS = (
    "workspace",
    "display series",
    "settings",
    "data server colab",
    "models",
    "plots",
    "tracking",
    "registry",
    "serving",
    "monitoring",
    "notebook run",
)


def imported(path):
    """Return the rooms of the helpers that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("helpers."))


def test_imports_go_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    for path in HELPERS.rglob("*.py"):
        room = path.relative_to(HELPERS).parts[0].removesuffix(".py")
        if room != "__init__":
            up = {
                other for other in imported(path) if other != room and floor[other] >= floor[room]
            }
            assert not up, f"{path} imports {up}"
