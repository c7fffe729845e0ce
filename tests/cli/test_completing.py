"""Completion in bash: words that it splits, and files beside the names of models."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import sys
import time

import pytest

from ascendit.cli import main as cli


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("generate hf : Wan-AI/Wan2.2-TI", ["Wan-AI/Wan2.2-TI2V-5B-Diffusers"]),
        ("generate --device twin :", ["a2", "a3", "a5"]),
        ("generate --set solver = e", ["euler"]),
        ("generate --set = solver = e", ["euler"]),
        ("generate --scheme = mxfp4", ["mxfp4", "mxfp4_dualscale"]),
        ("generate d", ["demo", "demo-2/", "demo-3.safetensors"]),
        ("inspect demo-", []),  # the shell completes the files
    ],
)
def test_words_that_bash_splits_and_files(monkeypatch, tmp_path, capsys, words, completed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-2").mkdir()
    for name in ("demo-3.safetensors", "demo-4.txt", "d 5.safetensors"):
        (tmp_path / name).touch()
    pieces = ["ascendit", *words.split()]
    monkeypatch.setenv("_ASCENDIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(pieces))
    monkeypatch.setenv("COMP_CWORD", str(len(pieces) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
    assert [line for line in capsys.readouterr().out.splitlines() if line] == completed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_an_interactive_bash_completes_after_a_colon(tmp_path):
    program = tmp_path / "ascendit"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ascendit "$@"\n')
    program.chmod(0o755)
    start = f"PATH={tmp_path}:$PATH; PS1=; stty cols 200; "
    start += 'eval "$(_ASCENDIT_COMPLETE=bash_source ascendit)"; echo rea""dy\n'
    process, terminal = pty.fork()
    if process == 0:
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        os.write(terminal, start.encode())
        read_until(terminal, b"ready\r\n")
        os.write(terminal, b"ascendit generate hf:Wan-AI/Wan2.2-TI\t")
        assert b"hf:hf:" not in read_until(terminal, b"2V-5B-Diffusers ")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def read_until(terminal: int, end: bytes) -> bytes:
    """What a terminal shows until `end`, for at most 30 s."""
    shown, limit = b"", time.monotonic() + 30
    while end not in shown:
        assert time.monotonic() < limit, shown
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096)
    return shown
