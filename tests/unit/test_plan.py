"""The plan's numbers are exact, and its command says them as a table and as JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli.app import app
from kvarn.errors import ConfigError
from kvarn.models import program_from_config
from kvarn.planning import plan
from kvarn.program.listing import listing
from kvarn.tensors import DType
from kvarn.testing import tiny_model

CONFIG = Path(__file__).parent / "data/llama-3-8b.json"


@pytest.fixture(scope="module")
def llama():
    _, program = program_from_config(json.loads(CONFIG.read_text()), "hf")
    return program, {weight.name: DType.BF16 for weight in program.weights}


def test_llama_3_8b_to_the_byte(llama):
    p = plan(*llama, batch=32, max_model_len=8192)
    assert p.parameters == 8_030_261_248
    assert p.weight_bytes == 16_060_522_496
    assert p.kv_bytes_per_token == 131_072
    assert p.kv_bytes_per_sequence == 2**30
    assert p.kv_bytes_total == p.kv_bytes_allocated == 34_359_738_368
    assert p.kv_bytes_per_token_without_grouping == 4 * 131_072


def test_the_cache_outgrows_the_weights_where_it_says(llama):
    p = plan(*llama)
    assert (p.outgrow_tokens - 1) * p.kv_bytes_per_token <= p.weight_bytes < p.outgrow_tokens * p.kv_bytes_per_token


def test_prefill_costs_two_operations_a_weight_and_token(llama):
    p = plan(*llama, prefill_tokens=1024)
    embedding = 128256 * 4096
    linears = 2 * 1024 * (p.parameters - 2 * embedding) + 2 * embedding
    assert p.prefill.flops == pytest.approx(linears + 32 * 4 * 4096 * (1024 * 1025 // 2), rel=1e-3)
    assert p.decode.weight_bytes == pytest.approx(p.weight_bytes - 2 * embedding, rel=1e-4)


def test_blocks_round_up(llama):
    p = plan(*llama, max_model_len=100)
    assert p.kv_bytes_total == 100 * 131_072
    assert p.kv_bytes_allocated == 112 * 131_072


def test_sliding_windows_need_less():
    model = tiny_model("gemma3_text", num_hidden_layers=4)
    types = {w.name: DType.F32 for w in model.program.weights}
    p = plan(model.program, types, max_model_len=512)
    layer = 2 * 2 * 32 * 2
    assert p.kv_bytes_per_sequence == 4 * layer * 512
    assert p.kv_bytes_per_sequence_needed == 2 * layer * 512 + 2 * layer * 24


@pytest.mark.parametrize(
    ("setting", "value"), [("max_model_len", 8193), ("max_model_len", 0), ("batch", 0), ("prefill_tokens", 10**6)]
)
def test_settings_out_of_range_are_named(llama, setting, value):
    with pytest.raises(ConfigError, match=setting.removesuffix("_tokens")):
        plan(*llama, **{setting: value})
    with pytest.raises(ConfigError, match="kv_dtype"):
        plan(*llama, kv_dtype="int3")


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command_prints_a_table():
    text = run(CONFIG, "--max-model-len", "8192", "--batch", "32").output
    for number in ("16,060,522,496 B", "131,072 B", "34,359,738,368 B", "batch 32 × length 3,830"):
        assert number in text


def test_the_command_prints_json():
    result = json.loads(run(CONFIG, "--json", "--dtype", "float32").output)
    assert result["weight_bytes"] == 2 * 16_060_522_496
    assert result["family"] == "llama"


def test_the_command_prints_the_program():
    _, program = program_from_config(json.loads(CONFIG.read_text()), "hf")
    assert run(CONFIG, "--program").output.strip() == listing(program)


def test_a_config_that_is_none_is_refused(tmp_path):
    for content, message in {
        '{"model_type": "bloom"}': "bloom",
        "[]": "object",
        '{"model_type": "llama"}': "hidden_size",
    }.items():
        (tmp_path / "config.json").write_text(content)
        assert message in str(run(tmp_path / "config.json").exception)
