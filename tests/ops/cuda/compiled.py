"""Compile the Triton kernels for a GPU that need not be present: `python compiled.py 90` for sm90.

Print the tensor core instructions of each kernel. Triton includes NVIDIA's assembler."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from ascendit.mx import scales
from ascendit.mx.formats import E2M1, E4M3
from ascendit.ops.cuda import quantized_attention, triton_attention, triton_kernels, triton_linear

compiler: Any = importlib.import_module("triton.compiler")
target: Any = importlib.import_module("triton.backends.compiler")
tl: Any = importlib.import_module("triton.language")

POINTERS = {
    "x_ptr": "*bf16", "mul_ptr": "*fp32", "out_ptr": "*bf16", "scale_ptr": "*u8", "qdata_ptr": "*u8",
    "dual_ptr": "*fp32", "dual_x_ptr": "*fp32", "dual_w_ptr": "*fp32", "bias_ptr": "*fp32",
    "sums_ptr": "*i32", "row_ptr": "*fp32", "column_ptr": "*fp32", "weight_ptr": "*fp32",
    "shift_ptr": "*fp32", "y_ptr": "*bf16", "gate_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32",
    "eps": "fp32", "mean_ptr": "*fp32", "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_ptr": "*bf16",
    "v_scale_ptr": "*fp32", "lse_ptr": "*fp32", "factor": "fp32",
}  # fmt: skip
ODD = ("eps", "factor", "S", "L", "H")
"""Not multiples of 16."""
MULTIPLIERS = ("wgmma", "mma.sync", "tcgen05")


def compiled(
    capability: int, kernel: Any, constants: dict[str, Any], options: dict[str, Any], **types: str
) -> str:
    """PTX for a bfloat16 activation; pointers, and lengths but for ODD, are multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**POINTERS, **types}.get(n, "i32") for n in names}
    source = compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in {*constants, *ODD}},
    )
    options = {"enable_fp_fusion": False, **options}
    built = compiler.compile(source, target=target.GPUTarget("cuda", capability, 32), options=options)
    assert "cubin" in built.asm
    return str(built.asm["ptx"])


def compile_all(capability: int) -> dict[str, str]:
    """PTX of each kernel, by name."""

    def blocks(element: Any, rule: str, **changes: Any) -> str:
        shift, threshold = scales.thresholds(rule, element)
        constants = {
            "DUAL": False,
            "QDATA": False,
            "ONES": 3,
            "SMOOTH": True,
            "GROUPS": triton_linear.GROUPS_PER_PROGRAM,
            **changes,
        }
        constants |= {"SHIFT": shift, "THRESHOLD": threshold, "MASK": scales.fraction_mask(rule, element)}
        constants |= triton_linear._constants(element)
        return compiled(
            capability,
            triton_kernels.quantize_blocks,
            constants,
            {},
            **({"out_ptr": "*u8"} if constants["QDATA"] else {}),
        )

    def matmul(kind: str, group: int, tile: tuple[int, int, int]) -> str:
        constants = {
            "KIND": kind,
            "GROUP": group,
            "BIAS": True,
            "EVEN": True,
            "DOT": tl.bfloat16,
            "GROUP_M": 8,
        }
        constants |= dict(zip(("BM", "BN", "BK"), tile, strict=True))
        types = {"qdata_ptr": "*bf16"} if kind == "bf16" else {}
        return compiled(
            capability, triton_kernels.matmul, constants, {"num_warps": 8, "num_stages": 3}, **types
        )

    def dense(name: str, **constants: Any) -> str:
        kernel = getattr(triton_kernels, name)
        return compiled(capability, kernel, {**constants, "BLOCK": 8192}, {"num_warps": 8}, scale_ptr="*fp32")

    def operand(format: str, tile: int, out: str) -> str:
        """The quantizer of an attention operand."""
        block = quantized_attention.ROW_BLOCK if tile == 1 else tile
        constants = {"TILE": tile, "LARGEST": quantized_attention.LARGEST[format], "MEAN": tile == 1}
        return compiled(
            capability,
            triton_attention.quantize,
            {**constants, "D": 128, "BLOCK": block},
            {"num_warps": max(4, block * 128 // 2048)},
            out_ptr=out,
            scale_ptr="*fp32",
        )

    def attention(elements: str, d: int, tiles: tuple[int, int, int], channels: bool = False) -> str:
        queries, keys = quantized_attention.BLOCKS[d]
        constants = dict(zip(("QUERY_TILE", "KEY_TILE", "VALUE_TILE"), tiles, strict=True))
        constants |= {"CHANNELS": channels, "LSE": True, "D": d, "DOT": tl.bfloat16, "BM": queries}
        return compiled(
            capability,
            triton_attention.attention,
            {**constants, "BN": keys},
            {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True},
            q_ptr=elements,
            k_ptr=elements,
        )

    e4m3 = "*fp8e4nv" if capability >= 89 else "*bf16"
    rows = {"STEP": 1 / 127, "FP8": False, "QDATA": True, "SMOOTH": False, "BLOCK": 1024}
    decode = {"KIND": "e2m1", "SCALED": True, "BIAS": True, "BLOCKS": 32}
    ends = {"ROW": True, "COLUMN": True, "BIAS": True, "BLOCK": 1024}
    return {
        "quantize_blocks": blocks(E4M3, "ceil"),
        "quantize_blocks dual": blocks(E2M1, "floor", DUAL=True),
        "quantize_blocks qdata": blocks(E2M1, "floor", QDATA=True),
        "quantize_rows": compiled(capability, triton_kernels.quantize_rows, rows, {}, out_ptr="*i8"),
        "decode_weight": compiled(capability, triton_kernels.decode_weight, decode, {}),
        "finish": compiled(capability, triton_kernels.finish, ends, {}),
        "rms_norm": dense("rms_norm"),
        "layer_norm": dense("layer_norm", SCALE=True, ONE=1.0, SHIFT=True),
        "gated_residual": dense("gated_residual"),
        "rope": dense("rope"),
        "matmul e4m3": matmul("e4m3", 0, triton_linear.LARGE_MATMUL_TILE),
        "matmul e2m1": matmul("e2m1", 0, triton_linear.MATMUL_TILE),
        "matmul e2m1 dual": matmul("e2m1", 512, triton_linear.MATMUL_TILE),
        "operand int8": operand("int8", 1, "*i8"),
        "operand fp8": operand("fp8", 256, "*u8"),
        "operand fp8 values": operand("fp8", 256, "*bf16"),
        "attention int8": attention("*i8", 128, (1, 1, 0), channels=True),
        "attention int8 64": attention("*i8", 64, (1, 1, 0)),
        "attention fp8": attention(e4m3, 128, (128, 256, 256)),
        "attention fp8 64": attention(e4m3, 64, (128, 256, 256)),
        "matmul bf16": matmul("bf16", 0, triton_linear.LARGE_MATMUL_TILE),
    }


if __name__ == "__main__":
    for name, ptx in compile_all(int(sys.argv[1])).items():
        print(f"{name}: {' '.join(i for i in MULTIPLIERS if re.search(re.escape(i), ptx))}")
