"""What a loaded SmolLM2 takes, counted by the kernel, against what the plan says; on the first start and the second."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

SLACK = 120_000_000
"""Interpreter, libraries, tokenizer, activations, and large pages that are not full."""
BLOCKS = 64
SCRIPT = """
import json, sys
from kvarn.engine import LLM
from kvarn.request import SamplingParams
with LLM(sys.argv[1], num_blocks=int(sys.argv[2]), max_num_seqs=1) as llm:
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": "Name three rivers."}])
    (completion,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=24, logprobs=3))
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    logprobs = [[t.logprob, [list(pair) for pair in t.top]] for t in completion.choices[0].logprobs]
    print(json.dumps({"resident": int(fields["VmRSS"].split()[0]) * 1024, "text": completion.text, "log": logprobs}))
"""


def start(path, home, **environment):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(BLOCKS)],
        env={**os.environ, "KVARN_HOME": str(home), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_memory_is_what_the_plan_says(smollm2_path, tmp_path):
    plan = subprocess.run(
        [sys.executable, "-m", "kvarn", "plan", str(smollm2_path), "--json"], check=True, capture_output=True, text=True
    )
    planned = json.loads(plan.stdout)
    bound = planned["packed_weight_bytes"] + BLOCKS * 16 * planned["kv_bytes_per_token"] + SLACK
    without = start(smollm2_path, tmp_path, KVARN_PACKED_CACHE_BYTES="0")
    assert not (tmp_path / "packed").exists()
    first = start(smollm2_path, tmp_path, KVARN_PACKED_CACHE_BYTES="1000000000")
    (file,) = (tmp_path / "packed").iterdir()
    assert planned["packed_weight_bytes"] <= file.stat().st_size <= planned["packed_weight_bytes"] * 1.02
    second = start(smollm2_path, tmp_path, KVARN_PACKED_CACHE_BYTES="1000000000")
    assert max(without["resident"], first["resident"], second["resident"]) <= bound
    assert without["text"] == first["text"] == second["text"]
    assert without["log"] == first["log"] == second["log"]
