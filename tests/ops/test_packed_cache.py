"""Packed weights on disk: the same bits as packed anew, and nothing but a whole, right file is ever used."""

import hashlib
import json
import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn import _native
from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, PackedSlot
from kvarn.backends.cpu.backend import pack_weights
from kvarn.backends.cpu.packed_file import (
    DIGEST_BYTES,
    MAGIC,
    PREFIX,
    DamagedFileError,
    StaleFileError,
    read_packed,
)
from kvarn.backends.cpu.packed_slot import PackedWriter
from kvarn.tensors import DType
from kvarn.testing import tiny_model

LIMITS = StepLimits(64, 4, 64)
KV = KvCacheSpec(16, 16, "float16")
KEY = "a" * 64


def slot_at(path, key=KEY, admit=lambda size: True):
    return PackedSlot(path, key, admit)


def load(model, slot):
    return CpuBackend(threads=1, packed=slot).load(model.program, model, KV, LIMITS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", dtype=DType.Q8_0)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The bytes of a file as it is written."""
    path = tmp_path_factory.mktemp("packed") / "tiny.packed"
    load(model, slot_at(path)).close()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, whole):
    path = tmp_path / "tiny.packed"
    path.write_bytes(whole)
    return path


def fresh(model):
    pool = _native.Pool(1, [])
    matrices = {w.name: model.tensor(w.name) for w in model.program.weights if len(w.shape) > 1}
    return {
        name: _native.pack(t.dtype.name, t.rows, t.shape[-1], t.data, pool).data.copy() for name, t in matrices.items()
    }


def with_header(whole, change):
    """The file with another header, its digest right."""
    start = PREFIX.size + DIGEST_BYTES
    _, layout, length = PREFIX.unpack_from(whole)
    header = json.loads(whole[start : start + length])
    text = json.dumps(change(header) or header).encode().ljust(length)
    return PREFIX.pack(MAGIC, layout, len(text)) + hashlib.sha256(text).digest() + text + whole[start + len(text) :]


def test_a_file_holds_what_packing_gives(model, path):
    weights = read_packed(path, KEY, model.program)
    expected = fresh(model)
    assert {name: bytes(matrix.data) for name, matrix in weights.matrices.items()} == {
        name: data.tobytes() for name, data in expected.items()
    }
    assert all(
        np.array_equal(vector.data.view(np.float32), model.tensor(name).data.view(np.float32))
        for name, vector in weights.vectors.items()
    )
    assert weights.dtypes == {w.name: model.tensor(w.name).dtype for w in model.program.weights}


def test_a_mapped_weight_outlives_its_file(model, path):
    weights = read_packed(path, KEY, model.program)
    path.unlink()
    name, matrix = next(iter(weights.matrices.items()))
    view = matrix.data
    del weights, matrix
    assert view.tobytes() == fresh(model)[name].tobytes()
    assert not view.flags.writeable


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_never_believed(model, path, whole, data):
    """Whatever happens to the header or the length, the file is refused (or, where padding was hit, the same)."""
    header_end = PREFIX.size + DIGEST_BYTES + PREFIX.unpack_from(whole)[2]
    broken = bytearray(whole)
    match data.draw(st.sampled_from(["cut", "flip", "longer", "overwrite"])):
        case "cut":
            del broken[data.draw(st.integers(0, len(whole) - 1)) :]
        case "flip":
            broken[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "longer":
            broken += bytes(data.draw(st.integers(1, 5000)))
        case "overwrite":
            start = data.draw(st.integers(0, header_end - 1))
            noise = data.draw(st.binary(min_size=1, max_size=64))
            broken[start : start + len(noise)] = noise
    path.write_bytes(broken)
    if broken[:header_end] == whole[:header_end] and len(broken) == len(whole):
        return
    with pytest.raises((DamagedFileError, StaleFileError)):
        read_packed(path, KEY, model.program)


ABSURD = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([None, True, 1.5, "", "Q9_Z", "F32", [], {}, [2**62, 2**62], [-1, 32], [0, 0]]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=st.integers(0, 20), field=st.integers(0, 5), value=ABSURD)
def test_a_hostile_header_is_never_believed(model, path, whole, entry, field, value):
    """The digest is right, and what it vouches for is not."""
    unchanged = False

    def change(header):
        nonlocal unchanged
        entries = header["weights"]
        if field == 5:
            header["weights"] = value
            return
        unchanged = entries[entry % len(entries)][field] == value
        entries[entry % len(entries)][field] = value

    path.write_bytes(with_header(whole, change))
    if unchanged:
        return
    with pytest.raises(DamagedFileError):
        read_packed(path, KEY, model.program)


def test_headers_that_are_no_objects_are_refused(model, path, whole):
    for text in (b"[]", b"7", b"{", b"[" * 100_000, b"\xff"):
        digest = hashlib.sha256(text).digest()
        path.write_bytes(PREFIX.pack(MAGIC, _native.PACKED_LAYOUT, len(text)) + digest + text + bytes(5000))
        with pytest.raises(DamagedFileError, match="header"):
            read_packed(path, KEY, model.program)
    path.write_bytes(PREFIX.pack(MAGIC, _native.PACKED_LAYOUT, 2**32 - 1) + bytes(64))
    with pytest.raises(DamagedFileError, match="4294967295"):
        read_packed(path, KEY, model.program)


def test_the_mapping_checks_offsets_itself(path):
    fd = os.open(path, os.O_RDONLY)
    file = _native.MappedFile(fd)
    os.close(fd)
    for rows, cols, offset in ((2**62, 32, 0), (16, 2**62, 0), (16, 2**40 // 32 * 32, 64), (16, 32, file.nbytes),
                               (16, 32, 2**64 - 64), (16, 32, 8), (0, 32, 0), (16, 33, 0)):  # fmt: skip
        with pytest.raises(ValueError):
            _native.mapped_weight("Q8_0", rows, cols, file, offset)


def test_another_key_or_layout_is_written_anew(model, path, whole, caplog):
    load(model, slot_at(path, key="b" * 64)).close()
    assert read_packed(path, "b" * 64, model.program)
    changed = bytearray(whole)
    changed[8] += 1
    path.write_bytes(changed)
    load(model, slot_at(path)).close()
    assert path.read_bytes() == whole
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_damaged_file_is_written_anew_with_a_warning(model, path, whole, caplog):
    path.write_bytes(whole[:-1])
    load(model, slot_at(path)).close()
    assert path.read_bytes() == whole
    assert "written anew" in caplog.text


def test_a_file_in_use_is_replaced_not_changed(model, path, whole):
    weights = read_packed(path, KEY, model.program)
    before = {name: bytes(matrix.data) for name, matrix in weights.matrices.items()}
    load(model, slot_at(path, key="b" * 64)).close()
    assert {name: bytes(matrix.data) for name, matrix in weights.matrices.items()} == before


def test_two_writers_at_once_leave_one_whole_file(model, tmp_path, whole):
    path = tmp_path / "new" / "tiny.packed"
    barrier = threading.Barrier(4)

    def admit(size):
        barrier.wait(timeout=10)
        return True

    executables = [load(model, slot_at(path, admit=admit)) for _ in range(4)]
    threads = [threading.Thread(target=e.close) for e in executables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_a_warning(model, tmp_path, caplog, monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    load(model, slot_at(tmp_path / "tiny.packed")).close()
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_gives_the_file_up(model, tmp_path):
    def admit(size):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        writer._cancelled.wait(timeout=10)
        return True

    weights = pack_weights(model.program, model, _native.Pool(1, []))
    writer = PackedWriter(slot_at(tmp_path / "tiny.packed", admit=admit), model.program, weights)
    # A shell's background jobs are started with interrupts ignored, and with them the tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_admitted_is_not_written(model, tmp_path, whole):
    asked = []
    load(model, slot_at(tmp_path / "tiny.packed", admit=lambda size: bool(asked.append(size)))).close()
    assert list(tmp_path.iterdir()) == []
    assert abs(asked[0] - len(whole)) < 3 * 4096


def test_the_layout_has_a_number():
    """The panels of every type, as bytes. Where this fails, raise kPackedLayout and write the new digest down."""
    pool = _native.Pool(1, [])
    digest = hashlib.sha256()
    for dtype in DType:
        stored = np.frombuffer(hashlib.shake_128(b"weights").digest(33 * dtype.row_bytes(512)), dtype=np.uint8)
        digest.update(_native.pack(dtype.name, 33, 512, stored, pool).data.tobytes())
    assert (_native.PACKED_LAYOUT, digest.hexdigest()[:16]) == (3, "c5b9a526bdc89684")


def test_packed_weights_take_few_bits():
    """Bits a weight, scales counted: the file's own for most; k-quants have wider scales, Q3_K quants of 4 bits."""
    bits = {dtype.name: _native.packed_bytes(dtype.name, 64, 1024) * 8 / (64 * 1024) for dtype in DType}
    assert bits == {
        "F32": 32, "F16": 16, "BF16": 16, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5,
        "Q2_K": 3.125, "Q3_K": 4.625, "Q4_K": 4.625, "Q5_K": 5.625, "Q6_K": 6.625,
    }  # fmt: skip
