// Formats with a float32 scale: groups of 512 over blocks of 32 (dual scale), and whole rows (int8, fp8).
#pragma once
#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "streams.h"

namespace ascendit {

constexpr int GROUP = 512;

inline float not_zero(float divisor) { return divisor == 0.0f ? INFINITY : divisor; }

// A group with infinities or NaN, which are set to 0; `mark` then sets their blocks to NaN.
template <class T>
struct Cleaned {
    T values[GROUP];
    bool nonfinite[GROUP / BLOCK];

    explicit Cleaned(const T* x) {
        for (int b = 0; b < GROUP / BLOCK; ++b) {
            nonfinite[b] = largest_of(x + b * BLOCK, BLOCK) >= Input<T>::infinity;
            for (int i = b * BLOCK; i < (b + 1) * BLOCK; ++i)
                values[i] = magnitude(x[i]) >= Input<T>::infinity ? T{} : x[i];
        }
    }
    void mark(int blocks, uint8_t* out, uint8_t* scale) const {
        for (int b = 0; b < blocks; ++b)
            if (nonfinite[b]) nan_block<E2M1>(out + b * E2M1::block_bytes, scale + b);
    }
};

// npu_dynamic_dual_level_mx_quant: values / (max / 6), rounded to the dtype of the input.
struct NpuDual {
    const uint8_t* table;  // of rule `floor`

    static float scale(float amax) {
        const float dual = amax * float(1.0 / 6.0);
        return dual < 0x1p-126f ? 0.0f : dual;
    }
    void blocks(const bf16* x, float dual, int count, uint8_t* out, uint8_t* scale) const {
        const float divisor = not_zero(dual);
        bf16 divided[GROUP];
        for (int i = 0; i < GROUP; ++i) divided[i] = to_bf16(to_float(x[i]) / divisor);
        if (count == BATCH) {
            Batch<E2M1, Rounding::rint> batch;
            batch.compute_scales(divided, table, scale);
            batch.encode(table, out, nullptr);
            return;
        }
        for (int b = 0; b < count; ++b)
            encode_block<E2M1, Rounding::rint>(divided + b * BLOCK, table, out + b * E2M1::block_bytes, scale + b);
    }
    void blocks(const float* x, float dual, int count, uint8_t* out, uint8_t* scale) const {
        const float divisor = not_zero(dual);
        const Rule floor{E2M1::emax, 0x7FFFFF, 0x7FFFFF};
        float divided[BLOCK];
        for (int b = 0; b < count; ++b) {
            for (int i = 0; i < BLOCK; ++i) divided[i] = x[b * BLOCK + i] / divisor;
            encode_block<E2M1>(divided, floor, out + b * E2M1::block_bytes, scale + b);
        }
    }
};

// msModelSlim: all steps in float32.
struct MsmsDual {
    const int32_t* early;  // by biased exponent: how many floats below the power of two torch.log2 rounds up to it

    static float scale(float amax) { return amax / 6.0f; }

    template <class T>
    void blocks(const T* x, float dual, int count, uint8_t* out, uint8_t* scale) const {
        const float divisor = not_zero(dual);
        float divided[GROUP];
        for (int i = 0; i < GROUP; ++i) divided[i] = to_float(x[i]) / divisor;
        for (int b = 0; b < count; ++b) {
            const float* values = divided + b * BLOCK;
            const uint32_t bits = to_bits(from_bits(largest_of(values, BLOCK)) / 0.875f + 9.6e-7f);
            const int exponent = int((bits + early[(bits >> 23) + 1]) >> 23) - BIAS - E2M1::emax;
            store_encoded<E2M1, Rounding::msms>(values, exponent, out + b * E2M1::block_bytes);
            scale[b] = uint8_t(exponent + BIAS);
        }
    }
};

template <class Dual, class T>
inline void encode_group(const Dual& rule, const T* x, int count, uint8_t* out, uint8_t* scale, float* dual) {
    prefetch_ahead(x, GROUP * sizeof(T));
    const uint32_t top = largest_of(x, GROUP);
    if (top < Input<T>::infinity) {
        *dual = rule.scale(Input<T>::widen(top));
        rule.blocks(x, *dual, count, out, scale);
        return;
    }
    const Cleaned<T> clean(x);
    *dual = rule.scale(Input<T>::widen(largest_of(clean.values, GROUP)));
    rule.blocks(clean.values, *dual, count, out, scale);
    clean.mark(count, out, scale);
}

// ---- one scale per row --------------------------------------------------------------------------

// float32 to the nearest integer, ties to even, clamped to [lowest, 127].
inline uint8_t to_int8(float x, int lowest) {
    const int n = int(to_bits(x + 12582912.0f)) - int(to_bits(12582912.0f));
    return uint8_t(std::min(std::max(n, lowest), 127));
}

// A row format defines the scale, the encoding of x / scale, and the encoding of rows that are not finite.
struct Int8 {  // npu_dynamic_quant
    static constexpr int nonfinite = 0;
    static float scale(float amax) { return amax * float(1.0 / 127.0); }
    uint8_t encode(float steps) const { return to_int8(steps, -128); }
};

struct Fp8 {
    static constexpr int nonfinite = E4M3::nan;
    static float scale(float amax) { return amax * float(1.0 / 448.0); }
    uint8_t encode(float steps) const { return encode_value<E4M3, Rounding::rint>(steps, steps); }
};

template <bool ROUNDED>
struct MsmsInt8 {  // each step in the dtype of the weight; ROUNDED: bfloat16
    static constexpr int nonfinite = 0;
    int lowest;
    static float step(float x) { return ROUNDED ? to_float(to_bf16(x)) : x; }
    static float scale(float amax) { return std::max(step(amax / 127.0f), 0x1p-23f); }
    uint8_t encode(float steps) const { return to_int8(step(steps), lowest); }
};

template <class RowFormat, class T>
inline void encode_values(const RowFormat format, const T* __restrict x, int64_t n, float divisor,
                          uint8_t* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = format.encode(to_float(x[i]) / divisor);
}

template <class RowFormat, class T>
inline void encode_row(const RowFormat format, const T* x, int64_t n, uint8_t* out, float* scale, bool large) {
    const uint32_t top = largest_of(x, n);
    if (top >= Input<T>::infinity) {
        *scale = NAN;
        std::memset(out, format.nonfinite, n);
        return;
    }
    *scale = format.scale(Input<T>::widen(top));
    const float divisor = not_zero(*scale);
    int64_t at = 0;
    for (constexpr int STEP = 512; large && at + STEP <= n; at += STEP) {
        uint8_t buffer[STEP];
        prefetch_ahead(x + at + n - AHEAD / sizeof(T), STEP * sizeof(T));  // of the next row
        encode_values(format, x + at, STEP, divisor, buffer);
        write_past_cache(out + at, buffer, STEP);
    }
    encode_values(format, x + at, n - at, divisor, out + at);
}

}  // namespace ascendit
