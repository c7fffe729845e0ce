"""The text and JSON output of `quantize` and `repack`, line by line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ascendit.convert.report import (
    OutputQuality,
    Outputs,
    QuantizedExpert,
    QuantizeReport,
    RepackedExpert,
    RepackReport,
    add_up,
)

EXPERT = QuantizedExpert(
    name="transformer",
    schemes={"mxfp8": 80, "bf16": 6},
    kept={"outside the blocks": ("patch_embedding", "proj_out")},
    bytes_before=3 << 20,
    bytes_after=3 << 19,
    num_weights=3 << 19,
)
QUANTIZED = QuantizeReport(
    path=Path("out"),
    source="org/name@rev",
    recipe="default",
    model_kind="t2v",
    experts=(EXPERT, replace(EXPERT, name="transformer_2", schemes={"bf16": 1, "int8": 2}, kept={})),
    dry_run=False,
    seconds=2.0,
    linked=("vae", "LICENSE"),
    loras=(
        {
            "file": "style.safetensors",
            "weight": 0.5,
            "expert": "all",
            "applied": dict.fromkeys(
                ("transformer", "transformer_2"), {"note": "style: 8 keys x weight 0.5"}
            ),
        },
    ),
    engine="mindie",
    warnings=("mind the gap",),
    next="ascendit generate out 'a cat'",
)


def test_schemes_add_up_with_bf16_last() -> None:
    total = add_up([{"bf16": 1, "int8": 2}, {"mxfp8": 3, "bf16": 4}])
    assert list(total.items()) == [("int8", 2), ("mxfp8", 3), ("bf16", 5)]
    assert list(QUANTIZED.schemes) == ["mxfp8", "int8", "bf16"]


def test_quantize_on_a_screen() -> None:
    assert QUANTIZED.lines() == [
        "Source         org/name@rev  (t2v)",
        "Recipe         default",
        "LoRA           style: 8 keys x weight 0.5",
        "transformer    80 mxfp8, 6 bf16   3.0 MiB -> 1.5 MiB   8.00 bits/weight",
        "  excluded     patch_embedding, proj_out  (outside the blocks)",
        "transformer_2  1 bf16, 2 int8   3.0 MiB -> 1.5 MiB   8.00 bits/weight",
        "Size           6.0 MiB -> 3.0 MiB  (50%)   8.00 bits/weight",
        "Also           vae, LICENSE",
        "Engine         mindie",
        "Warning        mind the gap",
        "Time           2.0 s, 3.0 MiB/s",
        "Output         out",
        "Next           ascendit generate out 'a cat'",
    ]


def test_a_dry_run_names_the_output() -> None:
    dry = replace(QUANTIZED, dry_run=True)
    assert dry.lines()[-1] == "Dry run        nothing written; the output would be out"
    assert dry.gib_per_s == 0.0 and dry.as_dict()["dry_run"] is True


def test_measurements_follow_the_summary() -> None:
    sqnr = {f"blocks.{n}.attn1.to_q": 30.0 - n for n in range(12)}
    outputs = Outputs(
        layers={
            "blocks.0.attn1.to_q": OutputQuality(plain=20.0, smoothed=22.5),
            "blocks.1.attn1.to_q": OutputQuality(plain=10.004, smoothed=9.0),
        }
    )
    expert = replace(EXPERT, sqnr=sqnr, outputs=outputs)
    calibration = {"alpha": 0.9, "prompts": 1, "steps": 16, "size": "64x64", "frames": 17}
    lines = replace(QUANTIZED, experts=(expert,), calibration=calibration).lines()
    assert "Smoothing    alpha 0.9, from 1 prompt of 16 steps at 64x64, 17 frames" in lines
    assert "Time         2.0 s" in lines  # no speed: the time includes a calibration
    start = lines.index("")
    assert lines[start + 1 : start + 4] == [
        "transformer: SQNR of the weights in dB, the 10 worst of 12 layers",
        "  blocks.11.attn1.to_q   19.00",
        "  blocks.10.attn1.to_q   20.00",
    ]
    assert lines[-3:] == ["", "Output       out", "Next         ascendit generate out 'a cat'"]
    assert lines[-10:-3] == [
        "",
        "transformer: SQNR in dB of the outputs of 2 layers with captured activations",
        "                       without  smoothed    gain",
        "  blocks.1.attn1.to_q    10.00      9.00   -1.00",
        "  blocks.0.attn1.to_q    20.00     22.50   +2.50",
        "  mean of attn1.to_q     15.00     15.75   +0.75",
        "  mean                   15.00     15.75   +0.75",
    ]
    data = expert.as_dict()
    assert data["worst"][0] == "blocks.11.attn1.to_q" and len(data["worst"]) == 10
    assert data["output_sqnr_db"]["blocks.1.attn1.to_q"] == {"plain": 10.0, "smoothed": 9.0}
    assert data["output_sqnr_db_mean"] == {"plain": 15.0, "smoothed": 15.75}


def test_quantize_as_json() -> None:
    data = json.loads(json.dumps(QUANTIZED.as_dict()))
    assert list(data) == [
        *("path", "source", "recipe", "model_kind", "dry_run", "engine", "layers", "bytes_before"),
        *("bytes_after", "bits_per_weight", "seconds", "gib_per_s", "experts", "linked", "omitted", "loras"),
        *("calibration", "warnings", "output", "next"),
    ]
    assert (data["output"], data["next"]) == (str(Path.cwd() / "out"), "ascendit generate out 'a cat'")
    assert (data["path"], data["bits_per_weight"], data["gib_per_s"]) == ("out", 8.0, 0.003)
    assert data["experts"][0] == {
        "name": "transformer",
        "layers": {"mxfp8": 80, "bf16": 6},
        "kept": {"outside the blocks": ["patch_embedding", "proj_out"]},
        "bytes_before": 3 << 20,
        "bytes_after": 3 << 19,
        "bits_per_weight": 8.0,
    }


REPACKED = RepackReport(
    path=Path("out"),
    source="export",
    layout="an export of msModelSlim",
    to="diffusers",
    engine=None,
    experts=(
        RepackedExpert(
            name="transformer",
            folder=".",
            origin="msmodelslim",
            schemes={"int8": 80, "bf16": 6},
            num_tensors=300,
            num_renamed=298,
            moved_bytes=1 << 20,
            rewritten_bytes=1 << 10,
            num_weights=1 << 20,
            rewritten={"packed": 80, "rounded": 2},
            decoded_sha256="ab12",
            num_checked=299,
        ),
    ),
    linked=("vae",),
    warnings=("mind the gap",),
    dry_run=False,
    seconds=1.0,
)


def test_repack_on_a_screen() -> None:
    assert REPACKED.lines() == [
        "Source       export  (an export of msModelSlim)",
        "Layout       diffusers names",
        "transformer  80 int8, 6 bf16",
        "             all 300 tensors, 298 of them renamed",
        "             1.0 MiB unchanged, 1.0 KiB rewritten (80 packed, 2 rounded)",
        "             299 tensors decode to the same values, sha256 ab12",
        "Size         1.0 MiB   8.01 bits/weight",
        "Also         vae",
        "Warning      mind the gap",
        "Time         1.0 s, 1.0 MiB/s",
        "Output       out",
    ]
    [expert] = REPACKED.experts
    plain = replace(REPACKED, experts=(replace(expert, rewritten={}, decoded_sha256=""),), engine="sglang")
    assert plain.lines()[1:5] == [
        "Layout       for sglang",
        "transformer  80 int8, 6 bf16",
        "             all 300 tensors, 298 of them renamed",
        "             1.0 MiB unchanged",
    ]
    assert not plain.checked and "checked" not in plain.as_dict()["experts"][0]


def test_repack_as_json() -> None:
    data = json.loads(json.dumps(REPACKED.as_dict()))
    assert list(data) == [
        *("path", "source", "layout", "to", "engine", "dry_run", "checked", "layers", "bytes"),
        *("bits_per_weight", "seconds", "gib_per_s", "experts", "parts", "placed", "omitted", "warnings"),
        *("output", "next"),
    ]
    assert data["checked"] is True and data["bytes"] == (1 << 20) + (1 << 10)
    assert data["experts"][0] == {
        "name": "transformer",
        "folder": ".",
        "origin": "msmodelslim",
        "layers": {"int8": 80, "bf16": 6},
        "tensors": 300,
        "renamed": 298,
        "moved_bytes": 1 << 20,
        "rewritten_bytes": 1 << 10,
        "rewritten": {"packed": 80, "rounded": 2},
        "checked": 299,
        "decoded_sha256": "ab12",
    }
