"""One expert as a folder: its plan of tensors run into shards, and the JSON files beside them. No torch."""

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
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.writer import MAX_SHARD_BYTES, Data, ShardWriter, TensorSpec
from ascendit.convert import provenance
from ascendit.progress import Advance
from ascendit.quant.vllm_omni_config import quantization_config_for
from ascendit.version import __version__
from ascendit.weights.engine_formats import Dialect, task_config
from ascendit.weights.tensor_steps import WAITING, Sink, TensorStep, run_steps, smoothed_in


@dataclass(frozen=True, kw_only=True)
class ExpertOutput:
    """What is written of one expert; names are Diffusers' here, the dialect's in the files."""

    source: Expert
    folder: str
    """Inside the output; `.` for the output itself."""
    dialect: Dialect
    steps: list[TensorStep]
    config: Mapping[str, Any]
    """Of a WanTransformer3DModel."""
    layers: Mapping[str, str]
    """Linears of the blocks, and others that are quantized or smoothed -> scheme."""
    attention: Mapping[str, str]
    """`<attn>.quant_type` -> its value in the manifest."""
    more_entries: Mapping[str, str] = field(default_factory=dict)
    """Entries of the source's manifest that stay true."""

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the order of the files."""
        return [spec for step in self.steps for spec in step.specs]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def disk_names(self) -> dict[str, str]:
        """Diffusers name -> name in the files."""
        smoothed = smoothed_in(self.steps)
        return {spec.name: self.dialect.on_disk(spec.name, smoothed) for spec in self.specs}


def fingerprint(outputs: Iterable[ExpertOutput], parts: Sequence[object], more: Iterable[Path] = ()) -> str:
    """The same for two runs that write the same bytes from the same files.

    `parts`: what else decides about the bytes, with a `repr` that says it. `more`: other files that are read.
    """
    outputs = list(outputs)
    files = {info.file for output in outputs for info in output.source.tensors.values()} | set(more)
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    layouts = [(output.folder, output.config, output.dialect, output.specs) for output in outputs]
    return hashlib.sha256(repr((__version__, stamps, layouts, parts)).encode()).hexdigest()


class WriteBehind(Sink):
    """Calls `append` and `move` of a writer in their order, a little later, from a thread of its own.

    So the next rows are encoded while these are written. What goes wrong there is raised by the next call
    here. As a context manager it ends the thread; the writer is the caller's to close.
    """

    def __init__(self, writer: ShardWriter, names: Mapping[str, str] | None = None) -> None:
        """`names`: Diffusers name -> name in the file, where they differ."""
        self._writer, self._names = writer, names or {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ascendit-write")
        self._waiting: deque[Future[None]] = deque()

    def done(self, name: str) -> bool:
        """As of the writer: known from the beginning."""
        return self._writer.done(self._names.get(name, name))

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor. Waits while as many pieces as may are on their way."""
        self._put(self._writer.append, self._names.get(name, name), data)

    def move(self, step: TensorStep) -> None:
        """A whole tensor from another file, in the kernel where it can."""
        self._put(self._writer.move, step.sources[0], self._names.get(step.name, step.name))

    def flush(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _put(self, call: Callable[..., None], *args: Any) -> None:
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
    """Write the files of one expert; path in the output -> sha256 of the weights with `hash`.

    `encode_all`: as for `run_steps`. `hash_json`: of the JSON files too. `align`: tensors start at the same
    offset within a page as in the source, which makes moving faster. Raises as `run_steps` and `ShardWriter`.
    """
    dialect, names = output.dialect, output.disk_names
    stem, manifest_file = dialect.file_names(model_quant_type(output.layers))
    folder = staging.path / output.folder
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(
        folder,
        [_in_file(step, spec, names, align) for step in output.steps for spec in step.specs],
        stem=stem,
        max_shard_bytes=None if dialect.export else max_shard_bytes,
        hash=hash,
        journal=staging.journal,
    )
    with writer, RowReader() as reader, WriteBehind(writer, names) as sink:
        run_steps(output.steps, reader, sink, advance=advance, encode_all=encode_all)
        sink.flush()
        digests = writer.close()
    private = [shard.file for shard in writer.shards]
    written = [folder / "config.json"]
    marker = quantization_config_for(output.layers, smoothed_in(output.steps))
    provenance.write_json(written[0], dialect.config(output.config, marker))
    if dialect.export:
        written.append(folder / "configuration.json")
        provenance.write_json(written[-1], task_config(output.config))
    if output.attention or any(name.endswith("_scale") for name in names):
        written.append(folder / manifest_file)
        manifest = dialect.manifest(output.layers, list(names), output.attention, output.more_entries)
        written[-1].write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")
        private.append(written[-1])
    if dialect.export:
        for file in private:
            file.chmod(0o640)
    if hash_json:
        written += folder.glob("*.index.json")
        digests |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    place = folder.relative_to(staging.path)
    return {(place / name).as_posix(): digest for name, digest in digests.items()}


def _in_file(step: TensorStep, spec: TensorSpec, names: Mapping[str, str], align: bool) -> TensorSpec:
    start = step.sources[0].start if align and step.how == "move" else None
    return replace(spec, name=names[spec.name], source_start=start)
