"""Out of memory, recognised and told."""

from __future__ import annotations

import pytest
import torch

from ascendit.cli.interruptions import is_out_of_memory, out_of_memory
from ascendit.errors import OutOfMemory

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "3.25 GiB is free. Process 1 has 75.00 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(CUDA), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"
            ),
            True,
        ),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_recognised(error, answer):
    assert is_out_of_memory(error) is answer


def test_the_real_allocator_is_recognised():
    with pytest.raises(RuntimeError) as e:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(e.value)
    assert out_of_memory(e.value).needs.startswith(f"{2**20:.1f} GiB more; ")


def test_told_with_required_and_free():
    error = out_of_memory(torch.OutOfMemoryError(CUDA), "decode", "cuda")
    assert isinstance(error, OutOfMemory) and error.exit_code == 4 and error.code == "E-MEM-01"
    assert error.got == "out of memory on cuda in stage decode"
    assert error.needs == "20.00 GiB more; 3.25 GiB is free"
    assert "--size" in error.fix


def test_without_numbers():
    assert out_of_memory(MemoryError(), "denoise", "cuda").needs == "more memory"
