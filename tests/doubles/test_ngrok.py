"""The stand-in behaves like ngrok, as pyngrok and https clients see it."""

import http.server
import os
import re
import socket
import subprocess
import threading
from types import SimpleNamespace

import pytest
import requests
from pyngrok import conf, ngrok
from pyngrok.exception import PyngrokNgrokError, PyngrokNgrokHTTPError

from tests.doubles.ngrok import free_account, paid_account
from tests.series import wait_for

BROWSER = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/130.0 Safari/537.36"


class Upstream(http.server.BaseHTTPRequestHandler):
    """Answers by path, and echoes bodies."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        if "Transfer-Encoding" not in self.headers:
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
        if status != 304:
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
        self.server.seen.append(SimpleNamespace(path=self.path, headers=self.headers))
        if self.path == "/not-modified":
            self.answer(304, ETag='"1"')
        elif self.path == "/broken":
            self.close_connection = True
        elif self.path == "/incomplete":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"half")
        elif self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (b"5\r\nfirst\r\n", b"6\r\nsecond\r\n0\r\n\r\n"):
                self.wfile.write(part)
                self.server.go_on.wait(5)
        else:
            self.answer(200, data or f"{self.command} {self.path}".encode(), Set_Cookie="a=1")

    do_GET = do_HEAD = do_POST = do_OPTIONS = handle_any  # noqa: N815


@pytest.fixture
def upstream():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.seen, server.go_on = [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make_config(cloud, tmp_path, monkeypatch):
    """Give each agent an executable and a configuration of its own; end them all."""
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    made = []

    def make(token=cloud.account.token):
        folder = tmp_path / f"agent {len(made)}"
        config = conf.PyngrokConfig(
            ngrok_path=str(cloud.install(folder)), config_path=str(folder / "ngrok.yml")
        )
        config.auth_token = token
        made.append(config)
        return config

    yield make
    for config in made:
        ngrok.kill(config)
    assert wait_for(lambda: not cloud.endpoints)


def connect(config, port, **options):
    return ngrok.connect(str(port), "http", pyngrok_config=config, **options).public_url


@pytest.fixture
def url(make_config, upstream):
    return connect(make_config(), upstream.server_port)


# --- agents -------------------------------------------------------------------------------------


def test_agents_of_an_account_get_what_its_plan_allows(cloud, make_config, upstream):
    free = [make_config() for _ in range(4)]
    assert connect(free[0], upstream.server_port) == cloud.account.url
    for config in free[1:3]:  # three agents, but only one address
        with pytest.raises(PyngrokNgrokHTTPError, match="ERR_NGROK_334"):
            connect(config, upstream.server_port)
    with pytest.raises(PyngrokNgrokError, match="limited to 3 .*ERR_NGROK_108"):
        ngrok.get_ngrok_process(free[3])
    # A killed agent frees its session and its address at once.
    ngrok.kill(free[0])
    assert connect(free[3], upstream.server_port) == cloud.account.url

    old = cloud.add_account(free_account(agents=1)).token
    ngrok.get_ngrok_process(make_config(old))
    with pytest.raises(PyngrokNgrokError, match="limited to 1 .*ERR_NGROK_108"):
        ngrok.get_ngrok_process(make_config(old))

    token = cloud.add_account(paid_account("models.example.com")).token
    first, second = make_config(token), make_config(token)
    own = connect(first, upstream.server_port, url="https://models.example.com")
    assert own == "https://models.example.com"
    assert re.fullmatch(r"https://\w+\.ngrok\.app", connect(second, upstream.server_port))
    # No warning page for paid accounts.
    assert requests.get(own, headers={"User-Agent": BROWSER}).text == "GET /"


@pytest.mark.parametrize(
    ("token", "code"),
    [("", "4018"), ("not-a-token", "105"), ("2unknown012345678_0123456789abcdef", "107")],
)
def test_tokens_that_start_no_agent(make_config, capfd, token, code):
    with pytest.raises(PyngrokNgrokError) as error:
        ngrok.get_ngrok_process(make_config(token))
    assert error.value.ngrok_error.startswith("authentication failed: ")
    assert f"ERR_NGROK_{code}" in error.value.ngrok_error
    assert f"ERROR:  ERR_NGROK_{code}\n" in capfd.readouterr().err


def test_addresses_that_are_refused(make_config, cloud):
    config = make_config()
    connect(config, 9)
    addresses = {cloud.account.url: "334", "https://other.ngrok.app": "319"}
    for address, code in {**addresses, "https://models.example.com": "314"}.items():
        with pytest.raises(PyngrokNgrokHTTPError) as error:
            connect(config, 9, url=address)
        assert error.value.status_code == 502
        assert f"ERR_NGROK_{code}" in error.value.body


def test_agent_without_a_network_never_ends_and_says_that_it_is_not_ready(make_config, tmp_path):
    config = make_config()
    command = [config.ngrok_path, "start", "--none", "--log", "stdout"]
    (tmp_path / "ngrok.yml").write_text("agent:\n    authtoken: x\n", encoding="utf-8")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{closed.getsockname()[1]}"
        agent = subprocess.Popen(
            [*command, "--config", str(tmp_path / "ngrok.yml")],
            env={**os.environ, "NGROK_DOUBLE_CLOUD": nowhere},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            lines = [agent.stdout.readline() for _ in range(3)]
            assert agent.poll() is None
            (address,) = re.findall(r"addr=([\d.:]+)", lines[0])
            assert all("lvl=eror" in line and "refused" in line for line in lines[1:])
            asking = {"name": "a", "upstream": {"url": "http://localhost:9"}}
            early = requests.post(f"http://{address}/api/endpoints", json=asking)
            assert (early.status_code, early.json()["error_code"]) == (503, 104)
            unknown = requests.get(f"http://{address}/api/tunnels")
            assert (unknown.status_code, "error_code" in unknown.json()) == (404, False)
        finally:
            agent.kill()
            agent.communicate()


# --- the edge -----------------------------------------------------------------------------------


def test_upstream_sees_the_public_host(url, upstream):
    requests.get(f"{url}/a?b=%20c", headers={"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Host": "x"})
    (seen,) = upstream.seen
    host = url.removeprefix("https://")
    assert seen.path == "/a?b=%20c"
    assert seen.headers["Host"] == host
    assert seen.headers["X-Forwarded-For"] == "1.2.3.4, 127.0.0.1"
    assert seen.headers.get_all("X-Forwarded-Host") == [host]
    assert seen.headers["X-Forwarded-Proto"] == "https"


def test_proxy_leads_to_endpoints_only(cloud, url):
    for address in ("https://pypi.org", f"{url}:8443"):
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(address)


def test_browsers_meet_a_warning_first(url, upstream):
    host = url.removeprefix("https://")
    browser = requests.Session()
    browser.headers.update({"User-Agent": BROWSER, "Accept": "text/html,*/*"})
    page = browser.get(url)
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (200, "ERR_NGROK_6024")
    assert f"You are about to visit {host}" in page.text
    plain = browser.get(url, headers={"Accept": "application/json"})
    assert plain.headers["Content-Type"].startswith("text/plain")
    assert upstream.seen == []
    assert browser.options(url).text == "OPTIONS /"
    assert browser.get(url, headers={"ngrok-skip-browser-warning": "0"}).text == "GET /"
    browser.cookies.clear()
    name, value = re.search(r'document.cookie = "(\w+)=([^;]+);', page.text).groups()
    browser.cookies.set(name, value, domain=host)
    assert browser.get(url).text == "GET /"


def test_endpoint_that_is_dropped_is_offline_and_its_agent_does_not_know(cloud, make_config):
    config = make_config()
    url = connect(config, 9)
    cloud.drop(url)
    assert [one.public_url for one in ngrok.get_tunnels(config)] == [url]
    page = requests.get(url)
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (404, "ERR_NGROK_3200")
    assert "ERR_NGROK_3200" in page.text


def test_upstream_that_is_down(make_config):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        page = requests.post(connect(make_config(), other.getsockname()[1]), data="x")
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (502, "ERR_NGROK_8012")


def test_upstream_that_breaks_off(url):
    page = requests.get(f"{url}/broken")
    assert (page.status_code, page.headers["Ngrok-Error-Code"]) == (502, "ERR_NGROK_3004")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(f"{url}/incomplete")


def test_answers_without_a_body(url):
    head = requests.head(f"{url}/x")
    assert (head.text, head.headers["Content-Length"]) == ("", "7")
    assert head.cookies.get_dict() == {"a": "1"}
    assert requests.get(f"{url}/not-modified").status_code == 304


def test_large_bodies_both_ways(url):
    data = os.urandom(5 << 20)
    assert requests.post(url, data=data).content == data
    parts = (data[start : start + 300_000] for start in range(0, len(data), 300_000))
    assert requests.post(url, data=parts).content == data


def test_answer_before_the_body_is_read(url):
    answer = requests.post(f"{url}/early", data=b"x" * (3 << 20))
    assert (answer.status_code, answer.text) == (401, "no")


def test_response_streams(url, upstream):
    with requests.get(f"{url}/stream", stream=True) as answer:
        pieces = answer.raw.stream()
        assert next(pieces) == b"first"  # while the upstream still waits
        upstream.go_on.set()
        assert b"".join(pieces) == b"second"
