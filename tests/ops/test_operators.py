"""Fast operators against `reference`, and what is bound."""

from __future__ import annotations

import pytest
import torch
from ops.given import S, arguments
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.kernels import reference
from ascendit.ops.operators import NAMES, Ops, bind

# Largest relative error, by the norm: float32 rounding, and half a BF16 step (2^-9) for each rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("spans", [(S,), (5, S - 5)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", NAMES)
def test_cpu_form_gives_the_reference_numbers(name: str, dtype: torch.dtype, spans: tuple[int, ...]) -> None:
    given = arguments(name, dtype, spans)
    got, wanted = getattr(bind("cpu"), name)(*given), getattr(reference, name)(*given)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype == dtype
    assert relative(got, wanted) < TOLERANCE[dtype]


def test_reference_can_be_forced_and_choices_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ascendit"):
        forced, free = bind("cpu", "reference"), bind("cpu")
    assert all(getattr(forced, name) is getattr(reference, name) for name in NAMES)
    assert free.attention is not reference.attention
    assert set(free.choices) == set(NAMES) and free.choices["linear"].startswith("reference")
    assert "fused PyTorch kernel" in free.choices["adaln"]
    assert "--set ops=reference" in caplog.text


def test_unknown_force_is_refused() -> None:
    with pytest.raises(UsageError, match="ops=fastest") as e:
        bind("cpu", "fastest")
    assert e.value.code == "E-USE-01"


def test_ops_are_frozen() -> None:
    with pytest.raises(AttributeError):
        bind("cpu").linear = reference.linear  # type: ignore[misc]
    assert isinstance(bind("cuda"), Ops)
