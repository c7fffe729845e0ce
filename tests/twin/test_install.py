"""Defined operators, counted launches, and that torch_npu and the twin exclude each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascendit.twin
from ascendit.errors import UsageError
from ascendit.twin import example_calls, registry
from ascendit.twin.contract import TwinError

SRC = Path(ascendit.twin.__file__).parents[2]


def caller(name: str, *args: Any, **kwargs: Any) -> Any:
    """An operator through the dispatcher."""
    namespace, _, operator = name.rpartition("::")
    return getattr(getattr(torch.ops, namespace or "npu"), operator)(*args, **kwargs)


def properties(result: Any) -> list[Any]:
    """Shape and dtype of each tensor."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in parts]


# ---- schemas ----------------------------------------------------------------------------------


def test_every_frozen_schema_is_defined_unchanged() -> None:
    assert len(registry.frozen("npu")) == 424 and len(registry.frozen("mindiesd")) == 16
    for namespace in ("npu", "mindiesd"):
        for name, text in registry.frozen(namespace).items():
            packet, _, overload = name.partition(".")
            defined = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            expected = torch._C.parse_schema(f"{namespace}::{text}")
            assert str(defined._schema) == str(expected)


def test_every_operator_that_is_computed_has_a_schema_and_its_arguments() -> None:
    for name in registry.OPERATORS:
        signature = registry.signature(name)
        code = registry.OPERATORS[name].__code__
        own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        assert set(own) <= set(signature.names), name
        assert code.co_flags & 0x08 or set(own) == set(signature.names), name  # ** accepts the others


def test_an_operator_that_is_not_computed_is_named() -> None:
    with pytest.raises(
        TwinError, match=r"torch.ops.npu.npu_silu_ is defined but not computed.*\n.*npu_rms_norm"
    ):
        torch.ops.npu.npu_silu_(torch.ones(2))
    with pytest.raises(TwinError, match=r"npu_grouped_matmul_add is defined but not computed"):
        ascendit.twin.call("npu_grouped_matmul_add", *[torch.ones(2, 2)] * 4)


# ---- correct calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
def test_correct_calls_are_accepted_and_fakes_agree(on: Callable[[str], None], chip: str) -> None:
    on(chip)
    names, operators = set(), set()
    for sample in example_calls.samples():
        plain, dispatched = sample.run(ascendit.twin.call), sample.run(caller)
        meta = sample.run(caller, lambda t: t.to("meta"))
        assert properties(plain) == properties(dispatched) == properties(meta), sample.name
        names.add(sample.name)
        operators.add(sample.operator)
    assert len(names) >= 30
    counts = ascendit.twin.launches()
    assert all(counts[name] >= 2 for name in operators)


def test_every_operator_has_a_sample() -> None:
    sampled = set()
    for chip in ("a2", "a5"):
        ascendit.twin.use(chip)
        sampled |= {sample.operator for sample in example_calls.samples()}
    others = {"_npu_dtype_cast", "fast_gelu", "npu_interleave_rope", "npu_ring_attention_update"}
    assert set(registry.OPERATORS) - sampled == others | {"npu_trans_quant_param"}


@pytest.mark.parametrize(
    "name", ["mxfp8", "dual level", "rope", "rms_norm", "attention", "adaln", "mxfp4 matmul"]
)
def test_opcheck(name: str) -> None:
    sample = next(s for s in example_calls.samples() if s.name == name)
    operator = caller_of(sample.operator)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, sample.args, dict(sample.kwargs), test_utils=utilities)


def caller_of(name: str) -> Any:
    namespace, _, operator = name.rpartition("::")
    return getattr(getattr(torch.ops, namespace or "npu"), operator).default


def test_torch_compile_sees_the_fakes() -> None:
    x, gamma = torch.randn(4, 64).bfloat16(), torch.ones(64).bfloat16()

    def norm(t: Tensor) -> Tensor:
        return torch.ops.npu.npu_gelu(torch.ops.npu.npu_rms_norm(t, gamma)[0], approximate="tanh") + 1

    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), norm(x))


# ---- counts, chips ----------------------------------------------------------------------------


def test_launches_are_counted_by_operator() -> None:
    x, gamma = torch.randn(2, 64).bfloat16(), torch.ones(64).bfloat16()
    for _ in range(3):
        torch.ops.npu.npu_rms_norm(x, gamma)
    torch.ops.mindiesd.adaln_v2(x[None], x[:1], x[:1])
    ascendit.twin.call("npu_gelu", x)
    torch.ops.npu.npu_gelu(x.to("meta"))  # a fake call is no launch
    with pytest.raises(TwinError):
        torch.ops.npu.npu_rms_norm(x, gamma[:3])
    assert ascendit.twin.launches() == {"npu_rms_norm": 3, "mindiesd::adaln_v2": 1, "npu_gelu": 1}
    counts = ascendit.twin.launches()
    counts.clear()
    assert ascendit.twin.launches()
    ascendit.twin.reset()
    assert ascendit.twin.launches() == {}


def test_the_chip_can_be_changed_and_must_be_one_of_three() -> None:
    assert ascendit.twin.chip() == "a5"
    ascendit.twin.enable("a2")
    assert ascendit.twin.chip() == "a2"
    with pytest.raises(
        UsageError, match=r"chip '910b'.*\n.*a2 \(Atlas A2 \(Ascend 910B\)\).*\n.*enable"
    ) as caught:
        ascendit.twin.enable("910b")
    assert caught.value.code == "E-USE-01" and ascendit.twin.chip() == "a2"


def test_the_twin_can_be_disabled_and_enabled_again() -> None:
    ascendit.twin.disable()
    assert ascendit.twin.chip() is None and not hasattr(torch.ops.npu, "npu_rms_norm")
    with pytest.raises(TwinError, match=r"the twin is not enabled.*\n.*\n.*enable\(\"a5\"\)"):
        ascendit.twin.call("npu_gelu", torch.ones(2))
    ascendit.twin.enable("a5")
    assert torch.ops.npu.npu_gelu(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_there_are_no_gradients() -> None:
    y = torch.ops.npu.npu_rms_norm(torch.ones(2, 8, requires_grad=True), torch.ones(8))[0]
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        y.sum().backward()


# ---- other processes --------------------------------------------------------------------------


def python(code: str, *folders: Path) -> str:
    """Output of code in a new Python process; warnings are errors."""
    head = f"import sys; sys.path[:0] = {[str(f) for f in (SRC, *folders)]!r}\n"
    command = [sys.executable, "-W", "error", "-c", head + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_twin_imports_no_torch() -> None:
    code = (
        "import ascendit.twin; print('torch' in sys.modules, ascendit.twin.chip(), ascendit.twin.launches())"
    )
    assert python(code) == "False None {}"


@pytest.fixture
def torch_npu(tmp_path: Path) -> Path:
    """A folder with a fake torch_npu package."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("print('real')\n")
    return tmp_path


def test_torch_npu_cannot_be_imported_afterwards(torch_npu: Path) -> None:
    code = """
import importlib.util, ascendit.twin
ascendit.twin.enable("a3")
print(importlib.util.find_spec("torch_npu") is not None)   # find_spec imports nothing
for _ in range(2):
    try:
        import torch_npu
    except ImportError as e:
        print(e)
ascendit.twin.disable()
import torch_npu
"""
    lines = python(code, torch_npu).splitlines()
    assert lines[0] == "True" and lines[-1] == "real"
    assert (
        lines[1].endswith("import torch_npu while the a3 twin is enabled in this process") and len(lines) == 8
    )


def test_beside_torch_npu_the_twin_can_be_used_but_not_enabled(torch_npu: Path) -> None:
    code = """
import torch, torch_npu, ascendit.twin
try:
    ascendit.twin.enable("a5")
except ImportError as e:
    print(e)
ascendit.twin.use("a5")
print(ascendit.twin.call("npu_gelu", torch.zeros(1)).tolist(), hasattr(torch.ops.npu, "npu_gelu"))
"""
    text = python(code, torch_npu)
    assert "torch_npu is loaded in this process" in text and 'try    ascendit.twin.use("a5")' in text
    assert text.endswith("[0.0] False")


def test_enabling_the_twin_disables_torch_plugins() -> None:
    code = """
import os, ascendit.twin
os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
ascendit.twin.enable("a5")
print(os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"])
"""
    assert python(code) == "0"


def test_operators_that_other_packages_define_are_named() -> None:
    code = """
import torch, ascendit.twin
other = torch.library.Library("mindiesd", "DEF")
other.define("adaln(Tensor x) -> Tensor")
try:
    ascendit.twin.enable("a5")
except ImportError as e:
    print(e)
"""
    text = python(code)
    assert "torch.ops.mindiesd cannot be defined" in text and "enable the twin before other packages" in text


def test_a_fake_torch_npu_module_for_other_packages() -> None:
    code = """
import importlib.util
import ascendit.twin
ascendit.twin.enable("a5", fake_module=True)
ascendit.twin.enable("a5", fake_module=True)
import torch, torch_npu, torch_npu.npu
x = torch.randn(4, 64).bfloat16()
q, s = torch_npu.npu_dynamic_mx_quant(x, dst_type=torch_npu.float8_e4m3fn)
print(q.dtype, torch_npu.float8_e8m0fnu, torch_npu.float4_e2m1fn_x2, torch_npu.__version__)
print(torch.npu.is_available(), torch.npu.device_count(), torch.npu.get_device_name())
print(torch.npu.get_soc_version())
torch.npu.synchronize(); torch.npu.empty_cache(); torch.npu.set_compile_mode(jit_compile=False)
ascendit.twin.enable("a2")
torch.npu.config.allow_internal_format = True
print(torch_npu.get_npu_format(torch_npu.npu_format_cast(torch.ones(16, 32).half(), 29)))
print(importlib.util.find_spec("torch_npu").name, hasattr(torch_npu, "npu_nothing"))
ascendit.twin.disable()
print("torch_npu" in sys.modules, hasattr(torch, "npu"))
"""
    assert python(code).splitlines() == [
        "torch.float8_e4m3fn 293 296 2.13.0",
        "False 0 Ascend950PR_9589",
        "260",
        "29",
        "torch_npu False",
        "False False",
    ]


def test_accelerate_and_diffusers_import_beside_it() -> None:
    code = """
import warnings; warnings.simplefilter("ignore")
import ascendit.twin
ascendit.twin.enable("a5", fake_module=True)
import accelerate, diffusers
from accelerate.utils import is_npu_available
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
print(is_npu_available(), WanTransformer3DModel.__name__, accelerate.Accelerator().device)
"""
    assert python(code).splitlines()[-1] == "False WanTransformer3DModel cpu"
