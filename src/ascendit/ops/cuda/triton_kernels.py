# mypy: ignore-errors
"""Triton kernels of `triton_linear.py` and `kernels.py`.

They work on the bits of floats, so that quantized values and scales equal those of `mx.reference` to the bit,
subnormals included. They also run under TRITON_INTERPRET=1 on a CPU, which is how they are tested; the
interpreter truncates to bfloat16 and cannot multiply it, hence `rounded` and DOT.
"""

from __future__ import annotations

import importlib


def _installed(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton = _installed("triton")
tl = _installed("triton.language")
jit = triton.jit if triton else lambda function: function


# ---- numbers ------------------------------------------------------------------------------------


@jit
def bits_of(f):
    return f.to(tl.int32, bitcast=True)


@jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@jit
def _power(exponent):
    """int32 in [-127, 127] -> 2^exponent, exact."""
    return float_of(tl.where(exponent > -127, (exponent + 127) << 23, 1 << 22))


@jit
def _scale_of(byte):
    """E8M0 -> float32, NaN for 255."""
    exponent = byte.to(tl.int32) - 127
    return tl.where(exponent == 128, float("nan"), _power(tl.minimum(exponent, 127)))


@jit
def to_even(f):
    """Round to the nearest integer, ties to even; |f| < 2^22."""
    return (f + 12582912.0) - 12582912.0


@jit
def rounded(f, LIKE: tl.constexpr):
    """float32 -> LIKE, rounded to nearest even."""
    if LIKE == tl.bfloat16:
        bits = bits_of(f)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return float_of(tl.where(f == f, bits, 0x7FC00000)).to(tl.bfloat16)
    else:
        return f.to(LIKE)


@jit
def to_element(f, MBITS: tl.constexpr, EMIN: tl.constexpr, MAX: tl.constexpr):
    """float32 -> the nearest value of an element format, as float32, saturated (`mx.elements.encode`)."""
    bits = bits_of(f)
    magnitude = tl.minimum(float_of(bits & 0x7FFFFFFF), MAX)
    exponent = tl.maximum((bits_of(magnitude) >> 23) - 127, EMIN)
    steps = to_even(magnitude * _power(MBITS - exponent))
    value = steps * _power(exponent - MBITS)
    return float_of(bits_of(value) | (bits & -2147483648))


@jit
def to_e4m3(f):
    """float32 values of e4m3, which include those of e2m1 -> e4m3 bit pattern, uint8. NaN -> 127."""
    bits = bits_of(f)
    body = bits & 0x7FFFFFFF
    small = (float_of(body) * 512.0).to(tl.int32)
    out = tl.where(body >= 0x3C800000, (body >> 20) - 960, small)  # normal from 2^-6 on
    out = tl.where(body > 0x7F800000, 0x7F, out | ((bits >> 24) & 0x80))
    return out.to(tl.uint8)


@jit
def _value_of(bits, KIND: tl.constexpr):
    """Bit pattern of an element in int32 -> float32. KIND: "e4m3", "e2m1", "int8"."""
    if KIND == "e4m3":
        value = float_of(((bits & 0x7F) << 20) | ((bits & 0x80) << 24)) * 1.329227995784916e36  # 2^120
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    elif KIND == "e2m1":
        return float_of(((bits & 7) << 22) | ((bits & 8) << 28)) * 8.507059173023462e37  # 2^126
    else:
        return bits.to(tl.float32)


# ---- activations --------------------------------------------------------------------------------


@jit
def _load_activation(x_ptr, mul_ptr, columns, inside, SMOOTH: tl.constexpr):
    """Load as float32; SMOOTH: times mul_scale, rounded to the dtype of the activation."""
    x = tl.load(x_ptr + columns, mask=inside, other=0.0)
    f = x.to(tl.float32)
    if SMOOTH:
        f = rounded(f * tl.load(mul_ptr + columns, mask=inside, other=0.0), x.dtype).to(tl.float32)
    return f


@jit
def quantize_blocks(
    x_ptr, mul_ptr, out_ptr, scale_ptr, dual_ptr, K, width, stride_x, blocks, groups,
    SHIFT: tl.constexpr, THRESHOLD: tl.constexpr, MASK: tl.constexpr,
    MBITS: tl.constexpr, EMIN: tl.constexpr, MAX: tl.constexpr, NAN: tl.constexpr,
    SMOOTH: tl.constexpr, DUAL: tl.constexpr, QDATA: tl.constexpr, ONES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Quantize an activation [M, K] in blocks of 32. Output: dequantized bfloat16 [M, width]; or, with QDATA,
    e4m3 qdata [M, width] and E8M0 scales [M, blocks].

    One program for GROUPS x 512 elements of a row. DUAL: level 0 is stored at `dual_ptr`, not multiplied in.
    ONES: number of ones after the K values, which are multiplied by the bias columns of a weight.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    block = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    columns = block[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    inside = columns < K
    f = _load_activation(x_ptr + row * stride_x, mul_ptr, columns, inside, SMOOTH)
    magnitude = bits_of(f) & 0x7FFFFFFF
    bad = tl.max(magnitude, 2) >= 0x7F800000
    if DUAL:
        f = tl.where(magnitude < 0x7F800000, f, 0.0)
        amax = float_of(tl.max(tl.max(bits_of(f) & 0x7FFFFFFF, 2), 1))
        level0 = amax * 0.16666667163372040  # float32(1 / 6)
        level0 = tl.where(level0 < 1.1754943508222875e-38, 0.0, level0)
        tl.store(dual_ptr + row * groups + group, level0, mask=group < groups)
        divisor = tl.where(level0 == 0.0, float("inf"), level0)
        f = tl.div_rn(f, tl.broadcast_to(divisor[:, None, None], f.shape))
        f = rounded(f, x_ptr.dtype.element_ty).to(tl.float32)
        magnitude = bits_of(f) & 0x7FFFFFFF
    amax = tl.max(magnitude, 2)
    exponent = (amax >> 23) - 127 - SHIFT + ((amax & MASK) > THRESHOLD).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -127), 127)
    value = to_element(f * _power(-exponent)[:, :, None], MBITS, EMIN, MAX)
    if QDATA:
        bits = tl.where(bad[:, :, None], NAN, to_e4m3(value))
        tl.store(out_ptr + row * width + columns, tl.where(inside, bits, 0), mask=columns < width)
        byte = tl.where(bad, 255, exponent + 127).to(tl.uint8)
        tl.store(scale_ptr + row * blocks + block, byte, mask=block < blocks)
    else:
        value = tl.where(bad[:, :, None], float("nan"), value * _power(exponent)[:, :, None])
        value = tl.where(inside, value, tl.where(columns < K + ONES, 1.0, 0.0))
        tl.store(out_ptr + row * width + columns, rounded(value, tl.bfloat16), mask=columns < width)


@jit
def quantize_rows(
    x_ptr, mul_ptr, out_ptr, scale_ptr, K, width, stride_x,
    STEP: tl.constexpr, FP8: tl.constexpr, QDATA: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize an activation [M, K] with one float32 scale per row, stored in [M]. Output [M, width]: qdata
    (QDATA), else the elements as bfloat16, not scaled.

    One program per row. It reads the row twice, the second time from the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        f = _load_activation(x_ptr + row * stride_x, mul_ptr, columns, columns < K, SMOOTH)
        top = tl.maximum(top, bits_of(f) & 0x7FFFFFFF)
    amax = tl.max(top, 0)
    bad = amax >= 0x7F800000
    scale = float_of(tl.where(bad, 0, amax)) * STEP
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        f = _load_activation(x_ptr + row * stride_x, mul_ptr, columns, columns < K, SMOOTH)
        steps = tl.div_rn(tl.where(bad, 0.0, f), tl.zeros([BLOCK], tl.float32) + divisor)
        if FP8:
            value = tl.where(bad & (columns < K), float("nan"), to_element(steps, 3, -6, 448.0))
        else:
            value = tl.minimum(tl.maximum(to_even(steps), -128.0), 127.0)
        if QDATA:
            out = to_e4m3(value) if FP8 else value.to(tl.int8)
        else:
            out = rounded(value, tl.bfloat16)
        tl.store(out_ptr + row * width + columns, out, mask=columns < width)
    tl.store(scale_ptr + row, tl.where(bad, float("nan"), scale))


# ---- weights ------------------------------------------------------------------------------------


@jit
def _load_elements(qdata_ptr, columns, inside, KIND: tl.constexpr):
    """Bit patterns of elements in int32. Of two FP4 elements in a byte, the one of even index is low."""
    if KIND == "e2m1":
        byte = tl.load(qdata_ptr + columns // 2, mask=inside, other=0).to(tl.int32)
        return (byte >> ((columns & 1) * 4)) & 0xF
    else:
        return tl.load(qdata_ptr + columns, mask=inside, other=0).to(tl.int32)


@jit
def decode_weight(
    qdata_ptr, scale_ptr, bias_ptr, out_ptr, K, width, stride, blocks,
    KIND: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Dequantize a weight [N, K] to bfloat16 [N, width], exactly. SCALED: multiply by the block scales.

    BIAS: the float32 bias follows the K values, split into three bfloat16 values that add up to it.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = columns < K
    value = _value_of(_load_elements(qdata_ptr + row * stride, columns, inside, KIND), KIND)
    if SCALED:
        byte = tl.load(scale_ptr + row * blocks + block, mask=block < blocks, other=0)
        value = value * _scale_of(byte)[:, None]
    value = tl.where(inside, value, 0.0)
    if BIAS:
        bias = tl.load(bias_ptr + row)
        high = rounded(bias, tl.bfloat16).to(tl.float32)
        middle = rounded(bias - high, tl.bfloat16).to(tl.float32)
        low = bias - high - middle
        part = tl.where(columns == K, high, tl.where(columns == K + 1, middle, low))
        value = tl.where((columns >= K) & (columns < K + 3), part, value)
    tl.store(out_ptr + row * width + columns, rounded(value, tl.bfloat16), mask=columns < width)


# ---- matmuls ------------------------------------------------------------------------------------


@jit
def _weight_tile(
    qdata_ptr, scale_ptr, k, stride_in, K, blocks,
    KIND: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A dequantized tile [BN, BK] of a weight; the pointers [BN, 1] are those of its rows."""
    if KIND == "bf16":
        columns = k + tl.arange(0, BK)[None, :]
        return tl.load(qdata_ptr + columns, mask=columns < K, other=0.0).to(DOT)
    else:
        if KIND == "e2m1":
            half = k // 2 + tl.arange(0, BK // 2)[None, :]
            if EVEN:
                byte = tl.load(qdata_ptr + half).to(tl.int32)
            else:
                byte = tl.load(qdata_ptr + half, mask=half * 2 < K, other=0).to(tl.int32)
            bits = tl.reshape(tl.join(byte & 0xF, byte >> 4), (BN, BK))
        else:
            columns = k + tl.arange(0, BK)[None, :]
            if EVEN:
                bits = tl.load(qdata_ptr + columns).to(tl.int32)
            else:
                bits = tl.load(qdata_ptr + columns, mask=columns < K, other=0).to(tl.int32)
        block = k // 32 + tl.arange(0, BK // 32)[None, :]
        if EVEN:
            byte = tl.load(scale_ptr + block)
        else:
            byte = tl.load(scale_ptr + block, mask=block < blocks, other=0)
        scale = tl.reshape(tl.broadcast_to(_scale_of(byte)[:, :, None], (BN, BK // 32, 32)), (BN, BK))
        return (_value_of(bits, KIND) * scale).to(DOT)


@jit
def matmul(
    x_ptr, qdata_ptr, scale_ptr, dual_x_ptr, dual_w_ptr, bias_ptr, out_ptr,
    M, N, K, stride_x, stride, blocks, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, >= K] bfloat16 @ dequantized weight [N, K].T + float32 bias [N], rounded once.

    The weight is the left operand, so that it is dequantized in registers and goes to the tensor cores from
    there. GROUP: 512 for a dual scale: the sum of each group is multiplied by its scales of row and channel.
    """
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP_M * columns) * GROUP_M
    group_m = tl.minimum(rows - first, GROUP_M)
    inner = pid % (GROUP_M * columns)
    m = (first + inner % group_m) * BM + tl.arange(0, BM)
    n = inner // group_m * BN + tl.arange(0, BN)
    from_m = tl.where(m < M, m, 0).to(tl.int64)
    from_n = tl.where(n < N, n, 0).to(tl.int64)
    x_rows = x_ptr + from_m[None, :] * stride_x + tl.arange(0, BK)[:, None]
    qdata_rows = qdata_ptr + from_n[:, None] * stride
    scale_rows = scale_ptr + from_n[:, None] * blocks
    total = tl.zeros([BN, BM], tl.float32)
    if GROUP:
        for g in range(groups):
            group_sum = tl.zeros([BN, BM], tl.float32)
            for k in range(g * GROUP, tl.minimum(g * GROUP + GROUP, K), BK):
                w = _weight_tile(qdata_rows, scale_rows, k, stride, K, blocks, KIND, BN, BK, EVEN, DOT)
                group_sum = tl.dot(w, tl.load(x_rows + k).to(DOT), group_sum)
            level0 = tl.load(dual_w_ptr + from_n * groups + g)
            total += group_sum * level0[:, None] * tl.load(dual_x_ptr + from_m * groups + g)[None, :]
    else:
        for k in range(0, K, BK):
            w = _weight_tile(qdata_rows, scale_rows, k, stride, K, blocks, KIND, BN, BK, EVEN, DOT)
            total = tl.dot(w, tl.load(x_rows + k).to(DOT), total)
    if BIAS:
        total += tl.load(bias_ptr + from_n)[:, None]
    outs = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(outs, rounded(total, out_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@jit
def finish(
    sums_ptr, row_ptr, column_ptr, bias_ptr, out_ptr, N, stride,
    ROW: tl.constexpr, COLUMN: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M, N] = int32 or float32 sums [M, stride] * scales + bias, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    f = tl.load(sums_ptr + row * stride + n, mask=inside, other=0).to(tl.float32)
    if ROW:
        f = f * tl.load(row_ptr + row)
    if COLUMN:
        f = f * tl.load(column_ptr + n, mask=inside, other=0.0)
    if BIAS:
        f = f + tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(out_ptr + row * N + n, rounded(f, out_ptr.dtype.element_ty), mask=inside)


# ---- dense operators: one program per token, whose D values fit the registers -------------------


@jit
def rms_norm(x_ptr, weight_ptr, out_ptr, D, stride, eps, BLOCK: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    f = tl.load(x_ptr + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    f = f * tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + i, rounded(f, out_ptr.dtype.element_ty), mask=inside)


@jit
def layer_norm(
    x_ptr, scale_ptr, shift_ptr, out_ptr, D, stride_batch, stride, out_batch, eps,
    SCALE: tl.constexpr, ONE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Layer norm, times (ONE + scale), + shift. Program (token, batch)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    f = tl.load(x_ptr + batch * stride_batch + token * stride + i, mask=inside, other=0.0).to(tl.float32)
    f = tl.where(inside, f - tl.sum(f, 0) / D, 0.0)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    if SCALE:
        f = f * (ONE + tl.load(scale_ptr + i, mask=inside, other=0.0).to(tl.float32))
    if SHIFT:
        f = f + tl.load(shift_ptr + i, mask=inside, other=0.0).to(tl.float32)
    out_ptr += batch * out_batch + token * D
    tl.store(out_ptr + i, rounded(f, out_ptr.dtype.element_ty), mask=inside)


@jit
def gated_residual(
    x_ptr, y_ptr, gate_ptr, out_ptr, D, x_batch, x_stride, y_batch, y_stride, out_batch, BLOCK: tl.constexpr
):
    """x + y * gate. Program (token, batch)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    x = tl.load(x_ptr + batch * x_batch + token * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + batch * y_batch + token * y_stride + i, mask=inside, other=0.0).to(tl.float32)
    f = x + y * tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32)
    out_ptr += batch * out_batch + token * D
    tl.store(out_ptr + i, rounded(f, out_ptr.dtype.element_ty), mask=inside)


@jit
def rope(
    x_ptr, cos_ptr, sin_ptr, out_ptr, pairs, angles, stride_batch, stride, out_batch, BLOCK: tl.constexpr
):
    """(a, b) -> (a cos - b sin, a sin + b cos) for the `pairs` of a token. Each head has `angles` of them."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    i = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    inside = i < 2 * pairs
    x = tl.load(x_ptr + batch * stride_batch + token * stride + i, mask=inside, other=0.0)
    a, b = tl.split(x.to(tl.float32))
    angle = token * angles + pair % angles
    c = tl.load(cos_ptr + angle, mask=pair < pairs, other=0.0)
    s = tl.load(sin_ptr + angle, mask=pair < pairs, other=0.0)
    f = tl.join(a * c - b * s, a * s + b * c)
    out_ptr += batch * out_batch + token * 2 * pairs
    tl.store(out_ptr + i, rounded(f, out_ptr.dtype.element_ty), mask=inside)
