"""--device, --dtype and --weights: what they come to, and what is said where there is no card."""

import dataclasses
import json
import sys

import pytest
from typer.testing import CliRunner

from kvarn.backends.cuda import check_device
from kvarn.cli.app import app
from kvarn.cli.options import chosen_device
from kvarn.config import CacheConfig, CudaConfig, EngineConfig
from kvarn.engine import make_backend
from kvarn.errors import ConfigError
from kvarn.testing import write_tiny_gguf


def chosen(device="cuda", dtype=None, weights=None):
    backend, cuda = chosen_device(device, dtype, weights)
    return EngineConfig(backend=backend, cuda=cuda)


def test_what_options_come_to():
    assert chosen("cpu") == EngineConfig()
    assert chosen() == EngineConfig(backend="cuda")
    assert chosen("cuda", "float16", "int8").cuda == CudaConfig("float16", "int8")
    assert chosen(weights="int4:128").cuda == CudaConfig(weights="int4", weight_group=128)
    assert make_backend("cuda", cuda=chosen(weights="fp8").cuda).config.weights == "fp8"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cpu", "dtype": "float16"}, "--dtype is for a GPU"),
        ({"device": "cpu", "weights": "int4"}, "--weights is for a GPU"),
        ({"device": "cuda:1"}, "--device must be cpu or cuda, not 'cuda:1'; of several GPUs CUDA_VISIBLE_DEVICES"),
        ({"dtype": "half"}, "dtype must be one of bfloat16, float16, float32, not 'half'"),
        ({"weights": "int3"}, "weights must be one of stored, dense, int8, int4, fp8, not 'int3'"),
        ({"weights": "int4:48"}, "weight_group must be 32, 64 or 128, not 48"),
        ({"weights": "int8:32"}, "--weights must be stored, dense, int8, int4, int4:GROUP or fp8, not 'int8:32'"),
        ({"weights": "int4:"}, "--weights must be"),
    ],
)
def test_what_is_wrong_is_named(settings, said):
    with pytest.raises(ConfigError) as error:
        chosen(**settings)
    assert str(error.value).startswith(said)


def test_without_torch_the_next_step_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"needs torch, which is not installed: pip install 'kvarn\[cuda\]'"):
        check_device("cuda")


def test_without_a_card_commands_say_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    model = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    for command in (["run", "hello", "--model", model], ["serve", model], ["plan", model]):
        result = CliRunner().invoke(app, [*command, "--device", "cuda"])
        assert result.exit_code != 0
        said = f"{result.output}{result.exception}"
        assert "device cuda" in said
        assert "CUDA" in said or "NVIDIA" in said
        assert ("--memory 80GiB" in said) == (command[0] == "plan")


def test_a_card_is_planned_for_where_there_is_none(tmp_path):
    model = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    plan = ["plan", model, "--device", "cuda", "--memory", "2GiB", "--max-num-seqs", "4", "--json"]
    plain, small = (
        json.loads(CliRunner().invoke(app, [*plan, *more]).output) for more in ([], ["--weights", "int4"])
    )
    assert plain["served"]["use"]["weights"] == plain["packed_weight_bytes"]
    assert small["packed_weight_bytes"] < plain["packed_weight_bytes"]
    table = CliRunner().invoke(app, plan[:-1]).output
    assert "weights, packed for a GPU" in table
    assert "1.50 GiB  --memory without 512.0 MiB for CUDA's context" in table
    parts = plain["served"]["use"]["parts"]
    assert {part["name"] for part in parts} == {"choice of tokens", "copies of blocks", "cuBLAS", "CUDA graphs"}
    taken = sum(size for size in plain["served"]["use"].values() if isinstance(size, int))
    assert plain["served"]["total"] == taken + sum(part["num_bytes"] for part in parts)
    assert all(part["name"] in table and part["source"] in table for part in parts)


def test_types_of_the_cache_are_those_of_the_device():
    assert EngineConfig(backend="cuda", cache=CacheConfig(dtype="fp8_e4m3")).cache.dtype == "fp8_e4m3"
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of .* on a CPU, not 'fp8_e4m3'"):
        EngineConfig(cache=CacheConfig(dtype="fp8_e4m3"))
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of .* on a GPU, not 'int4'"):
        EngineConfig(backend="cuda", cache=CacheConfig(dtype="int4"))


def test_settings_check_themselves():
    with pytest.raises(ConfigError, match="backend must be one of cpu, cuda, reference, not 'metal'"):
        EngineConfig(backend="metal")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        dataclasses.replace(CudaConfig(), dtype="int8")
