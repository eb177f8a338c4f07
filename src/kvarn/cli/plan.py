"""`kvarn plan`: what a model will take, before it is loaded or even downloaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarn.cli.options import (
    Device,
    KvCacheBytes,
    KvOffloadBytes,
    MemoryUtilization,
    Threads,
    WeightForm,
    chosen_device,
    optional_size,
    size_option,
)
from kvarn.cli.speculative import Speculative, speculative_config
from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.errors import CapacityError, ConfigError
from kvarn.kv_types import CACHE_TYPES, CARD_CACHE_TYPES

if TYPE_CHECKING:
    from kvarn.backends import Backend, KvCacheSpec, MemoryUse, StepLimits
    from kvarn.models import ModelConfig
    from kvarn.planning import MemoryPlan, Plan, Uses
    from kvarn.program import Program
    from kvarn.tensors import DType

EPILOG = """\b
Examples:
  kvarn plan smollm2-135m-instruct
  kvarn plan config.json --max-model-len 8192 --batch 32      a config alone is enough
  kvarn plan model.gguf --batch 16 --kv-dtype float32 --json
  kvarn plan model.gguf --memory 4GiB --max-num-seqs 16       would `kvarn serve` start there, and with what cache?
  kvarn plan config.json --device cuda --weights int4 --memory 24GiB --max-num-seqs 32    on a GPU, here or elsewhere
  kvarn plan smollm2-135m-instruct --program                  the program itself, op by op
"""
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def command(
    model: Annotated[str, typer.Argument(help="A name from `kvarn models`, a .gguf file, a folder, or a config.json.")],
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest sequence; default: what the model was made for.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at the same time.")] = 1,
    kv_dtype: Annotated[
        str, typer.Option(help="KV cache type: float16, bfloat16, float32, int8, int4 or fp8_e4m3.")
    ] = "float16",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights where only a config is given: float32, float16 "
            "or bfloat16; default: what the config says. With --device cuda: what is computed in, and what weights are "
            "that are not quantized; default: bfloat16."
        ),
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Length of the prompt whose prefill is counted.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Served: sequences computed at the same time.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Served: tokens computed in one step.")] = 512,
    kv_cache_bytes: KvCacheBytes = None,
    kv_offload_bytes: KvOffloadBytes = "0",
    memory_utilization: MemoryUtilization = 0.8,
    memory: Annotated[
        str | None, typer.Option(help="Memory to serve in, as 16GiB; default: what this machine, or its GPU, has now.")
    ] = None,
    threads: Threads = 0,
    device: Device = "cpu",
    weights: WeightForm = None,
    speculative: Speculative = None,
    program: Annotated[bool, typer.Option("--program", help="Print the program, op by op, and nothing else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model takes: weights, KV cache, activations, and the cost of its steps."""
    from kvarn.engine import engine_backend
    from kvarn.planning import plan

    on_gpu = device != "cpu"
    backend_name, cuda = chosen_device(device, dtype if on_gpu else None, weights)
    settings = EngineConfig(
        max_model_len=max_model_len,
        backend=backend_name,
        threads=threads,
        cuda=cuda,
        cache=CacheConfig(
            dtype=kv_dtype if kv_dtype in (CARD_CACHE_TYPES if on_gpu else CACHE_TYPES) else "float16",
            kv_cache_bytes=optional_size("kv-cache-bytes", kv_cache_bytes),
            memory_utilization=memory_utilization,
            kv_offload_bytes=size_option("kv-offload-bytes", kv_offload_bytes),
        ),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens),
        speculative=speculative_config(speculative),
    )
    config, parsed, dtypes = _read(model, None if on_gpu else dtype)
    if program:
        from kvarn.program.listing import listing

        print(listing(parsed))
        return
    prompt = min(512, parsed.max_positions) if prefill is None else prefill
    backend = engine_backend(settings)
    result = plan(
        parsed, dtypes, batch=batch, max_model_len=max_model_len, kv_dtype=kv_dtype, prefill_tokens=prompt,
        backend=backend if on_gpu else None,
    )  # fmt: skip
    served = _served(parsed, dtypes, settings, backend, optional_size("memory", memory))
    if as_json:
        print(json.dumps({"model": model, "family": config.family, **dataclasses.asdict(result), **_json(served)}))
    else:
        _print(model, config, result, "a GPU" if on_gpu else "the CPU")
        _print_served(served)


def _served(
    program: Program, dtypes: Mapping[str, DType], config: EngineConfig, backend: Backend, memory: int | None
) -> MemoryPlan | CapacityError:
    """What `kvarn serve` would take with these settings, or why it would refuse."""
    from kvarn.engine import backend_memory, memory_elsewhere
    from kvarn.planning import plan_memory
    from kvarn.spec import open_heads

    try:
        available = backend_memory(config) if memory is None else memory_elsewhere(config, memory)
    except ConfigError as error:
        raise ConfigError(f"{error}; or say what memory to plan for: --memory 80GiB") from None
    heads = open_heads(config.speculative, program)

    def uses(kv: KvCacheSpec, limits: StepLimits) -> MemoryUse:
        return backend.memory_use(program, dtypes, kv, limits if heads is None else heads.target_limits(limits))

    with _draft_uses(program, config) as drafter:
        try:
            return plan_memory(program, uses, config, available, drafter if heads is None else heads.uses(backend))
        except CapacityError as error:
            return error


@contextmanager
def _draft_uses(program: Program, config: EngineConfig) -> Iterator[Uses | None]:
    """What a draft model would take; None where the settings name none."""
    chosen = config.speculative
    if chosen is None or chosen.source != "draft":
        yield None
        return
    from kvarn.engine.load import open_draft

    draft = open_draft(config)
    assert draft is not None
    try:
        yield draft.uses(program, chosen)
    finally:
        draft.close()


def _json(served: MemoryPlan | CapacityError) -> dict[str, object]:
    if isinstance(served, CapacityError):
        return {"served": None, "refused": str(served)}
    derived = {name: getattr(served, name) for name in ("budget", "cache_tokens", "full_sequences")}
    return {"served": {**dataclasses.asdict(served), "total": served.total, **derived}, "refused": None}


def _print_served(served: MemoryPlan | CapacityError) -> None:
    from kvarn.cli.memory_table import memory_table

    if isinstance(served, CapacityError):
        print(f"kvarn serve would refuse these settings: {served}")
    else:
        print(f"kvarn serve with these settings:\n{memory_table(served)}")


def _read(model: str, dtype: str | None) -> tuple[ModelConfig, Program, dict[str, DType]]:
    """Sizes, program and stored types: of files where there are files, of a config otherwise."""
    from kvarn.models import load_model, program_from_config
    from kvarn.tensors import DType
    from kvarn.weights import open_model
    from kvarn.weights.hf import read_json_object

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    path = Path(model)
    if path.suffix == ".json":
        metadata = read_json_object(path)
        config, program = program_from_config(metadata, "hf", path=model)
        stored = DType[DTYPES[dtype or _config_dtype(metadata)]]
        return config, program, {weight.name: stored for weight in program.weights}
    if dtype is not None:
        raise ConfigError("dtype is for a config.json alone; files say how their weights are stored")
    from kvarn.cli.progress import resolve_with_progress

    with open_model(resolve_with_progress(model, quiet=False)) as files:
        loaded = load_model(files)
        types = {weight.name: loaded.weights.tensor(weight.name).dtype for weight in loaded.program.weights}
    return loaded.config, loaded.program, types


def _config_dtype(metadata: dict[str, Any]) -> str:
    """The type a config.json names, 16 bits where it names none that is known."""
    name = metadata.get("dtype") or metadata.get("torch_dtype")
    return name if name in DTYPES else "bfloat16"


def _size(num_bytes: int) -> str:
    """Exact bytes, and for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes:,} B  ({num_bytes / size:,.2f} {unit})"
    return f"{num_bytes:,} B"


def _print(model: str, config: ModelConfig, p: Plan, device: str) -> None:
    shared = p.kv_bytes_per_token_without_grouping // p.kv_bytes_per_token
    heads = f"{config.num_heads} query heads, {config.num_kv_heads} KV head{'s' if config.num_kv_heads > 1 else ''}"
    saving = f"{heads}: {shared}× smaller than with a KV head each" if shared > 1 else f"{heads}"
    per_batch = -(-p.outgrow_tokens // p.batch)
    rows = [
        ("parameters", f"{p.parameters:,}"),
        ("weights, as stored", _size(p.weight_bytes)),
        (f"weights, packed for {device}", _size(p.packed_weight_bytes)),
        ("KV cache, a token", f"{_size(p.kv_bytes_per_token)}  {saving}"),
        (f"KV cache, a sequence of {p.max_model_len:,}", _size(p.kv_bytes_per_sequence)),
    ]
    if p.kv_bytes_per_sequence_needed < p.kv_bytes_per_sequence:
        rows.append(("  of it kept, with its sliding windows", _size(p.kv_bytes_per_sequence_needed)))
    rows += [
        (f"KV cache, {p.batch} such sequence{'s' if p.batch > 1 else ''}", f"{_size(p.kv_bytes_total)}  {p.kv_dtype}"),
        (f"activations on {device}", _size(p.activation_bytes)),
        ("in total", _size(p.total_bytes)),
        ("cache outgrows weights", f"from {p.outgrow_tokens:,} tokens: batch {p.batch} × length {per_batch:,}"),
    ]
    for name, cost in (
        (f"prefill of {p.prefill_tokens:,} tokens", p.prefill),
        (f"decode of {p.batch} at {p.max_model_len:,}", p.decode),
    ):
        moved = cost.weight_bytes + cost.kv_read_bytes + cost.kv_write_bytes
        rows.append((name, f"{cost.flops / 1e9:,.2f} GFLOP, {moved / 1e9:,.3f} GB moved "
                     f"({cost.weight_bytes / 1e9:,.3f} weights, {(moved - cost.weight_bytes) / 1e9:,.3f} KV), "
                     f"{cost.intensity:,.1f} FLOP a byte"))  # fmt: skip
    width = max(len(name) for name, _ in rows)
    print(f"{model}: {config.family}, {config.num_layers} layers of {config.hidden_size}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
