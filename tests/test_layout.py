"""The direction of imports: a room knows only those on the floors below it."""

from helpers.resume import HELPERS, imported_modules

FLOORS = (
    "workspace",
    "display series",
    "locks pages",
    "settings",
    "data server colab",
    "models",
    "plots",
    "tracking",
    "registry",
    "serving",
    "monitoring",
    "notebook resume",
    "execution",
    "run",
)


def test_imports_go_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    for path in HELPERS.rglob("*.py"):
        room = path.relative_to(HELPERS).parts[0].removesuffix(".py")
        if room != "__init__":
            others = imported_modules(path.read_text(encoding="utf-8")) - {room}
            up = {other for other in others if floor[other] >= floor[room]}
            assert not up, f"{path} imports {up}"
