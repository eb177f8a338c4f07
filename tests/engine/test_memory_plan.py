"""The plan before the load: what fits, what is refused, and with which numbers. Memory is what a made-up /proc says."""

import json
import tracemalloc
from dataclasses import asdict

import pytest
from tiny_engine import shared_model, tiny_engine
from typer.testing import CliRunner

from kvarn.backends import KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.cache import OffloadIndex
from kvarn.cli.app import app
from kvarn.cli.memory_table import memory_table
from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import make_backend
from kvarn.errors import CapacityError, ConfigError
from kvarn.kv_types import CACHE_TYPES, KV_TYPES
from kvarn.planning import Available, available_memory, plan_memory
from kvarn.planning.memory import OFFLOAD_ENTRY_BYTES
from kvarn.planning.sizes import parse_size, size_text
from kvarn.tensors import DType
from kvarn.testing import tiny_model, write_tiny_gguf

GIB = 1 << 30
PROGRAM = tiny_model(max_position_embeddings=4096).program
BLOCK = 16 * PROGRAM.kv_bytes_per_token(KV_TYPES["float16"])
"""2 layers × 2 heads × 16 × (key and value) × 2 bytes × 16 tokens."""


def fixed_use(kv, limits):
    return MemoryUse(weights=1000, tables=0, kv_cache=kv.num_blocks * BLOCK, activations=500)


def plan(available=64 * GIB, *, max_model_len=None, max_num_seqs=64, tokens=512, uses=fixed_use, **cache):
    config = EngineConfig(
        max_model_len=max_model_len,
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens),
    )
    return plan_memory(PROGRAM, uses, config, Available(available, "here"))


def test_a_block_takes_what_its_tokens_do():
    assert BLOCK == 2 * 2 * 16 * 2 * 2 * 16
    assert 16 * PROGRAM.kv_bytes_per_token(KV_TYPES["float32"]) == 2 * BLOCK


def test_by_default_there_is_room_for_all_sequences_at_their_longest():
    memory = plan()
    assert memory.max_model_len == 4096
    assert memory.num_blocks == 64 * 4096 // 16
    assert memory.use.kv_cache == memory.num_blocks * BLOCK
    assert memory.full_sequences == 64
    assert memory.cache_tokens == 64 * 4096


def test_by_default_the_cache_is_modest():
    assert plan(max_num_seqs=512, block_size=64).use.kv_cache <= 4 * GIB
    wide = tiny_model(max_position_embeddings=4096, hidden_size=1024, num_attention_heads=16, num_hidden_layers=8,
                      num_key_value_heads=16).program  # fmt: skip
    block = 16 * wide.kv_bytes_per_token(KV_TYPES["float16"])

    def uses(kv, limits):
        return MemoryUse(weights=1000, tables=0, kv_cache=kv.num_blocks * block, activations=500)

    assert plan_memory(wide, uses, EngineConfig(), Available(640 * GIB, "here")).use.kv_cache == 4 * GIB


def test_with_little_memory_the_cache_is_what_fits_and_the_length_what_it_holds():
    available = 1500 + 10 * BLOCK
    whole, half = plan(available, memory_utilization=1.0), plan(available * 2, memory_utilization=0.5)
    assert (whole.num_blocks, whole.max_model_len, whole.full_sequences) == (10, 160, 1)
    assert (half.num_blocks, half.max_model_len) == (10, 160)
    assert whole.use.total == whole.budget == half.budget


def test_the_length_that_fits_is_the_longest_that_does():
    def uses(kv, limits):
        return MemoryUse(weights=1000, tables=limits.max_model_len * 64, kv_cache=kv.num_blocks * BLOCK, activations=0)

    available = 1000 + 10 * (BLOCK + 16 * 64)
    memory = plan(available, memory_utilization=1.0, uses=uses)
    assert (memory.num_blocks, memory.max_model_len) == (10, 160)
    assert memory.use.total <= available
    with pytest.raises(CapacityError, match="it may be at most 160"):
        plan(available, max_model_len=161, memory_utilization=1.0, uses=uses)
    assert plan(available, max_model_len=160, memory_utilization=1.0, uses=uses) == memory
    with pytest.raises(CapacityError, match="num_blocks may be at most 12"):
        plan(available, max_model_len=16, num_blocks=13, memory_utilization=1.0, uses=uses)


def test_an_exact_number_of_blocks_or_bytes_is_taken():
    assert plan(num_blocks=7).num_blocks == 7
    assert plan(num_blocks=7).max_model_len == 112
    assert plan(kv_cache_bytes=7 * BLOCK + 5).num_blocks == 7


@pytest.mark.parametrize(
    ("available", "settings", "message"),
    [
        (2 * (1500 + BLOCK) - 2, {"memory_utilization": 0.5},
         r"the model takes 1.0 KiB of weights.*memory_utilization must be at least 0\.501"),
        (1500 + BLOCK - 1, {"memory_utilization": 0.5}, "at least .* must be available"),
        (GIB, {"max_model_len": 160, "kv_cache_bytes": 9 * BLOCK}, "max_model_len 160 needs 10 blocks.*at most 144"),
        (1500 + 9 * BLOCK, {"num_blocks": 10}, "num_blocks 10 makes a KV cache.*num_blocks may be at most 9"),
        (1500 + 9 * BLOCK, {"kv_cache_bytes": 10 * BLOCK}, f"kv_cache_bytes may be at most {9 * BLOCK}"),
        (1500 + 9 * BLOCK, {"max_model_len": 160}, "max_model_len 160 needs 10 blocks.*it may be at most 144"),
        (GIB, {"max_model_len": 160, "num_blocks": 9}, "it may be at most 144"),
        (GIB, {"kv_cache_bytes": BLOCK - 1}, f"must be at least {BLOCK}"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_setting_that_does(available, settings, message):
    with pytest.raises(CapacityError, match=message):
        plan(available, **{"memory_utilization": 1.0, **settings})


def test_smaller_steps_are_named_where_they_would_do():
    def uses(kv, limits):
        return MemoryUse(1000, 0, kv.num_blocks * BLOCK, activations=100 * limits.max_num_tokens)

    available = 1000 + 100 * 200 + BLOCK
    with pytest.raises(CapacityError, match="max_num_batched_tokens may be at most 128"):
        plan(available, memory_utilization=1.0, uses=uses)
    assert plan(available, memory_utilization=1.0, uses=uses, tokens=128).num_blocks >= 1


def test_a_length_the_model_was_not_made_for_is_refused():
    with pytest.raises(ConfigError, match="max_model_len must be at most 4096"):
        plan(max_model_len=4097)


def test_what_is_known_of_the_second_tier_takes_memory_its_blocks_do_not():
    available = 1500 + 10 * BLOCK
    without = plan(available, memory_utilization=1.0)
    memory = plan(available, memory_utilization=1.0, kv_offload_bytes=100 * BLOCK)
    assert memory.offload_index == 100 * OFFLOAD_ENTRY_BYTES
    assert memory.num_blocks == without.num_blocks - -(-memory.offload_index // BLOCK)
    assert memory.total <= memory.budget < memory.total + BLOCK
    said = memory_table(memory)
    assert f"{size_text(memory.offload_index)}  to know what is in {size_text(100 * BLOCK)} of disk" in said
    assert "second tier" not in memory_table(without)
    with pytest.raises(CapacityError, match=r"kv_offload_bytes 2\.2 MiB.*at least"):
        plan(available, memory_utilization=1.0, kv_offload_bytes=9000 * BLOCK)


def test_what_is_counted_for_the_second_tier_is_enough():
    tracemalloc.start()
    try:
        index = OffloadIndex(5000, "it")
        for number in range(5000):
            index.save(index.after(index.root(), [number]), number)
            index.take_saves()
        assert tracemalloc.get_traced_memory()[0] < 5000 * OFFLOAD_ENTRY_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_cache_takes_what_is_planned_in_every_type(backend, family, dtype):
    model = shared_model(family, 0)
    dtypes = {weight.name: DType.F32 for weight in model.program.weights}
    kv, limits = KvCacheSpec(7, 32, dtype), StepLimits(16, 2, 64)
    made = make_backend(backend, 1)
    executable = made.load(model.program, model.weights, kv, limits)
    try:
        assert made.memory_use(model.program, dtypes, kv, limits).kv_cache == 7 * executable.block_bytes
    finally:
        executable.close()


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cache_of_so_many_bytes_takes_no_more_and_a_block_more_would_be_too_much(backend, dtype):
    """The reference keeps int8 and int4 as float32."""
    plans = []
    engine = tiny_engine(backend=backend, dtype=dtype, num_blocks=None, kv_cache_bytes=300_000, on_plan=plans.append)
    try:
        block = engine.core._runner._executable.block_bytes
        assert plans[0].use.kv_cache == plans[0].num_blocks * block
        assert plans[0].use.kv_cache <= 300_000 < plans[0].use.kv_cache + block
    finally:
        engine.core.close()


def test_the_reference_holds_what_the_plan_says_whatever_the_type():
    model = shared_model("llama", 0)
    for dtype in CACHE_TYPES:
        kv, limits = KvCacheSpec(9, 16, dtype), StepLimits(8, 2, 64)
        backend = make_backend("reference")
        tracemalloc.start()
        try:
            executable = backend.load(model.program, model.weights, kv, limits)
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        dtypes = {weight.name: DType.F32 for weight in model.program.weights}
        planned = backend.memory_use(model.program, dtypes, kv, limits).kv_cache
        assert planned <= taken < planned + 10_000, dtype
        executable.close()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_engine_takes_what_the_plan_says(backend):
    plans = []
    engine = tiny_engine(backend=backend, dtype="float16", num_blocks=None, max_num_seqs=3, on_plan=plans.append)
    try:
        assert plans == [engine.memory_plan]
        memory = engine.memory_plan
        assert engine.core.stats().num_blocks == memory.num_blocks
        assert engine.max_model_len == memory.max_model_len
        assert memory.full_sequences == 3
    finally:
        engine.core.close()


def test_the_executable_holds_what_the_plan_says_to_the_byte():
    model = shared_model("llama", 0)
    backend = CpuBackend(threads=1)
    dtypes = {weight.name: DType.F32 for weight in model.program.weights}
    memory = plan_memory(
        model.program, lambda kv, limits: backend.memory_use(model.program, dtypes, kv, limits),
        EngineConfig(max_model_len=100, scheduler=SchedulerConfig(5, 70)), Available(GIB, "here"),
    )  # fmt: skip
    assert memory.kv == KvCacheSpec(5 * 7, 16, "float16")
    assert memory.limits == StepLimits(70, 5, 100, outputs=("x",))
    executable = backend.load(model.program, model.weights, memory.kv, memory.limits)
    try:
        assert executable.info().memory == memory.use
    finally:
        executable.close()


def test_the_command_says_what_the_engine_takes(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    settings = ["--memory", "64MiB", "--max-num-seqs", "4", "--threads", "1", "--memory-utilization", "0.5"]
    said = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json", *settings]).output)["served"]
    from kvarn.engine.load import engine_memory
    from kvarn.models import load_model
    from kvarn.weights import open_model

    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_seqs=4), cache=CacheConfig(memory_utilization=0.5), threads=1
    )
    with open_model(path) as files:
        memory = engine_memory(load_model(files), config, CpuBackend(threads=1), Available(64 << 20, "--memory"))
    assert said["use"] == json.loads(json.dumps(asdict(memory.use)))
    assert (said["num_blocks"], said["max_model_len"]) == (memory.num_blocks, memory.max_model_len)
    tier = CliRunner().invoke(app, ["plan", str(path), *settings, "--kv-offload-bytes", "100MiB"]).output
    assert "to know what is in 100.0 MiB of disk" in tier
    table = CliRunner().invoke(app, ["plan", str(path), *settings]).output
    assert f"{memory.num_blocks:,} blocks of 16" in table
    assert "50 % of it may be taken" in table


def test_the_command_says_why_the_engine_would_refuse(tmp_path):
    path = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    refused = CliRunner().invoke(app, ["plan", path, "--memory", "10KB"])
    assert refused.exit_code == 0 and "would refuse" in refused.output and "must be available" in refused.output
    wrong = CliRunner().invoke(app, ["plan", path, "--kv-cache-bytes", "2 apples"])
    assert "--kv-cache-bytes must be bytes as a number" in str(wrong.exception)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 gib", 3 << 29), ("123", 123), ("7B", 7), (" 1KiB ", 1024)],
)
def test_sizes_are_read(text, size):
    assert parse_size("it", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 G B", "2XB", "1.5.5", "9" * 30, "٣", "2G", "99999999TiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--kv-cache-bytes must be"):
        parse_size("--kv-cache-bytes", text)


def test_sizes_are_written_for_people():
    assert [size_text(n) for n in (512, 3 << 19, 5 << 28)] == ["0.5 KiB", "1.5 MiB", "1.25 GiB"]


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def machine(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal:  100 kB\nMemAvailable:     64 kB\n")
    return tmp_path


def test_memory_of_a_machine_without_limits(machine):
    assert available_memory(machine) == Available(64 * 1024, "the machine's free memory")
    write(machine, "proc/self/cgroup", "0::/a/b\n")
    write(machine, "sys/fs/cgroup/a/b/memory.max", "max\n")
    assert available_memory(machine) == Available(64 * 1024, "the machine's free memory")


def test_memory_under_a_limit_of_a_group_or_of_one_above_it(machine):
    write(machine, "proc/self/cgroup", "0::/a/b\n")
    write(machine, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(machine, "sys/fs/cgroup/a/memory.max", "50000\n")
    write(machine, "sys/fs/cgroup/a/memory.stat", "anon 20000\nfile 25000\n")
    left = available_memory(machine)
    assert left.num_bytes == 30000, "page cache is given up when memory is wanted"
    assert left.source == "cgroup v2 /a, memory.max 50000"
    write(machine, "sys/fs/cgroup/a/memory.stat", "anon 20000\nfile 25000\nshmem 3000\nslab_unreclaimable 2000\n")
    assert available_memory(machine).num_bytes == 25000, "shared memory and slabs are not given up"


def test_memory_under_the_limit_where_a_group_is_slowed_down(machine):
    write(machine, "proc/self/cgroup", "0::/a\n")
    write(machine, "sys/fs/cgroup/a/memory.max", "60000\n")
    write(machine, "sys/fs/cgroup/a/memory.high", "40000\n")
    assert available_memory(machine) == Available(40000, "cgroup v2 /a, memory.high 40000")


def test_a_group_over_its_limit_has_nothing_left(machine):
    write(machine, "proc/self/cgroup", "0::/a\n")
    write(machine, "sys/fs/cgroup/a/memory.max", "50000\n")
    write(machine, "sys/fs/cgroup/a/memory.stat", "anon 60000\n")
    assert available_memory(machine).num_bytes == 0


def test_memory_in_a_container_that_sees_its_group_as_the_root(machine):
    write(machine, "proc/self/cgroup", "0::/../outside\n")
    write(machine, "sys/fs/cgroup/memory.max", "40000\n")
    assert available_memory(machine) == Available(40000, "cgroup v2 /, memory.max 40000")


def test_memory_under_the_older_kind_of_groups(machine):
    write(machine, "proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/1\n0::/\n")
    write(machine, "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "30000")
    write(machine, "sys/fs/cgroup/memory/docker/1/memory.stat", "cache 1\ntotal_rss 10000\n")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    assert available_memory(machine) == Available(20000, "cgroup v1 /docker/1, memory.limit_in_bytes 30000")


def test_memory_under_an_older_group_above_that_a_container_does_not_see(machine):
    write(machine, "proc/self/cgroup", "4:memory:/docker/1\n")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    write(machine, "sys/fs/cgroup/memory/memory.stat", "total_rss 10000\nhierarchical_memory_limit 25000\n")
    assert available_memory(machine).num_bytes == 15000


def test_lines_that_are_damaged_are_passed_over(machine):
    write(machine, "proc/self/cgroup", "nonsense\n\n0::/a\n")
    write(machine, "sys/fs/cgroup/a/memory.max", "lots\n")
    write(machine, "sys/fs/cgroup/a/memory.stat", "anon\nfile x\n")
    assert available_memory(machine).num_bytes == 64 * 1024


def test_memory_of_a_system_that_says_nothing(tmp_path):
    assert available_memory(tmp_path).num_bytes == 0
