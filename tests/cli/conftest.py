"""Shared by the tests of the commands: a model folder without real weights, and a fake pipeline."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.headers import WEIGHTS, floats, write_weights

import ascendit
from ascendit.checkpoint.hub import DEMO
from ascendit.cli.main import main
from ascendit.option_text import command_line
from ascendit.pipeline import load
from ascendit.pipeline.options import PreparedModel
from ascendit.pipeline.video import Video
from ascendit.progress import Progress

EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(autouse=True)
def _logs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write error logs to a temporary folder, and restore the environment variable that commands set."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


@pytest.fixture(autouse=True)
def _flags_in_errors() -> Iterator[None]:
    """Errors have the form of the command line, also where a test calls a function of a command."""
    with command_line():
        yield


@pytest.fixture
def environ() -> dict[str, str]:
    """Environment of a child process: ascendit on PYTHONPATH, no colour."""
    return {**os.environ, "PYTHONPATH": str(Path(ascendit.__file__).parents[1]), "NO_COLOR": "1"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo model with transformers of zeros."""
    root = shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns(WEIGHTS))
    shutil.copy(DEMO / "vae" / WEIGHTS, root / "vae")
    for name in EXPERTS:
        write_weights(root / name / WEIGHTS, floats(json.loads((root / name / "config.json").read_text())))
    return root


@dataclass
class FakePipeline:
    """Runs no model: reports the progress of a cascade and returns a grey ramp."""

    error: BaseException | None = None
    loaded: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def build(self, model: PreparedModel, on_progress: Callable[[Progress], None]) -> Any:
        self.loaded.append((model.options.model, model.options.record))
        on_progress(Progress(stage="load", step=4, total=4))
        return self

    def run(
        self,
        request: Any,
        *,
        pixels: Any,
        on_progress: Callable[[Progress], None],
        cancel: Any,
        allow_flat: bool,
    ) -> Video:
        self.requests.append(request)
        steps = request.num_inference_steps
        print("a library prints on stdout")
        on_progress(Progress(stage="encode", total=1))
        on_progress(Progress(stage="encode", step=1, total=1))
        for i in range(steps):
            expert = "transformer" if i < steps // 4 else "transformer_2"
            on_progress(
                Progress(
                    stage="denoise",
                    step=i + 1,
                    total=steps,
                    expert=expert,
                    seconds=2.0,
                    memory_bytes=3 * 2**30,
                )
            )
            if self.error is not None:
                raise self.error
        shape = (request.num_frames, request.height, request.width, 3)
        frames = np.broadcast_to(np.linspace(0, 255, request.width, dtype=np.uint8)[:, None], shape)
        source, options = self.loaded[-1]
        return Video(
            frames=np.ascontiguousarray(frames),
            fps=request.fps,
            request=request,
            model=source,
            source=source,
            loaded=options,
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """Replace loading by a FakePipeline; this machine has every device."""
    pipeline = FakePipeline()
    monkeypatch.setattr(load, "build", pipeline.build)
    monkeypatch.setattr(load, "open_accelerator", lambda policy, options: (policy.device, policy))
    return pipeline


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON object and nothing else."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`run("generate", ...)` runs the command in this process."""

    def call(*args: str | Path) -> Result:
        capsys.readouterr()
        code = main([str(w) for w in args])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
