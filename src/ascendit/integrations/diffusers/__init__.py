"""Diffusers loads folders that ascendit wrote, and quantizes others while it loads them.

    import ascendit.integrations.diffusers                           # registers the quantizer
    pipe = WanPipeline.from_pretrained("Wan2.2-T2V-A14B-mxfp8")      # a folder with a marker in config.json

    config = AscenditConfig("mxfp8")                                 # quantizes any model as it loads
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=config)

A folder without a marker, as SGLang's are, needs `quantization_config=AscenditConfig()`, a pipeline in a
`PipelineQuantizationConfig(quant_mapping=..)`. Diffusers lets a marker win over a config that is given; how
layers compute is changed later with `bind_`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ascendit.checkpoint.reader import TORCH_DTYPES
from ascendit.checkpoint.transformer import ATTENTION_TENSOR
from ascendit.errors import CheckpointError, EnvironmentProblem, UsageError
from ascendit.integrations.diffusers.stored_layers import read_stored_layers
from ascendit.kernels.kernel import Emulate
from ascendit.model.linear import FusedGroup, QuantLinear, SmoothLinear, check_values, stored_tensors
from ascendit.model.quantize_module import (
    ModuleSchemes,
    as_recipe,
    bind_,
    check_weight,
    encode_weight,
    linears_of,
    marker_of,
    module_schemes,
    rounded,
    wan_config_of,
)
from ascendit.names import listed
from ascendit.ops.operators import Schemes, bind
from ascendit.quant.recipe import Recipe
from ascendit.quant.schemes import METHOD

__all__ = ["AscenditConfig", "AscenditMethod", "AscenditQuantizer", "bind_", "register"]

log = logging.getLogger("ascendit")


class AscenditMethod(StrEnum):
    """The `quant_method` in config.json: the scheme in a marker, else `ascendit`."""

    ASCENDIT = METHOD
    INT8 = "int8"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"
    MXFP4_DUALSCALE = "mxfp4_dualscale"


class AscenditConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """For `quantization_config=`. Nothing given: the folder holds codes. A scheme or recipe: quantize it.

    The arguments are those of `ascendit.quantize_`.
    """

    def __init__(
        self,
        recipe_or_scheme: str | Path | Recipe | None = None,
        *,
        scheme: str | None = None,
        recipe: str | Path | Recipe | None = None,
        keep: Sequence[str] = (),
        device: str | None = None,
        emulate: Emulate | bool | None = None,
        activation_rule: str | None = None,
        force: bool = False,
        quant_method: str = METHOD,
        **marker: Any,
    ) -> None:
        """`quant_method` and `marker` come from config.json."""
        given = [x for x in (recipe_or_scheme, scheme, recipe) if x is not None]
        if len(given) > 1:
            raise UsageError(
                f"{len(given)} of recipe and scheme: {', '.join(map(str, given))}",
                needs="one of them",
                fix="AscenditConfig(scheme=...), or AscenditConfig(recipe=...)",
            )
        if marker and quant_method == METHOD:
            raise UsageError(
                f"AscenditConfig({', '.join(f'{key}=' for key in marker)})",
                needs="recipe_or_scheme, keep, device, emulate, activation_rule or force",
                fix="check the spelling",
            )
        self.quant_method = AscenditMethod(quant_method)
        self.recipe = as_recipe(given[0]) if given else None
        self.keep, self.device, self.emulate = tuple(keep), device, emulate
        self.activation_rule, self.force = activation_rule, force
        self.marker = {"quant_method": self.quant_method.value, **marker}

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: no more than the marker, so that other engines read it too."""
        return dict(self.marker)

    to_diff_dict = to_dict
    """Diffusers asks for it when it prints a config."""


class AscenditQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Quantized layers take their places on the meta device, then their tensors as Diffusers streams them.

    Until its weight arrives, a layer has the names and shapes on disk, which Diffusers looks at.
    """

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = True
    """`save_pretrained` writes the tensors of the disk again."""
    is_trainable = False

    def __init__(self, quantization_config: AscenditConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = quantization_config
        self._dtype = torch.float32
        self._files: list[Path] = []
        self._layers: dict[str, str] = {}
        """Every linear layer -> scheme."""
        self._smoothed: list[str] = []
        self._chosen: ModuleSchemes | None = None
        """What the recipe makes of a float model; None for a folder of quantized layers."""
        self._awaited: set[str] = set()
        """Tensors of quantized and smoothed layers that have not arrived."""
        self._schemes: dict[str, Schemes] = {}

    # ---- what Diffusers calls, in this order ----------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """UsageError for a device map that offloads."""
        places = {str(x) for x in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise UsageError(
                f"a device map with {', '.join(sorted(places))}",
                needs="every quantized layer on a device that computes",
                fix="leave device_map out and call pipe.enable_model_cpu_offload()",
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """As asked; where nothing is, Diffusers takes float32."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Take note of the files; leave out what only the attention of an NPU uses."""
        self._files = [Path(file) for file in checkpoint_files]
        return [key for key in loaded_keys if not ATTENTION_TENSOR.fullmatch(key)]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Decide which tensors are awaited. Errors as `read_stored_layers` and `module_schemes`."""
        stored = read_stored_layers(model, self._files)
        self._check_asked(bool(stored))
        linears = linears_of(model)
        self._layers = dict.fromkeys(linears, "bf16")
        if stored:
            for name, layer in stored.items():
                self._layers[name] = layer.scheme
                tensors = {}
                for role, t in layer.tensors.items():
                    dtype = getattr(torch, TORCH_DTYPES[t.dtype])
                    tensors[role] = torch.empty(t.shape, dtype=dtype, device="meta")
                self._put(model, name, layer.shape, tensors)
            self._smoothed = [name for name, layer in stored.items() if "mul_scale" in layer.tensors]
        else:
            self._choose_layers(model, linears)
        for scheme in set(self._layers.values()) - {"bf16"}:
            self._on(self._config.device or "cpu").kernel(scheme)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """CheckpointError E-CKP-04 where a quantized layer lacks a tensor."""
        if lost := sorted(self._awaited.intersection(missing_keys)):
            raise _incomplete(lost)
        return missing_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rounded first where the recipe says so."""
        if self._config.recipe and self._config.recipe.round_to:
            return {name: rounded(tensor) for name, tensor in state_dict.items()}
        return state_dict

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        """Whether this tensor belongs to a quantized layer."""
        return param_name in self._awaited

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str],
        **kwargs: Any,
    ) -> None:
        """Take a tensor as it is on disk: `param_value` was cast, scales and biases too."""
        name, _, role = param_name.rpartition(".")
        tensor, layer = state_dict[param_name], model.get_submodule(name)
        if self._chosen is None:
            check_values(param_name, tensor)
            # A copy: the tensor maps a file, all of which would stay mapped.
            tensors = {role: tensor.clone(memory_format=torch.contiguous_format)}
        elif role == "bias":
            rounding = bool(self._chosen.round_to)
            tensors = {role: (rounded(tensor) if rounding else tensor).to(torch.float32, copy=True)}
        else:
            check_weight(self._chosen, name, tensor)
            tensors = stored_tensors(encode_weight(self._chosen, name, tensor))
        place = self._on(self._config.device or str(torch.device(target_device))).device.torch_name
        if isinstance(layer, QuantLinear):
            layer.set_tensors({role: t.to(place) for role, t in tensors.items()})
        else:
            dtype = torch.float32 if role == "mul_scale" else self._dtype
            layer.register_parameter(role, nn.Parameter(tensors[role].to(place, dtype), requires_grad=False))
        self._awaited.discard(param_name)
        if not self._awaited:
            for m in model.modules():
                if isinstance(m, QuantLinear):
                    m.group.fuse(self._on(self._config.device or str(m.device)))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Say in the config what the model has become; each model gets a config of its own."""
        if self._awaited:
            raise _incomplete(sorted({name.rpartition(".")[0] for name in self._awaited}))
        wan = wan_config_of(model) is not None
        config = copy.copy(self._config)
        config.marker = marker_of(self._layers, smoothed=self._smoothed, wan=wan)
        self.quantization_config = self._config = config
        register: Any = model.register_to_config
        register(quantization_config=config)
        return model

    # ---- parts ----------------------------------------------------------------------------------

    def _choose_layers(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        """The layers of a float model that the recipe quantizes."""
        assert self._config.recipe is not None
        chosen = module_schemes(model, self._config.recipe, self._config.keep, force=self._config.force)
        self._layers, self._chosen = {s.name: s.scheme for s in chosen.layers}, chosen
        for name in chosen.quantized:
            floats = {r: torch.empty_like(p, device="meta") for r, p in linears[name].named_parameters()}
            self._put(model, name, (linears[name].out_features, linears[name].in_features), floats)

    def _put(
        self, model: nn.Module, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> None:
        """A layer in its place; `tensors`: role -> what is on disk, on the meta device."""
        self._awaited |= {f"{name}.{role}" for role in tensors}
        made: QuantLinear | SmoothLinear
        if (scheme := self._layers[name]) == "bf16":
            made = SmoothLinear(tensors["weight"], tensors.get("bias"), tensors["mul_scale"])
        else:
            smooth = tensors.get("mul_scale")
            made = QuantLinear(scheme, shape, tensors, compute_dtype=self._dtype, mul_scale=smooth)
            FusedGroup([made], self._on(self._config.device or "cpu"))
        model.set_submodule(name, made)

    def _check_asked(self, stored: bool) -> None:
        """UsageError: a recipe for codes, or none for floats."""
        recipe = self._config.recipe
        what = str(self._files[0].parent) if self._files else "this file"
        if stored and recipe:
            raise UsageError(
                f"recipe {recipe.name} for {what}, which holds codes",
                needs="weights in floating point, or a config without a recipe",
                fix="AscenditConfig() loads it as it is",
                code="E-QNT-01",
            )
        if not stored and not recipe:
            raise UsageError(
                f"no scheme for {what}, which holds no codes",
                needs="a folder that ascendit wrote, or a scheme to quantize with",
                fix='AscenditConfig("mxfp8")',
            )

    def _on(self, device: str) -> Schemes:
        if device not in self._schemes:
            c = self._config
            ops = bind(device, emulate=c.emulate, activation_rule=c.activation_rule)
            self._schemes[device] = ops.quantized
        return self._schemes[device]


def _incomplete(names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(names)} tensors of quantized layers are missing: {listed(names)}",
        needs="weight and bias of every layer that is to be quantized",
        fix="download the model again",
        code="E-CKP-04",
    )


def register() -> None:
    """Make Diffusers know the methods. One that another library has registered stays theirs; it is logged.

    EnvironmentProblem E-ENV-01 for a Diffusers that does not tell a quantizer which files it reads.
    """
    if not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"):
        raise EnvironmentProblem(
            f"Diffusers {diffusers.__version__}",
            needs="0.39 or newer, to load codes; ascendit.quantize_ works with older ones too",
            fix="pip install -U diffusers",
            code="E-ENV-01",
        )
    for method in AscenditMethod:
        known = auto.AUTO_QUANTIZER_MAPPING.setdefault(method.value, AscenditQuantizer)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, AscenditConfig)
        if known is not AscenditQuantizer:
            log.warning("quant_method %s of Diffusers is that of %s, not ascendit's", method.value, known)


register()
