"""Shards written as a stream. The oracles are the safetensors library and Diffusers' splitting."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kill
import pytest
import torch
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored import stored_tensors

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.tensor_info import TORCH_DTYPES, TensorInfo
from ascendit.checkpoint.writer import ShardWriter, TensorSpec, lay_out_shards
from ascendit.errors import CheckpointError, EnvironmentProblem

DTYPE_NAMES = {
    getattr(torch, name): dtype_name for dtype_name, name in TORCH_DTYPES.items() if dtype_name != "F4"
}
DTYPES = ("F8_E4M3", "U8", "BF16", "F32", "I8", "I64", "BOOL")


def draw(seed: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, including NaN."""
    torch_dtype = getattr(torch, TORCH_DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    if dtype == "BOOL":
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(shape, dtype=torch_dtype).nbytes
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype).reshape(shape) if size else torch.empty(shape, dtype=torch_dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def model(sizes: tuple[int, ...] = (40, 3, 0, 17, 64, 8)) -> dict[str, torch.Tensor]:
    return {f"blocks.{i}.w": draw(i, DTYPES[i % len(DTYPES)], (n, 5)) for i, n in enumerate(sizes)}


def write_all(folder: Path, tensors: dict[str, torch.Tensor], piece: int = 7, **options: Any) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, [spec(n, t) for n, t in tensors.items()], **options) as writer:
        for name, tensor in tensors.items():
            data = raw(tensor)
            if not writer.done(name):
                for start in range(0, len(data), piece):
                    writer.append(name, data[start : start + piece])
    return writer


def assert_same(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read with the safetensors library and with `RowReader`."""
    loaded: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            loaded |= {name: f.get_tensor(name) for name in f.keys()}
    assert loaded.keys() == tensors.keys()
    ours = stored_tensors(folder)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for other in (loaded[name], ours[name]):
            assert (other.dtype, other.shape, raw(other)) == (tensor.dtype, tensor.shape, raw(tensor)), name


# ---- the files


def test_one_file_has_the_tensors(tmp_path: Path) -> None:
    writer = write_all(tmp_path, model())
    assert os.listdir(tmp_path) == ["diffusion_pytorch_model.safetensors"]
    assert_same(tmp_path, model())
    assert list(read_header(writer.shards[0].file)) == list(model()), "the bytes have the order of specs"
    assert writer.shards[0].nbytes == writer.shards[0].file.stat().st_size
    assert writer.close() == {}, "no hashes unless requested"


def test_the_first_tensor_begins_at_a_multiple_of_8(tmp_path: Path) -> None:
    for length in range(1, 10):
        shard = lay_out_shards(tmp_path, [TensorSpec("n" * length, "U8", (3,))])[0]
        assert len(shard.header) % 8 == 0
        assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.lists(st.tuples(st.sampled_from(sorted(DTYPE_NAMES.values())), shapes), min_size=1, max_size=8),
    limit=st.none() | st.integers(1, 200),
    hashed=st.booleans(),
)
def test_any_mixture_is_written_exactly(
    tmp_path: Path, layout: list[tuple[str, tuple[int, ...]]], limit: int | None, hashed: bool
) -> None:
    tensors = {f"t{i}.é": draw(i, dtype, shape) for i, (dtype, shape) in enumerate(layout)}
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    write_all(folder, tensors, max_shard_bytes=limit, hash=hashed)
    assert_same(folder, tensors)


def test_shards_and_index_equal_those_of_diffusers(tmp_path: Path) -> None:
    tensors = {f"blocks.{i}.w": draw(i, "BF16", (n, 5)) for i, n in enumerate((40, 3, 17, 64, 8, 1))}
    limit = 700
    write_all(tmp_path, tensors, max_shard_bytes=limit)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit, filename_pattern=pattern)
    index = json.loads((tmp_path / SAFE_WEIGHTS_INDEX_NAME).read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]
    assert sorted(os.listdir(tmp_path)) == sorted([*split.filename_to_tensors, SAFE_WEIGHTS_INDEX_NAME])
    assert_same(tmp_path, tensors)


def test_a_tensor_is_never_split_and_none_means_one_file(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "U8", (10,)), TensorSpec("b", "U8", (100,)), TensorSpec("c", "U8", (5,))]
    names = [[s.name for s in shard.specs] for shard in lay_out_shards(tmp_path, specs, max_shard_bytes=20)]
    assert names == [["a"], ["b"], ["c"]]
    exact = lay_out_shards(tmp_path, specs, max_shard_bytes=110)
    assert [len(shard.specs) for shard in exact] == [2, 1], "a shard may reach the limit exactly"
    assert len(lay_out_shards(tmp_path, specs, max_shard_bytes=None)) == 1


def test_stem_and_metadata(tmp_path: Path) -> None:
    writer = write_all(tmp_path, model(), stem="quant_model_weight", metadata={"format": "pt", "by": "me"})
    assert writer.shards[0].file.name == "quant_model_weight.safetensors"
    with safe_open(writer.shards[0].file, "pt") as f:
        assert f.metadata() == {"format": "pt", "by": "me"}


def test_the_buffer_may_be_reused_at_once(tmp_path: Path) -> None:
    """The hash is computed in another thread, from the bytes at the time of the call."""
    data = os.urandom(3 << 20)
    buffer = bytearray(1 << 20)
    with ShardWriter(tmp_path, [TensorSpec("w", "U8", (len(data),))], hash=True) as writer:
        for start in range(0, len(data), len(buffer)):
            buffer[:] = data[start : start + len(buffer)]
            writer.append("w", buffer)
            buffer[:] = bytes(len(buffer))
    file = writer.shards[0].file
    assert file.read_bytes()[-len(data) :] == data
    digest = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
    assert writer.close() == {file.name: digest}


def test_hash_of_every_file(tmp_path: Path) -> None:
    writer = write_all(tmp_path, model(), max_shard_bytes=200, hash=True)
    files = [shard.file for shard in writer.shards]
    out = subprocess.run(["sha256sum", *files], capture_output=True, text=True, check=True).stdout
    assert len(files) > 2
    assert writer.close() == {Path(line.split()[1]).name: line.split()[0] for line in out.splitlines()}


@pytest.mark.parametrize("view", ["numpy", "mmap", "2d"])
def test_buffers_of_all_kinds(tmp_path: Path, view: str) -> None:
    import mmap

    tensor = draw(1, "F32", (6, 4))
    data: Any = tensor.numpy().data if view != "numpy" else tensor.view(torch.uint8).numpy().data
    if view == "mmap":
        data = mmap.mmap(-1, tensor.nbytes)
        data[:] = raw(tensor)
    with ShardWriter(tmp_path, [spec("w", tensor)]) as writer:
        writer.append("w", data)
    assert_same(tmp_path, {"w": tensor})


# ---- programming errors


@pytest.mark.parametrize(
    "calls,message",
    [
        ([("b", 4)], "b is out of order, a is next"),
        ([("a", 5)], "a has only 4 bytes"),
        ([("a", 3), ("b", 1)], "b is out of order"),
        ([("a", 4), ("b", 4), ("a", 1)], "all tensors are written"),
    ],
)
def test_bytes_out_of_order_are_refused(tmp_path: Path, calls: list[tuple[str, int]], message: str) -> None:
    specs = [TensorSpec("a", "U8", (4,)), TensorSpec("b", "U8", (4,))]
    with pytest.raises(AssertionError, match=message), ShardWriter(tmp_path, specs) as writer:
        for name, count in calls:
            writer.append(name, bytes(count))


def test_close_refuses_an_incomplete_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="b is not complete"):
        with ShardWriter(tmp_path, [TensorSpec("a", "U8", (4,)), TensorSpec("b", "U8", (4,))]) as writer:
            writer.append("a", bytes(4))


# ---- moving


def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    save_file(tensors, tmp_path / "source.safetensors", metadata={"about": "x" * 37})
    return read_header(tmp_path / "source.safetensors")


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("limit", [None, 5000])
def test_moved_tensors_are_the_same_under_new_names(tmp_path: Path, hashed: bool, limit: int | None) -> None:
    tensors = {f"w{i:02}": draw(i, DTYPES[i % 5], (i * 37, 3)) for i in range(20)}
    infos = source(tmp_path, tensors)
    order = [*list(infos)[:7], *reversed(list(infos)[7:12]), *list(infos)[12:]]
    specs = [TensorSpec(f"new.{n}", infos[n].dtype, infos[n].shape, infos[n].start) for n in order]
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out, specs, max_shard_bytes=limit, hash=hashed) as writer:
        for n in order:
            writer.move(infos[n], f"new.{n}")
    assert_same(out, {f"new.{n}": tensors[n] for n in order})
    if hashed:
        assert len(writer.close()) == len(writer.shards)


def test_moved_and_appended_tensors_mix(tmp_path: Path) -> None:
    tensors = {f"w{i}": draw(i, "BF16", (30, 4)) for i in range(6)}
    infos = source(tmp_path, tensors)
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out, [spec(n, t) for n, t in tensors.items()]) as writer:
        for i, (name, tensor) in enumerate(tensors.items()):
            if i in (1, 4):
                writer.append(name, raw(tensor))
            else:
                writer.move(infos[name], name)
    assert_same(out, tensors)


def test_moved_bytes_have_the_alignment_of_the_source(tmp_path: Path) -> None:
    """So the kernel copies complete pages, and some file systems can share them."""
    tensors = {"a": draw(0, "U8", (5000,)), "b": draw(1, "U8", (70000,))}
    infos = source(tmp_path, tensors)
    specs = [TensorSpec(f"x.{n}", i.dtype, i.shape, i.start) for n, i in infos.items()]
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out, specs) as writer:
        for n, info in infos.items():
            writer.move(info, f"x.{n}")
    for n, info in read_header(writer.shards[0].file).items():
        assert info.start % 4096 == infos[n.removeprefix("x.")].start % 4096
    assert len(writer.shards[0].header) % 8 == 0
    assert_same(out, {f"x.{n}": t for n, t in tensors.items()})


def test_the_alignment_of_most_bytes_wins(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "U8", (16,), 8), TensorSpec("b", "U8", (1000,), 4096 + 160)]
    header = lay_out_shards(tmp_path, specs)[0].header
    assert (len(header) + 16) % 4096 == 160


@pytest.mark.parametrize("hashed", [False, True])
def test_a_source_that_shrinks_is_named(tmp_path: Path, hashed: bool) -> None:
    infos = source(tmp_path, {"w": draw(0, "U8", (9000,))})
    file = infos["w"].file
    os.truncate(file, 5000)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError) as e:
        with ShardWriter(out, [TensorSpec("w", "U8", (9000,))], hash=hashed) as writer:
            writer.move(infos["w"], "w")
    assert e.value.code == "E-CKP-02"
    assert e.value.got == f"{file}: truncated since its header was read, from {infos['w'].end:,} bytes"


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    infos = source(tmp_path, {"w": draw(0, "U8", (90,))})
    infos["w"].file.unlink()
    with pytest.raises(CheckpointError, match="source.safetensors: No such file") as e:
        with ShardWriter(tmp_path, [TensorSpec("w", "U8", (90,))]) as writer:
            writer.move(infos["w"], "w")
    assert e.value.code == "E-CKP-02"


# ---- resuming


def test_complete_files_are_not_written_again(tmp_path: Path) -> None:
    tensors = {f"w{i}": draw(i, "U8", (100,)) for i in range(6)}
    specs = [spec(n, t) for n, t in tensors.items()]
    out = tmp_path / "out"
    out.mkdir()
    journal = Journal(tmp_path / "journal.json", out, "f")
    with pytest.raises(RuntimeError), ShardWriter(out, specs, max_shard_bytes=200, journal=journal) as writer:
        for name in ("w0", "w1", "w2"):
            writer.append(name, raw(tensors[name]))
        raise RuntimeError
    status = writer.shards[0].file.stat()
    again = Journal.read(tmp_path / "journal.json", out)
    assert again is not None and again.count == 1
    with ShardWriter(out, specs, max_shard_bytes=200, journal=again) as writer:
        assert [writer.done(n) for n in tensors] == [True] * 2 + [False] * 4
        with pytest.raises(AssertionError, match="w0 is out of order, w2 is next"):
            writer.append("w0", bytes(100))
        for name in ("w2", "w3", "w4", "w5"):
            writer.append(name, raw(tensors[name]))
    assert_same(out, tensors)
    assert writer.shards[0].file.stat().st_mtime_ns == status.st_mtime_ns, "it was not written again"
    complete = ShardWriter(out, specs, max_shard_bytes=200, journal=again)
    assert all(complete.done(n) for n in tensors)
    assert complete.close() == {}


@pytest.mark.parametrize("difference", ["other header", "size", "gone", "no hash"])
def test_a_file_that_differs_from_the_plan_is_written_again(tmp_path: Path, difference: str) -> None:
    tensors = {"w0": draw(0, "U8", (100,)), "w1": draw(1, "U8", (100,))}
    out = tmp_path / "out"
    journal = Journal(tmp_path / "journal.json", out, "f")
    first = write_all(out, tensors, journal=journal)
    file = first.shards[0].file
    if difference == "other header":
        tensors = {"x0": tensors["w0"], "w1": tensors["w1"]}
    elif difference == "size":
        os.truncate(file, 50)
    elif difference == "gone":
        file.unlink()
    specs = [spec(n, t) for n, t in tensors.items()]
    writer = ShardWriter(out, specs, journal=journal, hash=difference == "no hash")
    assert not any(writer.done(n) for n in tensors)
    with writer:
        for n, t in tensors.items():
            writer.append(n, raw(t))
    assert_same(out, tensors)


def test_hashes_are_taken_from_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json", tmp_path / "out", "f")
    first = write_all(tmp_path / "out", model(), journal=journal, hash=True, max_shard_bytes=100).close()
    assert len(first) > 1
    again = write_all(tmp_path / "out", model(), journal=journal, hash=True, max_shard_bytes=100)
    assert all(again.done(n) for n in model())
    assert again.close() == first


# ---- a full disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the first thousand bytes can be written, and nothing can be reserved."""
    real, written = os.pwrite, [0]

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 1000:
            raise OSError(28, os.strerror(28))
        return real(fd, data, offset)

    monkeypatch.setattr("ascendit.checkpoint.writer.reserve", lambda fd, count: None)
    monkeypatch.setattr(os, "pwrite", pwrite)
    yield


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("hashed", [False, True])
def test_the_error_of_a_full_disk_has_the_size_needed(tmp_path: Path, hashed: bool) -> None:
    specs = [TensorSpec("w", "U8", (5000,))]
    with pytest.raises(EnvironmentProblem) as e, ShardWriter(tmp_path, specs, hash=hashed) as writer:
        for _ in range(5):
            writer.append("w", bytes(1000))
    assert e.value.code == "E-ENV-04"
    size = writer.shards[0].nbytes
    assert e.value.got.startswith(f"{size:,} bytes (0.00 GiB) to write below {tmp_path}, ")
    assert e.value.got.endswith("bytes available (No space left on device)")


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    """EFBIG; Python ignores the signal SIGXFSZ."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from pathlib import Path
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
try:
    with ShardWriter(Path({str(tmp_path)!r}), [TensorSpec("w", "U8", (200_000,))]) as writer:
        writer.append("w", bytes(200_000))
except Exception as e:
    print(e)
"""
    done = subprocess.run(kill.python(code), capture_output=True, text=True, check=True)
    assert "[E-ENV-04] 200," in done.stdout
    assert "(File too large)" in done.stdout


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot write in .*nowhere: No such file") as e:
        ShardWriter(tmp_path / "nowhere", [TensorSpec("w", "U8", (2,))])
    assert e.value.code == "E-ENV-02"


# ---- memory and time


def test_writing_needs_little_memory_and_no_torch(tmp_path: Path) -> None:
    """64 MiB written and moved, with hashes. (`ru_maxrss` of a child is at least that of its parent.)"""
    code = f"""
from pathlib import Path
from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
out = Path({str(tmp_path)!r})
specs = [TensorSpec(f"w{{i}}", "U8", (1 << 24,)) for i in range(4)]
data = bytes(1 << 20)
with ShardWriter(out, specs, stem="a", hash=True) as writer:
    for spec in specs:
        for _ in range(16):
            writer.append(spec.name, data)
for name, hash in (("b", False), ("c", True)):
    with ShardWriter(out, specs, stem=name, hash=hash) as writer:
        for info in read_header(out / "a.safetensors").values():
            writer.move(info, info.name)
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak[0]) // 1024, "torch" in sys.modules, "numpy" in sys.modules)
"""
    done = subprocess.run(kill.python(code), capture_output=True, text=True, check=True)
    megabytes, *heavy = done.stdout.split()
    assert heavy == ["False", "False"]
    assert int(megabytes) < 60
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_file(tmp_path / "c.safetensors").keys() == {"w0", "w1", "w2", "w3"}


# ---- sha256 in a thread --------------------------------------------------------------------------


def test_close_ends_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with ShardWriter(tmp_path, [TensorSpec("w", "U8", (4,))], hash=True) as writer:
        writer.append("w", b"1")
        assert threading.active_count() == before + 1
        writer.append("w", b"234")
    assert threading.active_count() == before
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path, [TensorSpec("w", "U8", (4,))], hash=True) as writer,
    ):
        writer.append("w", b"1")
        raise RuntimeError
    assert threading.active_count() == before


def test_hashes_of_moved_and_appended_tensors(tmp_path: Path) -> None:
    """Of several MiB including the header, and of a file whose tensors are all empty."""
    tensors = {"a": draw(0, "U8", (3 << 20,)), "b": draw(1, "U8", (700_001,)), "c": torch.empty(0)}
    infos = source(tmp_path, tensors)
    with ShardWriter(tmp_path, [spec(n, t) for n, t in tensors.items()], hash=True) as writer:
        writer.move(infos["a"], "a")
        writer.append("b", raw(tensors["b"]))
    with ShardWriter(tmp_path, [TensorSpec("c", "F32", (0,))], stem="empty", hash=True) as empty:
        pass
    for closed in (writer, empty):
        file = closed.shards[0].file
        assert closed.close() == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
