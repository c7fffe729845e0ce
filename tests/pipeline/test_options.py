"""LoadOptions: one table of the flags, keys, arguments of `load`, records and replay lines."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_defaults import SINGLE

import ascendit
from ascendit.cli.generate_options import read_call
from ascendit.errors import UsageError
from ascendit.pipeline.job import prepare_model
from ascendit.pipeline.options import FLAGS, OPTIONS, LoadOptions, load_args
from ascendit.pipeline.request import resolve
from ascendit.schedule import Step, StepSchedule

ARGUMENTS: dict[str, Any] = {
    "model": Path("elsewhere"),
    "device": torch.device("cuda:1"),
    "dtype": torch.bfloat16,
    "vae_dtype": torch.float32,
    "keep": ("blocks.0.*", "proj_out"),
    "step_policy": StepSchedule.parse("0:w4a8,1:w4a8"),
    "emulate": True,
    "recipe": Path("my recipes/a.toml"),
    "ops": "auto",
    "nz": False,
    "scheme": None,
    "force": True,
}


def test_the_load_options_of_a_python_call_become_text() -> None:
    options = LoadOptions(**ARGUMENTS)
    record = options.record
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "device": "cuda:1",
        "text_on": "device",
        "recipe": "my recipes/a.toml",
        "step_policy": "0-1:w4a8",
        "emulate": "decode-on-use",
        "keep": ["blocks.0.*", "proj_out"],
        "dtype": "bfloat16",
        "vae_dtype": "float32",
        "force": True,
    }
    line = resolve(SINGLE, "a cat", seed=7).replay_line("models/wan", load=record)
    assert line.startswith(
        "ascendit generate --device cuda:1 --recipe 'my recipes/a.toml' --step-policy 0-1:w4a8 "
        "--emulate decode-on-use --set 'keep=blocks.0.*;proj_out' --set dtype=bfloat16 "
        "--set vae_dtype=float32 --set force=true models/wan 'a cat' --seed 7 "
    )


def test_json_round_trip() -> None:
    options = LoadOptions(**ARGUMENTS)
    assert options.model == "elsewhere" and options.ops is None and options.emulate == "decode-on-use"
    assert LoadOptions.from_json(options.to_json()) == options
    assert LoadOptions(model="elsewhere", **options.record) == options
    assert set(json.loads(options.to_json())) == set(OPTIONS)


def test_defaults_of_load_are_recorded_but_not_in_the_replay_line() -> None:
    record = LoadOptions(model="demo").record
    request = resolve(SINGLE, "a cat", seed=7)
    assert record == {"device": "cpu", "text_on": "device"} and load_args(record) == []
    assert request.replay_line("demo", load=record) == request.replay_line("demo")


def test_load_has_the_arguments_of_the_table() -> None:
    parameters = inspect.signature(ascendit.load).parameters
    assert list(parameters) == [*LoadOptions.model_fields, "on_progress"]
    assert parameters["model"].default is inspect.Parameter.empty
    assert parameters["device"].default == "cpu" and parameters["nz"].default is False
    assert parameters["keep"].default == ()
    assert all(f"`{name}`: {row.help}" in str(ascendit.load.__doc__) for name, row in OPTIONS.items())


def test_generate_has_the_flags_of_the_table() -> None:
    from ascendit.cli.generate import generate

    names = set(inspect.signature(generate).parameters)
    assert FLAGS.keys() == names & OPTIONS.keys()
    assert FLAGS["step_policy"] == "--step-policy"


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (StepSchedule(), "default:stored"),
        (StepSchedule(((0, Step()),), Step("w4a8")), "0:stored,default:w4a8"),
        (StepSchedule(((0, Step("w4a8")),)), "0:w4a8"),
    ],
)
def test_a_schedule_becomes_its_text(schedule: StepSchedule, text: str) -> None:
    assert LoadOptions(model="demo", step_policy=schedule).step_policy == text  # type: ignore[arg-type]
    assert StepSchedule.parse(text) == schedule


def test_an_empty_schedule_overrides_the_policy_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('step_policy = "0:w4a8"\n[[rules]]\nlayers = "*"\nscheme = "mxfp4"\n')
    options = LoadOptions(model="demo", recipe=str(recipe), step_policy=StepSchedule())  # type: ignore[arg-type]
    assert prepare_model(options).schedule == StepSchedule()
    assert load_args(options.record)[-2:] == ["--step-policy", "default:stored"]


@pytest.mark.parametrize(
    "schedule",
    [
        StepSchedule(default=Step("w4a8", cache="reuse")),
        StepSchedule(((1, Step("w4a8", cache="reuse")),)),
        StepSchedule(((1, Step("w4a8")), (0, Step("bf16")))),
    ],
)
def test_a_schedule_that_text_cannot_express_is_refused(schedule: StepSchedule) -> None:
    with pytest.raises(UsageError, match="step_policy=StepSchedule") as error:
        LoadOptions(model="demo", step_policy=schedule)  # type: ignore[arg-type]
    assert error.value.code == "E-USE-01" and "without cache settings" in error.value.needs


@pytest.mark.parametrize("keep", ["a.*;b", "a.* b", "a.*,b", ["a.*", "b"], ("a.*", "b")])
def test_patterns_are_text_or_a_sequence(keep: Any) -> None:
    assert LoadOptions(model="demo", keep=keep).keep == ("a.*", "b")
    assert LoadOptions(model="demo", keep=None).keep == LoadOptions(model="demo", keep="").keep == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "got", "needs"),
    [
        (
            {"scheme": "mxfp6"},
            'scheme="mxfp6"',
            "scheme: bf16 or int8 or int8_block or fp8 or mxfp8 or mxfp4 or mxfp4_dualscale",
        ),
        ({"emulate": "often"}, 'emulate="often"', "emulate: decode-on-use or decode-once"),
        ({"device": "gpu"}, "device 'gpu'", "cpu, cuda, cuda:N, npu, npu:N, twin:a2, twin:a3, twin:a5"),
        ({"step_policy": 5}, "step policy '5': it has type int, not text", None),
        ({"activation_rule": 7}, "activation_rule=7", "activation_rule: text"),
        ({"nz": "perhaps"}, 'nz="perhaps"', "nz: true or false"),
        ({"keep": 5}, "keep=[5]", "keep: text"),
        ({"shceme": "int8"}, "load has unknown fields: ['shceme']", None),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], got: str, needs: str | None) -> None:
    with pytest.raises(UsageError) as error:
        LoadOptions(model="demo", **options)
    assert (error.value.got, error.value.code) == (got, "E-USE-01")
    assert needs is None or error.value.needs == needs


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("8e9", 8 * 10**9),
        ("1.5 GB", 15 * 10**8),
        ("512", 512),
        (2**31, 2**31),
        (8e9, 8 * 10**9),
    ],
)
def test_max_memory_is_bytes_in_the_options_the_record_and_the_replay_line(text: Any, size: int) -> None:
    options = LoadOptions(model="demo", max_memory=text)
    assert options.record["max_memory"] == size
    assert load_args(options.record) == ["--max-memory", str(size)]
    flags = {"max_memory": str(text)}
    for layer in ({"flags": flags, "settings": []}, {"flags": {}, "settings": [f"max_memory={text}"]}):
        call = read_call(["a"], demo=True, config=None, **layer)  # type: ignore[arg-type]
        assert call.options == options


@pytest.mark.parametrize("text", ["much", "0", "-1", "24GiBs", "3 XB", "1e999", "9" * 400, "", "0.4", True])
def test_an_invalid_max_memory_is_refused(text: Any) -> None:
    with pytest.raises(UsageError) as error:
        LoadOptions(model="demo", max_memory=text)
    assert (error.value.got, error.value.fix) == (f"max_memory={text}", 'max_memory="24GiB"')


def test_dtypes_are_checked_by_the_device() -> None:
    assert LoadOptions(model="demo", dtype=torch.float64).record["dtype"] == "float64"  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="dtype=int8 on cpu") as error:
        ascendit.load("demo", dtype="int8")
    assert error.value.needs == "float32 or bfloat16 or float16"


def test_modules_of_the_start_import_no_pydantic() -> None:
    modules = ("cli.main", "cli.interruptions", "environment", "family")
    code = (
        f"import importlib, sys; [importlib.import_module('ascendit.' + name) for name in {modules!r}];"
        "print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_options_are_frozen_and_hashable() -> None:
    assert len({LoadOptions(model="demo"), LoadOptions(model="demo", device="cpu")}) == 1
