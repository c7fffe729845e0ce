"""Files of torch.save: the same tensors as `torch.load`, and nothing else that a pickle can ask for."""

from __future__ import annotations

import os
import pickle
import resource
import shlex
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascendit.checkpoint import pickle_file, pickle_program
from ascendit.checkpoint.headers import read_header, read_values
from ascendit.checkpoint.pickle_file import read_pickle_file
from ascendit.checkpoint.reader import RowReader, ShardSpec
from ascendit.checkpoint.tensor_info import Encoding
from ascendit.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu),
]


def data_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def flat(value: Any) -> dict[str, Tensor]:
    """The tensors of the only dict that has some."""
    if any(torch.is_tensor(x) for x in value.values()):
        return {name: x for name, x in value.items() if torch.is_tensor(x)}
    return next(flat(x) for x in value.values() if isinstance(x, dict))


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def good() -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randn(10, 10)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Conv3d(2, 4, 3), torch.nn.BatchNorm1d(2))
    parameter = torch.nn.Parameter(x.clone())
    parameter.note = "an attribute"  # type: ignore[attr-defined]
    return {
        "state dict": module.state_dict(),
        "parameters": dict(module.named_parameters()) | {"with attribute": parameter},
        "dtypes": {str(dtype): (torch.arange(12).view(3, 4) % 2).to(dtype) for dtype in DTYPES},
        "fp4": {"w": torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float4_e2m1fn_x2)},
        "views": {
            "rows": y[3:6],
            "transpose": x.t(),
            "slice": y[2:5, 3:7],
            "columns": y[:, :3],
            "steps": y[::2, ::3],
            "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
            "channels last": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        },
        "tied": {"a": x, "b": x, "c": x[1:], "d": x.t()},
        "empty": {"a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": torch.zeros(3, 0, 2)},
        "nested": {
            "epoch": 3,
            "model": {"state_dict": module.state_dict()},
            "optimizer": {"state": {0: {"exp_avg": x}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.9)}]},
        },
        "other values": {
            "w": x,
            "set": {1},
            "bytes": b"abc",
            "complex": 1j,
            "size": x.shape,
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "big": 10**30,
            "negative": -5,
            "float": 2.5,
            "none": None,
        },
        "names": {"模型.weight": x, "a b": y, "": x},
    }


@pytest.mark.parametrize("protocol", [2, 5])
def test_tensors_are_equal_to_those_of_torch(tmp_path: Path, protocol: int) -> None:
    for name, value in good().items():
        file = saved(tmp_path / f"{name}.pth", value, pickle_protocol=protocol)
        expected = flat(torch.load(file, weights_only=False))
        infos = read_header(file)
        assert set(infos) == set(expected), name
        with RowReader() as reader:
            for key, info in infos.items():
                tensor = reader.read_tensor(info)
                assert (tensor.dtype, tensor.shape) == (expected[key].dtype, expected[key].shape), (name, key)
                assert data_of(tensor) == data_of(expected[key]), (name, key)


def test_views_are_read_in_blocks_and_shards(tmp_path: Path) -> None:
    views = good()["views"]
    infos = read_header(saved(tmp_path / "x.pth", views))
    assert [name for name in views if infos[name].is_plain] == ["rows"]
    with RowReader() as reader:
        for name, tensor in views.items():
            blocks = [bytes(rows) for _, rows in reader.read_blocks(infos[name], block_bytes=8)]
            assert len(blocks) == len(tensor) and b"".join(blocks) == data_of(tensor)
            assert torch.equal(reader.read_tensor(infos[name], ShardSpec(0, 1, 1)), tensor[1:2])
            assert torch.equal(reader.read_tensor(infos[name], ShardSpec(1, 1, 2)), tensor[:, 1:3])


def test_views_of_encoded_tensors_are_decoded(tmp_path: Path) -> None:
    x = torch.randn(40, 24).to(torch.float8_e4m3fn)
    scale = torch.rand(24) + 0.5
    stored = read_header(saved(tmp_path / "x.pth", {"w": x.t(), "columns": x[:, 3:9], "scale": scale}))
    expected = {"w": (x.t().double() * scale[:, None]).bfloat16(), "columns": x[:, 3:9].bfloat16()}
    with RowReader() as reader:
        for name, factor in (("w", stored["scale"]), ("columns", None)):
            info = replace(stored[name], dtype="BF16", encoding=Encoding("F8_E4M3", factor))
            assert torch.equal(reader.read_tensor(info), expected[name])
            assert torch.equal(reader.read_tensor(info, ShardSpec(1, 2, 3)), expected[name][:, 2:5])
            blocks = [bytes(rows) for _, rows in reader.read_blocks(info, block_bytes=200)]
            assert len(blocks) > 1 and b"".join(blocks) == data_of(expected[name])


def test_numbers_and_texts_beside_the_tensors_are_kept(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pth", {"a": torch.ones(1), "alpha": 4.0, "rank": 8, "note": "x", "list": [1]})
    with open(file, "rb") as f:
        assert read_pickle_file(file, f, None).values == {"alpha": 4.0, "rank": 8, "note": "x"}
    inner = {"a": torch.ones(1), "alpha": 4.0}
    file = saved(tmp_path / "y.pth", {"x": {"model": inner, "epoch": 1}, "config": {"r": 8}, "alpha": 2})
    assert read_values(file) == {"epoch": 1, "config": {"r": 8}, "alpha": 4.0}


# ---- pickles that are no state dict -------------------------------------------------------------


def refused(file: Path, code: str, *parts: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as e:
        read_header(file)
    assert e.value.code == code and all(part in str(e.value) for part in parts), str(e.value)
    assert len(str(e.value)) < 1300
    return e.value


def other_tensors() -> dict[str, Any]:
    x = torch.randn(3, 1)
    return {
        "E-CKP-04 sparse": {"a": x.to_sparse()},
        "E-CKP-04 quantized": {"a": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)},
        "E-CKP-04 meta": {"a": torch.zeros(2, device="meta")},
        "E-CKP-02 repeats": {"a": x.expand(3, 4)},
        "E-CKP-02 negated, convert it": {"a": torch._neg_view(x)},
        "E-CKP-02 one tensor": x,
        "E-CKP-02 one list": [x],
        "E-CKP-02 dicts without tensors": {"a": 1, "b": {"c": [x]}},
        "E-CKP-02 name of type int": {0: x},
        "E-CKP-02 key of type tuple": {(1, 2): x},
        "E-CKP-05 torch.ComplexDoubleStorage": {"a": torch.zeros(1, dtype=torch.complex128)},
        "E-CKP-05 torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
        "E-CKP-05 pathlib.PosixPath": {"a": x, "path": Path("x")},
        "E-CKP-09 model (1 value), ema (1 value)": {"model": {"a": x}, "ema": {"a": x}},
        "E-CKP-09 its top (2 values), ema (1 value)": {"a": x, "ema": {"a": x}},
    }


@pytest.mark.filterwarnings("ignore")  # of torch, for quantized and sparse tensors
def test_other_values_are_refused_by_name(tmp_path: Path) -> None:
    for name, value in other_tensors().items():
        code, _, text = name.partition(" ")
        refused(saved(tmp_path / "x.pth", value), code, *text.split(", "))


def run_fix(error: CheckpointError, folder: Path) -> None:
    command = error.fix.partition(": ")[2].replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-c", command], check=True, cwd=folder)


@pytest.mark.slow
def test_the_commands_of_the_errors_convert_the_file(tmp_path: Path) -> None:
    x = torch.randn(3, 1)
    legacy = saved(tmp_path / "legacy.pth", {"a": x}, _use_new_zipfile_serialization=False)
    several = saved(tmp_path / "several.pt", {"model": {"a b": {"a": x}}, "ema": {"a": x}, "epoch": 1})
    expanded = saved(tmp_path / "expanded.bin", {"a": x.expand(3, 4)})
    misnamed = tmp_path / "misnamed.safetensors"
    misnamed.write_bytes(legacy.read_bytes())
    for file, code in (
        (legacy, "E-CKP-02"),
        (several, "E-CKP-09"),
        (expanded, "E-CKP-02"),
        (misnamed, "E-CKP-02"),
    ):
        run_fix(refused(file, code), tmp_path)
    for name in ("legacy", "several", "expanded", "misnamed"):
        with RowReader() as reader:
            tensor = reader.read_tensor(read_header(tmp_path / f"{name}.safetensors")["a"])
        assert torch.equal(tensor, x.expand_as(tensor))


def test_the_command_finds_the_only_dict_with_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.arange(3.0)[:, None]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"model": {"a": x, "n": 1}}, {"_use_new_zipfile_serialization": False}),
        ({"generator": {"state_dict": {"a": x.expand(3, 4)}}, "epoch": 1}, {}),
        ({"a": torch._neg_view(x)}, {}),
        ({"model": {"epoch": 1}}, {"_use_new_zipfile_serialization": False}),
        ({"model": {"a": x}, "ema": {"a": x}}, {"_use_new_zipfile_serialization": False}),
    ]
    for value, options in cases:
        (tmp_path / "x.safetensors").unlink(missing_ok=True)
        error = refused(saved(tmp_path / "x.pth", value, **options), "E-CKP-02")
        command = shlex.split(error.fix.removeprefix("convert it: "))
        monkeypatch.setattr(sys, "argv", command[2:])
        if "model" in value and "a" not in value["model"]:
            with pytest.raises(SystemExit, match="0 dicts have tensors"):
                exec(command[2], {})
            assert not (tmp_path / "x.safetensors").exists()
            continue
        if "ema" in value:
            with pytest.raises(SystemExit, match="2 dicts have tensors.*model.*ema"):
                exec(command[2], {})
            sys.argv.append("ema")
        exec(command[2], {})
        with RowReader() as reader:
            tensor = reader.read_tensor(read_header(tmp_path / "x.safetensors")["a"])
        assert torch.equal(tensor, flat(value)["a"])


# ---- malicious pickles --------------------------------------------------------------------------

MARKER = "the-pickle-ran"
PROTOCOL = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
EMPTY = b"ccollections\nOrderedDict\n)R"


def tensor(
    *,
    storage: bytes = STORAGE,
    offset: bytes = b"K\0",
    shape: bytes = b"(K\x02K\x02t",
    strides: bytes = b"(K\x02K\x01t",
    function: bytes = REBUILD,
    last: bytes = b"",
) -> bytes:
    """A pickle {"a": tensor}, with changes."""
    call = function + b"(" + storage + offset + shape + strides + b"\x89" + EMPTY + last + b"tR"
    return PROTOCOL + b"}X\x01\0\0\0a" + call + b"s."


def archive(path: Path, data: bytes, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as f:
        f.writestr("x/data.pkl", data)
        f.writestr("x/byteorder", "little")
        f.writestr("x/version", "3")
        f.writestr("x/data/0", bytes(16))
    return path


class Call:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


LONG = b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)
HOSTILE: dict[str, tuple[str, bytes]] = {
    **{
        f"os.system, protocol {n}": (
            "names posix.system",
            pickle.dumps({"a": Call(os.system, (f"touch {MARKER}",))}, n),
        )
        for n in range(6)
    },
    "eval": ("names builtins.eval", pickle.dumps(Call(eval, (f"open('{MARKER}', 'w')",)), 2)),
    "chain": ("names builtins.getattr", pickle.dumps(Call(getattr, (Call(__import__, ("os",)), "mkdir")), 2)),
    "INST": ("names os.system", f"(S'touch {MARKER}'\nios\nsystem\n.".encode()),
    "INST of a known name": ("an instance of", b"(icollections\nOrderedDict\n."),
    "OBJ": ("names os.system", f"(cos\nsystem\nS'touch {MARKER}'\no.".encode()),
    "NEWOBJ": ("names os.system", PROTOCOL + b"cos\nsystem\n)\x81."),
    "STACK_GLOBAL": ("names torch.serialization.os", b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93."),
    "loader": ("names torch.load", PROTOCOL + b"ctorch\nload\nX\x01\0\0\0x\x85R."),
    "subclass": (
        "names os.system",
        PROTOCOL + b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n)}tR.",
    ),
    "extension": ("EXT1", PROTOCOL + b"\x82\x01."),
    "text reference": ("PERSID", b"Pfoo\n."),
    "other reference": ("no storage", PROTOCOL + STORAGE.replace(b"storage", b"ZZorage") + b"."),
    "another member": (
        "missing",
        tensor(storage=STORAGE.replace(b"\x01\0\0\x000", b"\x0b\0\0\0../data.pkl")),
    ),
    "count": ("another size", tensor(storage=STORAGE.replace(b"K\x04", b"J\xff\xff\xff\x7f"))),
    "offset": ("larger than its storage", tensor(offset=b"K\x01")),
    "negative offset": ("invalid", tensor(offset=b"J\xff\xff\xff\xff")),
    "negative stride": ("invalid", tensor(strides=b"(J\xff\xff\xff\xffK\x01t")),
    "huge shape": ("invalid", tensor(shape=b"(\x8a\x08" + b"\xff" * 7 + b"\x7fK\x02t")),
    "long shape": ("invalid", tensor(shape=b"(" + LONG + b"K\x02t")),
    "bool shape": ("invalid", tensor(shape=b"(\x88K\x02t")),
    "axes": ("invalid", tensor(shape=b"(" + b"K\x01" * 9 + b"t", strides=b"(" + b"K\x01" * 9 + b"t")),
    "other strides": ("another number", tensor(strides=b"(K\x01t")),
    "repeats": ("repeats", tensor(shape=b"(K\x02K\x02K\x02t", strides=b"(K\0K\0K\0t")),
    "no storage": ("unknown storage", tensor(storage=b"K\0")),
    "memo index": ("without tensors", PROTOCOL + b"}r\xff\xff\xff\xff."),
    "missing memo": ("damaged", PROTOCOL + b"h\x05."),
    "deep tuples": ("one tuple", PROTOCOL + b")" + b"\x85" * 30_000 + b"."),
    "deep key": ("of type tuple", PROTOCOL + b"}(" + b")" + b"\x85" * 30_000 + b"K\x01u."),
    "deep dicts": ("nested more", PROTOCOL + b"}X\x01\0\0\0a" * 10_000 + b"}" + b"s" * 10_000 + b"."),
    "long key": ("more than 64 bits", PROTOCOL + b"}(" + LONG + b"K\x01u."),
    "laughs": (
        "nested more",
        PROTOCOL + b"}q\0" + b"0}(X\x01\0\0\0ah\0X\x01\0\0\0bh\0uq\0" * 5_000 + b"h\0.",
    ),
    "digits": ("damaged", b"I" + b"9" * 5_000 + b"\n."),
    "length of bytes": ("damaged", PROTOCOL + b"B\xff\xff\xff\xffabc."),
    "length of a long": ("damaged", PROTOCOL + b"\x8b\xff\xff\xff\x7f."),
    "many operations": ("operations", PROTOCOL + b"N0" * 60_000 + b"N."),
    "long arguments": ("damaged", PROTOCOL + b"ctorch\ndevice\n(" + b"K\x01" * 100 + b"tR."),
    "a list in itself": ("one list", PROTOCOL + b"]q\0h\0a."),
    "a dict in itself": ("without tensors", PROTOCOL + b"}q\0X\x01\0\0\0ah\0s."),
    "no end": ("damaged", PROTOCOL + b"}"),
    "nothing": ("damaged", b""),
    "protocol": ("protocol 9", b"\x80\x09}."),
    "empty stack": ("damaged", PROTOCOL + b"s."),
    "no mark": ("damaged", PROTOCOL + b"t."),
    "call of a text": ("damaged", PROTOCOL + b"X\x01\0\0\0a)R."),
    "state of a text": ("damaged", PROTOCOL + b"X\x01\0\0\0a}b."),
    "items of a function": ("damaged", PROTOCOL + REBUILD + b"K\x01K\x02s."),
    "key twice": ("twice", PROTOCOL + b"}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u."),
    "surrogate": ("surrogates", tensor().replace(b"X\x01\0\0\0a", b"X\x03\0\0\0\xed\xa0\x80")),
    "name": ("names .", PROTOCOL + b"c\n\n."),
    "long name": ("names aaaa", PROTOCOL + b"c" + b"a" * 100_000 + b"\nb\n."),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_and_never_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickle_program, "MAX_OPERATIONS", 100_000)
    problem, data = HOSTILE[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(
        archive(tmp_path / "x.pth", data), "E-CKP-05" if "names" in problem else "E-CKP-02", problem
    )
    assert error.fix and not (tmp_path / MARKER).exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_the_pickle_of_these_tests_is_valid(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.pth", tensor())
    assert read_header(file)["a"].shape == torch.load(file, weights_only=True)["a"].shape == (2, 2)


@pytest.mark.parametrize("last", [b"\x88", b"K\x1d", b"ctorch_npu.npu._format\nFormat\nK\x1d\x85R"])
def test_tensors_that_an_npu_saved(last: bytes, tmp_path: Path) -> None:
    """`torch_npu.utils.storage` adds the format of the copy on the NPU: a flag, a number or a member."""
    function = b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
    storage = STORAGE.replace(b"X\x03\0\0\0cpu", b"X\x05\0\0\0npu:0")
    plain, saved = (
        read_header(archive(tmp_path / "x.pth", data))
        for data in (tensor(), tensor(storage=storage, function=function, last=last))
    )
    assert {n: (x.shape, x.nbytes) for n, x in plain.items()} == {
        n: (x.shape, x.nbytes) for n, x in saved.items()
    }


# ---- archives -----------------------------------------------------------------------------------


def _until(end: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:end]


def _local_name(data: bytes) -> bytes:
    return data.replace(b"x/data/0", b"x/data/1", 1)


def _overlap(data: bytes) -> bytes:
    """The list of members points the last one to the first."""
    at = data.rindex(b"PK\x01\x02")
    return data[: at + 42] + bytes(4) + data[at + 46 :]


def _list_length(data: bytes) -> bytes:
    return data[:-10] + struct.pack("<I", 1 << 30) + data[-6:]


ARCHIVES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    **{f"{n} bytes": ("", _until(n)) for n in (0, 4, 10, 60, 300, -30, -1)},
    "a byte more": ("bytes follow", lambda data: data + b"x"),
    "two archives": ("first bytes", lambda data: data + data),
    "other local name": ("differs from its header", _local_name),
    "overlap": ("differs from its header", _overlap),
    "length of the list": ("", _list_length),
    "encrypted": ("encrypted", lambda data: data.replace(b"\x14\x03\x14\0\0\0", b"\x14\x03\x14\0\x01\0")),
    "byte order": ("the byte order", lambda data: data.replace(b"little", b"bigbig")),
    "tar": ("tar archive", lambda data: b"sys_info" + bytes(249) + b"ustar" + bytes(300)),
    "text": ("not a safetensors file", lambda data: b"404: not found, sorry"),
    "web page": ("a web page", lambda data: b"<html>not here</html>"),
    "a longer header": ("truncated", lambda data: struct.pack("<Q", 0x04034B50) + data),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_damaged_archive_is_refused(case: str, tmp_path: Path) -> None:
    problem, change = ARCHIVES[case]
    file = archive(tmp_path / "x.pth", tensor())
    file.write_bytes(change(file.read_bytes()))
    refused(file, "E-CKP-02", problem)


def test_members_that_are_not_those_of_torch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(archive(tmp_path / "x.pth", tensor(), compression=zipfile.ZIP_DEFLATED), "E-CKP-02", "compressed")
    members = {
        "twice": ["x/data.pkl", "x/data/0", "x/data/0"],
        "2 folders": ["x/data.pkl", "y/data/0"],
        "not of torch.save": ["x/readme", "x/data/0"],
        "2 files": ["data.pkl", "data/0"],
        "TorchScript": ["x/data.pkl", "x/constants.pkl"],
        "missing": ["x/data.pkl", "../../data/0"],
    }
    for problem, names in members.items():
        with pytest.warns() if problem == "twice" else zipfile.ZipFile(tmp_path / "y", "w"):
            with zipfile.ZipFile(tmp_path / "x.pth", "w") as f:
                for name in names:
                    f.writestr(name, tensor() if name.endswith("pkl") else bytes(16))
        refused(tmp_path / "x.pth", "E-CKP-02", "" if problem == "missing" else problem)
    archive(tmp_path / "x.pth", tensor())
    monkeypatch.setattr(pickle_file, "_MAX_LIST", 100)
    refused(tmp_path / "x.pth", "E-CKP-02", "list of members")
    monkeypatch.undo()
    monkeypatch.setattr(pickle_file, "_MAX_PICKLE", 10)
    refused(tmp_path / "x.pth", "E-CKP-02", "data.pkl of")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    file = tmp_path_factory.mktemp("plain") / "x.pth"
    x = torch.randn(6, 4)
    saved(file, {"model": {"a": x, "b": x.t(), "c": x[1:3].bfloat16(), "d": torch.nn.Parameter(x)}, "n": 3})
    return file, file.read_bytes()


def check_changed(file: Path, data: bytes) -> None:
    """A changed file is refused, or its tensors are those of `torch.load`, if that reads it."""
    file.write_bytes(data)
    try:
        infos = read_header(file)
    except CheckpointError as e:
        assert e.code in ("E-CKP-02", "E-CKP-04", "E-CKP-05", "E-CKP-09")
        return
    with RowReader() as reader:
        tensors = {name: reader.read_tensor(info) for name, info in infos.items()}
    try:
        expected = flat(torch.load(file, weights_only=True))
    except Exception:  # torch has limits of its own
        return
    assert {n: (x.shape, data_of(x)) for n, x in tensors.items()} == {
        n: (x.shape, data_of(x)) for n, x in expected.items()
    }


@settings(max_examples=60)
@given(st.data())
def test_changed_bytes_never_give_other_tensors(plain: tuple[Path, bytes], data: st.DataObject) -> None:
    file, content = plain
    end = content.index(b"PK\x01\x02")  # torch skips members that the list calls folders
    changed = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, min(end, 1200) - 1), min_size=1, max_size=3)):
        changed[at] = data.draw(st.integers(0, 255))
    check_changed(file, bytes(changed))
