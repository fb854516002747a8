"""The MLflow UI at a public https address, through ngrok or Colab's own port proxy.

The steps are those of the original pyngrok cell: start the MLflow server on port 5000 with the
SQLite store, set the ngrok token, ``ngrok.connect(5000, "http")``, show the URL. What is new is
that the server asks for a password before the tunnel opens, and that it is told the tunnel's
name once that is known (`helpers.access`, `helpers.server_app`).
"""

import atexit
import html
import json
import logging
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests
from filelock import FileLock
from pyngrok import conf, installer, ngrok
from pyngrok.exception import PyngrokError, PyngrokNgrokHTTPError, PyngrokNgrokInstallError

from helpers import access, activity, background, server
from helpers.display import notice, silenced_libraries
from helpers.workspace import (
    ProjectError,
    atomic_path,
    check_parameters,
    in_colab,
    is_interactive,
)

WHERE_TO_GET_A_TOKEN = (
    "Get a free token at https://dashboard.ngrok.com/get-started/your-authtoken. In Colab, put "
    f"it into the Secrets panel (the key symbol on the left) under the name {access.NGROK_TOKEN} "
    "and switch on 'Notebook access'; elsewhere, set the environment variable "
    f"{access.NGROK_TOKEN}. Then run this cell again."
)

# What to do about what ngrok reports; messages: https://ngrok.com/docs/errors
ADVICE = {
    "ERR_NGROK_4018": f"ngrok wants the token of an account. {WHERE_TO_GET_A_TOKEN}",
    "ERR_NGROK_105": (
        f"What {access.NGROK_TOKEN} holds is no ngrok token; perhaps only a part of it was "
        f"copied, or an API key. {WHERE_TO_GET_A_TOKEN}"
    ),
    "ERR_NGROK_107": (
        f"The token in {access.NGROK_TOKEN} is not valid (any more). {WHERE_TO_GET_A_TOKEN}"
    ),
    "ERR_NGROK_108": (
        "Your ngrok account already has as many agents running as its plan allows (one, on the "
        "free plan), perhaps in another notebook. Stop that one, there or at "
        "https://dashboard.ngrok.com/agents, and run this cell again."
    ),
    "ERR_NGROK_334": (
        "Another agent already serves this address, perhaps in another notebook or on another "
        "machine. Stop it, there or at https://dashboard.ngrok.com/endpoints, and run this cell "
        "again."
    ),
    "ERR_NGROK_3200": "The tunnel is offline. Run this cell again to open it anew.",
    "ERR_NGROK_8012": (
        "The tunnel is open, but the MLflow server behind it does not answer. Run this cell "
        "again: it starts the server."
    ),
}
MODELS = "The models answer"
_typed = {}  # what was typed in this session, so that nobody is asked twice
DOMAIN_CODES = ("ERR_NGROK_319", "ERR_NGROK_320", "ERR_NGROK_326")


class TunnelError(ProjectError):
    """The UI cannot be shown at a public address."""


@dataclass(frozen=True)
class Tunnel:
    """An open tunnel, as noted in the workspace.

    Attributes
    ----------
    url : str
        Public address.
    port : int
        Port of the MLflow server that it shows.
    api_url : str
        Address of the ngrok agent's own API on this machine.
    pid, created
        Process of the agent and its start time (seconds since the epoch).
    """

    url: str
    port: int
    api_url: str
    pid: int
    created: float

    @property
    def host(self):
        """Name under which the tunnel shows the server."""
        return urlsplit(self.url).netloc

    @property
    def alive(self):
        """Whether the agent runs, and says that it serves this address."""
        if not background.is_running(self.pid, self.created):
            return False
        try:
            answer = access.local_session().get(f"{self.api_url}/api/endpoints", timeout=5).json()
        except (requests.RequestException, ValueError):
            return False
        return any(endpoint.get("url") == self.url for endpoint in answer["endpoints"] or [])


@dataclass(frozen=True)
class Address:
    """Where the MLflow UI can be seen; a notebook shows it as a link.

    Attributes
    ----------
    url : str
    note : str
        How to sign in, or why the address is not public.
    what : str
        What is there, for the sentence that says so.
    """

    url: str
    note: str = ""
    what: str = "The MLflow UI is"

    def __repr__(self):
        return f"{self.what} at {self.url}" + (f"\n{self.note}" if self.note else "")

    def _repr_html_(self):
        url, note = html.escape(self.url, quote=True), html.escape(self.note)
        link = f'<a href="{url}" target="_blank" rel="noopener"><b>{url}</b></a>'
        return f"{self.what} at {link}<br>{note}".replace("\n", "<br>")


# --- the cell ---------------------------------------------------------------------------------


def show_ui(workspace, expose="auto", users=None, without_password=False, keep=None):
    """Show where the MLflow UI can be seen, and open a tunnel to it where that is wanted.

    Run twice, it returns the same tunnel; a tunnel that dropped is opened again.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    expose : {'auto', True, False}
        Whether the UI is shown at a public address. ``'auto'``: where there is a token; a
        failure is then said, and the notebook goes on. ``True``: a failure is an error.
        ``False``: no, and a tunnel that is open is closed.
    users : list of str, optional
        Who may sign in besides the admin: ``name:role``, see `helpers.access.ROLES`; default:
        whom the workspace knows, at first `helpers.access.DEFAULT_USERS`.
    without_password : bool
        Let everyone who knows the public address see and change everything.
    keep : bool, optional
        See `helpers.server.start_server`.

    Returns
    -------
    Address

    Raises
    ------
    TunnelError
        If the UI cannot be shown as asked; says what to do.
    helpers.workspace.ParameterError
        If a value is none of those allowed.
    """
    users = check_parameters(
        EXPOSE_UI=expose, UI_USERS=users, ALLOW_UI_WITHOUT_PASSWORD=without_password
    )["UI_USERS"]
    roles = None if users is None else access.parse_users(users)
    team = os.environ.get("MLFLOW_TRACKING_URI")
    if team:
        return Address(team, "It is your team's server; MLFLOW_TRACKING_URI names it.")
    url = server.connect(workspace, keep)
    local = url.replace(background.HOST, "localhost")
    _forget_dead(workspace)
    if not expose:
        close_tunnel(workspace)
        return Address(local)
    token = _token(expose)
    if token is None:
        if expose is True and not _has_proxy():
            raise TunnelError(f"There is no ngrok token. {WHERE_TO_GET_A_TOKEN}")
        return _without_token(workspace, url, local)
    try:
        return _protected(workspace, url, token, roles, without_password)
    except (TunnelError, access.AccessError) as error:
        if expose is True:
            raise
        notice(f"The MLflow UI is not public. {error}", "warning")
        return _colab_proxy(workspace, url, "") if _has_proxy() else Address(local)


def show_models(workspace, models):
    """Show where the scoring server can be asked: publicly, where the MLflow UI is.

    It is below the address of the MLflow server, and takes the same users.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    models : helpers.serving.ScoringServer

    Returns
    -------
    Address
    """
    _forget_dead(workspace)
    with _lock(workspace):
        tunnel = _read(workspace)
    if tunnel is None:
        return Address(models.url, "Only from this machine; a tunnel shows it to others.", MODELS)
    note = "Sign in as for the MLflow UI; readers may ask, too. The path of each model: "
    note += ", ".join(f"/models/{name}/invocations" for name in models.models)
    return Address(f"{tunnel.url}{activity.SCORING_PATH.rstrip('/')}", note, MODELS)


def close_tunnel(workspace):
    """Close the workspace's tunnel; the MLflow server goes on.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace

    Returns
    -------
    bool
        Whether there was one.
    """
    with _lock(workspace):
        tunnel = _read(workspace)
        if tunnel is not None:
            _end(workspace, tunnel)
    return tunnel is not None


def _token(expose):
    token = access.find_secret(access.NGROK_TOKEN) or _typed.get(access.NGROK_TOKEN)
    # On a person's own machine the UI can be seen without a tunnel: no question is worth it.
    if token is None and (expose is True or in_colab()):
        token = access.ask_secret(access.NGROK_TOKEN, WHERE_TO_GET_A_TOKEN)
        _typed[access.NGROK_TOKEN] = token
    return token


def _without_token(workspace, url, local):
    if _has_proxy():
        return _colab_proxy(workspace, url, WHERE_TO_GET_A_TOKEN)
    if is_interactive():
        return Address(local, f"To see it from anywhere: {WHERE_TO_GET_A_TOKEN}")
    return Address(local)


def _protected(workspace, url, token, roles, without_password):
    """Ask for passwords first, then open the tunnel."""
    roles = access.set_up_users(workspace, url, roles)
    access.change_rules(workspace, sign_in=True, without_password=without_password)
    try:
        tunnel = _open(workspace, int(url.rsplit(":", 1)[1]), token)
    except TunnelError:
        access.change_rules(workspace, sign_in=False, without_password=False)
        raise
    if without_password:
        return Address(tunnel.url, "ANYONE who knows this address can see and change everything.")
    names = ", ".join(f"{name} ({role})" for name, role in roles.items())
    stored = [name for name in roles if access.find_secret(access.secret_name(name)) is None]
    note = f"Sign in as {names}."
    if stored:
        note += f"\nThe passwords made for {', '.join(stored)} are in {workspace.passwords}."
    return Address(tunnel.url, note)


# --- ngrok ------------------------------------------------------------------------------------


def _lock(workspace):
    workspace.server.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(workspace.server / "tunnel.lock")


def _path(workspace):
    return workspace.server / "tunnel.json"


def _read(workspace):
    path = _path(workspace)
    return Tunnel(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _open(workspace, port, token):
    """Return the workspace's tunnel; open it if it is not there or does not work."""
    domain = access.find_secret(access.NGROK_DOMAIN)
    rules = access.read_rules(workspace.access_rules)
    with _lock(workspace):
        tunnel = _read(workspace)
        if tunnel is not None:
            wanted = tunnel.port == port and (domain is None or tunnel.host == domain)
            if wanted and tunnel.alive and _problem_outside(tunnel.url) is None:
                _admit(workspace, tunnel)
                return tunnel
            _end(workspace, tunnel)
            access.change_rules(workspace, sign_in=True, without_password=rules.without_password)
        tunnel = _connect(port, token, domain)
        _admit(workspace, tunnel)
        with atomic_path(_path(workspace)) as path:
            path.write_text(json.dumps(asdict(tunnel)), encoding="utf-8")
        atexit.register(_end_own, workspace, tunnel)
    problem = _problem_outside(tunnel.url, patience=10)
    if problem:
        notice(f"{tunnel.url} is open but was not reached from here: {problem}", "warning")
    return tunnel


def _admit(workspace, tunnel):
    access.change_rules(workspace, public=[tunnel.host])


def _end(workspace, tunnel):
    """End a tunnel's agent, whichever process started it, and forget its name."""
    ngrok.kill(_configuration())
    if background.is_running(tunnel.pid, tunnel.created):
        agent = psutil.Process(tunnel.pid)
        agent.terminate()
        psutil.wait_procs([agent], timeout=5)
    # Nobody on this machine needs to sign in any more.
    access.change_rules(workspace, public=[], sign_in=False, without_password=False)
    _path(workspace).unlink(missing_ok=True)


def _forget_dead(workspace):
    """Forget a tunnel whose agent is gone, as after a restart of the machine."""
    with _lock(workspace):
        tunnel = _read(workspace)
        if tunnel is not None and not background.is_running(tunnel.pid, tunnel.created):
            _end(workspace, tunnel)


def _end_own(workspace, tunnel):
    """At the end of the process that opened a tunnel, its agent ends with it."""
    if workspace.server.is_dir():
        with _lock(workspace):
            if _read(workspace) == tunnel:
                _end(workspace, tunnel)


def _configuration(config_path=None):
    configuration = conf.PyngrokConfig(
        config_path=config_path,
        # An interrupt of the notebook must not end the tunnel.
        start_new_session=True,
    )
    # pyngrok would pass the token of the environment on in the agent's command line, which
    # everyone on the machine can read; the agent finds it in its configuration file.
    configuration.auth_token = None
    return configuration


@contextmanager
def _token_file(token):
    """Write the agent's configuration with the token; it is gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="ngrok-"))
    path = folder / "ngrok.yml"
    try:
        with open(path, "w", encoding="utf-8", opener=access.private):
            pass
        installer.install_default_config(str(path), {"agent": {"authtoken": token}})
        yield str(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _connect(port, token, domain):
    """Start an agent and let it open the tunnel."""
    # What is left of an earlier agent of this process would keep the account's only session.
    ngrok.kill(_configuration())
    # pyngrok repeats the agent's complaints in its log, and the agent writes them to the error
    # stream: with the token in them. Here they become one message, without it.
    logging.getLogger("pyngrok").setLevel(logging.CRITICAL + 1)
    options = {"url": f"https://{domain}"} if domain else {}
    with _token_file(token) as config_path, silenced_libraries():
        configuration = _configuration(config_path)
        try:
            opened = ngrok.connect(port, "http", pyngrok_config=configuration, **options)
            agent = ngrok.get_ngrok_process(configuration)
        except PyngrokError as error:
            ngrok.kill(configuration)
            raise TunnelError(_explain(error, domain).replace(token, "…")) from None
    created = psutil.Process(agent.proc.pid).create_time()
    return Tunnel(opened.public_url, port, agent.api_url, agent.proc.pid, created)


def _explain(error, domain):
    """Say in one message what went wrong and what to do."""
    if isinstance(error, PyngrokNgrokInstallError):
        return (
            "The ngrok agent could not be downloaded from bin.ngrok.com; perhaps this network "
            f"blocks it ({error}). Download it from https://ngrok.com/download in another way and "
            "name the file with the environment variable PYNGROK_NGROK_PATH."
        )
    logs = "\n".join(log.line for log in getattr(error, "ngrok_logs", None) or [])
    body = str(error.body) if isinstance(error, PyngrokNgrokHTTPError) else ""
    text = "\n".join([str(error), getattr(error, "ngrok_error", None) or "", body, logs])
    return explain_code(text, domain)


def explain_code(text, domain=None):
    """Turn what ngrok reports into advice.

    Parameters
    ----------
    text : str
        Report of the agent or the edge, with an ``ERR_NGROK_`` code in it or without.
    domain : str, optional
        The reserved domain that was asked for.

    Returns
    -------
    str
    """
    found = re.search(r"ERR_NGROK_\d+", text)
    if found is None:
        return (
            "The ngrok agent could not connect; perhaps this network blocks it. It said: "
            f"{' '.join(text.split())[:300]}"
        )
    code = found.group()
    link = f"https://ngrok.com/docs/errors/{code.lower()}"
    advice = ADVICE.get(code)
    if advice is None and (domain or code in DOMAIN_CODES):
        advice = (
            f"ngrok does not give you the domain {domain}, which {access.NGROK_DOMAIN} asks for. "
            "Reserve it at https://dashboard.ngrok.com/domains, or do without that setting."
        )
    return f"{advice or 'ngrok refused to open the tunnel.'} ({code}, see {link})"


def _problem_outside(url, patience=0.0):
    """Ask for the server by its public address; say what is wrong, or return None.

    Only ngrok's own error codes count: a machine that cannot reach its own tunnel says nothing
    about others.
    """
    end = time.monotonic() + patience
    while True:
        try:
            answer = requests.get(
                f"{url}/health", headers={"ngrok-skip-browser-warning": "1"}, timeout=10
            )
        except requests.RequestException:
            return None
        code = answer.headers.get("Ngrok-Error-Code")
        if code is None:
            return None
        if time.monotonic() >= end:
            return explain_code(code)
        time.sleep(0.5)


# --- Colab's own proxy ------------------------------------------------------------------------


def _has_proxy():
    return in_colab() and is_interactive()


def _colab_proxy(workspace, url, note):
    """Show the UI through Colab's port proxy, which lets only the notebook's owner through."""
    from google.colab import output

    port = int(url.rsplit(":", 1)[1])
    address = output.eval_js(f"google.colab.kernel.proxyPort({port})")
    access.change_rules(workspace, private=[urlsplit(address).netloc])
    only_you = "Only you can open it, while this notebook is open."
    return Address(address, f"{only_you} To share it: {note}" if note else only_you)
