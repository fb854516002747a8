"""The edge of the stand-in behaves like ngrok's, as https clients see it.

How its agents do is in the tests of the tunnel, which start them as a notebook does.
"""

import http.server
import os
import re
import threading
from types import SimpleNamespace

import pytest
import requests
from pyngrok import conf, ngrok

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
        else:
            self.answer(200, data or f"{self.command} {self.path}".encode(), Set_Cookie="a=1")

    do_GET = do_HEAD = do_POST = do_OPTIONS = handle_any  # noqa: N815


@pytest.fixture
def upstream():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.seen = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(cloud, tmp_path, upstream, monkeypatch):
    """The address of an endpoint that leads to the upstream."""
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    config = conf.PyngrokConfig(
        ngrok_path=str(cloud.install(tmp_path)), config_path=str(tmp_path / "ngrok.yml")
    )
    config.auth_token = cloud.account.token
    port = str(upstream.server_port)
    yield ngrok.connect(port, "http", pyngrok_config=config).public_url
    ngrok.kill(config)
    assert wait_for(lambda: not cloud.endpoints)


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
