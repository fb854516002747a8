"""Who may see and change what on the workspace's MLflow server: users, roles, admitted hosts.

The server process reads the rules at every request (`helpers.server.app`), so that a change
takes effect without a restart.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace

from filelock import FileLock

from helpers.server.credentials import (
    ADMIN,
    NOTEBOOKS,
    AccessError,
    password_of,
    stored_secret,
    write_private,
)
from helpers.settings import as_list
from helpers.workspace import ParameterError

LOCAL = "local"  # how the activity log names who came from this machine without signing in

ROLES = {
    "reader": "sees everything, changes nothing",
    "editor": "logs runs, registers and promotes models",
    "admin": "everything, also deleting and managing users",
}

# Environment variables: who may sign in besides the admin, as "ana:reader,luis:editor" or a JSON
# list; and whether everyone who knows the public address may see and change everything.
USERS = "UI_USERS"
OPEN_TO_ALL = "ALLOW_UI_WITHOUT_PASSWORD"
# Who may sign in besides the admin, unless UI_USERS says otherwise.
DEFAULT_USERS = ("reader:reader", "editor:editor")


def parse_users(users):
    """Read the table of users.

    Parameters
    ----------
    users : list of str
        Entries ``name:role``, with the roles of `ROLES`.

    Returns
    -------
    dict of str to str
        Role by name; always with the admin.

    Raises
    ------
    helpers.workspace.ParameterError
        Names the entry that cannot be read.
    """
    roles = {ADMIN: "admin"}
    for entry in users:
        name, _, role = (part.strip() for part in entry.partition(":"))
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", name) or role not in ROLES:
            raise ParameterError(
                f"UI_USERS: '{entry}' is no entry 'name:role'. A name begins with a letter; the "
                f"roles are {', '.join(ROLES)}."
            )
        if name in (NOTEBOOKS, LOCAL) or roles.get(name, role) != role:
            raise ParameterError(
                f"UI_USERS: '{entry}' cannot be: {name} is named twice or has a role of its own."
            )
        roles[name] = role
    return roles


def users_of_environment():
    """Read ``UI_USERS``.

    Returns
    -------
    dict of str to str or None
        From `parse_users`; None if it is not set.

    Raises
    ------
    helpers.workspace.ParameterError
        If it cannot be read.
    """
    text = os.environ.get(USERS, "").strip()
    if not text:
        return None
    entries = as_list(text)
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ParameterError(
            f'{USERS} must be "name:role,name:role" or a JSON list of such texts, not {text!r}.'
        )
    return parse_users(entries)


def is_open_to_all():
    """Tell whether ``ALLOW_UI_WITHOUT_PASSWORD`` lets everyone in; an error if it is unclear."""
    text = os.environ.get(OPEN_TO_ALL, "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ParameterError(f"{OPEN_TO_ALL} must be true or false, not {text!r}.")
    return text in ("1", "true")


def local_session():
    """Make a `requests.Session` for addresses on this machine, past every proxy setting."""
    import requests

    session = requests.Session()
    session.trust_env = False
    return session


def set_up_users(workspace, url, roles=None):
    """Make the users' accounts on the running server, with today's passwords and roles.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    url : str
        Address of its server on this machine.
    roles : dict of str to str, optional
        From `parse_users`; who had an account by an earlier table and is not in this one loses
        it. Default: the earlier table, at first `DEFAULT_USERS`.

    Returns
    -------
    dict of str to str
        The roles of all users.

    Raises
    ------
    AccessError
        If the server refuses an account, or a password is too short; names the user.
    """
    before = read_rules(workspace.access_rules).roles
    if roles is None:
        roles = before or parse_users(DEFAULT_USERS)
    passwords = {name: password_of(workspace, name) for name in roles}
    session = local_session()
    session.auth = (NOTEBOOKS, stored_secret(workspace, NOTEBOOKS))
    for name in before.keys() - roles.keys():
        _call(session, "DELETE", url, "delete", username=name)
    for name, role in roles.items():
        found = session.get(f"{url}/api/2.0/mlflow/users/get", params={"username": name})
        account = (name, passwords[name])
        if found.status_code == 404:
            _call(session, "POST", url, "create", username=name, password=passwords[name])
        elif session.get(f"{url}/version", auth=account).status_code == 401:
            _call(session, "PATCH", url, "update-password", username=name, password=account[1])
        _call(session, "PATCH", url, "update-admin", username=name, is_admin=role == "admin")
    change_rules(workspace, roles=roles)
    return roles


def _call(session, method, url, action, **content):
    answer = session.request(method, f"{url}/api/2.0/mlflow/users/{action}", json=content)
    gone = action == "delete" and answer.status_code == 404
    if not answer.ok and not gone:
        is_json = "json" in answer.headers.get("content-type", "")
        reason = answer.json().get("message") if is_json else answer.text
        raise AccessError(
            f"The account {content['username']} could not be set up ({action}): {reason}"
        )


# --- rules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccessRules:
    """What the server admits.

    Attributes
    ----------
    sign_in : bool
        Whether also this machine's own requests need a password.
    public : list of str
        Host names under which the server is on the internet; they always need a password,
        unless `without_password`.
    private : list of str
        Host names of proxies that let only their owner through (Colab's).
    without_password : bool
        Whether the user asked for an open UI.
    roles : dict of str to str
        Role of each named user; whoever is not in it is a reader.
    """

    sign_in: bool = False
    public: list = field(default_factory=list)
    private: list = field(default_factory=list)
    without_password: bool = False
    roles: dict = field(default_factory=dict)


CLOSED = AccessRules(sign_in=True)


def read_rules(path):
    """Read the rules; a file that cannot be read admits nobody without a password.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    AccessRules
    """
    try:
        return AccessRules(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return AccessRules()
    except (OSError, ValueError, TypeError):
        return CLOSED


def change_rules(workspace, **changes):
    """Change some rules of a workspace's server; they hold from its next request on.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    **changes
        Attributes of `AccessRules`.

    Returns
    -------
    AccessRules
    """
    workspace.server.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = workspace.access_rules
    with FileLock(workspace.server / "access.lock"):
        rules = replace(read_rules(path), **changes)
        write_private(path, asdict(rules))
    return rules
