"""The usage errors of typer and of missing arguments: their fix is a command that parses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ascendit.cli import main as cli

LINES = [
    ("quantize demo q8", "ascendit quantize demo -o q8 --scheme mxfp8"),
    ("quantize demo q8 --scheme int8", "ascendit quantize demo -o q8 --scheme int8"),
    ("quantize demo -o q8 --scheme int8 more", "ascendit quantize demo -o q8 --scheme int8"),
    ("inspect demo q8 --values", "ascendit inspect demo --diff q8 --values"),
    ("inspect demo -q --diff q8 more", "ascendit inspect demo -q --diff q8"),
    ("models wan2.2", "ascendit models"),
    ("quantize demo -o q8 --scheme", "--scheme int8"),
    ("repack demo -o", "write -o DST"),
    ("generate --demo cat --steps four", "omit --steps"),
    ("verify --demo --quality --limit=x", "omit --limit"),
    ("generate --demo a red circle", "ascendit generate --demo 'a red circle'"),
    ("generate demo a red circle", "ascendit generate --demo 'a red circle'"),
    ("generate hf:org/name a cat", "ascendit generate hf:org/name 'a cat'"),
    ("generate cat", "ascendit generate --demo cat"),
    ("generate --demo cat --guidance 5 3", "ascendit generate --demo cat"),
    ("generate --demo cat --seed random", "omit --seed for a random one"),
    ("generate --demo cat --seed 9-2", "--seed 2-9"),
]


@pytest.mark.parametrize(("line", "fix"), LINES)
def test_the_fix_of_a_wrong_command_line(line: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.splitlines()[2] == f"  try    {fix}"


@pytest.mark.parametrize(
    ("line", "got", "needs"),
    [
        ("generate --demo cat --steps four", "--steps four", "--steps: a whole number"),
        ("generate --demo cat --shift=x", "--shift x", "--shift: a number"),
        ("repack demo -o", "-o without a value", "-o DST"),
        ("serve demo", "No such command 'serve'.", f"one of {', '.join(cli.COMMANDS)}"),
    ],
)
def test_the_error_names_the_value_and_the_rule(
    line: str, got: str, needs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error[E-USE-01]: {got}\n  needs  {needs}\n")


def test_a_table_in_a_config_is_answered_with_its_keys(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run.toml").write_text('[generate]\nmodel = "demo"\n')
    assert cli.main(["generate", "cat", "--config", str(tmp_path / "run.toml")]) == 2
    fix = "write the keys of generate without a table around them"
    assert capsys.readouterr().err.endswith(f"  try    {fix}\n")


@pytest.mark.parametrize(
    ("part", "fix"),
    [
        ("nope.gguf", "correct the path"),
        (
            "unet=nope.gguf",
            "correct the path, or write one of transformer, transformer_2, text_encoder, vae, image_encoder "
            "instead of unet",
        ),
    ],
)
def test_a_part_without_a_file(part: str, fix: str, capsys: Any) -> None:
    assert cli.main(["generate", "--demo", "cat", "--part", part, "--dry-run"]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error[E-USE-02]: no file at {part}\n") and text.endswith(f"  try    {fix}\n")
