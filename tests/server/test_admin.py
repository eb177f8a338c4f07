"""The admin routes, TLS and CORS; and all of it together in a process that `kvarn serve` started."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from gated_engine import gated_llm
from live_server import posted, serving, wait_until
from test_bad_requests import check_shape

from kvarn.errors import ConfigError
from kvarn.server.admin import AdminOptions
from kvarn.server.cors import check_origins
from kvarn.server.keys.file import add_key
from kvarn.server.listening import Tls, is_loopback, listen
from kvarn.testing.gguf import write_tiny_gguf

COMPLETIONS, RESET = "/v1/completions", "/admin/cache/reset"
LONG = {"prompt": "x" * 80, "max_tokens": 20, "ignore_eos": True}
DATA = Path(__file__).parent / "data"
TLS = Tls(DATA / "localhost.crt.pem", DATA / "localhost.key.pem")


def test_the_cache_is_dropped_but_for_what_runs(llm):
    with serving(llm) as url, serving(llm, admin=AdminOptions()) as admin:
        def cached():
            usage = httpx.post(url + COMPLETIONS, json=LONG, timeout=60).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        cached()
        assert cached() > 0
        held = llm.stats().cached_blocks
        response = httpx.post(admin + RESET)
        assert response.json() == {"freed_blocks": held}
        assert llm.stats().cached_blocks == 0
        assert cached() == 0
        assert "x-request-id" in response.headers


def test_a_reset_disturbs_no_answer():
    with gated_llm() as (llm, gate), serving(llm) as url, serving(llm, admin=AdminOptions()) as admin:
        with posted(url, COMPLETIONS, {**LONG, "seed": 1}) as asked:
            gate.stand_in_step(5)
            with posted(admin, RESET, {}) as reset:
                wait_until(lambda: llm._loop._calls)  # the engine takes it between two steps
                gate.finish_step()
                assert reset.getresponse().status == 200
            gate.open()
            said = json.loads(asked.getresponse().read())["choices"][0]["text"]
        assert httpx.post(url + COMPLETIONS, json={**LONG, "seed": 1}).json()["choices"][0]["text"] == said


def test_while_there_is_no_engine_there_is_nothing_to_reset():
    with serving(None, admin=AdminOptions()) as admin:
        check_shape(httpx.post(admin + RESET), 503)


def test_an_engine_that_ends_meanwhile_answers_all_the_same():
    with contextlib.ExitStack() as stack:
        llm, gate = stack.enter_context(gated_llm())
        admin, url = stack.enter_context(serving(llm, admin=AdminOptions())), stack.enter_context(serving(llm))
        stack.enter_context(posted(url, COMPLETIONS, LONG))
        gate.stand_in_step(1)
        reset = stack.enter_context(posted(admin, RESET, {}))
        wait_until(lambda: llm._loop._calls)
        llm._loop._closing = True
        gate.open()
        assert reset.getresponse().status == 500


def test_admin_routes_are_not_on_the_api_nor_the_api_on_them(llm):
    with serving(llm) as url, serving(llm, admin=AdminOptions()) as admin:
        check_shape(httpx.post(url + RESET), 404)
        check_shape(httpx.get(f"{admin}/v1/models"), 404)
        check_shape(httpx.get(admin + RESET), 405)


def test_with_a_key_only_who_has_it_is_let_in(llm):
    with serving(llm, admin=AdminOptions(key="secret")) as admin:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {"x-api-key": ""}):
            response = httpx.post(admin + RESET, headers=headers)
            check_shape(response, 401)
            assert "secret" not in response.text
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert httpx.post(admin + RESET, headers={**headers, "host": "proxy.example"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://example.org"}, {"origin": "null"}, {"host": "rebound.example"}, {"host": "127.0.0.1.example"},
     {"host": "[::1].example"}, {"host": "10.0.0.1"}],
)  # fmt: skip
def test_without_a_key_no_page_is_let_in(llm, headers):
    with serving(llm, admin=AdminOptions()) as admin:
        check_shape(httpx.post(admin + RESET, headers=headers), 403)
        assert httpx.post(admin + RESET, headers={"host": "localhost:9"}).status_code == 200
        assert httpx.post(admin + RESET, headers={"host": "[::1]:9"}).status_code == 200


def test_beyond_this_machine_a_key_is_needed():
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="give an --admin-key"):
            AdminOptions(host, 9000)
        AdminOptions(host, 9000, "key")
        AdminOptions(host)  # nowhere
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        AdminOptions(host, 9000)
    with pytest.raises(ConfigError, match="admin_port must be between"):
        AdminOptions(port=70000)
    assert "secret" not in repr(AdminOptions(key="secret"))
    assert not is_loopback("localhost.example")


def test_a_port_in_use_is_told_with_its_flag():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: it is in use.*--admin-port"):
            listen("127.0.0.1", port, "--admin-port")


def test_tls(llm):
    trusted = ssl.create_default_context(cafile=str(TLS.cert))
    with serving(llm, tls=TLS) as url:
        assert url.startswith("https://")
        assert httpx.post(url + COMPLETIONS, json=LONG, verify=trusted, timeout=60).status_code == 200
        body = {**LONG, "stream": True}
        with httpx.stream("POST", url + COMPLETIONS, json=body, verify=trusted, timeout=60) as stream:
            assert stream.read().endswith(b"data: [DONE]\n\n")
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http") + "/health")
        assert httpx.get(f"{url}/health", verify=trusted).status_code == 200


def test_files_that_are_no_certificate_and_key_are_told(tmp_path):
    assert Tls().scheme == "http"
    with pytest.raises(ConfigError, match="--tls-cert needs --tls-key"):
        Tls(TLS.cert)
    with pytest.raises(ConfigError, match="--tls-key needs --tls-cert"):
        Tls(key=TLS.key)
    with pytest.raises(ConfigError, match=r"--tls-key: cannot read .*none.pem: No such file"):
        Tls(TLS.cert, tmp_path / "none.pem")
    for cert, key in ((TLS.key, TLS.key), (TLS.cert, TLS.cert), (Path(__file__), TLS.key)):
        with pytest.raises(ConfigError, match="not a certificate and its key"):
            Tls(cert, key)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_text(ENCRYPTED)
    with pytest.raises(ConfigError, match="is encrypted"):
        Tls(TLS.cert, encrypted)


ENCRYPTED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgWDUp8JEVdhgICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEEtyP+ZnBhSdmgzo2moiCgIEgZD5
U/JQo5Pd121Krtj//+ZyNsrLNwKMbWaAUZMbn7jstZlGs6dcAEWeTfVRTex4Rvan
wEnMpCFWM/uF+KlcItdczaWixSv9xvTaQHcjQjOXRnp0+CyszAMZGQUi0c1NUw7j
jM88vAI7a+9b9SuwVvwvD9jn0g6LNiSVHA1JhPo7VVbG0LWw5OnYG5MLVebqxYU=
-----END ENCRYPTED PRIVATE KEY-----
"""
"""Some key, under a password."""

ORIGIN = "https://app.example"


def preflight(url, origin=ORIGIN):
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return httpx.options(url + COMPLETIONS, headers={"origin": origin, **asks})


def test_no_page_of_another_origin_may_ask_unless_told(llm):
    with serving(llm) as url:
        assert preflight(url).status_code == 405
        response = httpx.post(url + COMPLETIONS, json=LONG, headers={"origin": ORIGIN})
        assert not any(name.startswith("access-control") for name in response.headers)


def test_pages_of_named_origins_may_ask(llm):
    with serving(llm, cors_origins=[ORIGIN], api_keys=["key"]) as url:
        allowed = preflight(url)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert preflight(url, "https://evil.example").status_code == 400
        for headers, status in (({"x-api-key": "key"}, 200), ({}, 401)):
            response = httpx.post(url + COMPLETIONS, json=LONG, headers={"origin": ORIGIN, **headers}, timeout=60)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "x-request-id" in response.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in response.headers


def test_what_is_no_origin_is_told():
    check_origins(["*", ORIGIN, "http://localhost:3000", "http://[::1]:80"])
    for wrong in ("", "example.org", "https://example.org/", "https://a.b/c", "https://*.b", "null", "ftp://a", "a b"):
        with pytest.raises(ConfigError, match="cors_origin must be"):
            check_origins([wrong])


@pytest.fixture
def started(tmp_path):
    """(URL of the API, URL of the admin routes, lines of the log, key) of a server in a process of its own."""
    keys = tmp_path / "keys.toml"
    key = add_key(keys, "ann", requests_per_minute=10)
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    command = [
        sys.executable, "-m", "kvarn", "serve", str(model), "--port", "0", "--admin-port", "0", "--kv-cache-bytes",
        "1MiB", "--keys-file", str(keys), "--log-format", "json", "--tls-cert", str(TLS.cert), "--tls-key",
        str(TLS.key), "--max-n", "2", "--no-commit-memory",
    ]  # fmt: skip
    environment = {**os.environ, "KVARN_ADMIN_KEY": "admin-secret", "KVARN_PACKED_CACHE_BYTES": "0"}
    log = tmp_path / "log"
    with log.open("w") as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    ) as process:
        try:
            url = next(found[0] for line in process.stdout if (found := re.search(r"https://[0-9.:]+", line)))
            lines = lambda: [json.loads(line) for line in log.read_text().splitlines()]  # noqa: E731
            (told,) = [line["message"] for line in lines() if "admin routes on" in line["message"]]
            yield url, told.split()[-1], lines, key
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_all_of_it_together_as_it_is_started(started):
    url, admin, lines, key = started
    trusted = ssl.create_default_context(cafile=str(TLS.cert))
    with httpx.Client(verify=trusted, timeout=60) as client:
        wait_until(lambda: client.get(f"{url}/health").status_code == 200, 30)
        assert client.post(url + COMPLETIONS, json=LONG).status_code == 401
        asked = {"authorization": f"Bearer {key}", "x-request-id": "mine"}
        answer = client.post(url + COMPLETIONS, json={**LONG, "prompt": "a secret question"}, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "9"
        refused = client.post(url + COMPLETIONS, json={**LONG, "n": 3}, headers=asked)
        assert "n must be at most 2, not 3 (max_n)" in refused.text
        assert client.post(admin + RESET).status_code == 401
        assert client.post(admin + RESET, headers={"x-api-key": "admin-secret"}).json()["freed_blocks"] > 0
        wait_until(lambda: len([line for line in lines() if line["message"] == "request"]) >= 5)
    told = next(line for line in lines() if line.get("request_id") == "mine")
    assert (told["key"], told["status"], told["completion_tokens"]) == ("ann", 200, 20)
    said = json.dumps(lines())
    assert not any(secret in said for secret in (key, "admin-secret", "secret question"))
