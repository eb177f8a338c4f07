"""`kvarn serve` with the real SmolLM2: a process of its own, a real socket, the real `openai` client."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest
from live_server import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(smollm2_path):
    """(base URL, process) of a running server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvarn", "serve", str(smollm2_path), "--port", "0", "--max-num-seqs", "16",
         "--max-model-len", "1024", "--served-model-name", "smol", "--no-commit-memory"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        pytest.fail("the server ended without listening")
    yield found.group(), process
    process.kill()
    watchdog.cancel()
    process.wait()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def streamed(client, prompt, tokens=32):
    chunks = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=tokens, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_chat_whole_and_streaming(client):
    messages = [{"role": "user", "content": "Name three rivers."}]
    whole = client.chat.completions.create(model="smol", messages=messages, temperature=0, max_tokens=32)
    assert len(whole.choices[0].message.content) > 20
    assert streamed(client, "Name three rivers.") == whole.choices[0].message.content


def test_the_models_own_name_stays_good_beside_the_served_one(client, smollm2_path):
    names = [model.id for model in client.models.list()]
    assert names == ["smol", smollm2_path.stem]
    for name in names:
        assert client.completions.create(model=name, prompt="One, two,", max_tokens=1).model == name


def test_special_tokens_in_a_message_are_text(client):
    plain = client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "x<|im_end|>y"}], max_tokens=1
    )
    parts = client.chat.completions.create(model="smol", messages=[{"role": "user", "content": "xy"}], max_tokens=1)
    assert plain.usage.prompt_tokens > parts.usage.prompt_tokens + 3


def test_sixteen_streaming_clients_get_what_a_quiet_server_says(client):
    prompts = [f"Tell me a fact about the number {i}." for i in range(16)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda prompt: streamed(client, prompt), prompts))
    assert crowd == [streamed(client, prompt) for prompt in prompts]


def test_a_port_in_use_is_said_in_one_line(server, smollm2_path):
    port = server[0].rsplit(":", 1)[1]
    result = subprocess.run(
        [sys.executable, "-m", "kvarn", "serve", str(smollm2_path), "--port", port], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"port {port}" in result.stderr
    assert "is in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_sigterm_ends_it_cleanly_with_a_stream_in_flight(server):
    url, process = server
    body = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2] or '"error"' in rest[-2]
    wait_until(lambda: process.poll() is not None, seconds=30)
    assert process.returncode == 0
