import os
import socket
import subprocess
import sys
import textwrap
import threading

import mlflow
import psutil
import pytest

from helpers import server, tracking
from helpers.server import processes
from helpers.server.processes import ServerError
from helpers.workspace import PROJECT_ROOT, open_workspace
from tests.series import wait_for


@pytest.fixture
def own_workspace(workspace):
    """A workspace whose server is stopped after the test."""
    yield workspace
    server.stop_server(workspace)


def python(code, *arguments, **options):
    """Start another Python process with the helpers."""
    environment = {name: value for name, value in os.environ.items() if name != "WORKSPACE"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**environment, "PYTHONPATH": str(PROJECT_ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def taken_port():
    with socket.socket() as other:
        other.bind((processes.HOST, 0))
        other.listen()
        yield other.getsockname()[1]


# --- starting and finding ----------------------------------------------------------------------


def test_second_start_finds_the_same_server(own_workspace):
    first = server.start_server(own_workspace, keep=False)
    again = server.start_server(own_workspace, keep=False)
    assert again == first
    assert first.alive
    assert server.stop_server(own_workspace) is True
    assert not first.alive
    assert server.stop_server(own_workspace) is False


def test_other_process_finds_the_same_server(running_server):
    code = """
        import sys
        from helpers import server
        from helpers.workspace import open_workspace
        print(server.start(open_workspace(sys.argv[1]), keep=False))
    """
    client = python(code, running_server.workspace.root)
    shown, _ = client.communicate(timeout=120)
    assert shown.splitlines()[-1] == running_server.url
    assert processes.answers(running_server.url)


def test_running_server_answers_and_nothing_else_does(running_server, taken_port):
    assert processes.answers(running_server.url)
    assert not processes.answers(f"http://127.0.0.1:{taken_port}", timeout=0.2)
    assert not processes.answers("no address")
    assert not processes.answers("http://[no address")


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


def test_server_keeps_its_files_in_the_workspace(tracking_server):
    assert tracking_server.workspace.tracking_db.is_file()
    with tracking.start_run("server_files", "one") as run:
        mlflow.log_text("hello", "note.txt")
    (note,) = tracking_server.workspace.artifacts.rglob(f"{run.info.run_id}/artifacts/note.txt")
    assert note.read_text() == "hello"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux answers on all of 127.0.0.0/8")
def test_server_is_not_offered_on_other_addresses_of_the_machine(running_server):
    port = int(running_server.url.rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


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
    family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    second = server.start_server(own_workspace, keep=False)
    assert second.pid != first.pid
    assert second.alive


@pytest.mark.slow
def test_server_that_dies_at_start_is_reported_with_its_log(own_workspace):
    own_workspace.tracking_db.write_bytes(b"this is no database " * 100)
    with pytest.raises(ServerError) as caught:
        tracking.connect(own_workspace, keep=False)
    message = str(caught.value)
    assert "ended while starting" in message
    assert str(own_workspace.server / "log.txt") in message
    assert "file is not a database" in message


def test_server_that_stays_silent_is_reported_with_its_log(own_workspace, taken_port):
    (own_workspace.server).mkdir()
    (own_workspace.server / "log.txt").write_text("first line\nlast line\n")
    me = psutil.Process()
    silent = processes.ServerProcess(
        f"http://127.0.0.1:{taken_port}", me.pid, me.create_time(), False
    )
    with pytest.raises(ServerError, match="is silent.*\n.*\nlast line"):
        server.service(own_workspace).wait(silent, timeout=0.1)


def test_command_line_stops_the_server_and_says_whether_there_was_one(own_workspace, capsys):
    started = server.start_server(own_workspace, keep=True)
    assert server.main(["--workspace", str(own_workspace.root), "--stop"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Stopped."
    assert not started.alive
    assert server.main(["--workspace", str(own_workspace.root), "--stop"]) == 0
    assert capsys.readouterr().out.strip() == "No server was running."


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
    user = python(USER, workspace.root, keep)
    # A notice about a taken port may come first.
    line = next(line for line in user.stdout if line.startswith("server "))
    _, pid, created = line.split()
    return user, int(pid), float(created)


def leave(user):
    user.communicate("\n", timeout=60)
    assert user.returncode == 0


def test_server_stops_when_the_only_process_that_used_it_ends(own_workspace):
    user, pid, created = start_user(own_workspace)
    assert processes.is_running(pid, created)
    leave(user)
    assert wait_for(lambda: not processes.is_running(pid, created))


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
