"""Where passwords and tokens come from: Colab Secrets, the environment, or made here.

What is made here lies in the workspace's ``passwords.json``, readable by its owner only.
"""

import getpass
import json
import os
import re
import secrets

from helpers.display import notice
from helpers.server.private_files import private_lock, write_private
from helpers.workspace import ProjectError, Workspace, colab_front_end, is_interactive

# Names under which a password made here is stored, besides those of the users.
ADMIN = "admin"
NOTEBOOKS = "notebooks"  # the account that the notebooks sign in with by themselves
SCORING = "scoring"  # of the models

# Where each password or token is looked for, in this order: Colab Secrets, the environment.
NGROK_TOKEN = "NGROK_AUTHTOKEN"
NGROK_DOMAIN = "NGROK_DOMAIN"
ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
USER_PASSWORD = "MLFLOW_PASSWORD_"  # and the user's name in capitals
SCORING_PASSWORD = "SCORING_PASSWORD"
ALERT_WEBHOOK = "ALERT_WEBHOOK"
GIVEN_SECRETS = (NGROK_TOKEN, NGROK_DOMAIN, SCORING_PASSWORD, ALERT_WEBHOOK)  # of no user

SHORTEST_PASSWORD = 12  # characters; MLflow refuses shorter ones


class AccessError(ProjectError):
    """A user, password or role cannot be set up as asked."""


# --- secrets that are given -------------------------------------------------------------------


def find_secret(name: str) -> str | None:
    """Look a secret up in Colab Secrets, else in the environment; without surrounding space."""
    value = _colab_secret(name) if colab_front_end() else None
    return (value or os.environ.get(name) or "").strip() or None


def _colab_secret(name: str) -> str | None:
    from google.colab import errors, userdata

    try:
        return userdata.get(name)
    except userdata.NotebookAccessError:
        notice(
            f"The Colab secret {name} is there, but this notebook may not read it. Open the key "
            "symbol on the left, switch on 'Notebook access', and run this cell again.",
            "warning",
        )
        return None
    except errors.Error:
        return None  # There is none, or the page is gone.


def ask_secret(name: str, explanation: str) -> str | None:
    """Ask the person at the keyboard for a secret; what is typed is not shown.

    Returns
    -------
    str or None
        None where nobody can answer, or if the answer is empty.
    """
    if not is_interactive():
        return None
    print(explanation)
    return getpass.getpass(f"{name} (hidden; Enter to go on without): ").strip() or None


# --- secrets that are made --------------------------------------------------------------------


def stored_secrets(workspace: Workspace) -> dict[str, str]:
    """Return every secret that was made for a workspace, by name.

    Raises
    ------
    AccessError
        If their file is damaged.
    """
    path = workspace.passwords
    try:
        known = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        known = None
    if not isinstance(known, dict) or not all(isinstance(each, str) for each in known.values()):
        raise AccessError(
            f"{path} is damaged and stays as it is. Correct it, or move it to another folder, "
            f"stop the servers (python -m helpers.server --stop) and run this again: new "
            "passwords are made."
        )
    return known


def stored_secret(workspace: Workspace, name: str) -> str:
    """Return the stored secret of a name, made at the first call (20 random characters)."""
    with private_lock(workspace.server / "passwords.lock"):
        known = stored_secrets(workspace)
        if name not in known:
            known[name] = secrets.token_urlsafe(15)
            write_private(workspace.passwords, known)
    return known[name]


def secret_name(user: str) -> str:
    """Return the name of the secret that holds a user's password."""
    if user == ADMIN:
        return ADMIN_PASSWORD
    return USER_PASSWORD + re.sub(r"\W", "_", user).upper()


def password_of(workspace: Workspace, user: str) -> str:
    """Return a user's password: from a secret, else the stored one, else a new one.

    Raises
    ------
    AccessError
        If the password in the secret is too short.
    """
    given = find_secret(secret_name(user))
    if given is None:
        return stored_secret(workspace, user)
    if len(given) < SHORTEST_PASSWORD:
        raise AccessError(
            f"The password in {secret_name(user)} is too short: at least {SHORTEST_PASSWORD} "
            "characters. Without that secret a password is made for you."
        )
    return given
