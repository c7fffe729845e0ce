"""Headers and tensors of GGUF files. The package `gguf` writes valid files; broken ones are made by hand."""

from __future__ import annotations

import io
import struct
import sys
import time
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendit.checkpoint.gguf_file import MAX_ENTRIES, read_gguf
from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.reader import RowReader, ShardSpec, as_tensor
from ascendit.errors import CheckpointError, EnvironmentProblem

U8, U32, I32, STRING, ARRAY = 0, 4, 5, 8, 9
TYPES = gguf.GGMLQuantizationType
SHAPES: dict[str, tuple[int, ...]] = {
    "F32": (3, 5),
    "F16": (4, 8),
    "BF16": (2, 3, 4),
    "Q8_0": (6, 64),
    "Q4_K": (5, 512),
    "Q6_K": (2, 256),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, np.ndarray]]]:
    """A file with one tensor per type, and name -> (type, stored array)."""
    generator = torch.Generator().manual_seed(0)
    arrays = {
        f"{kind.lower()}.weight": (kind, gguf_files.stored(torch.randn(shape, generator=generator), kind))
        for kind, shape in SHAPES.items()
    }
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    gguf_files.write(path, {name: (data, kind) for name, (kind, data) in arrays.items()})
    return path, arrays


def test_tensors_of_every_kind_have_the_values_of_the_package(valid) -> None:
    path, arrays = valid
    infos = read_header(path)
    assert list(infos) == list(arrays)
    with RowReader() as reader:
        for (name, (kind, data)), info in zip(arrays.items(), infos.values(), strict=True):
            expected = gguf_files.decoded(data, kind)
            assert info.shape == SHAPES[kind] and info.nbytes == data.nbytes
            assert info.read_nbytes == expected.nbytes
            assert torch.equal(reader.read_tensor(info), expected.reshape(info.shape)), name


def test_the_header_agrees_with_the_package(valid) -> None:
    path, _ = valid
    reader = gguf.GGUFReader(path)
    assert [(t.name, tuple(t.shape.tolist())[::-1], t.data_offset, t.n_bytes) for t in reader.tensors] == [
        (i.name, i.shape, i.start, i.nbytes) for i in read_header(path).values()
    ]


def test_shards_and_blocks_of_rows(valid) -> None:
    path, arrays = valid
    info = read_header(path)["q4_k.weight"]
    full = gguf_files.decoded(arrays["q4_k.weight"][1], "Q4_K")
    with RowReader() as reader:
        for shard in (ShardSpec(0, 1, 3), ShardSpec(1, 100, 300), ShardSpec(1, 256), ShardSpec(0, 4, 1)):
            expected = full.narrow(shard.axis, shard.start, shard.shape_of(info.shape)[shard.axis])
            assert torch.equal(reader.read_tensor(info, shard), expected)
        blocks = [as_tensor(view, info).clone() for _, view in reader.read_blocks(info, block_bytes=2048)]
    assert len(blocks) == 3 and torch.equal(torch.cat(blocks), full)


@pytest.mark.parametrize(("kind", "shape"), [("Q8_0", (16, 3, 1, 2, 2)), ("Q4_K", (64, 4, 1, 2, 2))])
def test_blocks_over_several_rows_of_the_original_shape(tmp_path: Path, kind: str, shape) -> None:
    """ComfyUI-GGUF writes such tensors as rows of 256 values, with their shape in the metadata."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows = values.reshape(-1, gguf.GGML_QUANT_SIZES[gguf_files.kind_of(kind)][0])
    data = gguf_files.stored(rows, kind)
    file = gguf_files.write(
        tmp_path / "x.gguf", {"patch.weight": (data, kind)}, original_shapes={"patch.weight": shape}
    )
    full = gguf_files.decoded(data, kind).reshape(shape)
    info = read_header(file)["patch.weight"]
    with RowReader() as reader:
        assert info.shape == shape and torch.equal(reader.read_tensor(info), full)
        assert torch.equal(reader.read_tensor(info, ShardSpec(0, 1, 4)), full[1:5])
        assert torch.equal(reader.read_tensor(info, ShardSpec(1, 1, 2)), full[:, 1:3])
        blocks = [as_tensor(view, info).clone() for _, view in reader.read_blocks(info, block_bytes=1)]
    assert torch.equal(torch.cat(blocks), full)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.0.modulation", (6, 32), (1, 6, 32)),
        ("model.diffusion_model.head.modulation", (2, 32), (1, 2, 32)),
        ("blocks.0.scale_shift_table", (1, 6, 32), (1, 6, 32)),
        ("patch_embedding.weight", (8 * 3, 1, 2, 2), (8, 3, 1, 2, 2)),
        ("patch_embedding.weight", (8, 3, 1, 2, 2), (8, 3, 1, 2, 2)),
        ("conv.weight", (8, 3, 2, 2), (8, 3, 2, 2)),
        ("norm.weight", (8,), (8,)),
        ("scalar", (), ()),
    ],
)
def test_shapes_that_ggml_changes_are_restored(tmp_path: Path, name: str, shape, expected) -> None:
    """ggml omits dimensions of size 1; stable-diffusion.cpp joins the first two of a 3-D convolution."""
    tensors = {name: (np.zeros(shape, np.float32), "F32")}
    tensors |= {f"{name.removesuffix('weight')}bias": (np.zeros(8, np.float32), "F32")}
    infos = read_header(gguf_files.write(tmp_path / "x.gguf", tensors))
    assert infos[name].shape == expected


# ---- metadata -----------------------------------------------------------------------------------


def test_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    writer.add_name("Wan 2.2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.shape", [1, 2, 3])
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"] * 5)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 15)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with open(tmp_path / "x.gguf", "rb") as f:
        metadata = read_gguf(tmp_path / "x.gguf", f, (tmp_path / "x.gguf").stat().st_size).metadata
    assert metadata == {
        "general.architecture": "wan",
        "general.name": "Wan 2.2",
        "general.file_type": 15,
        "a.float": 0.5,
        "a.bool": True,
        "a.shape": (1, 2, 3),
    }


def test_without_the_package_the_error_has_a_command(valid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it raises ImportError
    with pytest.raises(EnvironmentProblem) as e:
        read_header(valid[0])
    assert e.value.code == "E-ENV-01" and e.value.fix == 'pip install "gguf>=0.17"'


# ---- damaged files ------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes = "a", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return text(name) + numbers


def raw(
    *tensors: bytes,
    metadata: tuple[bytes, ...] = (),
    data: bytes = bytes(16),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file with exactly these parts, valid or not."""
    counts = counts or (len(tensors), len(metadata))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def number(value: int, letter: str = "I") -> bytes:
    return struct.pack(f"<{letter}", value)


def original_shape(*sizes: int) -> bytes:
    data = number(I32) + number(len(sizes), "Q") + struct.pack(f"<{len(sizes)}i", *sizes)
    return entry("comfy.gguf.orig_shape.a", ARRAY, data)


BROKEN: dict[str, tuple[bytes, str]] = {
    "another file": (b"version 3", "not a GGUF file: it begins with b'vers'"),
    "only the magic": (b"GGUF", "needs 4 bytes at byte 4 of 4"),
    "no counts": (b"GGUF" + number(3), "needs 8 bytes at byte 8 of 8"),
    "version 1": (raw(version=1), "GGUF version 1; versions 2 and 3 are read"),
    "version 4": (raw(version=4), "GGUF version 4"),
    "big-endian": (raw(version=0x03000000), "big-endian"),
    "2^60 tensors": (raw(counts=(1 << 60, 0)), f"truncated or damaged: it lists {1 << 60} tensors"),
    "2^60 entries": (raw(counts=(0, 1 << 60)), f"lists {1 << 60} metadata entries"),
    "more tensors than fit": (raw(tensor(), counts=(20, 0)), "lists 20 tensors in"),
    "too many tensors": (
        raw(counts=(MAX_ENTRIES + 1, 0), data=bytes(24 * MAX_ENTRIES + 99)),
        f"lists {MAX_ENTRIES + 1} tensors in",
    ),
    "name of 2^60 bytes": (raw(number(1 << 60, "Q") + bytes(40)), f"needs {1 << 60} bytes"),
    "name not UTF-8": (raw(tensor(b"\xff\xfe")), "the text at byte 24 is not UTF-8"),
    "2^32 - 1 dimensions": (raw(text("a") + number((1 << 32) - 1) + bytes(40)), "4294967295 dimensions"),
    "2^63 values": (raw(tensor(dims=(1 << 63,))), "truncated: a ends at byte"),
    "product of 2^120": (raw(tensor(dims=(1 << 60, 1 << 60))), "truncated: a ends at byte"),
    "offset of 2^63": (raw(tensor(offset=1 << 63)), "truncated: a ends at byte"),
    "truncated data": (raw(tensor(), data=bytes(15)), "truncated: a ends at byte 80, but the file at 79"),
    "overlap": (raw(tensor("a"), tensor("b"), data=bytes(64)), "b overlaps the tensor before it"),
    "gap": (raw(tensor(offset=32), data=bytes(48)), "a leaves a gap before it"),
    "gap between": (raw(tensor("a"), tensor("b", offset=64), data=bytes(80)), "b leaves a gap before it"),
    "not aligned": (raw(tensor("a"), tensor("b", offset=16), data=bytes(64)), "b leaves a gap before it"),
    "bytes at the end": (raw(tensor(), data=bytes(100)), "84 bytes follow the last tensor"),
    "two names": (raw(tensor("a"), tensor("a", offset=32), data=bytes(48)), "two tensors 'a'"),
    "two keys": (raw(metadata=(entry("k", U8, b"1"), entry("k", U8, b"2"))), "two metadata entries 'k'"),
    "unknown value type": (raw(metadata=(entry("k", 13, bytes(8)),)), "'k' has the unknown type 13"),
    "array of 2^60": (
        raw(metadata=(entry("k", ARRAY, number(U8) + number(1 << 60, "Q")),)),
        f"needs {1 << 60} bytes",
    ),
    "array of 2^60 texts": (
        raw(metadata=(entry("k", ARRAY, number(STRING) + number(1 << 60, "Q")),)),
        f"needs {8 << 60} bytes",
    ),
    "array of arrays": (
        raw(metadata=(entry("k", ARRAY, number(ARRAY) + number(1, "Q")),)),
        "'k' is an array of arrays",
    ),
    "text of 2^60": (raw(metadata=(entry("k", STRING, number(1 << 60, "Q")),)), f"needs {1 << 60} bytes"),
    "alignment of 0": (raw(metadata=(entry("general.alignment", U32, number(0)),)), "the alignment 0"),
    "alignment of 12": (raw(metadata=(entry("general.alignment", U32, number(12)),)), "the alignment 12"),
    "alignment as text": (raw(metadata=(entry("general.alignment", STRING, text("32")),)), "alignment '32'"),
    "row of half a block": (raw(tensor(dims=(16, 2), kind=TYPES.Q8_0)), "Q8_0 stores 32 values together"),
    "K of 128": (raw(tensor(dims=(128, 2), kind=TYPES.Q4_K)), "Q4_K stores 256 values together"),
    "other original shape": (
        raw(tensor(), metadata=(original_shape(2, 3),)),
        "but the original shape (2, 3)",
    ),
    "negative original shape": (
        raw(tensor(), metadata=(original_shape(-2, -2),)),
        "but the original shape (-2, -2)",
    ),
}


def refusal(path: Path, data: bytes) -> CheckpointError:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as e:
        read_header(path)
    return e.value


@pytest.mark.parametrize("label", BROKEN)
def test_damaged_headers_are_refused_with_the_reason(tmp_path: Path, label: str) -> None:
    data, reason = BROKEN[label]
    error = refusal(tmp_path / "x.gguf", data)
    assert error.code == "E-CKP-02" and error.needs == "a complete GGUF file"
    assert reason in error.got and len(error.got) < 500


@pytest.mark.parametrize(
    ("kind", "label"), [(9, "Q8_1"), (15, "Q8_K"), (4, "type 4"), (1 << 31, "type 2147483648")]
)
def test_types_that_are_not_read_are_named(tmp_path: Path, kind: int, label: str) -> None:
    error = refusal(tmp_path / "x.gguf", raw(tensor(dims=(256,), kind=kind), data=bytes(512)))
    assert error.code == "E-CKP-04" and f"the GGUF tensor 'a' is stored as {label}" in error.got
    assert "Q4_K" in error.needs


def test_other_versions_and_alignments_are_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32).tobytes()
    metadata = (entry("general.alignment", U32, number(8)),)
    for label, data in {
        "version 2": raw(tensor(), data=values, version=2),
        "alignment of 8": raw(tensor(), data=values, metadata=metadata, alignment=8),
        "padded": raw(tensor(), data=values + bytes(16)),
        "no tensors": raw(data=b""),
        "empty tensor": raw(tensor(dims=(4, 0)), tensor("b"), data=values),
        "largest text": raw(tensor(), data=values, metadata=(entry("k", STRING, text("x" * 100_000)),)),
    }.items():
        (tmp_path / "x.gguf").write_bytes(data)
        infos = read_header(tmp_path / "x.gguf")
        last = [info for info in infos.values() if info.nbytes]
        assert len(last) == (label != "no tensors"), label
        with RowReader() as reader:
            assert all(reader.read_tensor(info).tolist() == [0, 1, 2, 3] for info in last), label


def test_every_truncation_is_refused(valid, tmp_path: Path) -> None:
    data = valid[0].read_bytes()
    end = max(info.end for info in read_header(valid[0]).values())
    for length in [*range(4, 700, 13), *range(700, end, 997), end - 1]:
        assert refusal(tmp_path / "x.gguf", data[:length]).code == "E-CKP-02", length


def parsed(data: bytes, path: Path = Path("x.gguf")) -> str:
    """`ok` or the code of the error; any other exception fails the test."""
    try:
        read_gguf(path, io.BytesIO(data), len(data))
    except CheckpointError as e:
        return e.code
    return "ok"


@settings(max_examples=100, deadline=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 800), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)
)
def test_random_edits_of_the_header_never_raise_another_error(valid, edits) -> None:
    data = bytearray(valid[0].read_bytes())
    for position, new in edits:
        data[position : position + len(new)] = new
    assert parsed(bytes(data)) in ("ok", "E-CKP-02", "E-CKP-04")


def test_a_header_of_many_small_parts_is_read_in_bounded_time() -> None:
    texts = number(STRING) + number(100_000, "Q") + text("") * 100_000
    entries = (entry("tokens", ARRAY, texts), *(entry(f"k{i}", U8, b"1") for i in range(20_000)))
    start = time.process_time()
    assert parsed(raw(tensor(), metadata=entries)) == "ok"
    assert time.process_time() - start < 5
