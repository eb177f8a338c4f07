"""The plan before the load: what fits, what is refused, and with which numbers. Memory is what a made-up /proc says."""

import pytest

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine.capacity import Needs, block_bytes, plan_capacity
from kvarn.engine.memory import available_memory
from kvarn.errors import CapacityError, ConfigError
from kvarn.testing import tiny_model

GIB = 1 << 30
PROGRAM = tiny_model(max_position_embeddings=4096).program
BLOCK = block_bytes(PROGRAM, CacheConfig())
"""2 layers × 2 heads × 16 × (key and value) × 2 bytes × 16 tokens."""
NEEDS = Needs(weights=1000, activations=500)


def plan(available=64 * GIB, *, max_model_len=None, max_num_seqs=64, **cache):
    config = EngineConfig(
        max_model_len=max_model_len, cache=CacheConfig(**cache), scheduler=SchedulerConfig(max_num_seqs=max_num_seqs)
    )
    return plan_capacity(PROGRAM, config, NEEDS, available)


def test_a_block_takes_what_its_tokens_do():
    assert BLOCK == 2 * 2 * 16 * 2 * 2 * 16
    assert block_bytes(PROGRAM, CacheConfig(dtype="float32")) == 2 * BLOCK


def test_by_default_there_is_room_for_all_sequences_at_their_longest():
    capacity = plan()
    assert capacity.max_model_len == 4096
    assert capacity.num_blocks == 64 * 4096 // 16
    assert capacity.cache_bytes == capacity.num_blocks * BLOCK


def test_by_default_the_cache_is_modest():
    assert plan(max_num_seqs=512, block_size=64).cache_bytes <= 4 * GIB
    wide = tiny_model(max_position_embeddings=4096, hidden_size=1024, num_attention_heads=16, num_hidden_layers=8,
                      num_key_value_heads=16).program  # fmt: skip
    assert plan_capacity(wide, EngineConfig(), NEEDS, 640 * GIB).cache_bytes == 4 * GIB


def test_with_little_memory_the_cache_is_what_fits_and_the_length_what_it_holds():
    available = 1500 + 10 * BLOCK
    capacity = plan(available, memory_utilization=1.0)
    assert (capacity.num_blocks, capacity.max_model_len) == (10, 160)
    assert plan(available * 2, memory_utilization=0.5) == capacity


def test_an_exact_number_of_blocks_or_bytes_is_taken():
    assert plan(num_blocks=7).num_blocks == 7
    assert plan(num_blocks=7).max_model_len == 112
    assert plan(kv_cache_bytes=7 * BLOCK + 5).num_blocks == 7


@pytest.mark.parametrize(
    ("available", "settings", "message"),
    [
        (1600 + BLOCK, {"memory_utilization": 0.5}, "the model takes 1.0 KiB of weights"),
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


def test_a_length_the_model_was_not_made_for_is_refused():
    with pytest.raises(ConfigError, match="max_model_len must be at most 4096"):
        plan(max_model_len=4097)


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def machine(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal:  100 kB\nMemAvailable:     64 kB\n")
    return tmp_path


def test_memory_of_a_machine_without_limits(machine):
    assert available_memory(machine) == 64 * 1024
    write(machine, "proc/self/cgroup", "0::/a/b\n")
    write(machine, "sys/fs/cgroup/a/b/memory.max", "max\n")
    assert available_memory(machine) == 64 * 1024


def test_memory_under_a_limit_of_a_group_or_of_one_above_it(machine):
    write(machine, "proc/self/cgroup", "0::/a/b\n")
    write(machine, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(machine, "sys/fs/cgroup/a/memory.max", "50000\n")
    write(machine, "sys/fs/cgroup/a/memory.stat", "anon 20000\nfile 25000\n")
    assert available_memory(machine) == 30000, "page cache is given up when memory is wanted"


def test_memory_in_a_container_that_sees_its_group_as_the_root(machine):
    write(machine, "proc/self/cgroup", "0::/../outside\n")
    write(machine, "sys/fs/cgroup/memory.max", "40000\n")
    assert available_memory(machine) == 40000


def test_memory_under_the_older_kind_of_groups(machine):
    write(machine, "proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/1\n0::/\n")
    write(machine, "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "30000")
    write(machine, "sys/fs/cgroup/memory/docker/1/memory.stat", "cache 1\ntotal_rss 10000\n")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    assert available_memory(machine) == 20000


def test_memory_of_a_system_that_says_nothing(tmp_path):
    assert available_memory(tmp_path) == 0
