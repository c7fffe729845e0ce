"""The two ways to write an option agree with the parsers and with the functions of the Python interface."""

from __future__ import annotations

import inspect
from typing import Any

import fix_lines
import pytest

import ascendit
from ascendit.cli.generate_options import KEYS
from ascendit.option_text import (
    KEYWORDS,
    SET_ONLY,
    SETTABLE,
    SEVERAL,
    SWITCHES,
    command_line,
    for_reader,
    option,
    option_name,
    python_text,
)

SPECIAL = {"--demo", "--set", "--output", "-o"}


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("--device cpu", 'device="cpu"'),
        ("--steps 8", "num_inference_steps=8"),
        ("add --scheme mxfp8, or omit --step-policy", 'add scheme="mxfp8", or omit step_policy'),
        ("--size 64x48 or --size 80x48", "width=64, height=48 or width=80, height=48"),
        ("omit --size for the model's own", "omit width and height for the model's own"),
        ("--guidance 4,3 --set solver=euler", 'guidance_scale=4, guidance_scale_2=3, solver="euler"'),
        ("--timesteps 1000,500.", "timesteps=[1000, 500]."),
        ("--overwrite", "overwrite=True"),
        ("without --check, repack copies", "without check, repack copies"),
        ("--keep blocks.0.*", 'keep=["blocks.0.*"]'),
        ("pattern 'x' of --keep matches nothing", "pattern 'x' of keep matches nothing"),
        ("omit --scheme and --scale-rule", "omit scheme and scale_rule"),
        ("--set dtype=float32; or --set nz=true", 'dtype="float32"; or nz=True'),
        ("-o a-2.gif", 'save("a-2.gif")'),
        ("-o models/wan", 'dst="models/wan"'),
        ('--negative "a b"', 'negative_prompt="a b"'),
        ("ascendit generate --demo x --steps 3; or --steps 4", None),
        ("omit --config", "omit --config"),
        ("docker --rm x", "docker --rm x"),
    ],
)
def test_python_text(text: str, python: str | None) -> None:
    python = python or text.replace("or --steps 4", "or num_inference_steps=4")
    assert python_text(text) == for_reader(text) == python
    with command_line():
        assert for_reader(text) == text


def test_flags_of_another_command_are_keys_of_set() -> None:
    with command_line("generate"):
        assert for_reader("omit --keep, or --keep a.*") == "omit --set keep, or --set keep=a.*"
    with command_line("quantize"):
        assert for_reader("--steps 4") == "--set num_inference_steps=4"
        assert for_reader("omit --timesteps.") == "omit --set timesteps."
        with command_line("repack"):
            assert for_reader("--steps 4") == "--steps 4"
    for command, flags in SET_ONLY.items():
        assert not {*flags} & {flag for p in fix_lines.command(command).params for flag in p.opts}


def test_every_flag_of_every_command_is_in_a_table() -> None:
    tables = {*KEYWORDS, *SWITCHES, *SEVERAL, *fix_lines.COMMAND_LINE_ONLY, *SPECIAL}
    flags = {flag for flag in fix_lines.flags() if flag not in ("-h", "--help")}
    assert flags - tables == set()
    assert tables - flags - {"-o", "--quiet", "--verbose", "--version"} == set()


def test_every_key_of_set_has_a_flag_or_is_settable() -> None:
    assert {*KEYWORDS.values(), *SWITCHES.values(), *SETTABLE} >= {*KEYS}
    assert {*KEYS} >= SETTABLE and not SETTABLE & {*KEYWORDS.values()}


def test_flags_and_switches_take_what_the_tables_say() -> None:
    for flag, params in fix_lines.flags().items():
        if flag in KEYWORDS or flag in SEVERAL:
            assert not any(param.is_flag for param in params), flag
        if flag in SWITCHES:
            assert all(param.is_flag for param in params), flag


def test_every_keyword_is_one_of_a_function() -> None:
    functions: list[Any] = [ascendit.load, ascendit.quantize, ascendit.repack, ascendit.quantize_]
    functions += [ascendit.Pipeline.generate, ascendit.Video.save, ascendit.inspect]
    names = {name for f in functions for name in inspect.signature(f).parameters} | {*KEYS}
    from ascendit.inspect.diff import diff
    from ascendit.pipeline.calibrate import Calibrator
    from ascendit.verify.adherence import check_adherence

    names |= {n for f in (diff, check_adherence, Calibrator) for n in inspect.signature(f).parameters}
    keywords = {*KEYWORDS.values(), *SWITCHES.values(), *(n for names in SEVERAL.values() for n in names)}
    assert keywords - names == set()


@pytest.mark.parametrize(
    ("keyword", "value", "text", "name"),
    [
        ("scheme", "mxfp8", "--scheme mxfp8", "--scheme"),
        ("dtype", "bfloat16", "--set dtype=bfloat16", "--set dtype"),
        ("nz", True, "--set nz=true", "--set nz"),
        ("negative_prompt", "a $b", '--negative "a \\$b"', "--negative"),
        ("width", 64, "--set width=64", "--size"),
    ],
)
def test_option(keyword: str, value: object, text: str, name: str) -> None:
    assert (option(keyword, value), option_name(keyword)) == (text, name)
