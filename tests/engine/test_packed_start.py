"""A second start maps what the first one packed: the same logits, and never those of another file."""

import os
import time

import pytest

from kvarn.config import EngineConfig
from kvarn.engine import LLM
from kvarn.errors import ConfigError
from kvarn.request import SamplingParams
from kvarn.tensors import DType
from kvarn.testing import write_tiny_gguf
from kvarn.weights import packed_cache

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8, logprobs=5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The packed weights of these tests, in a folder of their own."""
    monkeypatch.setenv("KVARN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(packed_cache.LIMIT_VARIABLE)
    return tmp_path / "home" / "packed"


def answer(path, **settings):
    with LLM(str(path), num_blocks=40, threads=1, **settings) as llm:
        (completion,) = llm.generate("The mill by the river", GREEDY)
        return completion.token_ids, completion.choices[0].logprobs


def states(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [DType.Q8_0, DType.Q4_1, DType.F16])
def test_the_second_start_says_the_same_to_the_bit(tmp_path, folder, dtype):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", dtype=dtype)
    without = answer(path, packed_cache_bytes=0)
    assert not folder.exists()
    first = answer(path)
    written = states(folder)
    second = answer(path)
    assert without == first == second
    assert states(folder) == written
    assert len(written) == 1


def test_a_changed_file_is_packed_anew(tmp_path, folder):
    """Also where size and date of modification are those of before."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", dtype=DType.Q8_0, seed=1)
    before = answer(path)
    status, written = path.stat(), states(folder)
    other = write_tiny_gguf(tmp_path / "other.gguf", dtype=DType.Q8_0, seed=2).read_bytes()
    assert len(other) == status.st_size
    time.sleep(0.02)  # the kernel's clock for files is coarse
    path.write_bytes(other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = answer(path)
    assert after == answer(path, packed_cache_bytes=0)
    assert after != before
    assert states(folder).keys() == written.keys()
    assert states(folder) != written


def test_a_file_that_changes_while_it_is_packed_is_not_kept(tmp_path, folder):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", dtype=DType.Q8_0)
    with LLM(str(path), num_blocks=40, threads=1):
        os.utime(path)
    assert not folder.exists()


def test_the_limit_is_a_setting_or_the_environments(tmp_path, folder, monkeypatch):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv(packed_cache.LIMIT_VARIABLE, "100")
    answer(path)
    assert not folder.exists()
    monkeypatch.setenv(packed_cache.LIMIT_VARIABLE, "20 GB")
    with pytest.raises(ConfigError, match="KVARN_PACKED_CACHE_BYTES must be a number of bytes"):
        answer(path)
    with pytest.raises(ConfigError, match="packed_cache_bytes must be at least 0"):
        EngineConfig(packed_cache_bytes=-1)


def test_the_source_needs_no_memory_after_the_load(tmp_path):
    """No page of the model file counts once its weights are packed."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", dtype=DType.F32, hidden_size=512, intermediate_size=1024)

    def resident():
        with open("/proc/self/smaps", encoding="utf-8") as maps:
            inside, total = False, 0
            for line in maps:
                if "-" in line.split(" ")[0]:
                    inside = line.rstrip().endswith(str(path))
                elif inside and line.startswith("Rss:"):
                    total += int(line.split()[1]) * 1024
        return total

    with LLM(str(path), num_blocks=40, threads=1) as llm:
        assert resident() <= 64 * 1024
        llm.generate("x", GREEDY)
        assert resident() <= 64 * 1024
