"""Diffusers quantizer: load folders written by ascendit, or quantize models while Diffusers loads them.

    import ascendit.integrations.diffusers                           # registers the quantizer
    pipe = WanPipeline.from_pretrained("Wan2.2-T2V-A14B-mxfp8")      # config.json has a quantization_config

    config = AscenditConfig("mxfp8")                                 # quantizes any model while it loads
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=config)

A folder without `quantization_config` in config.json, such as SGLang's, needs
`quantization_config=AscenditConfig()`, for a pipeline in a `PipelineQuantizationConfig(quant_mapping=..)`.
Diffusers prefers the folder's config to the argument; use `bind_` after loading to change how layers compute.
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

from ascendit.checkpoint.tensor_info import TORCH_DTYPES
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
    module_schemes,
    quantization_config_of,
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
    """The `quant_method` in config.json: the scheme if vLLM-Omni can read the folder, else `ascendit`."""

    ASCENDIT = METHOD
    INT8 = "int8"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"
    MXFP4_DUALSCALE = "mxfp4_dualscale"


class AscenditConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` argument of Diffusers' `from_pretrained`.

    With a scheme or recipe, a float model is quantized while it loads; without, the folder must be quantized.
    Other arguments as in `ascendit.quantize_`.
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
        **stored: Any,
    ) -> None:
        """`quant_method` and `stored` come from config.json.

        Raises UsageError (E-USE-01) for unknown arguments.
        """
        recipes = [x for x in (recipe_or_scheme, scheme, recipe) if x is not None]
        if len(recipes) > 1:
            raise UsageError(
                f"{len(recipes)} of recipe and scheme: {', '.join(map(str, recipes))}",
                needs="one of them",
                fix="AscenditConfig(scheme=...), or AscenditConfig(recipe=...)",
            )
        if stored and quant_method == METHOD:
            raise UsageError(
                f"AscenditConfig({', '.join(f'{key}=' for key in stored)})",
                needs="recipe_or_scheme, keep, device, emulate, activation_rule or force",
                fix="check the spelling",
            )
        self.quant_method = AscenditMethod(quant_method)
        self.recipe = as_recipe(recipes[0]) if recipes else None
        self.keep, self.device, self.emulate = tuple(keep), device, emulate
        self.activation_rule, self.force = activation_rule, force
        self.stored = {"quant_method": self.quant_method.value, **stored}

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` for config.json, with only the keys that other engines read too."""
        return dict(self.stored)

    to_diff_dict = to_dict
    """Called by Diffusers to print a config."""


class AscenditQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Creates quantized layers, first on the meta device, and fills them while Diffusers streams tensors.

    Until its weight arrives, a layer has the tensor names and shapes of the file, which Diffusers compares.
    """

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = True
    """`save_pretrained` writes the stored tensors."""
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
        """The schemes that the recipe assigns to a float model; None for a quantized folder."""
        self._awaited: set[str] = set()
        """Tensors of quantized and smoothed layers that are not loaded yet."""
        self._schemes: dict[str, Schemes] = {}

    # ---- hooks of Diffusers, in the order of their calls ----------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise UsageError (E-USE-01) for a device map that offloads."""
        devices = {str(x) for x in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise UsageError(
                f"a device map with {', '.join(sorted(devices))}",
                needs="no offloading while the model is loaded",
                fix="omit device_map and call pipe.enable_model_cpu_offload()",
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember the compute dtype; Diffusers' default is float32."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Remember the files, and drop tensors that only the attention of an NPU uses."""
        self._files = [Path(file) for file in checkpoint_files]
        return [key for key in loaded_keys if not ATTENTION_TENSOR.fullmatch(key)]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Replace the layers to load. Raises the errors of `read_stored_layers` and `module_schemes`."""
        stored = read_stored_layers(model, self._files)
        self._check_recipe(bool(stored))
        linears = linears_of(model)
        self._layers = dict.fromkeys(linears, "bf16")
        if stored:
            for name, layer in stored.items():
                self._layers[name] = layer.scheme
                tensors = {}
                for role, t in layer.tensors.items():
                    dtype = getattr(torch, TORCH_DTYPES[t.dtype])
                    tensors[role] = torch.empty(t.shape, dtype=dtype, device="meta")
                self._replace(model, name, layer.shape, tensors)
            self._smoothed = [name for name, layer in stored.items() if "mul_scale" in layer.tensors]
        else:
            self._choose_layers(model, linears)
        for scheme in set(self._layers.values()) - {"bf16"}:
            self._schemes_on(self._config.device or "cpu").kernel(scheme)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise CheckpointError (E-CKP-04) if a quantized layer lacks a tensor."""
        if lost := sorted(self._awaited.intersection(missing_keys)):
            raise _incomplete(lost)
        return missing_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Round the tensors ([..] of any dtype) to bfloat16 if the recipe requires it."""
        if self._config.recipe and self._config.recipe.round_to:
            return {name: rounded(tensor) for name, tensor in state_dict.items()}
        return state_dict

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        """Whether this tensor ([..] of any dtype) belongs to a quantized layer."""
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
        """Load a tensor [..] of `state_dict` in its stored dtype.

        Raises the errors of `check_values` and `check_weight`.
        """
        name, _, role = param_name.rpartition(".")
        tensor, layer = state_dict[param_name], model.get_submodule(name)
        if self._chosen is None:
            check_values(param_name, tensor)
            # Copied, because the tensor would keep the whole file mapped.
            tensors = {role: tensor.clone(memory_format=torch.contiguous_format)}
        elif role == "bias":
            rounding = bool(self._chosen.round_to)
            tensors = {role: (rounded(tensor) if rounding else tensor).to(torch.float32, copy=True)}
        else:
            check_weight(self._chosen, name, tensor)
            tensors = stored_tensors(encode_weight(self._chosen, name, tensor))
        target = self._config.device or str(torch.device(target_device))
        device = self._schemes_on(target).device.torch_name
        if isinstance(layer, QuantLinear):
            layer.set_tensors({role: t.to(device) for role, t in tensors.items()})
        else:
            dtype = torch.float32 if role == "mul_scale" else self._dtype
            layer.register_parameter(role, nn.Parameter(tensors[role].to(device, dtype), requires_grad=False))
        self._awaited.discard(param_name)
        if not self._awaited:
            for m in model.modules():
                if isinstance(m, QuantLinear):
                    m.group.fuse(self._schemes_on(self._config.device or str(m.device)))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Record the quantization in the model's config; each model gets its own copy."""
        if self._awaited:
            raise _incomplete(sorted({name.rpartition(".")[0] for name in self._awaited}))
        wan = wan_config_of(model) is not None
        config = copy.copy(self._config)
        config.stored = quantization_config_of(self._layers, smoothed=self._smoothed, wan=wan)
        self.quantization_config = self._config = config
        register: Any = model.register_to_config
        register(quantization_config=config)
        return model

    # ---- helpers --------------------------------------------------------------------------------

    def _choose_layers(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        """Replace the layers of a float model that the recipe quantizes."""
        assert self._config.recipe is not None
        chosen = module_schemes(model, self._config.recipe, self._config.keep, force=self._config.force)
        self._layers, self._chosen = {s.name: s.scheme for s in chosen.layers}, chosen
        for name in chosen.quantized:
            floats = {r: torch.empty_like(p, device="meta") for r, p in linears[name].named_parameters()}
            self._replace(model, name, (linears[name].out_features, linears[name].in_features), floats)

    def _replace(
        self, model: nn.Module, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace a linear; `tensors`: role -> the tensor of the file, on the meta device."""
        self._awaited |= {f"{name}.{role}" for role in tensors}
        layer: QuantLinear | SmoothLinear
        if (scheme := self._layers[name]) == "bf16":
            layer = SmoothLinear(tensors["weight"], tensors.get("bias"), tensors["mul_scale"])
        else:
            smooth = tensors.get("mul_scale")
            layer = QuantLinear(scheme, shape, tensors, compute_dtype=self._dtype, mul_scale=smooth)
            FusedGroup([layer], self._schemes_on(self._config.device or "cpu"))
        model.set_submodule(name, layer)

    def _check_recipe(self, stored: bool) -> None:
        """Raise UsageError: E-QNT-01 for a recipe and quantized weights, E-USE-01 for float weights and no
        recipe.
        """
        recipe = self._config.recipe
        source = str(self._files[0].parent) if self._files else "this file"
        if stored and recipe:
            raise UsageError(
                f"recipe {recipe.name} for {source}, which is already quantized",
                needs="floating-point weights, or a config without a recipe",
                fix="load it with AscenditConfig()",
                code="E-QNT-01",
            )
        if not stored and not recipe:
            raise UsageError(
                f"no scheme for {source}, which is not quantized",
                needs="a folder written by ascendit, or a scheme to quantize with",
                fix='AscenditConfig("mxfp8")',
            )

    def _schemes_on(self, device: str) -> Schemes:
        if device not in self._schemes:
            c = self._config
            ops = bind(device, emulate=c.emulate, activation_rule=c.activation_rule)
            self._schemes[device] = ops.quantized
        return self._schemes[device]


def _incomplete(names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(names)} tensors of quantized layers are missing: {listed(names)}",
        needs="all tensors of every quantized layer",
        fix="download the model again",
        code="E-CKP-04",
    )


def register() -> None:
    """Register the methods with Diffusers. A name that another library has registered is logged and skipped.

    Raises EnvironmentProblem (E-ENV-01) if this Diffusers does not pass the checkpoint files to the
    quantizer.
    """
    if not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"):
        raise EnvironmentProblem(
            f"Diffusers {diffusers.__version__}",
            needs="0.39 or newer to load quantized folders; ascendit.quantize_ works with older versions too",
            fix="pip install -U diffusers",
            code="E-ENV-01",
        )
    for method in AscenditMethod:
        registered = auto.AUTO_QUANTIZER_MAPPING.setdefault(method.value, AscenditQuantizer)
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, AscenditConfig)
        if registered is not AscenditQuantizer:
            log.warning("Diffusers' quant_method %s is %s, not ascendit's", method.value, registered)


register()
