"""Who may sign in, and the rules of what the server admits."""

import stat

import pytest

from helpers.server import users
from helpers.server.users import AccessRules, change_rules, read_rules
from helpers.workspace import ParameterError


@pytest.mark.parametrize("text", ["ana:reader, luis : editor ", '["ana:reader", "luis:editor"]'])
def test_users_are_named_in_the_environment_besides_the_admin(monkeypatch, text):
    monkeypatch.setenv("UI_USERS", text)
    expected = {"admin": "admin", "ana": "reader", "luis": "editor"}
    assert users.users_of_environment() == expected


def test_without_the_setting_the_users_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("UI_USERS", " ")
    assert users.users_of_environment() is None


@pytest.mark.parametrize(
    "text",
    [
        *("[broken", "[1]", "ana", "notebooks:reader", "local:admin", "admin:reader"),
        "ana:reader,ana:editor",
    ],
)
def test_users_that_cannot_be_read_or_are_taken_are_refused(monkeypatch, text):
    monkeypatch.setenv("UI_USERS", text)
    with pytest.raises(ParameterError, match="UI_USERS"):
        users.users_of_environment()


@pytest.mark.parametrize(
    "entry", ["ana", "ana:", ":reader", "ana:boss", "1ana:reader", "a na:reader", "../x:reader"]
)
def test_entry_that_is_no_user_is_refused_with_the_roles(entry):
    with pytest.raises(ParameterError, match="reader, editor, admin"):
        users.parse_users([entry])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", False), ("0", False), ("False", False), ("1", True), ("true", True)],
)
def test_everyone_is_let_in_only_where_that_is_said(monkeypatch, text, expected):
    monkeypatch.setenv("ALLOW_UI_WITHOUT_PASSWORD", text)
    assert users.is_open_to_all() is expected


def test_unclear_word_lets_nobody_in(monkeypatch):
    monkeypatch.setenv("ALLOW_UI_WITHOUT_PASSWORD", "perhaps")
    with pytest.raises(ParameterError, match="ALLOW_UI_WITHOUT_PASSWORD must be true or false"):
        users.is_open_to_all()


def test_rules_are_kept_and_changed_one_by_one(workspace):
    assert read_rules(workspace.access_rules) == AccessRules()
    change_rules(workspace, public=["a.example"])
    change_rules(workspace, sign_in=True)
    expected = AccessRules(sign_in=True, public=["a.example"])
    assert read_rules(workspace.access_rules) == expected
    assert stat.S_IMODE(workspace.access_rules.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sign_in": false, "extra": 1}'])
def test_rules_that_cannot_be_read_admit_nobody_without_a_password(workspace, content):
    change_rules(workspace, public=["a.example"], without_password=True)
    workspace.access_rules.write_text(content)
    assert read_rules(workspace.access_rules) == AccessRules(sign_in=True)
