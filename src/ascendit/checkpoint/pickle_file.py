"""Read the header of a file of `torch.save` without PyTorch and without running code.

Such a file is a zip archive of uncompressed members: `NAME/data.pkl`, a pickle of nested dicts, and
`NAME/data/KEY`, the bytes of each storage. `pickle_program` evaluates the pickle as data, with the functions
of `pickle_tensors`. A tensor of the result is a `TensorInfo` of its bytes in the archive, so that `RowReader`
streams it.
"""

from __future__ import annotations

import struct
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ascendit.checkpoint.pickle_program import ConvertibleError, PickleDataError, UnknownGlobalError, evaluate
from ascendit.checkpoint.pickle_tensors import CALLS, PickledTensor, storages
from ascendit.checkpoint.sources import FileState
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import listed
from ascendit.report import counted, shell_line

ZIP = b"PK\x03\x04"
"""First bytes of a zip archive."""
_END, _END_BYTES = b"PK\x05\x06", 22
"""First bytes and length of the end of a zip archive without a comment."""
_OLDER = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of a pickle that is no archive, as PyTorch before 1.6 wrote it."""
_MAX_PICKLE = 16 << 20
"""Bytes of `data.pkl`. A Wan model has 0.3 MB."""
_MAX_LIST = 4 << 20
"""Bytes of the list of members. A Wan model has 0.1 MB."""
_MAX_DEPTH = 16
"""Limit of nested dicts with texts as keys."""

_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the meta device, which has no values",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor saved through NumPy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor saved through the CPU",
}
"""Functions that make tensors whose bytes are not their numbers -> words for a message."""


@dataclass(frozen=True)
class PickleFile:
    """The contents of a file of `torch.save`."""

    tensors: dict[str, TensorInfo]
    """In the order of their bytes. Tied tensors have the same bytes."""
    values: dict[str, Any]
    """Numbers, texts, None and dicts beside the tensors and around their dict, such as an alpha."""


def is_archive(first: bytes) -> bool:
    """Whether a file with these first 8 bytes is a zip archive. A safetensors file begins with the same four
    if its header has 67,324,752 bytes, but the next four are then zero.
    """
    return first.startswith(ZIP) and any(first[4:8])


def read_pickle_file(path: Path, file: BinaryIO, state: FileState | None) -> PickleFile:
    """Return the tensors of the open `file`, a zip archive, and the numbers and texts beside them.

    Raises CheckpointError: E-CKP-02 for a damaged archive or one without tensors by name; E-CKP-04 for
    sparse, quantized and other tensors whose bytes are not their numbers; E-CKP-05 if the pickle names
    another class or function; E-CKP-09 if several dicts in it have tensors.
    """
    try:
        members = _members(file)
        start, end = members["data.pkl"]
        if end - start > _MAX_PICKLE:
            raise PickleDataError(f"data.pkl of {end - start:,} bytes")
        file.seek(start)
        top = evaluate(file.read(end - start), CALLS, storages(members))
        content, values = _choose(path, top)
        named = {_name(name): value for name, value in content.items() if isinstance(value, PickledTensor)}
    except UnknownGlobalError as e:
        raise _unknown_global(path, str(e)) from e
    except ConvertibleError as e:
        raise _convertible(path, str(e)) from e
    except (ValueError, EOFError, zipfile.BadZipFile, struct.error, NotImplementedError) as e:
        raise _broken(path, str(e) or type(e).__name__) from e
    infos = [_info(path, name, tensor, state) for name, tensor in named.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    return PickleFile({info.name: info for info in infos}, values)


def _name(name: object) -> str:
    """The name of a tensor. Raises PickleDataError, or UnicodeError for a text that no file can store."""
    if type(name) is not str:
        raise PickleDataError(f"a tensor with a name of type {type(name).__name__}")
    name.encode()
    return name


def _info(path: Path, name: str, tensor: PickledTensor, state: FileState | None) -> TensorInfo:
    return TensorInfo(
        name,
        tensor.dtype,
        tensor.shape,
        path,
        tensor.start,
        tensor.end,
        state,
        strides=tensor.strides,
        container="pickle",
    )


# ---- the archive --------------------------------------------------------------------------------


class _Bounded:
    """A file for `zipfile`, which reads as much at once as the archive claims to need."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_LIST:
            raise zipfile.BadZipFile("its list of members is too long")
        return self.file.read(size if size >= 0 else _MAX_LIST)


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Name without the folder of the archive -> (start, end) of its bytes in the file.

    Raises PickleDataError, BadZipFile, or the errors of `struct` and `zipfile` for a damaged archive.
    """
    file.seek(max(file.seek(0, 2) - _END_BYTES, 0))
    if not file.read().startswith(_END):
        raise PickleDataError("truncated, or bytes follow its end")
    with zipfile.ZipFile(_Bounded(file)) as archive:
        entries, end = archive.infolist(), archive.start_dir
    members: dict[str, tuple[int, int]] = {}
    names = {entry.orig_filename.partition("/")[2] for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:
        kind = "a TorchScript archive, which has code beside its tensors"
        other = f"a zip archive of {counted(len(entries), 'file')}, not of torch.save"
        raise PickleDataError(kind if "constants.pkl" in names else other)
    folders = {entry.orig_filename.partition("/")[0] for entry in entries}
    if any(entry.header_offset < 0 for entry in entries) or all(entry.header_offset for entry in entries):
        raise PickleDataError("its first bytes are no member of the archive")
    previous = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.orig_filename.partition("/")[2]
        start = _data_offset(file, entry)
        if name in members or entry.header_offset < previous or start + entry.file_size > end:
            raise PickleDataError(f"{_named(entry)} is there twice, or overlaps another")
        previous = start + entry.file_size
        members[name] = start, previous
    if len(folders) != 1:
        raise PickleDataError(f"an archive with {len(folders)} folders: {listed(map(repr, sorted(folders)))}")
    _check_byte_order(file, members)
    return members


def _named(entry: zipfile.ZipInfo) -> str:
    return f"the member {entry.orig_filename!r:.80}"


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """The offset of the bytes of a member, behind its local header."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ConvertibleError(f"{_named(entry)} is compressed")
    if entry.flag_bits & 0x1:
        raise PickleDataError(f"{_named(entry)} is encrypted")
    file.seek(entry.header_offset)
    header = file.read(30)
    length, extra = map(int, struct.unpack("<26xHH", header))
    if not header.startswith(ZIP) or file.read(length) != entry.orig_filename.encode():
        raise PickleDataError(f"{_named(entry)} differs from its header")
    return entry.header_offset + 30 + length + extra


def _check_byte_order(file: BinaryIO, members: Mapping[str, tuple[int, int]]) -> None:
    start, end = members.get("byteorder", (0, 0))
    file.seek(start)
    if start and (order := file.read(min(end - start, 16))) != b"little":
        raise ConvertibleError(f"the byte order {order.decode('latin1')!r}, not 'little'")


# ---- the state dict -----------------------------------------------------------------------------


def _choose(path: Path, top: object) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The only dict in the pickle that has tensors, and the values beside them and around it."""
    if not isinstance(top, dict):
        kind = "one tensor" if isinstance(top, PickledTensor) else f"one {type(top).__name__}"
        raise _no_state_dict(path, kind)
    waiting = deque[tuple[tuple[str, ...], dict[Any, Any]]]([((), top)])
    visited, chosen = {id(top)}, dict[tuple[str, ...], dict[Any, Any]]()
    while waiting:
        keys, item = waiting.popleft()
        if any(isinstance(value, PickledTensor) for value in item.values()):
            chosen[keys] = item
        for name, value in item.items():
            if isinstance(value, dict) and isinstance(name, str) and id(value) not in visited:
                if len(keys) == _MAX_DEPTH:
                    raise PickleDataError(f"dicts nested more than {_MAX_DEPTH} deep")
                visited.add(id(value))
                waiting.append(((*keys, name), value))
    if not chosen:
        raise _no_state_dict(path, "dicts without tensors")
    if len(chosen) > 1:
        raise _several(path, chosen)
    ((keys, item),) = chosen.items()
    values, outer = _values(top), top
    for key in keys:
        del values[key]
        outer = outer[key]
        values |= _values(outer)
    return item, values


def _values(item: dict[Any, Any]) -> dict[str, Any]:
    kinds = (str, int, float, dict, type(None))
    return {name: value for name, value in item.items() if isinstance(name, str) and isinstance(value, kinds)}


def _several(path: Path, chosen: Mapping[tuple[str, ...], dict[Any, Any]]) -> CheckpointError:
    choices = {".".join(keys)[:60] or "its top": item for keys, item in chosen.items()}
    sizes = [f"{name} ({counted(len(item), 'value')})" for name, item in choices.items()]
    keys = next(keys for keys in chosen if keys)
    command = convert_command(path, path.with_suffix(".safetensors"), keys)
    return CheckpointError(
        f"{path} has tensors in {len(chosen)} dicts: {listed(sizes)}",
        needs="a file with the tensors of one model",
        fix=f"choose one of them; this command saves {'.'.join(keys)[:60]}: {command}",
        code="E-CKP-09",
    )


def convert_command(
    pickled: Path, file: Path, keys: tuple[str, ...] = (), without: Sequence[str] = ()
) -> str:
    """A command that writes the tensors of a pickle to a safetensors file, without running code.

    `keys`: path of the dict with the tensors; default: the only one that has some, else the command fails.
    `without`: first components of the names of tensors that are omitted.
    """
    select = "" if without else "d = [x for x in d if (*sys.argv[3:],) in ((), x[0])]; "
    wanted = "t(v)" + (" and k.split('.')[0] not in sys.argv[3:]" if without else "")
    code = (
        "import sys, torch; from safetensors.torch import save_file; t = torch.is_tensor; "
        "f = lambda d, *k: [(k, d)] * any(map(t, d.values())) + [x for n, v in d.items() "
        "if isinstance(v, dict) and isinstance(n, str) for x in f(v, *k, n)]; "
        f"d = f(torch.load(sys.argv[1], weights_only=True, map_location='cpu')); {select}"
        "len(d) == 1 or sys.exit(f'{len(d)} dicts have tensors: {[k for k, _ in d]}; add the keys of one'); "
        f"save_file({{k: v.clone().contiguous() for k, v in d[0][1].items() if {wanted}}}, sys.argv[2])"
    )
    move = ""
    if pickled.suffix == file.suffix:  # torch.load reads the name of the file, not its first bytes
        renamed = pickled.with_suffix(".pth")
        move, pickled = shell_line(["mv", str(pickled), str(renamed)]) + " && ", renamed
    return move + shell_line(["python", "-c", code, str(pickled), str(file), *(without or keys)])


# ---- errors -------------------------------------------------------------------------------------

_SAVE_AGAIN = (
    "use the model's .safetensors file; or, in the program that saved this one, save plain tensors: "
)


def _unknown_global(path: Path, name: str) -> CheckpointError:
    if (kind := _OTHER_TENSORS.get(name)) is not None:
        return CheckpointError(
            f"{path} has {kind} ({name})",
            needs="tensors whose bytes are their numbers",
            fix=_SAVE_AGAIN + "tensor.dequantize(), .to_dense() or .cpu() of each",
            code="E-CKP-04",
        )
    return CheckpointError(
        f"{path}: its pickle names {name:.100}, which is not part of a tensor; nothing of it was run",
        needs="a pickle of tensors, numbers and texts: unpickling anything else can run code of the file",
        fix=_SAVE_AGAIN + "torch.save(model.state_dict(), FILE)",
        code="E-CKP-05",
    )


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable file of torch.save: {problem}",
        needs="an uncompressed archive of torch.save (PyTorch 1.6 or later) with a state dict of tensors",
        fix="download the file again and compare its size and sha256 with the source; or use the model's "
        ".safetensors file",
        code="E-CKP-02",
    )


def _no_state_dict(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {kind}, not tensors by name",
        needs="the state dict of a model",
        fix=_SAVE_AGAIN + "torch.save(model.state_dict(), FILE)",
        code="E-CKP-02",
    )


def older_format(path: Path, file: BinaryIO) -> CheckpointError | None:
    """The error E-CKP-02 for a file that PyTorch before 1.6 wrote, which is no zip archive; else None."""
    file.seek(0)
    first = file.read(512)
    if first[257:262] == b"ustar":
        return _no_state_dict(path, "a tar archive, as PyTorch before 0.2 wrote it")
    if not first.startswith(_OLDER):
        return None
    return _convertible(path, "a PyTorch pickle without an archive, as versions before 1.6 wrote it")


def _convertible(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        needs="a safetensors file, or an uncompressed archive of torch.save (PyTorch 1.6 or later)",
        fix=f"convert it: {convert_command(path, path.with_suffix('.safetensors'))}",
        code="E-CKP-02",
    )
