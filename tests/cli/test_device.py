"""`--device`: a twin, an invalid name, a machine without an NPU, a torch_npu without CANN."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ascendit.cli.generate_options import read_call
from ascendit.errors import UsageError

NEW_PYTHON = (sys.executable, "-m", "ascendit")
SMALL = ["--size", "32x32", "--frames", "5", "--steps", "2", "--seed", "3"]


@pytest.fixture
def ascendit(tmp_path: Path, environ: dict[str, str]) -> Any:
    """Run a command in a new Python and an empty folder. `start`: the program and its first arguments."""

    def call(
        *args: str | Path, start: Sequence[str | Path] = NEW_PYTHON, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = list(map(str, [*start, *args]))
        env = {**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", **variables}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)

    return call


@pytest.fixture
def half_installed(tmp_path: Path, environ: dict[str, str]) -> dict[str, str]:
    """PYTHONPATH with an installed torch_npu whose import fails for lack of CANN."""
    site = tmp_path / "site"
    info = site / "torch_npu-2.13.0.dist-info"
    info.mkdir(parents=True)
    error = "libhccl.so: cannot open shared object file: No such file or directory"
    (site / "torch_npu.py").write_text(f"raise ImportError({error!r})\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"PYTHONPATH": os.pathsep.join([str(site), environ["PYTHONPATH"]])}


def test_a_twin_makes_a_video_and_replays(
    ascendit: Any, warm: Path, tiny_t2v_single: Path, tmp_path: Path
) -> None:
    start = [warm / "ascendit"]
    args = ["generate", tiny_t2v_single, "a cat", *SMALL, "--device", "twin:a5", "-o", "a.gif", "-v"]
    done = ascendit(*args, start=start)
    assert done.returncode == 0, done.stderr
    assert "operators on twin:a5: adaln -> npu: mindiesd::adaln_v2" in done.stderr
    replay = next(line for line in (done.stderr + done.stdout).splitlines() if "replay" in line)
    assert "--device twin:a5" in replay
    again = ascendit(*shlex.split(replay.split("replay", 1)[1])[1:], "-o", "b.gif", start=start)
    assert again.returncode == 0 and (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize("name", ["twin:a9", "twin", "tpu", "cuda:one"])
def test_an_invalid_device_is_refused_before_the_model_is_read(name: str) -> None:
    with pytest.raises(UsageError) as e:
        read_call(["no/such/folder", "a cat"], demo=False, flags={"device": name}, settings=[], config=None)
    assert e.value.got == f"device {name!r}" and "twin:a5" in e.value.needs and "cuda:N" in e.value.needs


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_a_machine_without_an_npu(ascendit: Any, tiny_t2v_single: Path) -> None:
    done = ascendit("generate", tiny_t2v_single, "a cat", *SMALL, "--device", "npu:0")
    assert done.returncode == 3 and "error[E-ENV-03]: device npu: torch_npu is not installed" in done.stderr
    assert "--device twin:a5" in done.stderr and "Traceback" not in done.stderr


def test_torch_npu_without_cann_does_not_break_other_devices(
    ascendit: Any, half_installed: dict[str, str], tiny_t2v_single: Path
) -> None:
    env = {**os.environ, **half_installed, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    plain = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, env=env)
    assert plain.returncode != 0 and "libhccl.so" in plain.stderr
    generate = ("generate", tiny_t2v_single, "a", *SMALL, "--device")
    for args in (("cpu", "--dry-run"), ("twin:a5", "-o", "a.gif")):
        done = ascendit(*generate, *args, **half_installed)
        assert done.returncode == 0, done.stderr
    done = ascendit(*generate, "npu", **half_installed)
    assert done.returncode == 3 and "torch_npu cannot be imported: libhccl.so" in done.stderr
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in done.stderr


def test_fast_layernorm_from_the_environment_and_its_override(
    run: Any, fake: Any, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAST_LAYERNORM", "1")
    ended = run("generate", model, "a cat", "-o", tmp_path / "a.gif")
    assert "note: FAST_LAYERNORM=1: MindIE-SD's layer norm" in ended.err
    assert fake.loaded[-1][1]["fast_layernorm"] is True
    assert "--set fast_layernorm=true" in ended.out + ended.err
    ended = run("generate", model, "a cat", "--set", "fast_layernorm=false", "-o", tmp_path / "b.gif")
    assert "fast_layernorm" not in fake.loaded[-1][1]


def test_commands_disable_device_plugins_except_doctor(
    run: Any, fake: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ascendit.doctor import machine

    monkeypatch.setattr(machine, "PROBES", ())
    run("doctor")
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    run("generate", model, "a cat", "-o", tmp_path / "a.gif")
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
