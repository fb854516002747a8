"""The MLflow UI at a public https address, through ngrok or Colab's own port proxy.

The steps of the original pyngrok cell stand in the notebooks: start the MLflow server on port
5000, set the ngrok token, ``ngrok.connect(5000, "http")``, print the URL. `opening` surrounds
them: the server asks for a password before the tunnel opens, and is told the tunnel's name once
that is known (`helpers.server.users`, `helpers.server.gate`); it answers under no other name.
"""

import html
import os
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

from pyngrok import ngrok
from pyngrok.exception import PyngrokError

from helpers.display import notice
from helpers.server import activity, credentials, mlflow_server, ngrok_agent, users
from helpers.server.http import HOST
from helpers.server.ngrok_errors import WHERE_TO_GET_A_TOKEN, explain, problem_outside
from helpers.settings import check_parameters
from helpers.workspace import (
    PATIENCE,
    ProjectError,
    Workspace,
    colab_front_end,
    in_colab,
    is_interactive,
)

FRAME_HEIGHT = "700"  # pixels of the UI below a cell of Colab
_typed = {}  # what was typed in this session, so that nobody is asked twice


class TunnelError(ProjectError):
    """The UI cannot be shown at a public address."""


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

    def __repr__(self) -> str:
        return f"{self.what} at {self.url}" + (f"\n{self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        url, note = html.escape(self.url), html.escape(self.note)
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

    def __init__(
        self, workspace: Workspace, expose: str | bool, keep: bool | None, port: int | None
    ):
        check_parameters(EXPOSE_UI=expose)
        super().__init__("")
        self.port, self.wanted = port, False
        self._workspace, self._expose, self._keep = workspace, expose, keep
        self._roles = users.users_of_environment()
        self._open_to_all = users.is_open_to_all()
        self._domain = credentials.find_secret(credentials.NGROK_DOMAIN)
        self._local = self._token = self._configuration = None
        self._block = ExitStack()  # what ends with the block

    def __enter__(self) -> "PublicUi":
        team = os.environ.get("MLFLOW_TRACKING_URI")
        if team:
            self.url, self.note = team, "It is your team's server; MLFLOW_TRACKING_URI names it."
            return self
        address = mlflow_server.start(self._workspace, self._keep)
        self._local = self.url = address.replace(HOST, "localhost")
        ngrok_agent.forget_dead_tunnel(self._workspace)
        if not self._expose:
            close_tunnel(self._workspace)
            self._show_in_colab()
            return self
        self._token = _find_token(self._expose)
        with ExitStack() as block:
            try:
                if self._token is None:
                    raise TunnelError(f"There is no ngrok token. {WHERE_TO_GET_A_TOKEN}")
                block.enter_context(ngrok_agent.lock(self._workspace))
                self._protect(address)
                self._block = block.pop_all()
            except (TunnelError, credentials.AccessError) as error:
                self._stay_local(error)
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        with self._block:
            if not self.wanted:
                return False
            if error is None:
                reason = self._admit()
            elif isinstance(error, PyngrokError):
                reason = TunnelError(explain(error, self._domain).replace(self._token, "…"))
            else:
                reason = error
            if reason is None:
                return False
            ngrok_agent.end_tunnel(self._workspace)
            if reason is error:
                return False
        self._stay_local(reason)
        return True

    def set_auth_token(self) -> None:
        """Give ngrok the token, where no other user, log or command line shows it."""
        if self.wanted:
            self._configuration = self._block.enter_context(
                ngrok_agent.token_set(self._token, self._domain, self.port)
            )

    def _protect(self, address: str) -> None:
        """Ask for passwords before anything is public; take the tunnel that is there."""
        workspace, cell = self._workspace, self.port
        self.port = urlsplit(address).port
        tunnel = ngrok_agent.read_tunnel(workspace)
        if tunnel is not None:
            fits = tunnel.port == self.port and self._domain in (None, tunnel.host)
            if not (fits and tunnel.alive and problem_outside(tunnel.url) is None):
                ngrok_agent.end_tunnel(workspace, tunnel)
                tunnel = None
        if tunnel is None and cell not in (None, self.port):
            raise TunnelError(
                f"Port {cell}, which this cell makes public, was taken when the MLflow server of "
                f"this workspace started; it is at {self._local}. Stop the program that has port "
                f"{cell}, stop the server ({mlflow_server.command_line(workspace)} --stop), then "
                "run this cell again."
            )
        roles = users.set_up_users(workspace, address, self._roles)
        users.change_rules(workspace, sign_in=True, without_password=self._open_to_all)
        self.note = self._who_may_sign_in(roles)
        self.wanted = tunnel is None
        if tunnel is not None:
            self.url = tunnel.url

    def _who_may_sign_in(self, roles: dict[str, str]) -> str:
        if self._open_to_all:
            return "ANYONE who knows this address can see and change everything."
        note = "Sign in as " + ", ".join(f"{name} ({role})" for name, role in roles.items()) + "."
        made = [
            name for name in roles if not credentials.find_secret(credentials.secret_name(name))
        ]
        if made:
            note += (
                f"\nThe passwords made for {', '.join(made)} are in {self._workspace.passwords}."
            )
        return note

    def _admit(self) -> TunnelError | None:
        """Let the server answer under the tunnel's name; return what speaks against it, or None."""
        if self._configuration is None:
            return TunnelError(
                "The token was not set: ui.set_auth_token() is missing in the block."
            )
        tunnel = ngrok_agent.tunnel_of(self._configuration, self.url, self.port)
        if tunnel is None or not tunnel.alive:
            return TunnelError(
                f"ui.url is {self.url}, no address of a tunnel to port {self.port}. Set it in the "
                f'block: ui.url = ngrok.connect({self.port}, "http").public_url'
            )
        ngrok_agent.keep_tunnel(self._workspace, tunnel)
        problem = problem_outside(tunnel.url, patience=10)
        if problem:
            notice(f"{tunnel.url} is open but was not reached from here: {problem}", "warning")
        return None

    def _stay_local(self, reason: ProjectError) -> None:
        """Say where the UI is without a tunnel, or that it is an error that there is none."""
        self.url, self.note, self.wanted = self._local, "", False
        has_token = self._token is not None
        if self._expose is True and (has_token or not colab_front_end()):
            raise reason from None
        if has_token:
            notice(f"The MLflow UI is not public. {reason}", "warning")
        in_frame = self._show_in_colab()
        if not has_token and is_interactive():
            to_share = "To share it" if in_frame else "To see it from anywhere"
            self.note = f"{self.note} {to_share}: {WHERE_TO_GET_A_TOKEN}".lstrip()

    def _show_in_colab(self) -> bool:
        """Show the UI below the cell, by Colab's port proxy, which lets only its owner through.

        Tell whether that was possible: the front end must be Colab's own page.
        """
        if not colab_front_end():
            return False
        from google.colab import output

        port = urlsplit(self._local).port
        asked = f"google.colab.kernel.proxyPort({port})"
        address = output.eval_js(asked, timeout_sec=PATIENCE)
        if not address:
            return False
        users.change_rules(self._workspace, private=[urlsplit(address).netloc])
        output.serve_kernel_port_as_iframe(port, height=FRAME_HEIGHT)
        self.url = address
        self.note = (
            "It is in the frame above. The address is for you only, while this notebook is open, "
            "and not all browsers open it."
        )
        return True


def opening(
    workspace: Workspace,
    expose: str | bool = "auto",
    keep: bool | None = None,
    port: int | None = mlflow_server.PORT,
) -> PublicUi:
    """Surround the lines that open a tunnel to the workspace's MLflow server.

    Before the block, the users' accounts are made and sign-in is switched on; if a tunnel is
    open already, in whichever notebook, the block has nothing to do. After it the server answers
    under the tunnel's name, which is noted in the workspace, and under no other. What is left
    out of the block leaves a server that lets nobody in from outside. Who may sign in is said by
    the environment variable ``UI_USERS``; ``ALLOW_UI_WITHOUT_PASSWORD`` lets everyone in.

    Parameters
    ----------
    expose : {'auto', True, False}
        Whether the UI is shown at a public address. ``'auto'``: where there is a token; a
        failure is then said, and the notebook goes on. ``True``: a failure is an error.
        ``False``: no, and a tunnel that is open is closed. Without a tunnel Colab shows the UI
        in a frame below the cell.
    keep : bool, optional
        See `helpers.server.start`.
    port : int or None
        The port that the block makes public. None: whichever the server has.

    Raises
    ------
    TunnelError
        If the UI cannot be shown as asked, with whatever pyngrok raises in the block; says what
        to do.
    helpers.workspace.ParameterError
        If a value is none of those allowed.
    """
    return PublicUi(workspace, expose, keep, port)


def show_ui(
    workspace: Workspace, expose: str | bool = "auto", keep: bool | None = None
) -> PublicUi:
    """Do what the pyngrok cell does, whichever port the server has; see `opening`."""
    with opening(workspace, expose, keep, port=None) as ui:
        if ui.wanted:
            ui.set_auth_token()
            ui.url = ngrok.connect(ui.port, "http").public_url
    return ui


def show_models(workspace: Workspace, models) -> Address:
    """Show where the scoring server can be asked: publicly, where the MLflow UI is.

    It is below the address of the MLflow server, and takes the same users.

    Parameters
    ----------
    models : helpers.serving.ScoringClient
    """
    what = "The models answer"
    ngrok_agent.forget_dead_tunnel(workspace)
    with ngrok_agent.lock(workspace):
        tunnel = ngrok_agent.read_tunnel(workspace)
    if tunnel is None:
        return Address(models.url, "Only from this machine; a tunnel shows it to others.", what)
    note = "Sign in as for the MLflow UI; readers may ask, too. The path of each model: "
    note += ", ".join(f"/models/{name}/invocations" for name in models.models)
    return Address(f"{tunnel.url}{activity.SCORING_PATH.rstrip('/')}", note, what)


def close_tunnel(workspace: Workspace) -> bool:
    """Close the workspace's tunnel; the MLflow server goes on. Tell whether there was one."""
    with ngrok_agent.lock(workspace):
        tunnel = ngrok_agent.read_tunnel(workspace)
        if tunnel is not None:
            ngrok_agent.end_tunnel(workspace, tunnel)
    return tunnel is not None


def _find_token(expose: str | bool) -> str | None:
    name = credentials.NGROK_TOKEN
    token = credentials.find_secret(name) or _typed.get(name)
    # On a person's own machine the UI can be seen without a tunnel: no question is worth it.
    if token is None and (expose is True or in_colab()):
        token = _typed[name] = credentials.ask_secret(name, WHERE_TO_GET_A_TOKEN)
    return token
