"""Where the tensors of a plan go: `run_steps` makes them one after the other and gives them to a `Sink`.

    with RowReader() as reader, WriteBehind(writer) as sink:
        run_steps(stored_steps(expert), reader, sink)

`WriteBehind` is the sink of a folder, `model.weight_loader.ModelSink` that of a model. No torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.writer import Data, ShardWriter
from ascendit.progress import Advance
from ascendit.weights.tensor_steps import WAITING, TensorStep


class Sink:
    """Takes tensors under their Diffusers names, in the order of the plan."""

    def done(self, name: str) -> bool:
        """Whether an earlier run has left this tensor here."""
        return False

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor. They stay as they are until WAITING more have come, or `flush`."""
        raise NotImplementedError

    def move(self, step: TensorStep) -> None:
        """The one tensor of a step that leaves its source as it is."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when no piece is needed any more."""


def no_progress(name: str, count: int, skipped: bool = False) -> None:
    """No progress is reported."""


def run_steps(
    steps: Iterable[TensorStep],
    reader: RowReader,
    sink: Sink,
    *,
    advance: Advance = no_progress,
    encode_all: bool = False,
) -> None:
    """Make every tensor that the sink does not have yet.

    `advance`: gets the bytes of the sources of a step while it runs. `encode_all`: layers that an earlier run
    has written are encoded again, to be measured. Raises CheckpointError: E-CKP-08 for invalid scales,
    E-CKP-04 for what is no FP4 number, E-CKP-02 for files that shrink, E-QNT-01 for weights that are not
    finite.
    """
    for step in steps:
        done = bool(step.specs) and all(sink.done(spec.name) for spec in step.specs)
        if done and not (encode_all and step.how == "encode"):
            advance(step.name, step.bytes_read(), True)
        elif step.how == "move":
            sink.move(step)
            advance(step.name, step.bytes_read())
        else:
            _make(step, reader, sink, advance)


def _make(step: TensorStep, reader: RowReader, sink: Sink, advance: Advance) -> None:
    """Give the pieces of one step; the bytes of its sources are reported as those of its tensors come."""
    made, reported, total, weight = 0, 0, step.bytes_made(), step.bytes_read()
    for name, data in step.produce(reader):
        if not sink.done(name):
            sink.append(name, data)
            if step.how != "encode":
                sink.flush()
        made += memoryview(data).nbytes
        done = weight * made // total
        advance(name, done - reported)
        reported = done
    if reported < weight:
        advance(step.name, weight - reported)


# ---- a folder -----------------------------------------------------------------------------------


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
        """A whole tensor from another file, inside the kernel."""
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
