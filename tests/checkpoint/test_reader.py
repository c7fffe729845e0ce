"""Headers and bytes. The safetensors library is the oracle of valid files; broken ones are made by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored import stored_tensors

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.reader import RowReader, ShardSpec, as_bytes, as_tensor, float_bytes
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TORCH_DTYPES, Encoding, TensorInfo
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.names import listed

STEM = "diffusion_pytorch_model"
DTYPES = {dtype_name: getattr(torch, name) for dtype_name, name in TORCH_DTYPES.items() if dtype_name != "F4"}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with exactly this header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as e:
        read_header(path)
    assert e.value.code == "E-CKP-02"
    assert str(path) in e.value.got
    return e.value.got


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits, except for bool; NaN payloads must be preserved."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).to(torch.bool)
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
contents = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(DTYPES)), shapes),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=contents, metadata=st.booleans())
def test_files_of_safetensors_are_read_exactly(
    tmp_path: Path, contents: dict[str, tuple[str, tuple[int, ...]]], metadata: bool
) -> None:
    tensors = {name: random_bytes(shape, DTYPES[dtype]) for name, (dtype, shape) in contents.items()}
    file = tmp_path / f"{STEM}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"} if metadata else None)
    header = read_header(file)
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == contents
    assert Shards.open(tmp_path).tensors == header
    read = stored_tensors(tmp_path)
    assert all(same(read[name], tensors[name]) for name in tensors)


def test_every_dtype(tmp_path: Path) -> None:
    tensors = {name: random_bytes((3, 4), dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    infos, read = Shards.open(tmp_path).tensors, stored_tensors(tmp_path)
    for name, tensor in tensors.items():
        assert (infos[name].dtype, infos[name].nbytes) == (name, 12 * DTYPE_BITS[name] // 8)
        assert same(read[name], tensor), name


def test_packed_four_bit(tmp_path: Path) -> None:
    packed = torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float4_e2m1fn_x2)
    save_file({"x": packed}, tmp_path / f"{STEM}.safetensors")
    info = Shards.open(tmp_path).tensors["x"]
    assert (info.dtype, info.shape) == ("F4", (2, 6))
    assert same(stored_tensors(tmp_path)["x"], packed)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "last": torch.ones(2)}
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    read = stored_tensors(tmp_path)
    assert read["scalar"].shape == ()
    assert all(same(read[name], tensor) for name, tensor in tensors.items())


def test_offsets_are_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw({"b": entry(2, 5), "a": entry(0, 2), "__metadata__": {"x": "y"}}, b"AABBB"))
    header = read_header(file)
    assert list(header) == ["a", "b"]
    info = header["b"]
    assert info == TensorInfo("b", "U8", (3,), file, info.start, info.start + 3)
    assert file.read_bytes()[info.start : info.end] == b"BBB"


BROKEN: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty"),
    "seven bytes": (b"\x01" * 7, "too short for a header"),
    "header beyond the file": (raw({}, length=5000), "truncated: header of 5000 bytes"),
    "impossible header length": (raw({}, length=2**60), "not a safetensors file"),
    "web page": (b"<html>not found</html>", "a web page, not weights"),
    "garbage": (raw(b"{garbage"), "header is not JSON"),
    "not utf-8": (raw(b"\xff\xff"), "header is not JSON"),
    "nested too deep": (raw(b"[" * 100_000), "header is not JSON"),
    "list": (raw([]), "a JSON list, not an object"),
    "duplicate name": (raw(b'{"a": {}, "a": {}}'), "duplicate key"),
    "entry is not an object": (raw({"a": 3}), "entry of a is not an object"),
    "unknown dtype": (raw({"a": entry(0, 1, dtype="F7")}, b"x"), "unknown dtype 'F7'"),
    "dtype is a list": (raw({"a": {**entry(0, 1), "dtype": ["U8"]}}, b"x"), "unknown dtype"),
    "negative shape": (raw({"a": entry(0, 1, shape=[-1])}, b"x"), "has the invalid shape"),
    "boolean shape": (raw({"a": {**entry(0, 1), "shape": [True]}}, b"x"), "has the invalid shape"),
    "no shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "has the invalid shape None"),
    "offsets reversed": (raw({"a": entry(1, 0, shape=[1])}, b"x"), "has the invalid offsets"),
    "three offsets": (raw({"a": {**entry(0, 1), "data_offsets": [0, 1, 2]}}, b"x"), "the invalid offsets"),
    "wrong byte count": (
        raw({"a": entry(0, 6, shape=[2], dtype="F32")}, b"x" * 6),
        "has 6 bytes; F32 [2] takes 8",
    ),
    "huge shape": (raw({"a": entry(0, 1, shape=[2**62, 2**62])}, b"x"), "has 1 bytes"),
    "truncated": (raw({"a": entry(0, 9)}, b"xxxx"), "truncated: a ends at byte"),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6), "b overlaps"),
    "overlapping tensors": (raw({"a": entry(0, 4), "b": entry(0, 4)}, b"x" * 4), "b overlaps"),
    "gap": (raw({"a": entry(0, 2), "b": entry(4, 6)}, b"x" * 6), "b leaves a gap"),
    "gap at the start": (raw({"a": entry(1, 2)}, b"x" * 2), "a leaves a gap"),
    "bytes at the end": (raw({"a": entry(0, 2)}, b"x" * 6), "4 bytes follow the last tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_error_of_a_broken_header(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / "a.safetensors").write_bytes(content)
    assert message in refused(tmp_path / "a.safetensors")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "missing" in refused(tmp_path / "none.safetensors")
    assert "a folder" in refused(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 500), flip=st.integers(0, 499), to=st.integers(0, 255))
def test_damage_is_an_error_or_harmless(tmp_path: Path, cut: int, flip: int, to: int) -> None:
    """A cut file is always refused; a changed byte gives an ascendit error or a header that fits the file."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(20.0), "b": torch.ones(3, 4, dtype=torch.int8)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: min(cut, len(content) - 1)])
    refused(file)
    damaged = bytearray(content)
    damaged[flip % len(content)] = to
    file.write_bytes(damaged)
    try:
        header = read_header(file)
    except CheckpointError as e:
        assert e.code == "E-CKP-02"
    else:
        assert max(info.end for info in header.values()) == len(content)


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards and an index."""
    folder.mkdir(exist_ok=True)
    tensors = {f"blocks.{i}.weight": torch.full((2, 2), float(i)) for i in range(4)}
    weight_map = {name: f"{STEM}-0000{1 + i // 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    write_index(folder, weight_map)
    return tensors


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 64}, "weight_map": weight_map})
    (folder / f"{STEM}.safetensors.index.json").write_text(text)


def weight_map(folder: Path) -> dict[str, str]:
    data: dict[str, dict[str, str]] = json.loads((folder / f"{STEM}.safetensors.index.json").read_text())
    return data["weight_map"]


def cannot_open(folder: Path, code: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as e:
        Shards.open(folder)
    assert e.value.code == code, str(e.value)
    return e.value


def test_shards_are_one_set(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    shards, read = Shards.open(tmp_path), stored_tensors(tmp_path)
    assert set(shards.tensors) == set(tensors)
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    assert [(info.file.name, info.name) for info in shards.tensors.values()] == [
        (f"{STEM}-0000{1 + i // 2}-of-00002.safetensors", f"blocks.{i}.weight") for i in range(4)
    ]


def test_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"a": entry(4, 6), "b": entry(0, 4), "none": entry(4, 4, shape=[0])}
    (tmp_path / f"{STEM}.safetensors").write_bytes(raw(header, b"bbbbaa"))
    shards = Shards.open(tmp_path)
    assert shards.files == (tmp_path / f"{STEM}.safetensors",)
    assert list(shards.tensors) == ["b", "none", "a"]


def test_another_stem(tmp_path: Path) -> None:
    save_file({"shared.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Shards.open(tmp_path, "model").tensors) == ["shared.weight"]
    assert list(Shards.open(tmp_path).tensors) == ["shared.weight"]  # the only weights, of any name


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "part")
    (tmp_path / "blobs").mkdir()
    for file in (tmp_path / "part").glob("*"):
        blob = tmp_path / "blobs" / file.name.replace(".", "_")
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    read = stored_tensors(tmp_path / "part")
    assert all(same(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "a/../../outside.safetensors", "C:\\x", "", "a\0b"]
)
def test_an_index_with_a_path_outside_the_folder(tmp_path: Path, name: str) -> None:
    sharded(tmp_path / "part")
    save_file({"blocks.0.weight": torch.ones(2, 2)}, tmp_path / "outside.safetensors")
    write_index(tmp_path / "part", weight_map(tmp_path / "part") | {"blocks.0.weight": name})
    e = cannot_open(tmp_path / "part", "E-CKP-03")
    assert f"{name!r}, which is not inside the folder" in e.got


def test_an_index_with_an_absolute_name(tmp_path: Path) -> None:
    sharded(tmp_path / "part")
    name = str(tmp_path / "part" / f"{STEM}-00001-of-00002.safetensors")
    write_index(tmp_path / "part", weight_map(tmp_path / "part") | {"blocks.0.weight": name})
    assert "not inside the folder" in cannot_open(tmp_path / "part", "E-CKP-03").got


def test_an_index_with_a_missing_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / f"{STEM}-00002-of-00002.safetensors").unlink()
    e = cannot_open(tmp_path, "E-CKP-03")
    assert f"lists 2 files, 1 of them missing: {STEM}-00002-of-00002.safetensors" in e.got


def test_an_index_with_a_name_too_long_for_a_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map(tmp_path) | {"blocks.0.weight": "a" * 5000})
    assert "lists 3 files, 1 of them missing: aaa" in cannot_open(tmp_path, "E-CKP-03").got


def test_an_index_with_missing_tensors(tmp_path: Path) -> None:
    sharded(tmp_path)
    more = {f"extra.{i}": f"{STEM}-00001-of-00002.safetensors" for i in range(7)}
    write_index(tmp_path, weight_map(tmp_path) | more)
    e = cannot_open(tmp_path, "E-CKP-04")
    assert "7 not in the listed shard: extra.0 in " in e.got
    assert "extra.4" in e.got
    assert "extra.5" not in e.got
    assert "and 2 more" in e.got


def test_a_shard_with_an_unlisted_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    entries = weight_map(tmp_path)
    del entries["blocks.3.weight"]
    write_index(tmp_path, entries)
    assert "1 in a shard but not in the index: blocks.3.weight in" in cannot_open(tmp_path, "E-CKP-04").got


def test_a_tensor_in_another_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map(tmp_path) | {"blocks.0.weight": f"{STEM}-00002-of-00002.safetensors"})
    e = cannot_open(tmp_path, "E-CKP-04")
    assert f"blocks.0.weight in {STEM}-00002" in e.got
    assert f"blocks.0.weight in {STEM}-00001" in e.got


@pytest.mark.parametrize("content", [None, [], {"a": 3}])
def test_an_index_without_a_map(tmp_path: Path, content: object) -> None:
    sharded(tmp_path)
    write_index(tmp_path, content)
    assert "has no weight_map" in cannot_open(tmp_path, "E-CKP-06").got


def test_an_index_that_is_not_json(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / f"{STEM}.safetensors.index.json").write_text("{")
    assert "index.json is not JSON" in cannot_open(tmp_path, "E-CKP-06").got


def test_one_file_and_an_index(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    assert "has both" in cannot_open(tmp_path, "E-CKP-03").got
    write_index(tmp_path, dict.fromkeys(tensors, f"{STEM}.safetensors"))
    assert len(Shards.open(tmp_path).files) == 1


@pytest.mark.parametrize("target", [f"{STEM}.safetensors", "../blobs/gone"])
def test_a_dangling_link(tmp_path: Path, target: str) -> None:
    """To itself, and to a file that does not exist."""
    link = tmp_path / f"{STEM}.safetensors"
    link.symlink_to(target)
    e = cannot_open(tmp_path, "E-CKP-03")
    assert e.got == f"{link} is a dangling symlink to {target}"


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.txt").touch()
    e = cannot_open(tmp_path, "E-CKP-02")
    assert f"no {STEM}.safetensors" in e.got and f"{STEM}.safetensors.index.json" in e.needs
    assert "no folder" in cannot_open(tmp_path / "none", "E-CKP-02").got


def test_a_broken_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    file = tmp_path / f"{STEM}-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    e = cannot_open(tmp_path, "E-CKP-02")
    assert file.name in e.got
    assert "truncated" in e.got


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8), "b": torch.ones(8)}, tmp_path / f"{STEM}.safetensors")
    tensors = Shards.open(tmp_path).tensors
    os.truncate(tmp_path / f"{STEM}.safetensors", tensors["b"].end - 4)
    with RowReader() as reader:
        for info in tensors.values():  # also the complete one: the file is another one
            with pytest.raises(CheckpointError, match="truncated since its header was read") as e:
                reader.read_tensor(info)
            assert e.value.code == "E-CKP-02"


def test_a_file_that_disappears_after_its_header_was_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    info.file.unlink()
    with RowReader() as reader, pytest.raises(CheckpointError, match="x.safetensors: No such file") as e:
        reader.read_all(info)
    assert e.value.code == "E-CKP-02"


def test_a_tensor_does_not_need_its_file_and_owns_its_memory(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.ones(1000)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    with RowReader() as reader:
        a, again = reader.read_tensor(info), reader.read_tensor(info)
    assert not reader._files._descriptors
    a += 1
    assert again.tolist() == [0, 1, 2, 3]
    assert a.untyped_storage().nbytes() == 16  # it keeps no other tensor alive
    assert reader.read_tensor(info).tolist() == [0, 1, 2, 3]  # opens its file again
    reader.close()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first byte, last byte + 1) of every read."""
    spans: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(handle: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(handle, buffers, offset)
        spans.append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return spans


def test_reading_one_tensor_reads_only_its_bytes(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(1000)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["b"]
    with RowReader() as reader:
        assert spans == []
        reader.read_tensor(info)
    assert spans == [(info.start, info.end)]


@pytest.mark.parametrize(
    "shard", [ShardSpec(0, 30, 50), ShardSpec(0, 150), ShardSpec(1, 16, 32), ShardSpec(1, 48)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_slice_of_a_tensor(
    tmp_path: Path, shard: ShardSpec, dtype: torch.dtype, spans: list[tuple[int, int]]
) -> None:
    """Rows or columns, by every read method: the values of the slice, and no byte outside of it is read."""
    tensor = torch.randn(200, 64).to(dtype)
    save_file({"x": torch.ones(5), "w": tensor, "y": torch.ones(3)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["w"]
    end = None if shard.count is None else shard.start + shard.count
    expected = tensor[shard.start : end] if shard.axis == 0 else tensor[:, shard.start : end]
    assert shard.shape_of(info.shape) == tuple(expected.shape)
    with RowReader() as reader:
        view = torch.empty(expected.shape, dtype=dtype)
        reader.read_into(info, as_bytes(view), shard)
        blocks = list(
            (start, bytes(view)) for start, view in reader.read_blocks(info, shard=shard, block_bytes=1000)
        )
        for result in (view, reader.read_tensor(info, shard)):
            assert same(result, expected)
        for data in (reader.read_all(info, shard), b"".join(data for _, data in blocks)):
            assert data == bytes(as_bytes(expected))
        assert blocks[0][0] == (shard.start if shard.axis == 0 else 0) and len(blocks) > 1
    assert sum(end - start for start, end in spans) == 4 * expected.nbytes
    row = info.nbytes // 200
    for start, end in spans:
        assert start >= info.start + (shard.start * row if shard.axis == 0 else 0)
        if shard.axis == 1:
            assert (start - info.start) % row >= shard.start * dtype.itemsize
            assert end - start == expected.shape[1] * dtype.itemsize, "the columns of one row"


@pytest.mark.parametrize("shard", [ShardSpec(0, 30, 50), ShardSpec(1, 16, 32)], ids=str)
def test_a_file_that_shrinks_in_the_slice(tmp_path: Path, shard: ShardSpec) -> None:
    save_file({"w": torch.randn(200, 64)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["w"]
    os.truncate(info.file, info.start + 70 * 64 * 4)
    with RowReader() as reader:
        for read in (reader.read_all, reader.read_tensor):
            with pytest.raises(CheckpointError, match="truncated since its header was read") as e:
                read(info, shard)
            assert e.value.code == "E-CKP-02"


def test_a_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.arange(100)}, tmp_path / f"{STEM}.safetensors")
    monkeypatch.setattr("ascendit.checkpoint.reader._LARGE", 7)
    assert same(stored_tensors(tmp_path)["a"], torch.arange(100))


def test_headers_need_no_torch() -> None:
    code = "import sys, ascendit.checkpoint.reader, ascendit.checkpoint.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_listed() -> None:
    assert listed(["b", "a"]) == "a, b"
    assert listed("gfedcba") == "a, b, c, d, e and 2 more"


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{STEM}.safetensors")
    assert "not a regular file" in cannot_open(tmp_path, "E-CKP-02").got


def test_half_a_surrogate_pair_is_not_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw(b'{"\\ud800": %s}' % json.dumps(entry(0, 1)).encode(), b"x"))
    assert "header is not JSON" in refused(tmp_path / "a.safetensors")


def test_a_file_with_two_names_in_an_index_counts_once(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    weight_map = {"a": "x.safetensors", "b": "./x.safetensors"}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shards = Shards.open(tmp_path)
    assert shards.files == (tmp_path / "x.safetensors",)
    assert list(shards.tensors) == ["a", "b"]


def test_files_without_an_index(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        save_file({file.stem: torch.zeros(2)}, file)
    shards = Shards.from_files(files)
    assert (set(shards.tensors), shards.files) == ({"a", "b"}, tuple(files))
    save_file({"a": torch.zeros(2)}, files[1])
    with pytest.raises(CheckpointError, match="a is in both a.safetensors and b.safetensors") as e:
        Shards.from_files(files)
    assert e.value.code == "E-CKP-09"


# ---- row blocks ----------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, TensorInfo]]:
    values = {
        "matrix": torch.randn(37, 20).to(torch.bfloat16),
        "conv": torch.randn(6, 4, 1, 2, 2),
        "vector": torch.randn(11).to(torch.float16),
        "scalar": torch.tensor(3.5),
        "fp8": torch.randn(300, 70).to(torch.float8_e4m3fn),
    }
    save_file(values, tmp_path / "x.safetensors")
    return values, read_header(tmp_path / "x.safetensors")


def test_concatenated_blocks_equal_the_tensor(stored):
    values, infos = stored
    with RowReader() as reader:
        for name, tensor in values.items():
            blocks: list[torch.Tensor] = []
            for start, view in reader.read_blocks(infos[name], block_bytes=128):
                assert start == sum(len(block) for block in blocks)
                blocks.append(as_tensor(view, infos[name]).clone())
            joined = torch.cat(blocks).view(tensor.shape)
            assert torch.equal(joined.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
            assert reader.read_all(infos[name]) == bytes(as_bytes(tensor))


def test_blocks_are_multiples_and_grow_if_necessary(stored, monkeypatch):
    values, infos = stored
    monkeypatch.setattr("ascendit.checkpoint.reader.BLOCK_BYTES", 1000)
    with RowReader() as reader:
        starts = [start for start, _ in reader.read_blocks(infos["fp8"], multiple=128)]
        assert starts == [0, 128, 256]
        assert [start for start, _ in reader.read_blocks(infos["fp8"])] == list(range(0, 300, 14))


def test_a_file_that_shrinks_is_an_error(stored):
    _, infos = stored
    file = infos["matrix"].file
    match = "truncated during the read of matrix"
    with pytest.raises(CheckpointError, match=match) as e, RowReader() as reader:
        blocks = reader.read_blocks(infos["matrix"], block_bytes=40)
        next(blocks)
        with open(file, "r+b") as f:
            f.truncate(infos["matrix"].start + 50)
        list(blocks)
    assert e.value.code == "E-CKP-02"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_to_float32_is_exact(dtype):
    dtype_name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    values = torch.tensor([0.0, -0.0, 1.0, 1e-7, -6e-8, 65504.0, torch.inf, -torch.inf], dtype=dtype)
    data = bytes(as_bytes(values))
    for buffer in (data, bytearray(data), memoryview(data)):
        as_float32 = torch.frombuffer(bytearray(float_bytes(buffer, dtype_name)), dtype=torch.float32)
        assert torch.equal(as_float32, values.float()) and torch.equal(as_float32.signbit(), values.signbit())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_shape", [None, (), (1,), (6,), (6, 1)])
def test_encoded_rows_are_decoded(
    dtype: torch.dtype,
    scale_shape: tuple[int, ...] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ascendit.checkpoint.reader.BLOCK_BYTES", 100)
    stored = torch.randn(6, 40).to(dtype)
    scale = torch.ones(()) if scale_shape is None else torch.rand(scale_shape) + 0.1
    save_file({"w": stored, "s": scale}, tmp_path / "a.safetensors")
    infos = read_header(tmp_path / "a.safetensors")
    encoding = Encoding(infos["w"].dtype, None if scale_shape is None else infos["s"])
    info = replace(infos["w"], dtype="BF16", encoding=encoding)
    expected = (stored.double() * scale.double().reshape(-1, 1)).to(torch.bfloat16)
    with RowReader() as reader:
        assert torch.equal(reader.read_tensor(info), expected)
        assert torch.equal(reader.read_tensor(info, ShardSpec(0, 2, 3)), expected[2:5])
        assert torch.equal(reader.read_tensor(info, ShardSpec(1, 7, 9)), expected[:, 7:16])
        blocks = [as_tensor(view, info).clone() for _, view in reader.read_blocks(info, block_bytes=170)]
    assert len(blocks) > 1 and torch.equal(torch.cat(blocks), expected)
