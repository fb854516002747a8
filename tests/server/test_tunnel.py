"""The cell that shows the MLflow UI at a public address."""

import functools
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests
from jupyter_client.manager import start_new_kernel
from pyngrok import conf as pyngrok_conf
from pyngrok import ngrok as pyngrok
from pyngrok import process

from helpers import server
from helpers.server import credentials, ngrok_agent, processes, tunnel, users
from helpers.server.credentials import AccessError
from helpers.server.tunnel import TunnelError
from helpers.workspace import PROJECT_ROOT, ParameterError, open_workspace
from tests.doubles.colab import PAGE, VS_CODE, ColabMachine
from tests.doubles.ngrok import NgrokCloud, paid_account
from tests.series import start_python, wait_for
from tests.tools import walkthrough

HEADERS = {"ngrok-skip-browser-warning": "1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory, _no_team_server):
    """A workspace whose server runs for the whole module."""
    workspace = open_workspace(tmp_path_factory.mktemp("tunnel") / "ws")
    server.start(workspace, keep=True)
    yield workspace
    server.stop_server(workspace)


@pytest.fixture
def ngrok(cloud, tmp_path, monkeypatch):
    """A machine with a token, on which ngrok's agent is installed; gives the cloud."""
    for name, value in cloud.machine(tmp_path).items():
        monkeypatch.setenv(name, value)
    return cloud


@pytest.fixture
def shown(served, request):
    """Show the UI of the workspace; the tunnel is closed after the test."""
    if "own_domain" not in request.fixturenames:
        request.getfixturevalue("ngrok")
    yield lambda: tunnel.show_ui(served, True)
    tunnel.close_tunnel(served)


def show_elsewhere(workspace, **environment):
    """Show the UI in another process, which then ends; return what it says."""
    code = """
        import sys
        from helpers.server import tunnel
        from helpers.workspace import open_workspace
        try:
            print(tunnel.show_ui(open_workspace(sys.argv[1]), True))
        except tunnel.TunnelError as error:
            print(error)
    """
    environment = {**os.environ, **environment}
    process = start_python("-c", textwrap.dedent(code), workspace.root, env=environment)
    return process.communicate(timeout=90)[0]


@pytest.fixture
def own_domain(monkeypatch, tmp_path):
    """A machine whose token and settings ask for a reserved domain; gives its cloud."""
    with NgrokCloud() as cloud:
        account = cloud.add_account(paid_account("mlflow.example.com"))
        for name, value in cloud.machine(tmp_path, account).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("NGROK_DOMAIN", "mlflow.example.com")
        yield cloud


def agents():
    """Return the running agents that this process started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "start --none" in " ".join(child.cmdline())]


def outside(url, path="/health", **options):
    return requests.get(url + path, headers=HEADERS, timeout=20, **options)


# --- opening, finding, closing -----------------------------------------------------------------


def test_public_address_leads_to_the_server_behind_a_password(served, ngrok, shown):
    address = shown()
    assert re.fullmatch(r"https://[\w-]+\.ngrok-free\.app", address.url)
    assert ngrok.endpoints == [address.url]
    assert outside(address.url).status_code == 401
    account = ("reader", credentials.password_of(served, "reader"))
    page = outside(address.url, "/", auth=account)
    assert page.status_code == 200
    assert "<title>MLflow" in page.text


def test_what_the_cell_shows(served, shown, monkeypatch):
    monkeypatch.setenv("UI_USERS", "ana:reader")
    address = shown()
    text, page = repr(address), address._repr_html_()
    assert text.startswith(
        f"The MLflow UI is at {address.url}\nSign in as admin (admin), ana (reader)"
    )
    assert f'<a href="{address.url}" target="_blank"' in page
    assert str(served.passwords) in text
    for password in json.loads(served.passwords.read_text()).values():
        assert password not in text + page


def test_second_run_of_the_cell_returns_the_same_tunnel(ngrok, shown):
    first = shown()
    before = [agent.pid for agent in agents()]
    assert shown() == first
    assert [agent.pid for agent in agents()] == before
    assert len(before) == 1
    assert ngrok.endpoints == [first.url]


def test_tunnel_of_another_process_is_found(served, ngrok, shown):
    first = shown()
    assert first.url in show_elsewhere(served)
    assert ngrok.endpoints == [first.url]
    assert outside(first.url).status_code == 401


def test_false_closes_the_tunnel(served, ngrok, shown):
    address = shown()
    closed = tunnel.show_ui(served, False)
    assert closed.url.startswith("http://localhost:")
    assert wait_for(lambda: not ngrok.endpoints)
    assert not agents()
    assert outside(address.url).headers["Ngrok-Error-Code"] == "ERR_NGROK_3200"
    assert users.read_rules(served.access_rules).public == []
    assert tunnel.close_tunnel(served) is False


def test_tunnel_ends_with_the_process_that_opened_it(served, ngrok):
    assert "https://" in show_elsewhere(served)
    assert wait_for(lambda: not ngrok.endpoints)
    assert users.read_rules(served.access_rules).public == []


def test_interrupt_of_the_notebook_does_not_end_the_tunnel(ngrok, shown):
    address = shown()
    (agent,) = agents()
    assert os.getpgid(agent.pid) != os.getpgid(0)
    assert outside(address.url).status_code == 401


def test_reserved_domain_is_asked_for(own_domain, shown):
    address = shown()
    assert address.url == "https://mlflow.example.com"
    assert outside(address.url).status_code == 401


# --- the cell without one of its lines ---------------------------------------------------------


def refused(url):
    """Tell whether nobody gets in from outside, whatever is asked for and whoever asks."""
    asked = [
        outside(f"https://{url.split('//')[1]}", path, auth=auth)
        for path in ("/", "/version", "/api/2.0/mlflow/users/current", "/scoring/models")
        for auth in (None, ("admin", "password1234"))
    ]
    return {answer.status_code for answer in asked} == {403}


@pytest.fixture
def port(served, ngrok, tmp_path):
    """Where the server listens; what a test opened with pyngrok alone is closed after it."""
    before = pyngrok_conf.get_default()
    # pyngrok as a person has it who uses it without the helpers.
    pyngrok_conf.set_default(pyngrok_conf.PyngrokConfig(config_path=str(tmp_path / "own.yml")))
    yield int(server.start(served).rsplit(":", 1)[1])
    pyngrok.kill()
    pyngrok_conf.set_default(before)
    tunnel.close_tunnel(served)


def test_cell_as_it_stands_in_the_notebooks(served, ngrok, port, capsys):
    own = pyngrok_conf.get_default()
    with tunnel.opening(served, True, port=port) as ui:
        assert ui.wanted
        ui.set_auth_token()
        ui.url = pyngrok.connect(port, "http").public_url
        assert refused(ui.url)
    print(ui)
    assert capsys.readouterr().out.startswith(f"The MLflow UI is at {ui.url}\nSign in as admin")
    assert outside(ui.url).status_code == 401
    with tunnel.opening(served, True, port=port) as again:
        assert not again.wanted
    assert again == ui
    # pyngrok is as it was: the file with the token is gone, and is not asked for any more.
    assert pyngrok_conf.get_default() is own
    assert not Path(own.config_path).exists()


def test_plain_connect_without_any_helper(served, ngrok, port):
    url = pyngrok.connect(port, "http").public_url
    assert refused(url)
    assert users.read_rules(served.access_rules).public == []


def test_block_without_its_token(served, ngrok, port):
    with (
        pytest.raises(TunnelError, match="ui.set_auth_token"),
        tunnel.opening(served, True, port=port) as ui,
    ):
        ui.url = pyngrok.connect(port, "http").public_url
        url = ui.url
        assert refused(url)
    assert wait_for(lambda: not ngrok.endpoints)
    assert users.read_rules(served.access_rules).public == []


def test_block_that_does_not_say_its_address(served, ngrok, port, capsys):
    with tunnel.opening(served, "auto", port=port) as ui:
        ui.set_auth_token()
        url = pyngrok.connect(port, "http").public_url
        assert refused(url)
    assert "no address of a tunnel" in capsys.readouterr().out
    assert ui.url == f"http://localhost:{port}"
    assert wait_for(lambda: not ngrok.endpoints)


def test_block_without_the_question_whether_it_is_wanted(served, ngrok, port):
    with tunnel.opening(served, False, port=port) as ui:
        ui.set_auth_token()
        ui.url = pyngrok.connect(port, "http").public_url
    assert refused(ui.url)


def test_tunnel_that_leads_elsewhere_is_not_admitted(served, ngrok, port):
    with (
        pytest.raises(TunnelError, match=f"to port {port}"),
        tunnel.opening(served, True, port=port) as ui,
    ):
        ui.set_auth_token()
        ui.url = pyngrok.connect(9, "http").public_url
    assert wait_for(lambda: not ngrok.endpoints)


def test_port_of_another_program_is_not_made_public(served, ngrok, port, capsys):
    with pytest.raises(TunnelError, match=f"Port {port + 1}, .* was taken"):
        tunnel.opening(served, True, port=port + 1).__enter__()
    with tunnel.opening(served, "auto", port=port + 1) as ui:
        assert not ui.wanted
    assert f"Port {port + 1}, which" in capsys.readouterr().out
    assert ui.url == f"http://localhost:{port}"
    assert wait_for(lambda: not ngrok.endpoints)


def test_other_error_in_the_block_stays_what_it_is(served, ngrok, port):
    with pytest.raises(NameError), tunnel.opening(served, "auto", port=port) as ui:
        ui.set_auth_token()
        pyngrok.connect(port, "http")
        raise NameError("a typing mistake")
    assert wait_for(lambda: not ngrok.endpoints)
    assert not users.read_rules(served.access_rules).sign_in


# --- what goes wrong on the way ----------------------------------------------------------------


def test_team_server_is_named_and_nothing_is_exposed(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert tunnel.show_ui(workspace, True).url == "https://mlflow.example"
    assert not workspace.server.exists()


def drop(ngrok, workspace):
    (url,) = ngrok.endpoints
    ngrok.drop(url)
    assert outside(url).headers["Ngrok-Error-Code"] == "ERR_NGROK_3200"


def kill_agent(ngrok, workspace):
    (agent,) = agents()
    agent.kill()
    psutil.wait_procs([agent], timeout=10)


def lose_note(ngrok, workspace):
    # As after a restart of the server in another folder.
    (workspace.server / "tunnel.json").unlink()


@pytest.mark.parametrize("lose", [drop, kill_agent, lose_note])
def test_tunnel_that_is_lost_is_opened_anew(served, ngrok, shown, lose):
    address = shown()
    before = {agent.pid for agent in agents()}
    lose(ngrok, served)
    assert shown().url == address.url  # a free account has one constant domain
    assert outside(address.url).status_code == 401
    (agent,) = agents()
    assert agent.pid not in before


@pytest.mark.slow
def test_server_that_died_is_started_by_the_cell(workspace, ngrok):
    try:
        address = tunnel.show_ui(workspace, True)
        died = processes.read_state(workspace.server)
        process = psutil.Process(died.pid)
        process.kill()
        process.wait()
        assert outside(address.url).headers["Ngrok-Error-Code"] == "ERR_NGROK_8012"
        again = tunnel.show_ui(workspace, True)
        assert outside(again.url).status_code == 401
    finally:
        tunnel.close_tunnel(workspace)
        server.stop_server(workspace)


@pytest.mark.slow
def test_taken_port_is_said_and_the_tunnel_leads_to_the_other(workspace, ngrok, capsys):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Where something else has it already, that is as good.
        with suppress(OSError):
            other.bind((processes.HOST, server.PORT))
            other.listen()
        try:
            address = tunnel.show_ui(workspace, True)
            assert f"Port {server.PORT} is taken" in capsys.readouterr().out
            assert outside(address.url).status_code == 401
        finally:
            tunnel.close_tunnel(workspace)
            server.stop_server(workspace)


def test_without_a_token_true_is_an_error_that_says_where_to_get_one(served, monkeypatch):
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    with pytest.raises(TunnelError) as caught:
        tunnel.show_ui(served, True)
    message = str(caught.value)
    assert "https://dashboard.ngrok.com/get-started/your-authtoken" in message
    assert "NGROK_AUTHTOKEN" in message
    assert "Secrets" in message


def test_without_a_token_auto_says_in_one_line_where_the_ui_is(served, monkeypatch, capsys):
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    port = server.start(served).rsplit(":", 1)[1]
    address = tunnel.show_ui(served, "auto")
    assert repr(address) == f"The MLflow UI is at http://localhost:{port}"
    assert capsys.readouterr().out == ""
    assert outside(address.url, "/version").status_code == 200


@pytest.mark.parametrize(
    ("token", "code", "words"),
    [
        ("not a token", "ERR_NGROK_105", "no ngrok token"),
        ("2unknown0123456789abcdefghi_6xVpQ8rT1uW3yZ5aB7cD9", "ERR_NGROK_107", "not valid"),
    ],
)
def test_token_that_ngrok_refuses(served, ngrok, monkeypatch, capfd, caplog, token, code, words):
    monkeypatch.setenv("NGROK_AUTHTOKEN", token)
    with pytest.raises(TunnelError) as caught:
        tunnel.show_ui(served, True)
    message = str(caught.value)
    assert code in message
    assert words in message
    assert f"https://ngrok.com/docs/errors/{code.lower()}" in message
    assert token not in message + "".join(capfd.readouterr()) + caplog.text
    assert not agents()


def test_auto_goes_on_without_a_tunnel_and_says_why(served, ngrok, monkeypatch, capsys):
    monkeypatch.setenv("NGROK_AUTHTOKEN", "not a token")
    address = tunnel.show_ui(served, "auto")
    assert address.url.startswith("http://localhost:")
    shown = capsys.readouterr().out
    assert "The MLflow UI is not public." in shown
    assert "ERR_NGROK_105" in shown
    # Nobody needs to sign in on this machine who did not before.
    assert outside(address.url, "/version").status_code == 200


@pytest.mark.slow
def test_second_machine_of_a_free_account_is_explained(served, workspace, ngrok, shown, tmp_path):
    url = shown().url
    said = show_elsewhere(workspace, PYNGROK_NGROK_PATH=str(ngrok.install(tmp_path / "other")))
    server.stop_server(workspace)
    assert "ERR_NGROK_334" in said
    assert "https://dashboard.ngrok.com/endpoints" in said
    assert "EXPOSE_UI = False" in said
    # The first one is as it was.
    assert ngrok.endpoints == [url]
    assert outside(url).status_code == 401


@pytest.fixture
def nowhere(monkeypatch):
    """A network in which every connection to the outside is refused at once."""
    address = "127.0.0.1:9"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{address}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    return address


def test_agent_that_never_gets_through_is_given_up(served, ngrok, nowhere, monkeypatch):
    monkeypatch.setenv("NGROK_DOUBLE_CLOUD", nowhere)
    monkeypatch.setattr(ngrok_agent, "PATIENCE", 2)
    begin = time.monotonic()
    with pytest.raises(TunnelError) as caught:
        tunnel.show_ui(served, True)
    assert time.monotonic() - begin < 6
    assert "did not get through to ngrok; perhaps this network blocks it" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert not agents()


@pytest.fixture(scope="session")
def real_agent(tmp_path_factory):
    """The agent itself, of version 2, from npm."""
    folder = tmp_path_factory.mktemp("npm")
    npm = shutil.which("npm")
    if npm is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("needs npm, on Linux with x86-64")
    install = ["install", "--silent", "--prefix", str(folder), "@expo/ngrok-bin-linux-x64@2"]
    if subprocess.run([npm, *install]).returncode:
        pytest.skip("npm does not get the agent")
    return folder / "node_modules/@expo/ngrok-bin-linux-x64/ngrok"


@pytest.mark.slow
def test_real_agent_without_a_network_is_given_up(served, real_agent, nowhere, monkeypatch):
    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(real_agent))
    monkeypatch.setenv("NGROK_AUTHTOKEN", "2token0123456789abcdefghijk_0123456789abcdefghijk")
    lines, watched = [], ngrok_agent.NgrokLog
    monkeypatch.setattr(process, "NgrokLog", lambda line: lines.append(line) or watched(line))
    begin = time.monotonic()
    with pytest.raises(TunnelError, match="did not get through") as caught:
        tunnel.show_ui(served, True)
    assert time.monotonic() - begin < 15
    assert any('msg="starting web service"' in line for line in lines)
    assert sum('lvl=eror msg="failed to reconnect session"' in line for line in lines) > 1
    assert nowhere in str(caught.value)
    assert not agents()
    assert users.read_rules(served.access_rules).public == []


def test_address_that_is_online_elsewhere_is_explained(served, own_domain, tmp_path):
    code = """
        import sys
        from pyngrok import conf, ngrok
        path, url = sys.argv[1], "https://mlflow.example.com"
        configuration = conf.PyngrokConfig(ngrok_path=path, config_path=f"{path}.yml")
        print(ngrok.connect(9, "http", pyngrok_config=configuration, url=url), flush=True)
        sys.stdin.readline()
    """
    other = start_python("-c", textwrap.dedent(code), own_domain.install(tmp_path / "other"))
    try:
        assert "mlflow.example.com" in other.stdout.readline()
        with pytest.raises(TunnelError, match="ERR_NGROK_334") as caught:
            tunnel.show_ui(served, True)
        assert "Another machine or notebook already shows its UI" in str(caught.value)
        assert {agent.ppid() for agent in agents()} == {other.pid}
    finally:
        other.communicate("\n", timeout=20)


def test_domain_of_somebody_else_is_explained(served, ngrok, monkeypatch):
    monkeypatch.setenv("NGROK_DOMAIN", "somebody-elses.ngrok.app")
    with pytest.raises(TunnelError) as caught:
        tunnel.show_ui(served, True)
    assert "NGROK_DOMAIN" in str(caught.value)
    assert "somebody-elses.ngrok.app" in str(caught.value)


def test_download_of_the_agent_that_is_blocked_is_explained(served, nowhere, monkeypatch, tmp_path):
    monkeypatch.setenv("NGROK_AUTHTOKEN", "2token0123456789abcdefghijk_0123456789")
    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(tmp_path / "bin" / "ngrok"))
    with pytest.raises(TunnelError) as caught:
        tunnel.show_ui(served, True)
    message = str(caught.value)
    assert "could not be downloaded" in message
    assert "PYNGROK_NGROK_PATH" in message


# --- passwords and users -----------------------------------------------------------------------


def test_password_is_asked_for_before_the_tunnel_opens(served, ngrok, shown, monkeypatch):
    """At no moment does the tunnel lead to a server that answers without a password."""
    seen = []
    connect = tunnel.ngrok.connect

    def spied(port, *kind):
        seen.append(requests.get(f"http://127.0.0.1:{port}/version").status_code)
        return connect(port, *kind)

    monkeypatch.setattr(tunnel.ngrok, "connect", spied)
    shown()
    assert seen == [401]


def test_open_ui_is_only_open_where_it_was_asked_for(served, ngrok, shown, monkeypatch):
    monkeypatch.setenv("ALLOW_UI_WITHOUT_PASSWORD", "true")
    address = shown()
    assert "ANYONE" in repr(address)
    assert outside(address.url, "/version").status_code == 200
    monkeypatch.setenv("ALLOW_UI_WITHOUT_PASSWORD", "0")
    assert "Sign in as" in repr(shown())
    assert outside(address.url, "/version").status_code == 401


def test_users_come_and_go_with_their_table(served, shown, monkeypatch):
    monkeypatch.setenv("UI_USERS", '["ana:reader", "luis:editor"]')
    address = shown()
    ana = ("ana", credentials.password_of(served, "ana"))
    assert outside(address.url, "/version", auth=ana).status_code == 200
    monkeypatch.delenv("UI_USERS")
    assert "ana (reader), luis (editor)" in repr(shown())  # not set: as before
    monkeypatch.setenv("UI_USERS", "luis:editor")
    shown()
    assert outside(address.url, "/", auth=ana).status_code == 401


def test_new_password_in_a_secret_takes_the_place_of_the_old(served, shown, monkeypatch):
    monkeypatch.setenv("UI_USERS", "eva:reader")
    address = shown()
    old = credentials.password_of(served, "eva")
    monkeypatch.setenv("MLFLOW_PASSWORD_EVA", "a new long password")
    note = repr(shown())
    assert outside(address.url, "/", auth=("eva", "a new long password")).status_code == 200
    assert outside(address.url, "/", auth=("eva", old)).status_code == 401
    assert "passwords made for admin are in" in note


def test_short_password_stops_the_tunnel(served, ngrok, monkeypatch):
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "short")
    with pytest.raises(AccessError, match="MLFLOW_AUTH_ADMIN_PASSWORD is too short"):
        tunnel.show_ui(served, True)
    assert wait_for(lambda: not ngrok.endpoints)


@pytest.mark.parametrize(
    ("name", "value"), [("UI_USERS", "ana"), ("ALLOW_UI_WITHOUT_PASSWORD", "perhaps")]
)
def test_setting_that_cannot_be_read_is_refused(served, ngrok, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ParameterError, match=name):
        tunnel.show_ui(served, True)
    assert not ngrok.endpoints


def test_other_value_of_expose_ui_is_refused_with_those_allowed(workspace):
    with pytest.raises(ParameterError, match="EXPOSE_UI must be one of 'auto', True, False"):
        tunnel.show_ui(workspace, "true")


# --- a person at the keyboard ------------------------------------------------------------------


@pytest.fixture
def front_end(ngrok):
    """A Jupyter front end: runs code in a real kernel and types what it is asked for."""
    manager, client = start_new_kernel(cwd=str(PROJECT_ROOT))

    def run(code, answer=""):
        asked, shown = [], []
        client.execute_interactive(
            textwrap.dedent(code),
            allow_stdin=True,
            timeout=90,
            stdin_hook=lambda message: (
                asked.append(message["content"]),
                client.input(answer),
            ),
            output_hook=lambda message: shown.append(json.dumps(message["content"])),
        )
        return SimpleNamespace(asked=asked, shown="\n".join(shown))

    yield run
    client.stop_channels()
    manager.shutdown_kernel()


SHOW = """
    import os
    from helpers.server import tunnel
    from helpers.workspace import open_workspace
    os.environ.pop("NGROK_AUTHTOKEN", None)
    tunnel.show_ui(open_workspace({folder!r}), {expose!r})
"""


def test_token_is_asked_for_hidden_and_once(served, ngrok, front_end):
    code = SHOW.format(folder=str(served.root), expose=True)
    first = front_end(code, ngrok.account.token)
    (question,) = first.asked
    assert question["password"] is True
    assert "NGROK_AUTHTOKEN" in question["prompt"]
    assert "https://dashboard.ngrok.com/get-started/your-authtoken" in first.shown
    assert ngrok.endpoints[0] in first.shown
    assert ngrok.account.token not in first.shown
    second = front_end(code, ngrok.account.token)
    assert second.asked == []
    assert ngrok.endpoints[0] in second.shown


def test_person_on_an_own_machine_is_not_asked_by_auto(served, front_end):
    done = front_end(SHOW.format(folder=str(served.root), expose="auto"))
    assert done.asked == []
    assert "http://localhost:" in done.shown
    assert "NGROK_AUTHTOKEN" in done.shown


@pytest.fixture
def shown_in_colab(served, tmp_path):
    """Run the cell on a machine of Colab that has no token; return what it shows.

    Who runs it presses Enter when asked for one.
    """
    machine = ColabMachine(Path(sys.executable), tmp_path / "disk", tmp_path / "drive", {})
    code = f"""
        import sys
        sys.path.insert(0, {str(PROJECT_ROOT)!r})
        from helpers.server import tunnel
        from helpers.workspace import open_workspace
        print(tunnel.show_ui(open_workspace({str(served.root)!r}), expose))
    """

    def show(expose, front_end=PAGE):
        machine.front_end = front_end
        text, error = machine.run(f"expose = {expose!r}{textwrap.dedent(code)}")
        assert error is None, error
        return text

    yield show
    machine.vanish()
    users.change_rules(served, private=[])


def test_colab_without_a_token_shows_the_ui_below_the_cell(served, shown_in_colab):
    url = server.start(served)
    port = url.rsplit(":", 1)[1]
    address = f"https://{port}-colab.example"
    frame, link = f"proxyPort({port})", f"The MLflow UI is at {address}"
    for expose in ("auto", True, False):
        seen = shown_in_colab(expose)
        assert 0 < seen.index(frame) < seen.index(link)
        assert ("To share it: Get a free token" in seen) == (expose is not False)
    headers = {"Host": f"{port}-colab.example", "Origin": address}
    search = f"{url}/api/2.0/mlflow/experiments/search"
    assert requests.post(search, json={"max_results": 1}, headers=headers).status_code == 200
    foreign = {**headers, "Origin": "https://evil.example"}
    assert requests.post(search, json={"max_results": 1}, headers=foreign).status_code == 403


@pytest.mark.slow  # waits for an answer
def test_front_end_that_is_not_colabs_page_shows_no_frame(served, shown_in_colab):
    seen = shown_in_colab("auto", VS_CODE)
    assert "proxyPort" not in seen
    assert "The MLflow UI is at http://localhost:" in seen
    assert users.read_rules(served.access_rules).private == []


def framing(headers):
    """Return what a browser reads: the ancestors that are allowed, and MLflow's own rule."""
    return headers.get("Content-Security-Policy"), headers.get("X-Frame-Options")


def test_only_pages_of_colab_may_frame_the_ui_and_no_page_what_is_public(served, shown):
    url = server.start(served)
    assert framing(requests.get(url).headers) == (None, "SAMEORIGIN")
    public = shown().url
    users.change_rules(served, private=["5000-colab.example"])
    admin = ("admin", credentials.password_of(served, "admin"))
    try:
        ancestors, _ = framing(
            requests.get(url, headers={"Host": "5000-colab.example"}, auth=admin).headers
        )
        assert ancestors.split() == [
            *("frame-ancestors", "'self'", "https://colab.research.google.com"),
            "https://*.googleusercontent.com",
        ]
        page = outside(public, "/", auth=admin)
        assert (page.status_code, framing(page.headers)) == (200, (None, "SAMEORIGIN"))
    finally:
        users.change_rules(served, private=[])


OUTPUT = """<script>
const google = {colab: {kernel: {proxyPort: port => `https://${port}-colab.example/`}}};
const stand_in = {iframe(url, frame) {
  const shown = document.createElement("iframe");
  Object.assign(shown, {src: new URL(frame.path, url), width: frame.width, height: frame.height});
  document.documentElement.append(shown);
}};
%s
</script>"""


@pytest.mark.slow
def test_ui_in_colabs_page_is_visible_and_in_no_other(served, shown_in_colab, tmp_path):
    if walkthrough.find_browser() is None:
        pytest.skip(f"no browser: install one of {', '.join(walkthrough.BROWSERS)}")
    url = server.start(served)
    host = f"{url.rsplit(':', 1)[1]}-colab.example"
    (script,) = re.findall(r"stand_in\.iframe.*", shown_in_colab("auto"))
    output = "https://abc-0-colab.googleusercontent.com"
    pages = {
        "https://colab.research.google.com": f'<iframe src="{output}" width=1200 height=750>',
        output: OUTPUT % script,
        "https://evil.example": f'<iframe src="{output}" width=1200 height=750>',
        "https://evil.googleusercontent.example": OUTPUT % script,
    }

    def fulfill_page(body, route):
        route.fulfill(body=body, content_type="text/html")

    def proxy(route):
        asked = route.request
        headers = {**asked.all_headers(), "host": host}
        path = asked.url.split(host, 1)[1]
        answer = requests.request(
            asked.method, url + path, headers=headers, data=asked.post_data_buffer
        )
        dropped = ("content-encoding", "content-length", "transfer-encoding")
        kept = {name: text for name, text in answer.headers.items() if name.lower() not in dropped}
        route.fulfill(status=answer.status_code, headers=kept, body=answer.content)

    with walkthrough.everyday_page(tmp_path / "profile") as page:
        page.route(f"https://{host}/**", proxy)
        for address, body in pages.items():
            page.route(f"{address}/", functools.partial(fulfill_page, body))
        page.goto("https://colab.research.google.com/")
        ui = page.frame_locator("iframe").frame_locator("iframe")
        ui.get_by_role("link", name="Experiments").first.click()
        ui.get_by_role("link", name="Default", exact=True).wait_for()
        for foreign in [address for address in pages if "evil" in address]:
            with page.expect_console_message(lambda message: "frame-ancestors" in message.text):
                page.goto(f"{foreign}/")
            assert not [frame for frame in page.frames if host in frame.url]


def test_the_notebooks_kernel_ends_the_tunnel_with_itself(served, ngrok, front_end):
    front_end(SHOW.format(folder=str(served.root), expose=True), ngrok.account.token)
    assert len(ngrok.endpoints) == 1
    front_end("import os; os._exit(0) if False else get_ipython().kernel.do_shutdown(False)")
    assert wait_for(lambda: not ngrok.endpoints)
