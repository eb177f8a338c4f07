"""The command line on the real SmolLM2, each command in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e


def kvarn(*arguments: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "kvarn", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert not check or result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_help_lists_every_command():
    text = kvarn("--help").stdout
    for name in ("run", "chat", "serve", "pull", "models", "plan", "tokenize", "eval", "bench", "profile"):
        assert f"  {name} " in text


@pytest.mark.parametrize("name", ["run", "chat", "serve", "pull", "models", "plan", "tokenize", "profile"])
def test_each_commands_help_teaches_by_example(name):
    assert f"kvarn {name}" in kvarn(name, "--help").stdout


def test_run_answers_and_is_reproducible(smollm2_path):
    arguments = ("run", "Name three rivers.", "--model", str(smollm2_path), "--max-tokens", "12", "--json")
    first = json.loads(kvarn(*arguments, "--temperature", "0").stdout)
    again = json.loads(kvarn(*arguments, "--temperature", "0").stdout)
    assert first["text"] == again["text"] != ""
    assert first["completion_tokens"] <= 12
    assert first["finish_reason"] in ("stop", "length")
    seeded = [json.loads(kvarn(*arguments, "--temperature", "1", "--seed", "7").stdout)["text"] for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_run_reads_the_prompt_from_a_pipe(smollm2_path):
    result = kvarn("run", "--model", str(smollm2_path), "--max-tokens", "4", "--raw", stdin="The capital of France is")
    assert result.stdout.strip()


def test_chat_keeps_the_conversation(smollm2_path):
    script = "Say hello.\n/again\n/clear\n/nonsense\nSay hello.\n/quit\n"
    result = kvarn("chat", str(smollm2_path), "--max-tokens", "8", "--temperature", "0", stdin=script)
    answers = [line for line in result.stdout.splitlines() if line.strip()]
    assert len(answers) >= 3
    assert "no command /nonsense" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "hi", "--temperature", "-1"), "temperature must be between 0 and 100"),
        (("run", "hi", "--model", "no-such-model"), "no-such-model"),
        (("run", "hi", "--model", __file__), "not a GGUF"),
        (("eval", "perplexity", "no-such-model", "--text", __file__), "no-such-model"),
        (("nonsense",), "No such command"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, message):
    result = kvarn(*arguments, check=False)
    assert result.returncode != 0
    assert message.lower() in result.stderr.lower()


@pytest.mark.parametrize("name", ["roofline", "latency", "compare"])
def test_each_benchs_help_teaches_by_example(name):
    assert f"kvarn bench {name}" in kvarn("bench", name, "--help").stdout


def test_bench_and_profile_of_a_quantized_model(smollm2_path):
    small = ("--prefill", "16", "--depth", "0", "--rounds", "1", "--json")
    rows = json.loads(kvarn("bench", "latency", str(smollm2_path), *small, "--decode", "2", "--batch", "1").stdout)
    assert {row["limit"] for row in rows["latency"]["rows"]} <= {"memory", "arithmetic"}
    assert all(row["cost"]["integer_macs"] > 100e6 for row in rows["latency"]["rows"])
    profiles = json.loads(kvarn("profile", str(smollm2_path), *small).stdout)["profiles"]
    assert {"prepare", "q+k+v", "gate+up", "down", "logits"} <= {row["name"] for row in profiles[0]["rows"]}
