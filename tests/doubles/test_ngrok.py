"""The stand-in behaves like ngrok, as pyngrok and https clients see it."""

import http.server
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import requests
import yaml
from pyngrok import conf, ngrok
from pyngrok.exception import PyngrokNgrokError, PyngrokNgrokHTTPError

from tests.doubles.ngrok import NgrokCloud, agent, free_account, make_token, paid_account

BROWSER = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/130.0 Safari/537.36"


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def code_of(error):
    return re.search(r"ERR_NGROK_\d+", str(error.value)).group()


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers by path, and echoes bodies."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self):
        if self.path == "/early":  # before the body is read
            self.close_connection = True
            self.answer(401, b"no", Connection="close")
            return
        data = self.body()
        self.server.seen.append(SimpleNamespace(
            method=self.command, path=self.path, headers=self.headers, size=len(data)
        ))  # fmt: skip
        if self.path == "/slow":
            time.sleep(0.2)
        if self.path == "/not-modified":
            self.answer(304, ETag='"1"')
        elif self.path == "/empty":
            self.answer(204)
        elif self.path == "/broken":
            self.close_connection = True
        elif self.path == "/cookies":
            self.send_response(200)
            self.send_header("Set-Cookie", "a=1")
            self.send_header("Set-Cookie", "b=2")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (b"first", b"second"):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                self.wfile.flush()
                self.server.go_on.wait(5)
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.answer(200, data or f"{self.command} {self.path}".encode())

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815
    do_DELETE = do_OPTIONS = handle_any  # noqa: N815


@pytest.fixture
def upstream():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.seen, server.go_on = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.port = server.server_address[1]
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cloud(monkeypatch):
    monkeypatch.delenv("NGROK_AUTHTOKEN", raising=False)
    with NgrokCloud() as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def make_config(cloud, tmp_path):
    """Give each agent an executable and a file of its own; end them all."""
    made = []

    def make(token="free", **options):
        folder = tmp_path / f"agent{len(made)}"
        path = cloud.install(folder)
        config = conf.PyngrokConfig(
            ngrok_path=str(path), config_path=str(folder / "ngrok.yml"), **options
        )
        made.append(config)
        ngrok.install_ngrok(config)
        if token == "free":
            token = cloud.account.token
        if token is not None:
            ngrok.set_auth_token(token, config)
        return config

    yield make
    for config in made:
        ngrok.kill(config)


@pytest.fixture
def config(make_config):
    return make_config()


@pytest.fixture
def url(config, upstream):
    return ngrok.connect(str(upstream.port), "http", pyngrok_config=config).public_url


def logs(config):
    return [line.line for line in ngrok.get_ngrok_process(config).logs]


def has_log(config, *parts):
    return wait_for(lambda: any(all(p in line for p in parts) for line in logs(config)))


# --- the agent and its local API ----------------------------------------------------------------


def test_executable_starts_fast_and_tells_its_version(cloud, tmp_path):
    path = cloud.install(tmp_path / "with a space")
    seconds = []
    for words in (["version"], ["--version"], ["version"]):
        started = time.perf_counter()
        shown = subprocess.run([path, *words], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        assert re.fullmatch(r"ngrok version 3\.\d+\.\d+\n", shown.stdout)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    "before",
    [
        None,
        "",
        "version: '3'\n",
        "version: '3'\nagent:\n  web_addr: 127.0.0.1:4050\nendpoints: []\n",
        "agent:\n    authtoken: old # mine\n    console_ui: false\nversion: 3\n",
        "agent: {}\nversion: '3'\n",
        'version: "2"\nauthtoken: old\nregion: eu\n',
        'version: "2"\nregion: eu\n',
    ],
)
@pytest.mark.parametrize("token", [make_token(), "1234567", "1e5", "it's: odd"])
def test_add_authtoken_keeps_the_rest_of_the_file(tmp_path, capsys, before, token):
    path = tmp_path / "folder" / "ngrok.yml"
    if before is not None:
        path.parent.mkdir()
        path.write_text(before)
    words = ["config", "add-authtoken", token, "--log", "stdout", "--config", str(path)]
    assert agent.main(words) == 0
    assert capsys.readouterr().out == f"Authtoken saved to configuration file: {path}\n"
    expected = yaml.safe_load(before or "version: '3'")
    if str(expected["version"]) == "2":
        expected["authtoken"] = token
    else:
        expected["agent"] = {**(expected.get("agent") or {}), "authtoken": token}
    assert yaml.safe_load(path.read_text()) == expected
    assert agent.read_setting(path, "authtoken") == token


def test_wrong_command_lines_fail(cloud, tmp_path):
    path = cloud.install(tmp_path)
    for words in (["start", "--nine"], ["frob"], ["config", "check", "--config", "/no/file"]):
        done = subprocess.run([path, *words], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("ERROR:  ")


def test_connect_list_and_disconnect_with_endpoints(cloud, config, upstream):
    tunnel = ngrok.connect(str(upstream.port), "http", pyngrok_config=config)
    assert tunnel.public_url == cloud.account.url
    assert cloud.endpoints == [cloud.account.url]
    assert tunnel.upstream == {"url": f"http://localhost:{upstream.port}", "protocol": "http1"}
    assert [one.public_url for one in ngrok.get_tunnels(config)] == [cloud.account.url]
    assert requests.get(tunnel.public_url).text == "GET /"
    tunnel.refresh_metrics()
    assert tunnel.metrics["conns"]["count"] == 1
    assert has_log(config, 'msg="started tunnel"', f"url={tunnel.public_url}")
    assert has_log(config, 'msg="join connections"', f"l=127.0.0.1:{upstream.port}")
    ngrok.disconnect(tunnel.public_url, config)
    assert ngrok.get_tunnels(config) == []
    assert cloud.endpoints == []


def test_connect_list_and_disconnect_with_tunnels(cloud, make_config, upstream):
    config = make_config(config_version="2")
    tunnel = ngrok.connect(f"http://127.0.0.1:{upstream.port}", pyngrok_config=config)
    assert (tunnel.public_url, tunnel.proto) == (cloud.account.url, "https")
    (listed,) = ngrok.get_tunnels(config)
    assert listed.config["addr"] == f"http://127.0.0.1:{upstream.port}"
    assert requests.get(tunnel.public_url).text == "GET /"
    ngrok.disconnect(tunnel.public_url, config)
    assert (ngrok.get_tunnels(config), cloud.endpoints) == ([], [])


def test_reconnecting_gives_the_same_address(cloud, make_config, upstream):
    addresses = set()
    for _ in range(2):
        config = make_config()
        addresses.add(ngrok.connect(str(upstream.port), pyngrok_config=config).public_url)
        ngrok.kill(config)
    assert addresses == {cloud.account.url}


def test_status_and_unknown_names(config):
    api = ngrok.get_ngrok_process(config).api_url
    status = requests.get(f"{api}/api/status").json()
    assert (status["status"], status["uri"]) == ("online", "/api/status")
    assert requests.get(f"{api}/api/endpoints/no").status_code == 404
    assert requests.delete(f"{api}/api/tunnels/no").status_code == 404
    assert requests.get(f"{api}/api/frob").status_code == 404
    wrong = requests.post(f"{api}/api/endpoints", json={"name": "a", "addr": "80"})
    assert (wrong.status_code, wrong.json()["error_code"]) == (400, 102)


def test_web_service_takes_the_next_port_where_one_is_taken(cloud, make_config):
    config = make_config()
    first = ngrok.get_ngrok_process(config).api_url
    other_account = cloud.add_account(free_account())
    other = make_config(other_account.token)
    second = ngrok.get_ngrok_process(other).api_url
    assert first != second
    assert urllib.request.urlopen(f"{second}/api/status").status == 200
    assert has_log(other, "lvl=warn", "can't bind default web address")


# --- what ngrok refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token, code, text",
    [
        (None, "ERR_NGROK_4018", "requires a verified account and authtoken"),
        ("not-a-token", "ERR_NGROK_105", "does not look like a proper ngrok authtoken"),
        (make_token(), "ERR_NGROK_107", "properly formed, but it is invalid"),
    ],
)
def test_tokens_that_start_no_agent(cloud, make_config, capfd, token, code, text):
    config = make_config(token)
    with pytest.raises(PyngrokNgrokError) as error:
        ngrok.get_ngrok_process(config)
    assert code_of(error) == code
    assert text in error.value.ngrok_error
    assert error.value.ngrok_error.startswith("authentication failed: ")
    assert not ngrok.process.is_process_running(config.ngrok_path)
    shown = capfd.readouterr().err
    assert f"ERROR:  {code}\nERROR:  https://ngrok.com/docs/errors/{code.lower()}\n" in shown


def test_agent_that_is_refused_exits_with_1(cloud, tmp_path):
    words = [cloud.install(tmp_path), "start", "--none", "--log", "stdout"]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert (
        'msg="failed to reconnect session" obj=tunnels.session err="authentication' in done.stdout
    )


def test_token_of_the_flag_comes_before_the_environment_and_the_file(
    cloud, make_config, monkeypatch
):
    with pytest.raises(PyngrokNgrokError, match="ERR_NGROK_105"):
        ngrok.get_ngrok_process(make_config(auth_token="wrong"))
    monkeypatch.setenv("NGROK_AUTHTOKEN", cloud.account.token)
    config = make_config("wrong")
    config.auth_token = None
    ngrok.get_ngrok_process(config)
    assert cloud.sessions == 1


def test_second_agent_of_a_free_account_is_refused(cloud, config, make_config):
    ngrok.get_ngrok_process(config)
    with pytest.raises(PyngrokNgrokError, match="limited to 1 simultaneous") as error:
        ngrok.get_ngrok_process(make_config())
    assert code_of(error) == "ERR_NGROK_108"


def test_killed_agent_frees_its_session_at_once(cloud, config, make_config, url):
    os.kill(ngrok.get_ngrok_process(config).proc.pid, signal.SIGKILL)
    other = make_config()
    assert ngrok.get_ngrok_process(other).healthy()
    assert cloud.sessions == 1
    assert cloud.endpoints == []


def test_address_can_only_be_online_once(cloud, config, url, upstream):
    with pytest.raises(PyngrokNgrokHTTPError) as error:
        ngrok.connect(str(upstream.port), pyngrok_config=config)
    assert code_of(error) == "ERR_NGROK_334"
    assert error.value.status_code == 502
    answer = requests.models.complexjson.loads(error.value.body)
    assert (answer["error_code"], answer["status_code"]) == (103, 502)
    assert answer["details"]["err"].startswith(f"failed to start tunnel: The endpoint '{url}' is")
    assert has_log(config, "lvl=warn", 'msg="failed to start tunnel"', "ERR_NGROK_334")


@pytest.mark.parametrize(
    "domain, code",
    [
        ("taken.example.com", "ERR_NGROK_320"),
        ("nobodys.ngrok.app", "ERR_NGROK_319"),
        ("nobodys.example.com", "ERR_NGROK_314"),
        ("under_score.ngrok.app", "ERR_NGROK_326"),
    ],
)
def test_domains_of_others(cloud, config, domain, code):
    cloud.add_account(paid_account("taken.example.com"))
    with pytest.raises(PyngrokNgrokHTTPError) as error:
        ngrok.connect("5000", url=domain, pyngrok_config=config)
    assert code_of(error) == code


def test_paid_account_has_domains_random_hosts_and_many_agents(cloud, make_config, upstream):
    account = cloud.add_account(paid_account("models.example.com", "mine.ngrok.app"))
    configs = [make_config(account.token) for _ in range(2)]
    own = ngrok.connect(str(upstream.port), url="models.example.com", pyngrok_config=configs[0])
    free = ngrok.connect(str(upstream.port), pyngrok_config=configs[1])
    assert own.public_url == "https://models.example.com"
    assert re.fullmatch(r"https://[0-9a-f]{12}\.ngrok\.app", free.public_url)
    for one in (own, free):  # no warning page for paid accounts
        answer = requests.get(one.public_url, headers={"User-Agent": BROWSER})
        assert answer.text == "GET /"
        assert "Ngrok-Agent-Ips" not in answer.headers


# --- the edge -----------------------------------------------------------------------------------


def test_upstream_sees_the_public_host(cloud, url, upstream):
    host = url.removeprefix("https://")
    requests.get(f"{url}/a?b=%20c", headers={"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Host": "x"})
    (seen,) = upstream.seen
    assert seen.path == "/a?b=%20c"
    assert seen.headers["Host"] == host
    assert seen.headers["X-Forwarded-For"] == "1.2.3.4, 127.0.0.1"
    assert seen.headers.get_all("X-Forwarded-Host") == [host]
    assert seen.headers["X-Forwarded-Proto"] == "https"
    assert "Connection" not in seen.headers
    (known,) = cloud.requests
    assert (known.method, known.host, known.path, known.status, known.error) == (
        "GET", host, "/a?b=%20c", 200, None,
    )  # fmt: skip
    assert known.user_agent.startswith("python-requests")


def test_certificate_is_of_the_clouds_own_authority(cloud, url, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(url)
    context = ssl.create_default_context(cafile=cloud.ca_file)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    assert opener.open(url).status == 200


def test_proxy_leads_to_endpoints_only(cloud):
    for address in ("https://example.com", "https://pypi.org:8443"):
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(address)
    assert cloud.refused == ["example.com:443", "pypi.org:8443"]


def test_browsers_meet_a_warning_first(cloud, url, upstream):
    host = url.removeprefix("https://")
    browser = requests.Session()
    browser.headers.update({"User-Agent": BROWSER, "Accept": "text/html,*/*"})
    page = browser.get(url)
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (200, "ERR_NGROK_6024")
    assert f"You are about to visit {host}" in page.text
    assert ">Visit Site</button>" in page.text
    plain = browser.get(url, headers={"Accept": "application/json"})
    assert plain.headers["Content-Type"] == "text/plain"
    assert upstream.seen == []
    assert browser.options(url).text == "OPTIONS /"
    assert browser.get(url, headers={"ngrok-skip-browser-warning": "0"}).text == "GET /"
    name, value = re.search(r'document.cookie = "(\w+)=([^;]+);', page.text).groups()
    browser.cookies.set(name, value, domain=host)
    assert browser.get(url).text == "GET /"
    assert [one.error for one in cloud.requests] == ["6024", "6024", None, None, None]


@pytest.mark.parametrize("how", ["disconnect", "kill", "drop"])
def test_endpoint_that_is_offline(cloud, config, url, how):
    if how == "disconnect":
        ngrok.disconnect(url, config)
    elif how == "kill":
        ngrok.kill(config)
        assert wait_for(lambda: not cloud.endpoints)
    else:
        cloud.drop(url)
        assert [one.public_url for one in ngrok.get_tunnels(config)] == [url]
    page = requests.get(url)
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (404, "ERR_NGROK_3200")
    assert page.headers["Content-Type"] == "text/html"
    assert "is offline." in page.text
    assert "ERR_NGROK_3200" in page.text


def test_upstream_that_is_down(cloud, config):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    url = ngrok.connect(str(port), pyngrok_config=config).public_url
    page = requests.get(url)
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (502, "ERR_NGROK_8012")
    assert f"http://localhost:{port}" in page.text
    assert "connection refused" in page.text
    assert has_log(config, 'msg="failed to open private leg"')


def test_upstream_that_breaks_off(url):
    page = requests.get(f"{url}/broken")
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (502, "ERR_NGROK_3004")


def test_methods_and_statuses(url):
    with requests.Session() as session:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert session.request(method, f"{url}/x").text == f"{method} /x"
        head = session.head(f"{url}/x")
        assert (head.text, head.headers["Content-Length"]) == ("", "7")
        assert session.get(f"{url}/not-modified").status_code == 304
        assert session.get(f"{url}/empty").status_code == 204
        assert session.get(f"{url}/cookies").cookies.get_dict() == {"a": "1", "b": "2"}


def test_large_bodies_both_ways(url):
    data = os.urandom(5 << 20)
    assert requests.post(url, data=data).content == data

    def parts():
        for start in range(0, len(data), 300_000):
            yield data[start : start + 300_000]

    assert requests.post(url, data=parts()).content == data


def test_answer_before_the_body_is_read(url):
    answer = requests.post(f"{url}/early", data=b"x" * (3 << 20))
    assert (answer.status_code, answer.text) == (401, "no")


def test_response_streams(url, upstream):
    with requests.get(f"{url}/stream", stream=True) as answer:
        pieces = answer.raw.stream()
        assert next(pieces) == b"first"  # while the upstream still waits
        upstream.go_on.set()
        assert b"".join(pieces) == b"second"


def test_parallel_requests(url, upstream):
    started = time.perf_counter()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: requests.get(f"{url}/slow").text, range(20)))
    assert answers == ["GET /slow"] * 20
    assert time.perf_counter() - started < 20 * 0.2


# --- lost sessions ------------------------------------------------------------------------------


def test_agent_reconnects_and_brings_its_endpoints_back(cloud, config, url):
    cloud.disconnect_agents(outage=0.5)
    assert requests.get(url).headers["Ngrok-Error-Code"] == "ERR_NGROK_3200"
    assert has_log(config, "lvl=eror", 'msg="session closed, starting reconnect loop"')
    assert wait_for(lambda: cloud.endpoints == [url])
    assert requests.get(url).text == "GET /"
    assert sum("client session established" in line for line in logs(config)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_agent_ends_by_signal(cloud, config, url, number):
    process = ngrok.get_ngrok_process(config).proc
    process.send_signal(number)
    assert process.wait(5) == 0
    assert wait_for(lambda: not cloud.sessions)


def test_agent_ends_after_its_cloud(tmp_path):
    with NgrokCloud() as cloud:
        words = [cloud.install(tmp_path), "start", "--none", "--authtoken", cloud.account.token]
        process = subprocess.Popen(
            words,
            env={**os.environ, **cloud.environment(), "XDG_CONFIG_HOME": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert wait_for(lambda: cloud.sessions == 1)
    assert process.wait(10) == 1
