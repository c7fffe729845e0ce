"""The file of measurements: round trip, damaged and foreign files, and the choice that follows it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ascendit import environment
from ascendit.attention import measured, plan
from ascendit.attention.choice import AttentionPolicy
from ascendit.attention.measured import (
    ERROR_LIMIT,
    Measurement,
    Shape,
    cached_file,
    fastest,
    file_data,
    from_row,
    merged,
    read_measurements,
)
from ascendit.device.attention_limits import AttentionCall
from ascendit.device.device import parse_device
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel
from ascendit.ops.open_device import hardware_name
from ascendit.ops.operators import bind

CPU = parse_device("cpu")
HARDWARE = "A processor (R) of 2026"
USABLE = ("cpu", "sdpa", "reference", "qk_int8")


def row(kernel: str, milliseconds: float, tokens: int = 4096, **other: Any) -> Measurement:
    shape = Shape(kind="self", queries=tokens, keys=tokens, heads=12, head_dim=128)
    measurement = Measurement(
        kernel=kernel,
        shape=shape,
        dtype="bfloat16",
        seconds=milliseconds / 1e3,
        best_seconds=milliseconds / 1.25e3,
        repeats=9,
        measured_heads=12,
        error=2e-3,
    )
    sizes = {k: v for k, v in other.items() if k in ("kind", "queries", "keys", "heads", "head_dim")}
    others = {k: v for k, v in other.items() if k not in sizes}
    return replace(measurement, shape=replace(shape, **sizes), **others)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the file of this CPU; keywords replace its keys."""
    monkeypatch.setattr(measured, "FOLDER", tmp_path)

    def write(*rows: Measurement, **changes: Any) -> Path:
        file = cached_file(HARDWARE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(file_data(HARDWARE, rows) | changes))
        return file

    return write


def choice(
    tokens: int = 4096, kind: Any = "self", usable: Collection[str] = USABLE, **other: Any
) -> tuple[str, str] | None:
    return fastest(CPU, call(tokens, kind, **other), usable.__contains__, hardware=HARDWARE)


def call(tokens: int = 4096, kind: Any = "self", **other: Any) -> AttentionCall:
    sizes: dict[str, Any] = {"heads": 12, "head_dim": 128, "queries": tokens, "keys": tokens}
    return AttentionCall(**({"kind": kind, "dtype": "bfloat16"} | sizes | other))


def test_the_rows_of_a_file_are_read_back(write: Write) -> None:
    rows = (row("cpu", 3.5), row("sdpa", 5), row("emulated", 50, scheme="fp8"))
    assert read_measurements(write(*rows), HARDWARE) == rows
    assert from_row(rows[0].as_dict()) == rows[0]
    assert rows[0].tflops == pytest.approx(4 * 4096**2 * 12 * 128 / 3.5e-3 / 1e12)
    assert rows[0].peak_tflops == pytest.approx(1.25 * rows[0].tflops)


def test_the_choice_is_the_fastest_kernel_at_the_nearest_length(write: Write) -> None:
    write(
        row("cpu", 9), row("sdpa", 12), row("qk_int8", 5), row("emulated", 1, scheme="fp8"),
        row("cpu", 90, 8192), row("sdpa", 80, 8192),
    )  # fmt: skip
    name, reason = choice() or ("", "")
    assert name == "cpu"
    assert reason == (
        "fastest in ascendit bench attention at 4,096 x 4,096, 12 heads of 128: cpu 7.2 ms, sdpa 9.6 ms"
    )
    assert (choice(5000) or "")[0] == "cpu" and (choice(7000) or "")[0] == "sdpa"
    assert (choice(7000, usable=("cpu",)) or "")[0] == "cpu" and choice(7000, usable=()) is None
    write(row("cpu", 9))
    assert choice() is None, "nothing to compare it with"


def test_rows_of_other_calls_are_not_used(write: Write) -> None:
    write(
        row("cpu", 9),
        row("sdpa", 8),
        row("cpu", 2, kind="cross", keys=512),
        row("sdpa", 3, kind="cross", keys=512),
    )
    assert (choice() or "")[0] == "sdpa"
    assert (choice(kind="text", keys=512) or "")[0] == "cpu"
    assert (choice(kind="image", keys=257) or "")[0] == "cpu"
    assert choice(head_dim=64) is None and choice(dtype="float16") is None
    assert choice(40_000) is None and choice(500) is None and choice(heads=100) is None
    assert (choice(9000, key_length=4096) or "")[0] == "sdpa"
    assert (choice(32_760) or "")[0] == (choice(600) or "")[0] == "sdpa"


def test_the_fastest_call_decides(write: Write) -> None:
    write(row("cpu", 9, seconds=0.5), row("sdpa", 8.9, best_seconds=8.8e-3))
    assert (choice() or "")[0] == "cpu"


def test_a_kernel_with_a_large_error_is_not_chosen(write: Write) -> None:
    write(row("cpu", 9), row("sdpa", 1, error=2 * ERROR_LIMIT), row("reference", 50))
    assert (choice() or "")[0] == "cpu"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "written by another version of ascendit"),
        ({"hardware": "another"}, "measured on another, this is A processor"),
        ({"versions": {"torch": "1.0"}}, "measured with ascendit absent"),
        ({"rows": [{"kernel": "cpu"}]}, "damaged (KeyError"),
        ({"rows": 7}, "damaged (TypeError"),
        ({"rows": [row("cpu", 1).as_dict() | {"seconds": 0}]}, "damaged (ValueError"),
        ({"rows": [row("cpu", 1).as_dict() | {"seconds": "fast"}]}, "damaged (ValueError"),
        ({"rows": [row("cpu", 1).as_dict() | {"keys": None}]}, "damaged (ValueError"),
        ({"rows": [row("cpu", 1).as_dict() | {"keys": 10**400}]}, "damaged (ValueError"),
        ({"rows": [row("cpu", 1).as_dict() | {"kernel": []}]}, "damaged (ValueError"),
        ({"rows": [row("cpu", 1).as_dict() | {"kind": {}}]}, "damaged (ValueError"),
    ],
)
def test_other_machines_and_damaged_files_are_ignored_with_a_warning(
    write: Write, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    file = write(row("cpu", 9), row("sdpa", 8), **changes)
    measured._read.cache_clear()
    with caplog.at_level(logging.WARNING, "ascendit"):
        assert choice() is None and choice() is None
    (record,) = caplog.records  # once
    assert record.getMessage().startswith(f"{file}: {reason}")
    assert record.getMessage().endswith("attention is chosen without it until ascendit bench attention")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}'])
def test_a_file_that_is_no_record_is_ignored(write: Write, text: str) -> None:
    write().write_text(text)
    assert choice() is None


def test_without_a_file_and_on_a_twin_nothing_is_measured(write: Write) -> None:
    assert choice() is None
    write(row("cpu", 9), row("sdpa", 8))
    assert choice() is not None
    twin = parse_device("twin:a2")
    assert fastest(twin, call(), USABLE.__contains__, hardware=HARDWARE) is None


def test_a_user_without_a_home_has_no_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment, "cache_home", no_home)
    assert choice() is None


def test_new_rows_replace_those_of_the_same_shape() -> None:
    old, new = [row("cpu", 9), row("sdpa", 8), row("cpu", 90, 8192)], [row("cpu", 7)]
    assert merged(old, new) == [old[2], new[0]]


def test_each_hardware_has_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_file("NVIDIA H200") == tmp_path / "ascendit" / "attention" / "nvidia-h200.json"


def test_the_policy_follows_the_file(write: Write) -> None:
    """Also the order of the table without a file, and requests against it."""
    policy = AttentionPolicy(device=CPU, measured=partial(fastest, hardware=HARDWARE))
    assert policy.choose(call()).name == "cpu"
    write(row("cpu", 9), row("sdpa", 8))
    assert policy.choose(call()).name == "sdpa"
    assert policy.choose(call()).reason.startswith("fastest in ascendit bench attention at 4,096 x 4,096")
    assert policy.choose(call(dtype="float32")).name == "sdpa"  # the first of the table in float32
    write(row("cpu", 9), row("sdpa", 8), row("qk_int8", 1))
    assert policy.choose(call()).name == "sdpa"
    assert replace(policy, request={"self": "cpu"}).choose(call()).name == "cpu"
    assert replace(policy, missing=lambda name: "absent" * (name == "sdpa")).choose(call()).name == "cpu"


def test_a_plan_reads_the_file_of_its_hardware(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {
        name: Kernel("attention", "cpu", reference.attention, "", name=name) for name in ("sdpa", "reference")
    }
    monkeypatch.setattr(plan, "dense_kernels", lambda ops: kernels)
    ops, hardware = bind("cpu"), hardware_name(CPU)
    assert plan.with_kernels(None, ops).choose(call()).name == "sdpa"
    write().with_name(cached_file(hardware).name).write_text(
        json.dumps(file_data(hardware, [row("sdpa", 9), row("reference", 8)]))
    )
    assert plan.with_kernels(None, ops).choose(call()).name == "reference"
