"""What requests may not do although MLflow's permissions allow it.

Who looks changes nothing, though some of MLflow's pages make what they do not find. Artifacts
lie where the server puts them, whoever asks. And what Production is made of stays as
it was promoted: nobody but an admin renames or deletes a model that has a version in Production,
or writes to the files of a registered version.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from urllib.parse import parse_qs, unquote

from helpers.server.visits import RejectedError

PRODUCTION = "production"  # alias; the stage has a capital letter
SCHEME = "mlflow-artifacts"
# The places that a location may name; others would be opened by the server itself.
PLACES = re.compile(rf"({SCHEME}|models|runs):/(//)?[^/].*")
# Of an experiment's artifacts, for whoever is no admin: others' lie below their numbers.
OWN_PLACE = re.compile(rf"{SCHEME}:/(//)?[A-Za-z][\w.-]*/?")
LOCATIONS = {"artifactlocation", "artifacturi", "storagelocation", "mlflow.artifactlocation"}
OF_PROXY = re.compile(r".*/mlflow-artifacts/(?:artifacts|mpu/[^/]+|presigned)/(.*)", re.DOTALL)
CHANGES = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|CREATE|ALTER|DROP)\b", re.IGNORECASE)

_looking = ContextVar("looking", default=False)


class Protected:
    """Looks at changes before MLflow does.

    Parameters
    ----------
    handlers : module
        `mlflow.server.handlers`, its stores initialized.
    """

    def __init__(self, handlers):
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        # Looked up here: an MLflow that has them no more ends the start, not a request.
        self._runs, self._models = (
            handlers._get_tracking_store(),
            handlers._get_model_registry_store(),
        )
        event.listen(Engine, "before_cursor_execute", _refuse_changes)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Let what runs in the block change no table of MLflow's."""
        token = _looking.set(True)
        try:
            yield
        finally:
            _looking.reset(token)

    def check(self, method: str, path: str, query: str, body: bytes, is_admin: bool) -> None:
        """Raise `RejectedError` if a change must not be made.

        Parameters
        ----------
        body : bytes
            Empty where it is a file.
        """
        action = "/".join(path.rstrip("/").rsplit("/", 2)[-2:])
        content = _parse(body)
        for key, value in _texts(content):
            is_source = key == "source" and action == "model-versions/create"
            if (is_source or key in LOCATIONS) and value and not _is_place(value):
                own = f"Artifacts lie in this server's own storage ({SCHEME}:/…)"
                raise RejectedError(400, "error", f"{own}, not at {value}")
            elsewhere = key == "artifactlocation" and not OWN_PLACE.fullmatch(value)
            if elsewhere and value and not is_admin:
                message = "Leave artifact_location out: the server chooses it."
                raise RejectedError(403, "role", message)
        if is_admin:
            return
        if action in ("registered-models/rename", "registered-models/delete"):
            self._check_name(content)
        if action == "model-versions/delete":
            self._check_name(content, content.get("version"))
        target = self._artifact(method, path, parse_qs(query))
        if target is not None:
            self._check_artifact(target)

    def _check_name(self, content: dict, version: object = None) -> None:
        """Refuse to change the name of a model, or to delete a version, in Production."""
        from mlflow.exceptions import MlflowException

        try:
            model = self._models.get_registered_model(content.get("name"))
        except MlflowException:
            return  # MLflow says what is wrong with the name.
        used = {str(model.aliases[PRODUCTION])} if PRODUCTION in model.aliases else set()
        used |= {
            str(each.version)
            for each in model.latest_versions
            if each.current_stage.lower() == PRODUCTION
        }
        if used and (version is None or str(version) in used):
            message = f"{model.name} is in Production: only an admin renames or deletes it."
            raise RejectedError(403, "role", message)

    def _artifact(self, method: str, path: str, query: dict[str, list[str]]) -> str | None:
        """Return where in the storage a request writes or deletes; None if it does not."""
        from mlflow.exceptions import MlflowException

        of_proxy = OF_PROXY.fullmatch(path)
        if of_proxy:
            return of_proxy[1]
        if not path.endswith("/upload-artifact"):
            return None
        try:
            run = self._runs.get_run(query.get("run_uuid", [""])[0])
        except MlflowException:
            return None
        return f"{run.info.artifact_uri}/{query.get('path', [''])[0]}"

    def _check_artifact(self, target: str) -> None:
        """Refuse to write into a registered version's files, or to delete a folder around them."""
        target = _canonical(target)
        for version in self._versions():
            files = _canonical(version)
            if f"{target}/".startswith(f"{files}/") or f"{files}/".startswith(f"{target}/"):
                message = "These are files of a registered version: only an admin changes them."
                raise RejectedError(403, "role", message)

    def _versions(self) -> list[str]:
        """Return where the files of all registered versions are."""
        token, found = None, []
        while token != "":
            page = self._models.search_model_versions(page_token=token)
            found += [self._location(each.name, each.version) for each in page]
            token = page.token or ""
        return found

    def _location(self, name: str, version: str) -> str:
        location = self._models.get_model_version_download_uri(name, version)
        if location.startswith("runs:/"):
            run_id, _, path = location.removeprefix("runs:/").partition("/")
            location = f"{self._runs.get_run(run_id).info.artifact_uri}/{path}"
        return location


def _refuse_changes(connection, cursor, statement, *others) -> None:
    if _looking.get() and CHANGES.match(statement):
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

        raise MlflowException(
            "Only an admin sees this page: it makes something.", PERMISSION_DENIED
        )


def _parse(body: bytes) -> dict:
    """Return the fields of a body as MLflow reads them: old clients send the JSON as a text."""
    try:
        content = json.loads(body)
        content = json.loads(content) if isinstance(content, str) else content
    except RecursionError:
        raise RejectedError(400, "error", "The body is nested too deeply.") from None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _texts(content: object):
    """Give each text in a body with its key; a tag has two fields for that."""
    if isinstance(content, list):
        for each in content:
            yield from _texts(each)
    elif isinstance(content, dict):
        tag = {content["key"]: content.get("value")} if isinstance(content.get("key"), str) else {}
        for key, value in (*content.items(), *tag.items()):
            if isinstance(value, str):
                yield key.replace("_", "").lower(), value
            else:
                yield from _texts(value)


def _is_place(location: str) -> bool:
    return bool(PLACES.fullmatch(location)) and ".." not in _unquoted(location)


def _unquoted(text: str) -> str:
    while (plain := unquote(text)) != text:
        text = plain
    return text


def _canonical(location: str) -> str:
    path = _unquoted(location).removeprefix(f"{SCHEME}:")
    return posixpath.normpath(f"/{path}".replace("//", "/")).strip("/")
