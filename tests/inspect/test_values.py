"""Numbers of two checkpoints: against float64 numpy over tensors that a module without ascendit decodes."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert import exports
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_files import clip_state, vae_name

from ascendit.convert.repack import repack
from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.diff import diff
from ascendit.inspect.values import ValueDiff, ValueRow, _aligned, compare_values

Array = np.ndarray[Any, Any]
LAYER = "blocks.0.attn1.to_q"


def by_hand(export: Path, expert: str) -> dict[str, Array]:
    """Name -> float64 of every tensor of one expert; smoothed weights times their mul_scale."""
    stored = exports.tensors(exports.experts(export)[expert])
    named = {exports.diffusers_name(name): tensor for name, tensor in stored.items()}
    numbers = {name: tensor.double().numpy() for name, tensor in named.items()}
    for name, layer in exports.by_layer(named).items():
        weight = exports.decoded(layer).double().numpy()
        numbers = {n: x for n, x in numbers.items() if not n.startswith(f"{name}.weight_")}
        numbers[f"{name}.weight"] = weight * numbers.pop(f"{name}.mul_scale", 1.0)
    for name in [n for n in numbers if n.endswith(".mul_scale")]:  # smoothed, in BF16
        numbers[name.replace("mul_scale", "weight")] *= numbers.pop(name)
    return numbers


@functools.cache
def compared(a: Path, b: Path) -> ValueDiff:
    return compare_values(inspect(a), inspect(b))


@pytest.mark.parametrize(
    ("a", "b"),
    [(exports.INT8, exports.DUAL), (exports.DUAL, exports.SMOOTH), (exports.MXFP8, exports.MXFP4)],
    ids=lambda folder: folder.name,
)
def test_sqnr_of_every_tensor(a: Path, b: Path) -> None:
    result = compared(a, b)
    assert not result.same
    for part in exports.experts(a):
        left, right = by_hand(a, part), by_hand(b, part)
        rows = {row.name: row for row in result.rows if row.part == part}
        assert rows.keys() == left.keys() | right.keys()
        for name, row in rows.items():
            if name not in left or name not in right:
                assert row.status == ("only in A" if name in left else "only in B")
                continue
            x, y = left[name], right[name]
            assert row.values == x.size and row.differing == np.count_nonzero(x != y), name
            assert row.status == ("different" if row.differing else "equal")
            assert row.max_difference == np.abs(x - y).max()
            if row.differing:
                expected = 10 * math.log10(np.square(x).sum() / np.square(x - y).sum())
                assert row.sqnr_db == pytest.approx(expected, abs=1e-9), name
            else:
                assert row.sqnr_db is None


@pytest.mark.parametrize("source", [exports.SMOOTH, exports.MXFP4], ids=lambda x: x.name)
def test_another_layout_has_equal_numbers(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out")
    result = diff(source, tmp_path / "out", values=True)
    assert result.values is not None and result.same and result.changes == diff(*_reports(result)).changes
    assert "equal numbers" in result.lines()[-1]


def _reports(result: Any) -> tuple[Any, Any]:
    return result.a, result.b


def test_fp4_in_a_wider_dtype_has_equal_numbers(tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and name.endswith(".weight"):
                tensors[name] = exports.unpacked(tensor).to(torch.float8_e4m3fn)

    other = exports.changed(exports.MXFP4, tmp_path / "other", widen)
    assert compared(exports.MXFP4, other).same


def test_parts_compare_by_the_names_of_the_library(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wan's names of a VAE and of an image encoder, in which q, k and v are one tensor."""
    model = tiny_folder("i2v_21")
    wan = Path(shutil.copytree(model, tmp_path / "wan"))
    vae, clip = (
        wan / "vae" / "diffusion_pytorch_model.safetensors",
        wan / "image_encoder" / "model.safetensors",
    )
    config = json.loads((wan / "vae" / "config.json").read_text())
    save_file({vae_name(name, config): x for name, x in load_file(vae).items()}, vae)
    state = {name.removeprefix("vision_model."): x for name, x in load_file(clip).items()}
    save_file(clip_state(state), clip)
    result = diff(model, wan, values=True)
    assert result.same and result.changes == ()
    stored = load_file(clip)
    stored["visual.transformer.1.attn.to_qkv.weight"][0, 0] += 1  # of q, the first of the three
    save_file(stored, clip)
    (row,) = compare_values(inspect(model), inspect(wan)).worst
    assert row.differing == 1 and row.name == "encoder.layers.1.self_attn.q_proj.weight"


def edited(tmp_path: Path, change: Any) -> ValueDiff:
    other = exports.changed(exports.MXFP8, tmp_path / "other", lambda tensors, types: change(tensors, types))
    return compared(exports.MXFP8, other)


def test_one_bit_of_one_value(tmp_path: Path) -> None:
    def flip(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        tensors["head.head.weight"].view(torch.uint8)[1, 2] ^= 1

    (row,) = edited(tmp_path, flip).worst
    assert (row.part, row.name, row.differing) == ("transformer", "proj_out.weight", 1)


def test_nan_and_infinity_are_counted_and_excluded_from_the_sums(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        tensors["head.head.weight"][0, :3] = torch.tensor([math.nan, math.inf, 5.0])

    result = edited(tmp_path, spoil)
    (row,) = result.worst
    x = by_hand(exports.MXFP8, "transformer")["proj_out.weight"]
    noise = (5.0 - x[0, 2]) ** 2
    signal = np.square(x).sum() - np.square(x[0, :2]).sum()
    assert (row.invalid_a, row.invalid_b, row.differing) == (0, 2, 3)
    assert row.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert "2 NaN or infinite values in B" in result.summary()
    assert compared(tmp_path / "other", tmp_path / "other").same, "NaN equals NaN"


def test_minus_zero_equals_zero_and_a_zero_tensor_has_no_sqnr(tmp_path: Path) -> None:
    def fill(value: float) -> exports.Change:
        return lambda tensors, types: tensors.update({"head.head.bias": torch.full((192,), value)})

    shape = exports.tensors(exports.MXFP8)["head.head.bias"].shape
    assert shape == (192,)
    zero = exports.changed(exports.MXFP8, tmp_path / "zero", fill(0.0))
    minus = exports.changed(exports.MXFP8, tmp_path / "minus", fill(-0.0))
    assert compared(zero, minus).same
    (row,) = compared(zero, exports.MXFP8).worst
    assert row.sqnr_db is None and row.status == "different" and row.signal == 0


@pytest.mark.parametrize(("heights", "others"), [((5, 3), (1, 7)), ((8,), (2, 2, 4)), ((1,) * 8, (8,))])
def test_blocks_of_other_heights_are_paired_row_by_row(heights: Any, others: Any) -> None:
    rows = torch.arange(24).reshape(8, 3)

    def blocks(sizes: Any) -> Iterator[Tensor]:
        buffer = torch.empty(8, 3, dtype=rows.dtype)  # reused, as by RowReader
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            buffer[:size] = rows[start : start + size]
            yield buffer[:size]

    pairs = [(x.clone(), y.clone()) for x, y in _aligned(blocks(heights), blocks(others))]
    assert all(x.equal(y) for x, y in pairs)
    assert torch.cat([x for x, _ in pairs]).equal(rows)


def test_rows_of_json_and_lines(tmp_path: Path) -> None:
    result = compared(exports.INT8, exports.DUAL)
    data = result.as_dict()
    assert len(data["rows"]) == len(result.rows) and set(data["parts"]) == {"transformer", "transformer_2"}
    assert {"name", "status", "sqnr_db", "max_difference", "differing", "a", "b"} <= data["rows"][0].keys()
    ratios = [row.sqnr_db for row in result.worst if row.sqnr_db is not None]
    assert ratios == sorted(ratios)
    shown = [line for line in result.lines() if " dB " in line and "->" in line]
    assert len(shown) <= 24 and any("--json has all" in line for line in result.lines())


def test_sections_of_the_page() -> None:
    def row(name: str, status: Any = "different", **values: Any) -> ValueRow:
        return ValueRow(part="transformer", name=name, status=status, a="bf16", b="int8", **values)

    bad = row("blocks.0.ffn.net.2.weight", signal=1.0, noise=0.01, max_difference=0.5, invalid_b=3, values=8)
    infinite = row("blocks.1.ffn.net.2.weight", signal=0.0, noise=1.0, max_difference=math.inf)
    alone = row("blocks.0.attn1.to_q.weight", "only in A")
    same = row("proj_out.weight", "equal", values=8)
    sections = ValueDiff((bad, infinite, alone, same)).sections()
    assert [s.title for s in sections][0] == "Summary" and len(sections) == 5
    text = "".join(part.markup() for section in sections for part in section.parts)
    assert "20.00 dB" in text and "bad'>0 / 3</td>" in text
    assert "bad'>only in A</td>" in text and "good'>equal</td>" in text
    equal = ValueDiff((same,)).sections()
    assert [s.title for s in equal] == ["Summary", "Tensors"]
