"""Pydantic errors as errors of ascendit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import StrictInt, ValidationError, field_validator
from safetensors.numpy import save_file

from ascendit.errors import UsageError
from ascendit.pipeline.latents import read_latents
from ascendit.pipeline.request import GenerateRequest
from ascendit.quant.recipe import load_recipe
from ascendit.validation import Model, described, parse, problem, read_settings, usage_error

Sizes = Annotated[tuple[StrictInt, ...], described("sizes = {got}, not a list of numbers")]


class Inner(Model):
    title = "an entry"
    sizes: Sizes = ()


class Outer(Model):
    title = "the file"
    entries: Annotated[tuple[Inner, ...], described("entries is not a list of tables")] = ()
    count: int = 1

    @field_validator("count")
    @classmethod
    def _small(cls, count: int) -> int:
        if count > 9:
            raise problem(f"count {count} is too much")
        if count < 0:
            raise UsageError("count below 0", needs="n", fix="f", code="E-REQ-03")
        return count


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"entry": 1, "a": 2}, "the file has a, entry; allowed are count, entries"),
        ({"entries": "x"}, "entries is not a list of tables"),
        ({"entries": [1]}, "entries is not a list of tables"),
        ({"entries": [{"size": 1}]}, "an entry has size; allowed are sizes"),
        ({"entries": [{}, {"sizes": [1, "{b}"]}]}, "sizes = [1, '{b}'], not a list of numbers"),
        ({"count": 10}, "count 10 is too much"),
        ({"count": None}, "count: Input should be a valid integer"),
    ],
)
def test_the_error_is_the_first_problem(data: object, text: str) -> None:
    with pytest.raises(ValidationError) as e:
        Outer.model_validate(data)
    error = usage_error(e.value, source="my.toml", needs="entries", fix="correct it")
    assert error.got == f"my.toml: {text}"
    assert (error.needs, error.fix, error.code) == ("entries", "correct it", "E-USE-01")


def test_an_ascendit_error_is_raised_unchanged() -> None:
    with pytest.raises(UsageError, match="E-REQ-03"):
        Outer.model_validate({"count": -1})


def test_a_text_that_is_not_toml() -> None:
    error = usage_error(ValueError("line 1"), source="my.toml", syntax="TOML", needs="n", fix="f")
    assert error.got == "my.toml: it is not TOML (line 1)"


NESTED: list[tuple[Any, str]] = [
    ("json", "[" * 100_000),
    ("json", "[" * 200 + "]" * 200),
    ("toml", "a = " + "[" * 100_000),
    ("toml", "a = " + "[" * 200 + "]" * 200),
    ("toml", "a." * 100_000 + "a = 1"),
]


@pytest.mark.parametrize(("syntax", "text"), NESTED)
def test_deep_nesting_is_an_error_of_the_file(syntax: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 64"):
        parse(text, syntax)
    if syntax == "toml":
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(UsageError, match="E-USE-01"):
            load_recipe(str(tmp_path / "r.toml"))


def test_settings_are_read_from_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file|Is a directory"):
            read_settings(path)
    with pytest.raises(UsageError, match="E-USE-02.*not a regular file"):
        load_recipe(str(tmp_path / "pipe.toml"))
    (tmp_path / "a.toml").write_text('prompt = "a.b. c"\nkeep = [["x"]]\n')
    assert read_settings(tmp_path / "a.toml") == {"prompt": "a.b. c", "keep": [["x"]]}


def test_deep_nesting_in_the_metadata_of_latents(tmp_path: Path) -> None:
    save_file({"latents": np.zeros((1, 1, 1, 1, 1), np.float32)}, tmp_path / "x", {"ascendit": "[" * 100_000})
    with pytest.raises(UsageError, match="E-USE-01.*no latents of ascendit"):
        read_latents(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "value", "end"), [("prompt", 5, '"a red circle moves right"'), ("seed", -1, "a random one")]
)
def test_the_fix_of_a_field_without_a_default_of_the_model(name: str, value: Any, end: str) -> None:
    request: dict[str, Any] = {"prompt": "a", "width": 16, "height": 16, "num_frames": 1, "fps": 8}
    request |= {"num_inference_steps": 1, "guidance_scale": 1.0, "flow_shift": 1.0, "seed": 1, name: value}
    with pytest.raises(UsageError, match=f"{name} is") as e:
        GenerateRequest(**request)
    assert e.value.fix.endswith(end)
