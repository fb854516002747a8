"""The MLflow UI at a public https address, through ngrok or Colab's own port proxy.

The steps of the original pyngrok cell stand in the notebooks: start the MLflow server on port
5000, set the ngrok token, ``ngrok.connect(5000, "http")``, print the URL. `opening` surrounds
them: the server asks for a password before the tunnel opens, and is told the tunnel's name once
that is known (`helpers.server.users`, `helpers.server.app`); it answers under no other name.
"""

import atexit
import html
import json
import logging
import os
import re
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests
from filelock import FileLock
from pyngrok import conf, installer, ngrok, process
from pyngrok.exception import PyngrokError, PyngrokNgrokHTTPError, PyngrokNgrokInstallError

from helpers import server
from helpers.display import notice, silenced_libraries
from helpers.server import activity, credentials, processes, users
from helpers.settings import check_parameters
from helpers.workspace import ProjectError, atomic_path, in_colab, is_interactive

WHERE_TO_GET_A_TOKEN = (
    "Get a free token at https://dashboard.ngrok.com/get-started/your-authtoken. In Colab, put "
    f"it into the Secrets panel (the key symbol on the left) under the name "
    f"{credentials.NGROK_TOKEN} and switch on 'Notebook access'; elsewhere, set the environment "
    f"variable {credentials.NGROK_TOKEN}. Then run this cell again."
)

# What to do about what ngrok reports; messages: https://ngrok.com/docs/errors
ADVICE = {
    "ERR_NGROK_4018": f"ngrok wants the token of an account. {WHERE_TO_GET_A_TOKEN}",
    "ERR_NGROK_105": (
        f"What {credentials.NGROK_TOKEN} holds is no ngrok token; perhaps only a part of it was "
        f"copied, or an API key. {WHERE_TO_GET_A_TOKEN}"
    ),
    "ERR_NGROK_107": (
        f"The token in {credentials.NGROK_TOKEN} is not valid (any more). {WHERE_TO_GET_A_TOKEN}"
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
        """Whether the agent runs, and says that this address leads to the server's port."""
        if not processes.is_running(self.pid, self.created):
            return False
        try:
            answer = users.local_session().get(f"{self.api_url}/api/endpoints", timeout=5).json()
        except (requests.RequestException, ValueError):
            return False
        return any(
            endpoint.get("url") == self.url
            and endpoint["upstream"]["url"] == f"http://localhost:{self.port}"
            for endpoint in answer["endpoints"] or []
        )


@dataclass
class Address:
    """Where something can be seen; a notebook shows it as a link.

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


class PublicUi(Address):
    """The MLflow UI while the block of `opening` makes it public; printed, it says where it is.

    Attributes
    ----------
    url : str
        To be set in the block, to the public address of the tunnel. Else the UI's address.
    port : int
        Where the workspace's server listens.
    wanted : bool
        Whether the block has to open a tunnel.
    """

    def __init__(self, workspace, expose, keep, port):
        check_parameters(EXPOSE_UI=expose)
        super().__init__("")
        self.port, self.wanted = port, False
        self._workspace, self._expose, self._keep = workspace, expose, keep
        self._roles = users.users_of_environment()
        self._open_to_all = users.is_open_to_all()
        self._domain = credentials.find_secret(credentials.NGROK_DOMAIN)
        self._local = self._token = self._configuration = None
        self._block = ExitStack()  # what ends with the block

    def __enter__(self):
        team = os.environ.get("MLFLOW_TRACKING_URI")
        if team:
            self.url, self.note = team, "It is your team's server; MLFLOW_TRACKING_URI names it."
            return self
        address = server.start(self._workspace, self._keep)
        self._local = self.url = address.replace(processes.HOST, "localhost")
        _forget_dead(self._workspace)
        if not self._expose:
            close_tunnel(self._workspace)
            return self
        self._token = _token(self._expose)
        if self._token is None:
            self._stay_local(TunnelError(f"There is no ngrok token. {WHERE_TO_GET_A_TOKEN}"))
            return self
        try:
            self._block.enter_context(_lock(self._workspace))
            self._prepare(address)
        except (TunnelError, credentials.AccessError) as error:
            self._block.close()
            self._stay_local(error)
        except BaseException:
            self._block.close()
            raise
        return self

    def __exit__(self, kind, error, traceback):
        with self._block:
            if not self.wanted:
                return False
            reason = error
            if error is None:
                reason = self._admit()
            elif isinstance(error, PyngrokError):
                explained = _explain(error, self._domain)
                reason = TunnelError(explained.replace(self._token, "…"))
            if reason is None:
                return False
            self._close()
            if reason is error:
                return False
        self._stay_local(reason)
        return True

    def set_auth_token(self):
        """Give ngrok the token, where no other user, log or command line shows it.

        pyngrok's own function passes it to a command that everyone on the machine can read, and
        writes it into the person's own configuration. This one makes a configuration that is
        gone after the block; with the reserved domain of ``NGROK_DOMAIN``, where there is one.
        """
        if not self.wanted:
            return
        # What is left of an earlier agent of this process would keep the account's only session.
        ngrok.kill(_configuration())
        # pyngrok repeats the agent's complaints in its log, and the agent writes them to the
        # error stream: with the token in them. Here they become one message, without it.
        logging.getLogger("pyngrok").setLevel(logging.CRITICAL + 1)
        self._block.enter_context(silenced_libraries())
        path = self._block.enter_context(_agent_file(self._token, self._domain, self.port))
        self._block.callback(conf.set_default, conf.get_default())
        self._configuration = _configuration(path)
        conf.set_default(self._configuration)

    def _prepare(self, address):
        """Ask for passwords before anything is public; take the tunnel that is there."""
        workspace, cell = self._workspace, self.port
        self.port = int(address.rsplit(":", 1)[1])
        tunnel = _read(workspace)
        if tunnel is not None:
            fits = tunnel.port == self.port and self._domain in (None, tunnel.host)
            if not (fits and tunnel.alive and _problem_outside(tunnel.url) is None):
                _end(workspace, tunnel)
                tunnel = None
        if tunnel is None and cell not in (None, self.port):
            raise TunnelError(
                f"Port {cell}, which this cell makes public, was taken when the MLflow server of "
                f"this workspace started; it is at {self._local}. Stop the program that has port "
                f"{cell}, stop the server ({server.command_line(workspace)} --stop), then run "
                "this cell again."
            )
        roles = users.set_up_users(workspace, address, self._roles)
        users.change_rules(workspace, sign_in=True, without_password=self._open_to_all)
        self.note = self._who_may_sign_in(roles)
        self.wanted = tunnel is None
        if tunnel is not None:
            self.url = tunnel.url

    def _who_may_sign_in(self, roles):
        if self._open_to_all:
            return "ANYONE who knows this address can see and change everything."
        names = ", ".join(f"{name} ({role})" for name, role in roles.items())
        stored = [
            name for name in roles if credentials.find_secret(credentials.secret_name(name)) is None
        ]
        note = f"Sign in as {names}."
        if stored:
            passwords = self._workspace.passwords
            note += f"\nThe passwords made for {', '.join(stored)} are in {passwords}."
        return note

    def _admit(self):
        """Let the server answer under the tunnel's name; return what speaks against it, or None."""
        if self._configuration is None:
            return TunnelError(
                "The token was not set: ui.set_auth_token() is missing in the block."
            )
        tunnel = _tunnel_of(self._configuration, self.url, self.port)
        if tunnel is None or not tunnel.alive:
            return TunnelError(
                f"ui.url is {self.url}, no address of a tunnel to port {self.port}. Set it in the "
                f'block: ui.url = ngrok.connect({self.port}, "http").public_url'
            )
        users.change_rules(self._workspace, public=[tunnel.host])
        with atomic_path(_path(self._workspace)) as path:
            path.write_text(json.dumps(asdict(tunnel)), encoding="utf-8")
        atexit.register(_end_own, self._workspace, tunnel)
        problem = _problem_outside(tunnel.url, patience=10)
        if problem:
            notice(f"{tunnel.url} is open but was not reached from here: {problem}", "warning")
        return None

    def _close(self):
        """End what the block opened; nobody on this machine needs to sign in for it."""
        ngrok.kill(_configuration())
        users.change_rules(self._workspace, public=[], sign_in=False, without_password=False)

    def _stay_local(self, reason):
        """Say where the UI is without a tunnel, or that it is an error that there is none."""
        self.url, self.note, self.wanted = self._local, "", False
        if self._expose is True and (self._token is not None or not _has_proxy()):
            raise reason from None
        if self._token is not None:
            notice(f"The MLflow UI is not public. {reason}", "warning")
        help_ = "" if self._token is not None else WHERE_TO_GET_A_TOKEN
        proxy = _colab_proxy(self._workspace, self._local) if _has_proxy() else None
        if proxy:
            self.url, self.note = proxy, "Only you can open it, while this notebook is open."
            self.note += f" To share it: {help_}" if help_ else ""
        elif help_ and is_interactive():
            self.note = f"To see it from anywhere: {help_}"


def opening(workspace, expose="auto", keep=None, port=server.PORT):
    """Surround the lines that open a tunnel to the workspace's MLflow server.

    Before the block, the users' accounts are made and sign-in is switched on; if a tunnel is
    open already, in whichever notebook, the block has nothing to do. After it the server answers
    under the tunnel's name, which is noted in the workspace, and under no other. What is left
    out of the block leaves a server that lets nobody in from outside.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    expose : {'auto', True, False}
        Whether the UI is shown at a public address. ``'auto'``: where there is a token; a
        failure is then said, and the notebook goes on. ``True``: a failure is an error.
        ``False``: no, and a tunnel that is open is closed.
    keep : bool, optional
        See `helpers.server.start_server`.
    port : int or None
        The port that the block makes public. None: whichever the server has.

    Returns
    -------
    PublicUi
        To be used with ``with``. Who may sign in is said by the environment variable
        ``UI_USERS``; ``ALLOW_UI_WITHOUT_PASSWORD`` lets everyone in.

    Raises
    ------
    TunnelError
        If the UI cannot be shown as asked, with whatever pyngrok raises in the block; says what
        to do.
    helpers.workspace.ParameterError
        If a value is none of those allowed.
    """
    return PublicUi(workspace, expose, keep, port)


def show_ui(workspace, expose="auto", keep=None):
    """Do what the pyngrok cell does, whichever port the server has; see `opening`."""
    with opening(workspace, expose, keep, port=None) as ui:
        if ui.wanted:
            ui.set_auth_token()
            ui.url = ngrok.connect(ui.port, "http").public_url
    return ui


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
    token = credentials.find_secret(credentials.NGROK_TOKEN) or _typed.get(credentials.NGROK_TOKEN)
    # On a person's own machine the UI can be seen without a tunnel: no question is worth it.
    if token is None and (expose is True or in_colab()):
        token = credentials.ask_secret(credentials.NGROK_TOKEN, WHERE_TO_GET_A_TOKEN)
        _typed[credentials.NGROK_TOKEN] = token
    return token


# --- ngrok ------------------------------------------------------------------------------------


def _lock(workspace):
    workspace.server.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(workspace.server / "tunnel.lock")


def _path(workspace):
    return workspace.server / "tunnel.json"


def _read(workspace):
    path = _path(workspace)
    return Tunnel(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _end(workspace, tunnel):
    """End a tunnel's agent, whichever process started it, and forget its name."""
    ngrok.kill(_configuration())
    if processes.is_running(tunnel.pid, tunnel.created):
        agent = psutil.Process(tunnel.pid)
        agent.terminate()
        psutil.wait_procs([agent], timeout=5)
    # Nobody on this machine needs to sign in any more.
    users.change_rules(workspace, public=[], sign_in=False, without_password=False)
    _path(workspace).unlink(missing_ok=True)


def _forget_dead(workspace):
    """Forget a tunnel whose agent is gone, as after a restart of the machine."""
    with _lock(workspace):
        tunnel = _read(workspace)
        if tunnel is not None and not processes.is_running(tunnel.pid, tunnel.created):
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
def _agent_file(token, domain, port):
    """Write the agent's configuration with the token; it is gone after the block."""
    content = {"agent": {"authtoken": token}}
    if domain:
        # pyngrok takes this definition for a tunnel that is opened without a name.
        upstream = {"url": f"http://localhost:{port}"}
        definition = {"name": "pyngrok-default", "url": f"https://{domain}", "upstream": upstream}
        content["endpoints"] = [definition]
    with tempfile.TemporaryDirectory(prefix="ngrok-") as folder:
        path = Path(folder) / "ngrok.yml"
        with open(path, "w", encoding="utf-8", opener=credentials.private):
            pass
        installer.install_default_config(str(path), content)
        yield str(path)


def _tunnel_of(configuration, url, port):
    """Return the tunnel of this process's agent, or None where none runs."""
    if not process.is_process_running(configuration.ngrok_path):
        return None
    agent = ngrok.get_ngrok_process(configuration)
    created = psutil.Process(agent.proc.pid).create_time()
    return Tunnel(url, port, agent.api_url, agent.proc.pid, created)


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
            f"ngrok does not give you the domain {domain}, which {credentials.NGROK_DOMAIN} asks "
            "for. Reserve it at https://dashboard.ngrok.com/domains, or do without that setting."
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


def _colab_proxy(workspace, url):
    """Return the address of Colab's port proxy, which lets only the notebook's owner through.

    None where the front end has none, such as that of VS Code.
    """
    from google.colab import output

    port = int(url.rsplit(":", 1)[1])
    address = output.eval_js(f"google.colab.kernel.proxyPort({port})")
    if address:
        users.change_rules(workspace, private=[urlsplit(address).netloc])
    return address
