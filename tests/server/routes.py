"""Every route of the MLflow server, taken from the app itself, with a body that fits it.

Run as a program it prints them as JSON: the app can be made only once in a process.
"""

import inspect
import json
import re
import sys
from dataclasses import dataclass, field

from helpers.workspace import open_workspace
from tests.series import run_module

PARAMETER = re.compile(r"[<{](?:\w+:)?(\w+)(?::\w+)?[>}]")


@dataclass
class Route:
    """A method and a path with the fields of its request: by name an example, or nested fields."""

    method: str
    path: str
    fields: dict = field(default_factory=dict)

    def filled(self, known: dict) -> tuple[str, dict]:
        """Return path and body with known values in the place of examples."""
        path = PARAMETER.sub(lambda found: str(known.get(found[1], "1")), self.path)
        return path, _fill(self.fields, known)


def every_route(folder) -> list[Route]:
    """List the routes of a server of this project, as its process has them."""
    done = run_module("tests.server.routes", folder)
    assert done.returncode == 0, done.stderr
    return [Route(*route) for route in json.loads(done.stdout.splitlines()[-1])]


def _fill(fields: dict, known: dict) -> dict:
    filled = {}
    for name, example in fields.items():
        value = known.get(name, example)
        if name not in known and isinstance(example, dict):
            value = _fill(example, known)
        if name not in known and isinstance(example, list):
            value = [_fill(each, known) if isinstance(each, dict) else each for each in example]
        elif isinstance(example, list) and not isinstance(value, list):
            value = [value]
        filled[name] = value
    return filled


def _fields(message, depth=3) -> dict:
    """Return an example for each field of a protobuf message."""
    return {
        each.name: [_example(each, depth)] if each.is_repeated else _example(each, depth)
        for each in message.fields
        if depth or each.message_type is None
    }


def _example(each, depth):
    if each.message_type is not None:
        known = {"google.protobuf.Timestamp": "2026-01-01T00:00:00Z", "google.protobuf.Value": "x"}
        known |= {"google.protobuf.Duration": "1s"}
        return known.get(each.message_type.full_name, _fields(each.message_type, depth - 1))
    if each.enum_type is not None:
        return each.enum_type.values[-1].name
    return {each.CPPTYPE_STRING: "x", each.CPPTYPE_BOOL: True}.get(each.cpp_type, 1)


def _asked_for(view) -> dict:
    """Return the fields that a function without a message asks a request for, by its source."""
    try:
        source = inspect.getsource(inspect.unwrap(view))
    except (OSError, TypeError):
        return {}
    return dict.fromkeys(re.findall(r"""(?:get|param|args)\w*[(\[]["'](\w+)["']""", source), "x")


def _of_schema(schema, components, depth=4):
    """Return an example of a JSON schema."""
    if "$ref" in schema:
        schema = components[schema["$ref"].rsplit("/", 1)[-1]]
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return _of_schema(schema[choice][0], components, depth)
    if "properties" in schema and depth:
        inner = schema["properties"].items()
        return {name: _of_schema(each, components, depth - 1) for name, each in inner}
    if schema.get("type") == "array":
        return [_of_schema(schema.get("items", {}), components, depth - 1)] if depth else []
    plain = {"integer": 1, "number": 1.0, "boolean": True, "object": {}}
    return (schema.get("enum") or [plain.get(schema.get("type"), "x")])[0]


def _main(folder):
    from mlflow.server import app as flask
    from mlflow.server.handlers import get_endpoints

    from helpers.server.app import create_app

    workspace = open_workspace(folder)
    workspace.server.mkdir(exist_ok=True)
    routes = []
    api = create_app(workspace, 5000)._app.openapi()
    for path, methods in api["paths"].items():
        for method, what in methods.items():
            content = what.get("requestBody", {}).get("content", {}).get("application/json", {})
            fields = _of_schema(content.get("schema", {}), api["components"]["schemas"])
            routes.append((method.upper(), path, fields if isinstance(fields, dict) else {}))
    messages = {
        path: _fields(request.DESCRIPTOR)
        for path, request, _ in get_endpoints(lambda request: request)
        if hasattr(request, "DESCRIPTOR")
    }
    for rule in flask.url_map.iter_rules():
        fields = messages.get(rule.rule) or _asked_for(flask.view_functions[rule.endpoint])
        routes += [(method, rule.rule, fields) for method in rule.methods - {"HEAD", "OPTIONS"}]
    print(json.dumps(sorted(routes, key=lambda route: route[:2])))


if __name__ == "__main__":
    _main(sys.argv[1])
