"""Record q, k and v of a few attention calls of the demo model: the fixture of tests of attention kernels.

    python tools/record_attention.py tests/fixtures/attention/demo.safetensors

Each call has one head, so that the file stays small: q [1, S, 1, d], k and v [1, L, 1, d], bfloat16, as the
kernel receives them, after the norm and RoPE. Names: `self.step2.block3.q`. Prints the error of `qk_int8` on
all calls of the video, against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

import ascendit
from ascendit.kernels.quantized_attention import qk_int8
from ascendit.model.state import DenoiseState
from ascendit.pipeline.generate import denoise

PROMPT, SEED = "a red circle moves right on a black background", 7
CALLS = {("self", 2, 3): 0, ("self", 9, 3): 1, ("text", 0, 7): 2}
"""(kind, step, block) -> the head to record. The last has the largest error of `qk_int8` of all calls."""


class Call(NamedTuple):
    kind: str
    step: int
    block: int
    q: Tensor
    k: Tensor
    v: Tensor


def calls() -> list[Call]:
    """Every attention call of the prompt, of the first CFG branch, on a CPU in BF16."""
    recorded: list[Call] = []

    class Recorder(DenoiseState):
        def attend(self, kind: Any, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.branch == 0:
                recorded.append(Call(kind, self.step, block, q.clone(), k.clone(), v.clone()))
            return super().attend(kind, block, q, k, v)

    pipe = replace(ascendit.load("demo", dtype="bfloat16"), make_state=Recorder)
    with pipe.exclusive(None):
        denoise(pipe, pipe.request(PROMPT, seed=SEED), None, lambda event: None, None)
    return recorded


def errors(recorded: list[Call]) -> Iterator[tuple[float, Call]]:
    """Relative error of `qk_int8` on each call: norm of the difference / norm of the result in float64."""
    for call in recorded:
        q, k, v = (t.double() for t in (call.q, call.k, call.v))
        scores = torch.einsum("bshd,blhd->bhsl", q, k) * q.shape[-1] ** -0.5
        exact = torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v)
        difference = qk_int8(call.q, call.k, call.v).double() - exact
        yield float(difference.norm() / exact.norm()), call


def main() -> None:
    parser = argparse.ArgumentParser(description="Record attention calls of the demo model.")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    out = parser.parse_args().out
    recorded = calls()
    tensors = {
        f"{c.kind}.step{c.step}.block{c.block}.{name}": getattr(c, name)[:, :, head : head + 1].contiguous()
        for c in recorded
        if (head := CALLS.get((c.kind, c.step, c.block))) is not None
        for name in "qkv"
    }
    save_file(tensors, out, {"prompt": PROMPT, "seed": str(SEED), "model": "demo"})
    print(f"{out}: {out.stat().st_size / 2**10:.0f} KiB")
    worst = sorted(errors(recorded), key=lambda pair: -pair[0])
    print(f"qk_int8 against float64 on {len(worst)} calls: median {worst[len(worst) // 2][0]:.1e}; largest:")
    for error, c in worst[:5]:
        print(f"  {error:.1e}  {c.kind}, step {c.step}, block {c.block}")


if __name__ == "__main__":
    main()
