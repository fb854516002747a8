"""Who may see and change what on the workspace's MLflow server: users, roles, admitted hosts.

The server process reads the rules at every request (`helpers.server.gate`), so that a change
takes effect without a restart.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from helpers.server.credentials import (
    ADMIN,
    GIVEN_SECRETS,
    NOTEBOOKS,
    AccessError,
    find_secret,
    password_of,
    secret_name,
    stored_secret,
)
from helpers.server.http import local_session
from helpers.server.private_files import private_lock, write_private
from helpers.settings import as_list
from helpers.workspace import ParameterError, Workspace

LOCAL = "local"  # how the activity log names who came from this machine without signing in

ROLES = {
    "reader": "sees everything, changes nothing",
    "editor": "logs runs, registers and promotes models of its own",
    "admin": "everything, also deleting and managing users",
}

# Environment variables: who may sign in besides the admin, as "ana:reader,luis:editor" or a JSON
# list; and whether everyone who knows the public address may see and change everything.
USERS = "UI_USERS"
OPEN_TO_ALL = "ALLOW_UI_WITHOUT_PASSWORD"
# Who may sign in besides the admin, unless UI_USERS says otherwise.
DEFAULT_USERS = ("reader:reader", "editor:editor")


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
    public: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    without_password: bool = False
    roles: dict[str, str] = field(default_factory=dict)


def _read(path: Path) -> AccessRules:
    return AccessRules(**json.loads(path.read_bytes())) if path.exists() else AccessRules()


def read_rules(path: Path) -> AccessRules:
    """Read the rules; a file that cannot be read admits nobody without a password."""
    try:
        return _read(path)
    except (OSError, ValueError, TypeError):
        return AccessRules(sign_in=True)


def change_rules(workspace: Workspace, **changes) -> None:
    """Change attributes of the `AccessRules`; they hold from the server's next request on."""
    with private_lock(workspace.server / "access.lock"):
        path = workspace.access_rules
        try:
            rules = _read(path)
        except (ValueError, TypeError):
            raise AccessError(
                f"{path} is damaged and stays as it is; nobody gets in without a "
                "password. Move it to another folder and run this again: the roles are made anew "
                "from UI_USERS."
            ) from None
        write_private(path, asdict(replace(rules, **changes)))


# --- the table of users -----------------------------------------------------------------------


def parse_users(entries: Iterable[str]) -> dict[str, str]:
    """Return the role of each user, always with the admin, from entries ``name:role``.

    Raises
    ------
    helpers.workspace.ParameterError
        Names the entry that cannot be read.
    """
    roles = {ADMIN: "admin"}
    for entry in entries:
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


def users_of_environment() -> dict[str, str] | None:
    """Return the roles that ``UI_USERS`` names, or None if it is not set.

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


def is_open_to_all() -> bool:
    """Tell whether ``ALLOW_UI_WITHOUT_PASSWORD`` lets everyone in; an error if it is unclear."""
    text = os.environ.get(OPEN_TO_ALL, "").strip().lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ParameterError(f"{OPEN_TO_ALL} must be true or false, not {text!r}.")
    return text in ("1", "true")


def hand_on_secrets() -> list[str]:
    """Put Colab's secrets into the environment, for programs that this notebook starts.

    They have no front end of their own. Returns the names of those that are set.
    """
    roles = users_of_environment() or parse_users(DEFAULT_USERS)
    found = {name: find_secret(name) for name in (*GIVEN_SECRETS, *map(secret_name, roles))}
    os.environ.update({name: value for name, value in found.items() if value})
    return [name for name, value in found.items() if value]


# --- accounts ---------------------------------------------------------------------------------


def set_up_users(workspace: Workspace, url: str, roles: dict[str, str] | None) -> dict[str, str]:
    """Make the users' accounts on the running server, with today's passwords and roles.

    Parameters
    ----------
    url : str
        Address of its server on this machine.
    roles : dict of str to str or None
        From `parse_users`; who had an account by an earlier table and is not in this one loses
        it. None: the earlier table, at first `DEFAULT_USERS`.

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

    def change(method, action, name, **content):
        answer = session.request(
            method, f"{url}/api/2.0/mlflow/users/{action}", json={"username": name, **content}
        )
        if not answer.ok and (action, answer.status_code) != ("delete", 404):
            is_json = "json" in answer.headers.get("content-type", "")
            reason = answer.json().get("message") if is_json else answer.text
            raise AccessError(f"The account {name} could not be set up ({action}): {reason}")

    for name in before.keys() - roles.keys():
        change("DELETE", "delete", name)
    for name, password in passwords.items():
        found = session.get(f"{url}/api/2.0/mlflow/users/get", params={"username": name})
        if found.status_code == 404:
            change("POST", "create", name, password=password)
        elif session.get(f"{url}/version", auth=(name, password)).status_code == 401:
            change("PATCH", "update-password", name, password=password)
        change("PATCH", "update-admin", name, is_admin=roles[name] == "admin")
    change_rules(workspace, roles=roles)
    return roles
