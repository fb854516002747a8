"""The models that a scoring server has loaded: what is in Production, as far as it works."""

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from starlette.exceptions import HTTPException

from helpers import registry, series, tracking

POLL = 2.0  # seconds between two looks at what is in Production
TRY_AGAIN = 30.0  # seconds until a version that did not load is tried again

log = logging.getLogger("serving")


class BadVersionError(Exception):
    """A version in Production cannot be served; the message says why."""


@dataclass(frozen=True)
class LoadedModel:
    """One version of a model, loaded.

    Attributes
    ----------
    columns : dict of str to {'number', 'boolean', 'text'}
    classify : callable
        From converted rows to predictions and probabilities, see `helpers.models.interface`.
    since : str
        When it was loaded, ISO 8601, UTC.
    """

    name: str
    version: str
    run_id: str
    columns: dict[str, str]
    labels: list
    classify: Callable[[pd.DataFrame], tuple[list, np.ndarray]]
    since: str

    def describe(self) -> dict:
        """Return what clients may know."""
        return {name: value for name, value in vars(self).items() if name != "classify"}


def load(name: str, version: ModelVersion) -> LoadedModel:
    """Load a version and make sure that it answers.

    Raises
    ------
    BadVersionError
        If it does not load or answer.
    """
    number = str(version.version)
    try:
        # In a folder of its own: what MLflow downloads elsewhere is never deleted.
        with tempfile.TemporaryDirectory() as folder:
            uri = f"models:/{name}/{number}"
            path = mlflow.artifacts.download_artifacts(uri, dst_path=folder)
            model = tracking.load_model(path)
        # Whatever is done once, at the first call, is done here, too.
        model.predict(model.input_example)
        own = model.unwrap_python_model()
        columns, labels, classify = own.columns, own.labels, own.classify
    except registry.LOAD_ERRORS as error:
        # A file that was cut short may say nothing more.
        first_line = str(error).strip().partition("\n")[0][:300]
        raise BadVersionError(f"{type(error).__name__}: {first_line}") from error
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return LoadedModel(name, number, version.run_id, columns, labels, classify, now)


class Models:
    """The production models; looks now and then for new versions.

    A new version takes over between two requests; those that are being answered keep the one
    they began with. A version that does not load or answer is refused, and the one before stays.

    Attributes
    ----------
    loaded : dict of str to LoadedModel
        By name.
    refused : dict of str to dict
        ``version`` and ``reason``, by name.
    """

    def __init__(self, *loaded: LoadedModel):
        self.loaded = {each.name: each for each in loaded}
        self.refused, self._retry = {}, {}
        self._stop = threading.Event()

    def refresh(self) -> None:
        """Load what is new in Production; forget what is not there any more."""
        for name in series.MODELS:
            try:
                version = registry.production_version(name)
            except (MlflowException, OSError) as error:
                # Without the MLflow server production stays what it was.
                log.warning("MLflow does not answer: %s", str(error).splitlines()[0][:200])
                return
            if version is None:
                self.loaded.pop(name, None)
                self.refused.pop(name, None)
            elif self._is_new(name, str(version.version)):
                self._load(name, version)

    def _is_new(self, name: str, number: str) -> bool:
        if name in self.loaded and self.loaded[name].version == number:
            self.refused.pop(name, None)
            return False
        refused = self.refused.get(name, {}).get("version")
        return refused != number or time.monotonic() > self._retry[name]

    def _load(self, name: str, version: ModelVersion) -> None:
        number = str(version.version)
        try:
            self.loaded[name] = load(name, version)
        except BadVersionError as error:
            self.refused[name] = {"version": number, "reason": str(error)}
            self._retry[name] = time.monotonic() + TRY_AGAIN
            log.error("%s version %s is refused: %s", name, number, error)
        else:
            self.refused.pop(name, None)
            log.warning("%s version %s is served", name, number)

    def watch(self) -> None:
        """Refresh until `stop`; for a thread."""
        while not self._stop.wait(POLL):
            self.refresh()

    def stop(self) -> None:
        """End `watch`."""
        self._stop.set()

    def get(self, name: str | None = None) -> LoadedModel:
        """Return a model by name; without one, the first.

        Raises
        ------
        starlette.exceptions.HTTPException
            404 for an unknown name, 503 where its production version is not served.
        """
        # A copy: `refresh` changes the original from another thread.
        loaded = dict(self.loaded)
        if name is None:
            name = next((each for each in series.MODELS if each in loaded), None)
        if name in loaded:
            return loaded[name]
        if name is None or name in series.MODELS:
            reason = self.refused.get(name, {}).get("reason", "nothing is in Production")
            message = f"No version of {name or 'any model'} is served: {reason}"
            raise HTTPException(503, message, {"Retry-After": "5"})
        served = ", ".join(loaded) or "none"
        raise HTTPException(404, f"There is no model {name!r}. Served: {served}.")
