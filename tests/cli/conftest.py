"""Shared by the tests of the commands: a model folder without real weights, and a fake pipeline."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.headers import WEIGHTS, floats, write_json, write_weights

import ascendit
from ascendit.cli.main import main
from ascendit.pipeline import load
from ascendit.pipeline.options import PreparedModel
from ascendit.pipeline.video import Video
from ascendit.progress import Progress

EXPERT = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 8,
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": [1, 2, 2],
}
CONFIGS: dict[str, Any] = {
    "model_index.json": {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": 4.0,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    },
    "transformer/config.json": EXPERT,
    "transformer_2/config.json": EXPERT,
    "vae/config.json": {
        "_class_name": "AutoencoderKLWan",
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 4,
    },
}


@pytest.fixture(autouse=True)
def _logs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write error logs to a temporary folder, and restore the environment variable that commands set."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


@pytest.fixture
def environ() -> dict[str, str]:
    """Environment of a child process: ascendit on PYTHONPATH, no colour."""
    return {**os.environ, "PYTHONPATH": str(Path(ascendit.__file__).parents[1]), "NO_COLOR": "1"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the shape of the demo model: its configs, weights of zeros."""
    root = tmp_path / "model"
    for name, config in CONFIGS.items():
        write_json(root / name, config)
    for name in ("transformer", "transformer_2"):
        write_weights(root / name / WEIGHTS, floats(EXPERT))
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
    """Replace loading by a FakePipeline."""
    pipeline = FakePipeline()
    monkeypatch.setattr(load, "build", pipeline.build)
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
