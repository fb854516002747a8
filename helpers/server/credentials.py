"""Where passwords and tokens come from: Colab Secrets, the environment, or made here.

What is made here lies in the workspace's ``passwords.json``, readable by its owner only.
"""

import getpass
import json
import os
import re
import secrets
from contextlib import contextmanager

from filelock import FileLock

from helpers.display import notice
from helpers.workspace import ProjectError, atomic_path, in_colab, is_batch, is_interactive

ADMIN = "admin"
NOTEBOOKS = "notebooks"  # the account that the notebooks sign in with by themselves

# Where each password or token is looked for, in this order: Colab Secrets, the environment.
NGROK_TOKEN = "NGROK_AUTHTOKEN"
NGROK_DOMAIN = "NGROK_DOMAIN"
ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
USER_PASSWORD = "MLFLOW_PASSWORD_"  # and the user's name in capitals

SCORING_PASSWORD = "SCORING_PASSWORD"
ALERT_WEBHOOK = "ALERT_WEBHOOK"
SCORING = "scoring"  # under which a password made for the models is stored

SHORTEST_PASSWORD = 12  # characters; MLflow refuses shorter ones


class AccessError(ProjectError):
    """A user, password or role cannot be set up as asked."""


# --- secrets ----------------------------------------------------------------------------------


def find_secret(name):
    """Look a secret up in Colab Secrets, else in the environment.

    Parameters
    ----------
    name : str
        Such as ``NGROK_AUTHTOKEN``.

    Returns
    -------
    str or None
        Without surrounding white space; None if there is none.
    """
    # A batch run has no front end that could answer: Colab would wait ten seconds for it.
    value = _colab_secret(name) if in_colab() and not is_batch() else None
    return (value or os.environ.get(name) or "").strip() or None


def _colab_secret(name):
    from google.colab import userdata

    try:
        return userdata.get(name)
    except userdata.SecretNotFoundError:
        return None
    except userdata.NotebookAccessError:
        notice(
            f"The Colab secret {name} is there, but this notebook may not read it. Open the key "
            "symbol on the left, switch on 'Notebook access', and run this cell again.",
            "warning",
        )
        return None
    except userdata.TimeoutException:
        # A front end without secrets, such as that of VS Code.
        return None


def ask_secret(name, explanation):
    """Ask the person at the keyboard for a secret; what is typed is not shown.

    Parameters
    ----------
    name : str
    explanation : str
        Where to get it; printed before the question.

    Returns
    -------
    str or None
        None where nobody can answer, or if the answer is empty.
    """
    if not is_interactive():
        return None
    print(explanation)
    return getpass.getpass(f"{name} (hidden; Enter to go on without): ").strip() or None


# --- passwords --------------------------------------------------------------------------------


def private(path, flags):
    """Open a file so that only its owner may read it; an ``opener`` for `open`."""
    return os.open(path, flags, 0o600)


def write_private(path, content):
    """Write JSON into a file that only its owner may read."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", opener=private) as file,
    ):
        json.dump(content, file, indent=2)


@contextmanager
def _stored(workspace):
    """Give the stored passwords; what the block changes is written back, readable by the owner."""
    workspace.server.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(workspace.server / "passwords.lock"):
        path = workspace.passwords
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        before = dict(known)
        yield known
        if known != before:
            write_private(path, known)


def secret_name(user):
    """Return the name of the secret that holds a user's password."""
    if user == ADMIN:
        return ADMIN_PASSWORD
    return USER_PASSWORD + re.sub(r"\W", "_", user).upper()


def password_of(workspace, user):
    """Return a user's password: from a secret, else the stored one, else a new one.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
        New passwords are kept in its ``passwords.json``, readable by its owner only.
    user : str

    Returns
    -------
    str

    Raises
    ------
    AccessError
        If the password in the secret is too short.
    """
    given = find_secret(secret_name(user)) if user != NOTEBOOKS else None
    if given is None:
        return stored_secret(workspace, user)
    if len(given) < SHORTEST_PASSWORD:
        raise AccessError(
            f"The password in {secret_name(user)} is too short: at least {SHORTEST_PASSWORD} "
            "characters. Without that secret a password is made for you."
        )
    return given


def stored_secret(workspace, name):
    """Return the stored secret of a name, made at the first call (20 random characters)."""
    with _stored(workspace) as known:
        return known.setdefault(name, secrets.token_urlsafe(15))


def known_secret(workspace, name):
    """Return the stored secret of a name, or None if none was made."""
    path = workspace.passwords
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get(name)
