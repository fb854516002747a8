"""Colab Secrets: the front end has them."""

import re

from google.colab import _message, errors


class NotebookAccessError(Exception):
    """The notebook may not read the secret."""


class SecretNotFoundError(errors.Error):
    """There is no secret of this name."""


class TimeoutException(errors.Error):
    """The front end did not answer."""


def get(key):
    """Return a secret."""
    if not isinstance(key, str) or not re.fullmatch(r"\S+", key):
        raise ValueError("Please enter a valid secret name without spaces")
    found = _message.blocking_request("GetSecret", {"key": key}, timeout_sec=10)
    if not found:
        raise TimeoutException(f"Requesting secret {key} timed out.")
    if not found.get("exists"):
        raise SecretNotFoundError(f"Secret {key} does not exist.")
    if not found.get("access"):
        raise NotebookAccessError(f"Notebook does not have access to secret {key}")
    return found.get("payload", "")
