# mypy: ignore-errors
"""Triton kernels of attention with quantized scores, called by `quantized_attention.py`.

`quantize` makes the elements and scales of Q and K, and of V in fp8; `attention` multiplies them. Like the
kernels of `triton_kernels.py` they run in the interpreter, there with DOT float32.
"""

from __future__ import annotations

from ascendit.ops.cuda.triton_kernels import bits_of, float_of, jit, rounded, tl, to_e4m3, to_element, to_even


@jit
def quantize(
    x_ptr, mean_ptr, out_ptr, scale_ptr, S, H, stride_batch, stride_token, stride_head,
    TILE: tl.constexpr, LARGEST: tl.constexpr, MEAN: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize x [B, S, H, D] per head: elements [B, S, H, D] as int8, e4m3 (uint8) or their values (bf16),
    and float32 scales [B, ceil(S / TILE), H] of TILE tokens, 1 or BLOCK. LARGEST: 127 for int8, 448 for e4m3.

    MEAN: subtract float32 [B, H, D] first. Program (block of BLOCK tokens, batch and head).
    """
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    row, d = tl.arange(0, BLOCK), tl.arange(0, D)
    token = tl.program_id(0) * BLOCK + row
    inside = (token < S)[:, None]
    xs = x_ptr + batch * stride_batch + head * stride_head + token.to(tl.int64)[:, None] * stride_token
    f = tl.load(xs + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        f = tl.where(inside, f - tl.load(mean_ptr + (batch * H + head) * D + d)[None, :], 0.0)
    amax = tl.max(bits_of(f) & 0x7FFFFFFF, 1)
    if TILE > 1:
        amax = tl.zeros([BLOCK], tl.int32) + tl.max(amax, 0)
    bad = amax >= 0x7F800000
    scale = tl.div_rn(float_of(tl.where(bad, 0, amax)), tl.zeros([BLOCK], tl.float32) + LARGEST)
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    steps = tl.div_rn(tl.where(bad[:, None], 0.0, f), tl.broadcast_to(divisor[:, None], (BLOCK, D)))
    if LARGEST == 127:
        value = tl.minimum(tl.maximum(to_even(steps), -128.0), 127.0)
    else:
        value = tl.where(bad[:, None], float("nan"), to_element(steps, 3, -6, LARGEST))
    outs = out_ptr + ((batch * S + token)[:, None] * H + head) * D + d[None, :]
    if out_ptr.dtype.element_ty == tl.uint8:
        tl.store(outs, to_e4m3(value), mask=inside)
    else:
        tl.store(outs, rounded(value, out_ptr.dtype.element_ty), mask=inside)
    tile = token // TILE
    scales = scale_ptr + (batch * tl.cdiv(S, TILE) + tile) * H + head
    tl.store(scales, tl.where(bad, float("nan"), scale), mask=(token < S) & (row % TILE == 0))


@jit
def _add_keys(
    q, factor, top, total, sums, ks, vs, k_scales, v_scales, start, L, k_stride, v_stride, H,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, DOT: tl.constexpr, BN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add BN keys, from `start`, to the sums of a block of queries. LAST: some are beyond L.

    Scores are base-2 logarithms. A tile of BN or more tokens has one scale in this block.
    """
    n = start + tl.arange(0, BN)
    inside = n < L
    rows = n.to(tl.int64)[:, None]
    if LAST:
        k = tl.load(ks + rows * k_stride, mask=inside[:, None], other=0.0)
        v = tl.load(vs + rows * v_stride, mask=inside[:, None], other=0.0)
    else:
        k, v = tl.load(ks + rows * k_stride), tl.load(vs + rows * v_stride)
    if k.dtype == tl.bfloat16:
        k = k.to(DOT)
    scores = tl.dot(q, tl.trans(k)).to(tl.float32)
    if KEY_TILE % BN == 0:
        factor = factor * tl.load(k_scales + start // KEY_TILE * H)
    elif LAST:
        scores = scores * tl.load(k_scales + n // KEY_TILE * H, mask=inside, other=0.0)[None, :]
    else:
        scores = scores * tl.load(k_scales + n // KEY_TILE * H)[None, :]
    if LAST:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    largest = tl.maximum(top, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor[:, None] - largest[:, None])
    if LAST:
        p = tl.where(inside[None, :], p, 0.0)
    shrink = tl.exp2(top - largest)
    total = total * shrink + tl.sum(p, 1)
    if VALUE_TILE:
        tl.static_assert(VALUE_TILE % BN == 0)
        p = p * tl.load(v_scales + start // VALUE_TILE * H)
    p = p.to(tl.bfloat16) if DOT == tl.bfloat16 else rounded(p, tl.bfloat16).to(DOT)
    sums = tl.dot(p, v.to(DOT), sums * shrink[:, None])
    return largest, total, sums


@jit
def attention(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, S, L, H,
    v_batch, v_token, v_head, factor,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, CHANNELS: tl.constexpr,
    LSE: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [B, S, H, D] = softmax(q k^T * factor / log2(e)) v, and with LSE its log-sum-exp [B, H, S].

    q [B, S, H, D] and k [B, L, H, D]: elements in int8, e4m3, or e4m3 values in bfloat16, with scales
    [B, ceil(tokens / tile), H]. v [B, L, H, D] bfloat16: values; with VALUE_TILE elements with scales of such
    tiles; with CHANNELS elements with scales [B, H, D]. Probabilities are rounded to bfloat16. The dtype DOT
    multiplies bfloat16. Program (block of BM queries, batch and head).
    """
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    token = tl.where(m < S, m, 0)
    q = tl.load(q_ptr + ((batch * S + token) * H + head)[:, None] * D + d[None, :])
    if q.dtype == tl.bfloat16:
        q = q.to(DOT)
    scales = q_scale_ptr + (batch * tl.cdiv(S, QUERY_TILE) + token // QUERY_TILE) * H + head
    factor = tl.load(scales) * factor
    ks = k_ptr + (batch * L * H + head) * D + d[None, :]
    vs = v_ptr + batch * v_batch + head * v_head + d[None, :]
    k_scales = k_scale_ptr + batch * tl.cdiv(L, KEY_TILE) * H + head
    v_scales = v_scale_ptr
    if VALUE_TILE:
        v_scales += batch * tl.cdiv(L, VALUE_TILE) * H + head
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    full = L // BN * BN
    for start in range(0, full, BN):
        top, total, sums = _add_keys(
            q, factor, top, total, sums, ks, vs, k_scales, v_scales, start, L, H * D, v_token, H,
            KEY_TILE, VALUE_TILE, DOT, BN, False,
        )  # fmt: skip
    for start in range(full, L, BN):
        top, total, sums = _add_keys(
            q, factor, top, total, sums, ks, vs, k_scales, v_scales, start, L, H * D, v_token, H,
            KEY_TILE, VALUE_TILE, DOT, BN, True,
        )  # fmt: skip
    sums = sums / total[:, None]
    if CHANNELS:
        sums = sums * tl.load(v_scale_ptr + (batch * H + head) * D + d)[None, :]
    outs = out_ptr + ((batch * S + m) * H + head)[:, None] * D + d[None, :]
    tl.store(outs, rounded(sums, out_ptr.dtype.element_ty), mask=(m < S)[:, None])
    if LSE:
        lse = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (batch * H + head) * S + m, lse, mask=m < S)
