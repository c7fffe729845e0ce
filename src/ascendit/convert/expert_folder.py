"""Write one expert as a folder: run its steps into weight files, and write its JSON files.

Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.quant_metadata import model_quant_type
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.sources import FileState, files_below
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.writer import MAX_SHARD_BYTES, Data, ShardWriter, TensorSpec
from ascendit.convert import provenance
from ascendit.progress import Advance
from ascendit.quant.vllm_omni_config import quantization_config_for
from ascendit.version import __version__
from ascendit.weights.engine_formats import TargetFormat, task_config
from ascendit.weights.tensor_steps import WAITING, Sink, TensorStep, run_steps, smoothed_in


@dataclass(frozen=True, kw_only=True)
class ExpertOutput:
    """The output of one expert. Names are Diffusers names; `target` maps them to stored names."""

    source: Expert
    folder: str
    """Relative to the output; `.` for the output itself."""
    target: TargetFormat
    steps: list[TensorStep]
    config: Mapping[str, Any]
    """Config of a WanTransformer3DModel."""
    layers: Mapping[str, str]
    """Linear layers of the blocks, and others that are quantized or smoothed -> scheme."""
    attention: Mapping[str, str]
    """`<attn>.quant_type` -> its value in the manifest."""
    other_entries: Mapping[str, str] = field(default_factory=dict)
    """Entries of the source's manifest that are still valid."""

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors in the order of the files."""
        return [spec for step in self.steps for spec in step.specs]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def disk_names(self) -> dict[str, str]:
        """Diffusers name -> stored name."""
        smoothed = smoothed_in(self.steps)
        return {spec.name: self.target.on_disk(spec.name, smoothed) for spec in self.specs}


def fingerprint(outputs: Iterable[ExpertOutput], parts: Sequence[object], more: Sequence[Path] = ()) -> str:
    """A hash that is the same for two runs that write the same bytes from the same files.

    `parts`: other values that determine the bytes, hashed by their `repr`. `more`: other source files and
    folders.
    """
    outputs = list(outputs)
    files = {info.file for output in outputs for info in output.source.tensors.values()}
    states = {file: FileState.of(file.stat()) for file in files | {path for path in more if path.is_file()}}
    for folder in more:
        states |= files_below(folder)
    stamps = [(str(file), *state) for file, state in sorted(states.items())]
    layouts = [(output.folder, output.config, output.target, output.specs) for output in outputs]
    return hashlib.sha256(repr((__version__, stamps, layouts, parts)).encode()).hexdigest()


class WriteBehind(Sink):
    """Calls `append` and `move` of a writer from a separate thread, in order.

    The next rows are encoded while the previous ones are written. An error in the thread is raised by a later
    call. As a context manager it ends the thread; the caller closes the writer.
    """

    def __init__(self, writer: ShardWriter, names: Mapping[str, str] | None = None) -> None:
        """`names`: Diffusers name -> stored name, where they differ."""
        self._writer, self._names = writer, names or {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ascendit-write")
        self._waiting: deque[Future[None]] = deque()

    def done(self, name: str) -> bool:
        """Whether an earlier run has completed the tensor."""
        return self._writer.done(self._names.get(name, name))

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor. Blocks while WAITING pieces are not written yet."""
        self._submit(self._writer.append, self._names.get(name, name), data)

    def move(self, step: TensorStep) -> None:
        """Copy a complete tensor from its source, by a system call if possible."""
        self._submit(self._writer.move, step.sources[0], self._names.get(step.name, step.name))

    def flush(self) -> None:
        """Wait until everything is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _submit(self, call: Callable[..., None], *args: Any) -> None:
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(call, *args))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._thread.shutdown()
        if error is None:
            self.flush()


def write_expert(
    output: ExpertOutput,
    staging: Staging,
    advance: Advance,
    *,
    hash: bool,
    hash_json: bool = False,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    encode_all: bool = False,
    align: bool = False,
) -> dict[str, str]:
    """Write the files of one expert. Returns path in the output -> sha256 of the weight files with `hash`.

    `encode_all`: see `run_steps`. `hash_json`: hash the JSON files too. `align`: tensors start at the same
    offset within a page as in the source, which makes copying faster. Raises the errors of `run_steps` and
    `ShardWriter`.
    """
    target, names = output.target, output.disk_names
    stem, manifest_file = target.file_names(model_quant_type(output.layers))
    folder = staging.path / output.folder
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(
        folder,
        [_stored_spec(step, spec, names, align) for step in output.steps for spec in step.specs],
        stem=stem,
        max_shard_bytes=None if target.export else max_shard_bytes,
        hash=hash,
        journal=staging.journal,
    )
    with writer, RowReader() as reader, WriteBehind(writer, names) as sink:
        run_steps(output.steps, reader, sink, advance=advance, encode_all=encode_all)
        sink.flush()
        digests = writer.close()
    private = [shard.file for shard in writer.shards]
    written = [folder / "config.json"]
    quantization = quantization_config_for(output.layers, smoothed_in(output.steps))
    provenance.write_json(written[0], target.config(output.config, quantization))
    if target.export:
        written.append(folder / "configuration.json")
        provenance.write_json(written[-1], task_config(output.config))
    if output.attention or any(name.endswith("_scale") for name in names):
        written.append(folder / manifest_file)
        manifest = target.manifest(output.layers, list(names), output.attention, output.other_entries)
        written[-1].write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")
        private.append(written[-1])
    if target.export:
        for file in private:
            file.chmod(0o640)
    if hash_json:
        written += folder.glob("*.index.json")
        digests |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    relative = folder.relative_to(staging.path)
    return {(relative / name).as_posix(): digest for name, digest in digests.items()}


def _stored_spec(step: TensorStep, spec: TensorSpec, names: Mapping[str, str], align: bool) -> TensorSpec:
    start = step.sources[0].start if align and step.how == "move" else None
    return replace(spec, name=names[spec.name], source_start=start)
