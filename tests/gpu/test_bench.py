"""`bench/gpu.py` from end to end on tiny shapes: every part runs, in the interpreter or on a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ENGINES = ("kvarn", "transformers, continuous batching", "transformers, static cache, compiled")
ON_A_CARD_ALONE = {"memory"}
"""A CPU's allocator does not say what it held at most."""


def test_every_part_runs_on_tiny_shapes(device, tmp_path):
    command = [sys.executable, "bench/gpu.py", "--tiny", "--here", "--device", device, "--out", str(tmp_path)]
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "KVARN_PACKED_CACHE_BYTES": "0", **threads}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["part"], row["what"]): row for row in found["rows"]}

    assert not [row for row in found["rows"] if row["mark"] not in ("", "skipped")]
    left_out = {part for (part, what), row in rows.items() if row["skipped"] and what != "memory over N"}
    assert left_out == (ON_A_CARD_ALONE if device == "cpu" else set())
    for form in ("bf16", "int8"):
        for what in ("1 at once", "1 at once, no graphs"):
            assert rows["decode", f"tiny {form}, {what}"]["value"] > 0
        assert rows["prefill", f"tiny {form}, 4 tokens"]["value"] > 0
        assert rows["memory", f"tiny {form}"]["detail"]["planned_total"] > 0
    for form in ("bf16", "int8", "fp8", "int4"):
        for count in ("1 row", "3 rows"):
            assert rows["linears", f"a layer's matrices, {form}, {count}"]["value"] > 0
    for kv_type in ("int8", "fp8_e4m3"):
        assert rows["decode", f"tiny bf16, 1 at once, {kv_type} KV"]["value"] > 0
        assert rows["attention", f"decode, 2 x 32 tokens, {kv_type} KV"]["value"] > 0
    for engine in ENGINES:
        assert rows["streams", f"tiny, {engine}"]["value"] > 0
    # The same function on the same weights: what a comparison of speeds rests on.
    assert rows["streams", "tiny: logits against transformers'"]["figure"] < 0.02
    assert {path.name for path in tmp_path.glob("*.png")} == {"attention.png", "decode.png", "streams.png"}
