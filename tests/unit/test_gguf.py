"""The GGUF reader reads what the `gguf` package writes, and ends in ModelFileError for whatever else it is given."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.errors import KvarnError, ModelFileError, UnsupportedModelError
from kvarn.tensors import DType
from kvarn.weights import open_model
from kvarn.weights.gguf import GGUFFile


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor_header(name="w", extents=(32, 4), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


def build(pairs=(), headers=(), data=b"", *, version=3, tensors=None, values=None, magic=b"GGUF") -> bytes:
    head = magic + struct.pack(
        "<IQQ", version, len(headers) if tensors is None else tensors, len(pairs) if values is None else values
    )
    body = head + b"".join(pairs) + b"".join(headers)
    return body + b"\0" * (-len(body) % 32) + data


GOOD = build(
    [
        pair("general.architecture", 8, text("llama")),
        pair("n", 4, struct.pack("<I", 7)),
        pair("flag", 7, b"\1"),
        pair("names", 9, array(8, 3, text("a") + text("bc") + text("ü"))),
        pair("long", 9, array(6, 100, np.arange(100, dtype="<f4").tobytes())),
        pair("nested", 9, array(9, 1, array(5, 2, struct.pack("<ii", -1, 2)))),
    ],
    [tensor_header("w", (32, 4), 0, 0), tensor_header("q", (64, 2), 2, 512)],
    bytes(512 + 72),
)


@pytest.fixture
def write(tmp_path):
    def writer(data: bytes):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return writer


def test_values_and_tensors(write):
    with GGUFFile.open(write(GOOD)) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert (file.metadata["n"], file.metadata["flag"]) == (7, True)
        assert file.metadata["names"] == ["a", "bc", "ü"]
        assert file.metadata["long"] == list(range(100))
        assert file.metadata["nested"] == [[-1, 2]]
        assert file.tensor("w").shape == (4, 32)
        assert (file.tensor("q").dtype, file.tensor("q").shape, file.tensor("q").nbytes) == (DType.Q4_0, (2, 64), 72)
        with pytest.raises(ModelFileError, match="no such tensor"):
            file.tensor("nothing")


def test_agrees_with_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "written.gguf"
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("note", "grüß dich")
    writer.add_array("tokens", [f"t{i}" for i in range(300)])
    writer.add_tensor("w", values)
    writer.add_tensor("q", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_model(path) as files:
        assert files.metadata["note"] == "grüß dich"
        assert files.metadata["tokens"] == [f"t{i}" for i in range(300)]
        assert files.tensor("w").data.tobytes() == values.tobytes()
        assert files.tensor_info("q") == (DType.Q8_0, (6, 64))


DEEP = array(9, 1, array(9, 1, array(9, 1, array(9, 1, array(9, 1, b""))))) + bytes(99)

BAD = {
    "empty": (b"", "magic"),
    "other format": (b"\x80\x04" + bytes(100), "magic"),
    "version 1": (build(version=1), "version"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "absurd tensor count": (build(tensors=2**60), "tensor_count"),
    "absurd value count": (build(values=2**60), "metadata_kv_count"),
    "unknown value type": (build([pair("n", 99, b"")]), "type 99"),
    "unknown element type": (build([pair("n", 9, array(99, 1, b""))]), "type 99"),
    "boolean of 2": (build([pair("flag", 7, b"\2")]), "flag"),
    "absurd string": (build([pair("s", 8, struct.pack("<Q", 2**63))]), "s"),
    "absurd array": (build([pair("a", 9, array(4, 2**61, b""))]), "a"),
    "absurd string array": (build([pair("a", 9, array(8, 2**61, b""))]), "a"),
    "absurd nested array": (build([pair("a", 9, array(9, 2**61, b""))]), "a"),
    "deep nesting": (build([pair("a", 9, DEEP)]), "nested"),
    "string past the end": (build([pair("a", 9, array(8, 1, struct.pack("<Q", 1000)))]), "a"),
    "not UTF-8": (build([pair("s", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "UTF-8"),
    "key twice": (build([pair("n", 4, bytes(4))] * 2), "twice"),
    "bad alignment": (build([pair("general.alignment", 4, struct.pack("<I", 3))]), "general.alignment"),
    "tensor twice": (build(headers=[tensor_header()] * 2, data=bytes(1024)), "two tensors"),
    "truncated data": (build(headers=[tensor_header()], data=bytes(511)), "truncated"),
    "offset past the end": (build(headers=[tensor_header(offset=2**62)], data=bytes(512)), "ends at"),
    "misaligned": (build(headers=[tensor_header(offset=4)], data=bytes(1024)), "alignment"),
    "overlap": (build(headers=[tensor_header("a"), tensor_header("b", offset=256)], data=bytes(1024)), "overlaps"),
    "no dimensions": (build(headers=[tensor_header(extents=())]), "dimensions"),
    "many dimensions": (build(headers=[tensor_header(extents=(1,) * 9)], data=bytes(64)), "dimensions"),
    "extent of 0": (build(headers=[tensor_header(extents=(0, 4))]), "out of range"),
    "overflowing extents": (build(headers=[tensor_header(extents=(2**40, 2**40))]), "out of range"),
    "broken blocks": (build(headers=[tensor_header(extents=(33, 4), kind=2)], data=bytes(1024)), "multiple"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(write, name):
    data, message = BAD[name]
    with pytest.raises(ModelFileError, match=message):
        GGUFFile.open(write(data))


def test_an_unknown_tensor_type_is_unsupported_by_name(write):
    with pytest.raises(UnsupportedModelError, match="tensor type 77"):
        GGUFFile.open(write(build(headers=[tensor_header(kind=77)], data=bytes(1024))))


def test_a_bad_string_deep_in_a_long_array_is_found_when_it_is_read(write):
    strings = text("ok") * 99 + struct.pack("<Q", 1) + b"\xff"
    file = GGUFFile.open(write(build([pair("a", 9, array(8, 100, strings))])))
    with pytest.raises(ModelFileError, match="element 99 is not UTF-8"):
        file.metadata["a"]


def read_all(path) -> None:
    with GGUFFile.open(path) as file:
        for key in file.metadata:
            file.metadata[key]
        for name in file.tensors:
            assert file.tensor(name).data.sum() >= 0


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(cut=st.integers(0, len(GOOD) - 1))
def test_no_truncation_goes_further_than_an_error(write, cut):
    try:
        read_all(write(GOOD[:cut]))
    except KvarnError:
        return
    pytest.fail("a truncated file was read")


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 600), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_flipped_byte_goes_further_than_an_error(write, flips):
    data = bytearray(GOOD)
    for place, value in flips:
        data[place] = value
    try:
        read_all(write(bytes(data)))
    except KvarnError:
        return


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl"])
def test_pickles_are_refused_without_being_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelFileError, match="never read"):
        open_model(path)
