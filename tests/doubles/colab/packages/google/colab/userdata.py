"""Colab Secrets, as a file: a value, or null where the notebook may not read it."""

import json
import os
from pathlib import Path


class SecretNotFoundError(Exception):
    """There is no secret of this name."""


class NotebookAccessError(Exception):
    """The notebook may not read it."""


class TimeoutException(Exception):  # noqa: N818 - Colab's name
    """The front end did not answer."""


def get(key):
    """Return a secret."""
    secrets = json.loads(Path(os.environ["COLAB_DOUBLE_SECRETS"]).read_text(encoding="utf-8"))
    if key not in secrets:
        raise SecretNotFoundError(key)
    if secrets[key] is None:
        raise NotebookAccessError(key)
    return secrets[key]
