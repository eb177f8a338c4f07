"""`kvarn serve A B`, the real SmolLM2 among them: a process of its own, its signals, and an engine that is broken."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from live_server import wait_until

from kvarn.testing import write_tiny_gguf

pytestmark = pytest.mark.e2e

CHAT = {"messages": [{"role": "user", "content": "Name three rivers."}], "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def server(smollm2_path, tmp_path_factory):
    """(client, process, what it said) of a running server, whose engines SIGUSR1 breaks."""
    tiny = write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvarn.testing.faulty_server", "serve", f"smol={smollm2_path}",
         f"{tiny},max-model-len=64", "--port", "0", "--max-num-seqs", "8", "--max-model-len", "1024",
         "--no-commit-memory"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        pytest.fail("the server ended without listening")
    threading.Thread(target=lambda: said.extend(process.stdout), daemon=True).start()
    with httpx.Client(base_url=found.group(), timeout=60) as client:
        yield client, process, said
    process.kill()
    watchdog.cancel()
    process.wait()


def chat(client, model="smol"):
    response = client.post("/v1/chat/completions", json={**CHAT, "model": model})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def states(client):
    return {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}


def test_the_start_says_what_all_take(server):
    _, _, said = server
    text = "".join(said)
    assert re.search(r"smol +\d.*iB .*of weights, KV cache for 8 sequences of 1,024 tokens", text)
    assert re.search(r"tiny +\d.*KiB .*of 64 tokens", text)
    assert "all fit" in text
    assert "when asked for: tiny" in text


def test_another_model_comes_and_goes_beside_a_running_one(server):
    client, _, _ = server
    expected = chat(client)
    assert states(client)["tiny"] == "unloaded"
    answers = []
    running = threading.Thread(target=lambda: answers.append(chat(client)))
    running.start()
    for keep in (0, 0, -1):
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "ignore_eos": True, "keep_alive": keep}
        assert client.post("/v1/completions", json=body).status_code == 200
        if keep == 0:
            wait_until(lambda: states(client)["tiny"] == "unloaded")
    assert set(states(client).values()) == {"loaded"}
    running.join()
    assert answers == [expected]


def test_a_broken_engine_is_back_before_the_next_request(server):
    client, process, said = server
    expected = chat(client)
    body = {"model": "smol", "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        process.send_signal(signal.SIGUSR1)
        *_, error, done = lines
    broken = time.monotonic()
    assert '"engine_error"' in error and "error id" in error
    assert done == "data: [DONE]"
    assert chat(client) == expected
    print(f"answered again {time.monotonic() - broken:.2f} s after the failure")
    assert client.get("/health/ready").status_code == 200
    wait_until(lambda: any("the engine goes on" in line for line in said))


def test_sigterm_lets_a_stream_finish(server):
    client, process, _ = server
    body = {"model": "smol", "prompt": "Once", "max_tokens": 600, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{client.base_url}/health/ready").status_code == 503)
        assert httpx.get(f"{client.base_url}/health/live").status_code == 200
        refused = httpx.post(f"{client.base_url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert '"finish_reason":"length"' in last
    wait_until(lambda: process.poll() is not None, seconds=30)
    assert process.returncode == 0
