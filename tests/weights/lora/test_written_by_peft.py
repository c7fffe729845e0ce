"""Adapters that PEFT and Diffusers wrote. Oracle: PEFT's own scale of each layer, and float64 in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.loras import merged, weights
from torch import Tensor

from ascendit.names import expected_tensors
from ascendit.weights.lora.fields import Patterns
from ascendit.weights.lora.fold import Folds, LoraSource

peft = pytest.importorskip("peft")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 1,
}
SHAPES = expected_tensors(CONFIG)
WEIGHTS = weights(SHAPES, torch.bfloat16)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 1},
    "alpha equals rank": {"r": 4, "lora_alpha": 4},
    "not a power of two": {"r": 5, "lora_alpha": 7},
    "rslora": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "alpha pattern": {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 16, r"blocks\.0\.ffn.*": 3}},
    "rank pattern": {"r": 4, "lora_alpha": 2, "rank_pattern": {"attn1.to_k": 7, "^blocks.0.ffn.net.2": 2}},
    "both, rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "alpha_pattern": {"ffn.net.0.proj": 5},
        "rank_pattern": {r".*attn2\.to_(q|v)": 6},
    },
    "bias of up": {"r": 3, "lora_alpha": 2, "lora_bias": True},
    "gaussian": {"r": 4, "lora_alpha": 2, "init_lora_weights": "gaussian"},
}


def adapted(settings: dict[str, Any]) -> Any:
    """A small model with an adapter of random factors."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG)
    model.add_adapter(peft.LoraConfig(target_modules=LAYERS, **settings))
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def expected(model: torch.nn.Module) -> dict[str, Tensor]:
    """W + PEFT's scale * B A in float64, rounded once to bfloat16."""
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer = name.removeprefix("base_model.model.")
            (adapter,) = module.active_adapters
            scale, down, up = module.scaling[adapter], module.lora_A[adapter], module.lora_B[adapter]
            result[f"{layer}.weight"] = merged(
                WEIGHTS[f"{layer}.weight"], (scale, down.weight.detach(), up.weight.detach())
            )
            if up.bias is not None:
                bias = WEIGHTS[f"{layer}.bias"].double() + scale * up.bias.detach().double()
                result[f"{layer}.bias"] = bias.to(torch.bfloat16)
    assert len(result) >= 10
    return result


def check(path: Path, oracle: dict[str, Tensor]) -> None:
    folds = Folds.open([LoraSource(path)], "transformer", SHAPES)
    assert folds.names == oracle.keys()
    for name, tensor in oracle.items():
        assert torch.equal(folds.fold(name, WEIGHTS[name], 0), tensor), name


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of the bias of lora_B
@pytest.mark.parametrize("case", SETTINGS)
def test_adapters_of_diffusers_and_of_peft(tmp_path: Path, case: str) -> None:
    from diffusers import WanPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    model = adapted(SETTINGS[case])
    oracle = expected(model)
    model.save_lora_adapter(tmp_path / "model")
    check(tmp_path / "model", oracle)
    state = get_peft_model_state_dict(model, adapter_name="default")
    metadata = _collate_lora_metadata({"transformer": model})
    WanPipeline.save_lora_weights(tmp_path / "pipe", state, **metadata)
    check(tmp_path / "pipe", oracle)

    own = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=LAYERS, **SETTINGS[case]))
    randomize(own)
    own.save_pretrained(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    check(tmp_path / "peft", oracle)


def test_loha_of_peft(tmp_path: Path) -> None:
    settings = {"r": 3, "alpha": 2, "alpha_pattern": {"to_q": 5}, "init_weights": False}
    own = peft.get_peft_model(plain(), peft.LoHaConfig(target_modules=LAYERS, **settings))
    own.save_pretrained(tmp_path)
    folds = Folds.open([LoraSource(tmp_path)], "transformer", SHAPES)
    assert len(folds.names) == 10
    for name, module in own.named_modules():
        if isinstance(module, peft.tuners.loha.LoHaLayer):
            layer = f"{name.removeprefix('base_model.model.')}.weight"
            change = folds.fold(layer, torch.zeros(SHAPES[layer]), 0)
            torch.testing.assert_close(change, module.get_delta_weight("default").detach())


def plain() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIG)


@pytest.mark.parametrize("case", SETTINGS)
def test_patterns_match_as_in_peft(case: str) -> None:
    from peft.utils.other import get_pattern_key

    layers = [name.removesuffix(".weight") for name in SHAPES]
    for name in ("alpha_pattern", "rank_pattern"):
        table = SETTINGS[case].get(name, {"0.attn1.to_q": 3, ".*ffn.*": 2, "^blocks.1.*": 5})
        for layer in layers:
            assert Patterns(table).of([layer]) == table.get(get_pattern_key(table, layer))


def test_dora_and_pissa_are_refused(tmp_path: Path) -> None:
    from ascendit.errors import CheckpointError

    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        own = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=LAYERS, r=2, **settings))
        own.save_pretrained(tmp_path / "peft")
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2
        with pytest.raises(CheckpointError) as e:
            Folds.open([LoraSource(tmp_path / "peft")], "transformer", SHAPES)
        assert e.value.code == "E-LRA-01"
