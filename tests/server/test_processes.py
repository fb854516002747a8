"""How a workspace's server is found, started, leased and stopped."""

import socket
import sqlite3
import stat
import sys
import textwrap
import threading
from contextlib import closing

import psutil
import pytest

from helpers import server
from helpers.server import processes
from helpers.server.processes import ServerError, ServerProcess
from helpers.workspace import open_workspace
from tests.series import start_python, wait_for


@pytest.fixture
def own_workspace(workspace):
    """A workspace whose server is stopped after the test."""
    yield workspace
    server.stop_server(workspace)


@pytest.fixture
def taken_port():
    with socket.create_server((processes.HOST, 0)) as other:
        yield other.getsockname()[1]


# --- starting, finding, stopping ---------------------------------------------------------------


def test_second_start_finds_the_same_server(own_workspace):
    first = server.start_server(own_workspace, keep=False)
    again = server.start_server(own_workspace, keep=False)
    assert again == first
    assert first.alive
    assert server.stop_server(own_workspace) is True
    assert not first.alive
    assert server.stop_server(own_workspace) is False


def test_running_server_answers_and_nothing_else_does(running_server, taken_port):
    assert processes.answers(running_server.url)
    for url in (f"http://127.0.0.1:{taken_port}", "no address", "http://[no address"):
        assert not processes.answers(url, timeout=0.2)


def test_server_of_another_kind_is_no_mlflow_server():
    with socket.create_server((processes.HOST, 0)) as other:

        def greet():
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert not processes.answers(f"http://{processes.HOST}:{other.getsockname()[1]}")
        thread.join(timeout=10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers on all of 127.0.0.0/8")
def test_server_is_not_offered_on_other_addresses_of_the_machine(running_server):
    port = int(running_server.url.rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_server_folder_is_closed_to_others(running_server):
    workspace = running_server.workspace
    modes = {workspace.server: 0o700, workspace.activity: 0o600, workspace.passwords: 0o600}
    for path, mode in modes.items():
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_taken_port_is_said_and_the_next_free_one_is_used(own_workspace, taken_port, capsys):
    started = server.start_server(own_workspace, port=taken_port, keep=False)
    number = int(started.url.rsplit(":", 1)[1])
    assert taken_port < number <= taken_port + 99
    shown = capsys.readouterr().out
    assert f"Port {taken_port} is taken" in shown
    assert str(number) in shown


@pytest.mark.slow
def test_two_workspaces_that_start_at_once_get_servers_of_their_own(tmp_path):
    both = [open_workspace(tmp_path / name) for name in ("one", "other")]
    try:
        started = [server.start_server(workspace, keep=False) for workspace in both]
        assert started[0].url != started[1].url
        for workspace, its in zip(both, started, strict=True):
            server.service(workspace).wait(its)
    finally:
        for workspace in both:
            server.stop_server(workspace)


def test_state_of_a_server_that_is_gone_is_not_believed(own_workspace):
    first = server.start_server(own_workspace, keep=False)
    psutil.Process(first.pid).kill()
    assert wait_for(lambda: not first.alive)
    second = server.start_server(own_workspace, keep=False)
    assert second.pid != first.pid
    assert second.alive


@pytest.mark.slow
def test_server_that_dies_at_start_is_reported_with_its_log(own_workspace):
    (own_workspace.server / "basic_auth.ini").mkdir(parents=True)
    with pytest.raises(ServerError) as caught:
        server.start(own_workspace, keep=False)
    message = str(caught.value)
    assert "ended while starting" in message
    assert str(own_workspace.server / "log.txt") in message
    assert "IsADirectoryError" in message


def test_server_that_stays_silent_is_reported_with_its_log(own_workspace, taken_port):
    own_workspace.server.mkdir()
    (own_workspace.server / "log.txt").write_text("first line\nlast line\n")
    me = psutil.Process()
    silent = ServerProcess(f"http://127.0.0.1:{taken_port}", me.pid, me.create_time(), False)
    with pytest.raises(ServerError, match="is silent.*\n.*\nlast line"):
        server.service(own_workspace).wait(silent, timeout=0.1)


def test_command_line_stops_the_server_and_says_whether_there_was_one(own_workspace, capsys):
    started = server.start_server(own_workspace, keep=True)
    capsys.readouterr()
    for answer in ("Stopped.", "No server was running."):
        assert server.main(["--workspace", str(own_workspace.root), "--stop"]) == 0
        assert capsys.readouterr().out.strip() == answer
        assert not started.alive


# --- leases ------------------------------------------------------------------------------------

USER = """
    import sys
    from helpers import server
    from helpers.workspace import open_workspace
    found = server.start_server(open_workspace(sys.argv[1]), keep=sys.argv[2] == "keep")
    print("server", found.pid, found.created, flush=True)
    sys.stdin.readline()
"""


def start_user(workspace, keep="stop"):
    """Start a process that uses the workspace's server until its input ends."""
    user = start_python("-c", textwrap.dedent(USER), workspace.root, keep)
    # A notice about a taken port may come first.
    line = next(line for line in user.stdout if line.startswith("server "))
    _, pid, created = line.split()
    return user, int(pid), float(created)


def leave(user):
    user.communicate("\n", timeout=60)
    assert user.returncode == 0


def test_server_stays_until_the_last_process_that_uses_it_ends(own_workspace):
    first, pid, created = start_user(own_workspace)
    second, same, _ = start_user(own_workspace)
    assert same == pid
    leave(first)
    assert processes.is_running(pid, created)
    leave(second)
    assert wait_for(lambda: not processes.is_running(pid, created))


def test_lease_of_a_killed_process_does_not_keep_the_server(own_workspace):
    first, pid, created = start_user(own_workspace)
    second, _, _ = start_user(own_workspace)
    first.kill()
    first.communicate()
    assert processes.is_running(pid, created)
    leave(second)
    assert wait_for(lambda: not processes.is_running(pid, created))


def test_server_that_a_person_started_goes_on_after_the_process(own_workspace):
    user, pid, created = start_user(own_workspace, keep="keep")
    leave(user)
    batch, same, _ = start_user(own_workspace)
    assert same == pid
    leave(batch)
    assert processes.is_running(pid, created)
    assert server.stop_server(own_workspace)
    assert wait_for(lambda: not processes.is_running(pid, created))


TRAINING = """
    import sys, time
    from helpers import tracking
    from helpers.workspace import open_workspace
    tracking.connect(open_workspace(sys.argv[1]), keep=False)
    with tracking.start_run("endings", "cut off"):
        print("running", flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_server_of_a_killed_batch_run_closes_its_runs_and_ends(own_workspace):
    batch = start_python("-c", textwrap.dedent(TRAINING), own_workspace.root)
    assert any(line == "running\n" for line in batch.stdout)
    left = processes.read_state(own_workspace.server)
    batch.kill()
    batch.communicate()
    assert wait_for(lambda: not left.alive, seconds=30)
    assert processes.read_state(own_workspace.server) is None
    with closing(sqlite3.connect(own_workspace.tracking_db)) as connection:
        assert connection.execute("SELECT status FROM runs").fetchall() == [("KILLED",)]
