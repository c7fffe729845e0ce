"""Every JSON file of a model, changed at random: the model runs, or an error with a code; nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from broken.mutations import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ascendit.convert.quantize import quantize
from ascendit.errors import AscenditError, RequestError
from ascendit.inspect.checkpoint import inspect
from ascendit.pipeline.job import Prepared, prepare, run
from ascendit.pipeline.options import LoadOptions

SECONDS = 10.0
"""Limit of processor time for one model; each takes some milliseconds."""
SECRET = "secret.txt"
"""A file beside the models that the changed values point to; it must not be opened."""
PICTURE = Image.new("RGB", (32, 32), (200, 30, 30))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Image to video with CLIP, Wan2.2's VAE, two sharded experts, and a quantized model."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / SECRET).write_text("secret")
    image = tiny.build_i2v_21(root / "image")
    (image / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    (image / "tokenizer/added_tokens.json").write_text('{"</s>": 1}')
    tiny.build_ti2v(root / "ti2v")
    tiny.shard(tiny.build_t2v_cascade(root / "cascade"))
    quantize(root / "cascade", root / "quantized", scheme="mxfp8")
    return {name: root / name for name in ("image", "ti2v", "cascade", "quantized")}


OPENED: list[str] | None = None
"""While not None, the paths that are opened."""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(args[0]))


@pytest.fixture(scope="module", autouse=True)
def _watch() -> None:
    sys.addaudithook(_audit)


@contextmanager
def limits() -> Iterator[None]:
    """Stop a call that computes for too long, or opens the file beside the models."""
    global OPENED

    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"more than {SECONDS} s of processor time")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    opened: list[str] = []
    OPENED = opened
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        OPENED = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert not [path for path in opened if SECRET in path]


def attempt(call: Callable[[], Any]) -> Any:
    """The result of `call`, or its error, which must have a code."""
    with limits():
        try:
            return call()
        except AscenditError as error:
            assert str(error) and json.dumps(error.as_dict())
            return error


def prepare_one(folder: Path, name: str) -> Prepared:
    """One step of a small video, or of a first image."""
    image: dict[str, Any] = {"image": "picture", "pixels": {"picture": PICTURE}} if name == "image" else {}
    fields: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 1, "seed": 1}
    return prepare(LoadOptions(model=str(folder)), "a red circle", **image, **fields)


def try_model(folder: Path, name: str, generate: bool) -> str:
    """How far the model gets: the code of `inspect`, `runs`, `prepared`, or the code of `run`.

    `inspect` and `prepare` must judge alike.
    """
    report = attempt(lambda: inspect(folder))
    prepared = attempt(lambda: prepare_one(folder, name))
    refused = isinstance(prepared, AscenditError)
    if isinstance(report, AscenditError) or not report.ok:
        first = report if isinstance(report, AscenditError) else report.problems[0]
        assert refused, str(first)
        return str(first.code)
    if isinstance(prepared, RequestError):  # the folder lacks a boundary, which the caller can set
        assert "boundary" in prepared.got and "no boundary" in "".join(report.lines()), str(prepared)
        return str(prepared.code)
    assert not refused, str(prepared)
    if not generate:
        return "prepared"
    video = attempt(lambda: run(prepared))
    return f"run: {video.code}: {video.got[:80]}" if isinstance(video, AscenditError) else "runs"


def fuzz(models: dict[str, Path], data: st.DataObject, generate: bool) -> str:
    name = data.draw(st.sampled_from(sorted(models)))
    files = sorted(models[name].rglob("*.json"))
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    new = damaged(data.draw, content)
    before = {path: path.stat().st_mtime_ns for path in models[name].parent.rglob("*")}
    file.write_bytes(new)
    try:
        outcome = try_model(models[name], name, generate)
    finally:
        file.write_bytes(content)
    after = {path: path.stat().st_mtime_ns for path in models[name].parent.rglob("*")}
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {file}
    return outcome


@settings(max_examples=120)
@given(data=st.data())
def test_changed_configs(models: dict[str, Path], data: st.DataObject) -> None:
    fuzz(models, data, generate=False)


@pytest.mark.slow
def test_changed_configs_of_models_that_run(models: dict[str, Path]) -> None:
    """5,000 examples; the models that are accepted make a video of one step."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=int(os.environ.get("EXAMPLES", 5000)), suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def changed(data: st.DataObject) -> None:
        outcomes[fuzz(models, data, generate=True)] += 1

    changed()
    print(*outcomes.most_common(), sep="\n")
    assert outcomes["runs"] > 500
