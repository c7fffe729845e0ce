"""The schemes that each engine runs, as a literal table."""

from __future__ import annotations

import pytest

from ascendit.quant.engines import ENGINES, engines_for
from ascendit.quant.schemes import SCHEMES, STORED_SCHEMES


@pytest.mark.parametrize(
    ("schemes", "runs"),
    [
        (set(), {"vllm-omni", "sglang"}),
        ({"bf16"}, {"vllm-omni", "sglang"}),
        ({"int8"}, {"vllm-omni", "sglang", "mindie"}),
        ({"mxfp8", "bf16"}, {"vllm-omni", "sglang", "mindie"}),
        ({"mxfp4"}, {"vllm-omni", "sglang", "mindie"}),
        ({"mxfp4_dualscale"}, {"vllm-omni", "mindie"}),
        ({"mxfp8", "mxfp4"}, {"sglang", "mindie"}),
        ({"mxfp4", "mxfp4_dualscale"}, {"mindie"}),
        ({"fp8"}, set()),
        ({"int8_block"}, set()),
        ({"fp8_128x128"}, set()),
    ],
    ids=lambda names: "+".join(sorted(names)) or "none",  # the order of a set differs by process
)
def test_engines_for_schemes(schemes: set[str], runs: set[str]) -> None:
    compatibility = engines_for(schemes)
    assert compatibility.keys() == ENGINES.keys() == {"vllm-omni", "sglang", "mindie"}
    assert {name for name, problem in compatibility.items() if not problem} == runs


def test_excluded_layers_and_smoothing() -> None:
    assert engines_for({"mxfp8", "bf16", "float_block_linears"})["sglang"].startswith("it looks up excluded")
    assert engines_for({"bf16", "float_block_linears"})["sglang"] == "", "nothing is quantized"
    for scheme in SCHEMES:
        compatibility = engines_for({scheme, f"smoothed:{scheme}"})
        assert (compatibility["vllm-omni"] == "") == (scheme in ("mxfp4", "mxfp4_dualscale")), scheme
        assert (compatibility["sglang"] == "") == (scheme == "mxfp4"), scheme
    assert "silently ignores" in engines_for({"mxfp4", "bf16", "smoothed:bf16"})["vllm-omni"]


def test_engine_versions() -> None:
    assert {name: e.version for name, e in ENGINES.items()} == {
        "vllm-omni": "0.30.0",
        "sglang": "0.5.23",
        "mindie": "3.1.0",
    }
    for name, engine in ENGINES.items():
        assert engine.name == name and all(engine.refuses.values())


def test_engines_refer_to_schemes_of_the_table() -> None:
    traits = {
        "mixed",
        "split_qkv",
        "unlike_qkv",
        "outside_blocks",
        "float_block_linears",
        "added_kv",
        "unquantized",
    }
    for engine in ENGINES.values():
        for key in engine.refuses.keys() - traits:
            trait, _, scheme = key.rpartition(":")
            assert scheme in STORED_SCHEMES and trait in ("", "smoothed", "odd_blocks"), key
