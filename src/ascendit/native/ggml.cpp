// Decode block types of GGUF files to bfloat16: bit-identical to `mx.stored_floats.reference`, but for the payload of a NaN.
//
// A block is stored as one or two float16 factors and small integers. Every product of a factor and its integers fits
// into the 24 bits of a float32, so a value is rounded at most twice: the difference of two products to float32, and
// the result to bfloat16. Layouts: ggml-common.h of ggml.
#include <algorithm>

#include "floats.h"
#include "spread.h"

using namespace ascendit;

namespace {

// The float16 at x as float32; a NaN without payload, which rounding could carry into the exponent.
inline float factor(const uint8_t* x) {
    half h;
    std::memcpy(&h, x, sizeof h);
    return magnitude(h) > Input<half>::infinity ? from_bits(0x7FC00000) : to_float(h);
}

// y[i] = scale * q(i) - minimum, for `N` values.
template <int N, class Q>
inline void affine(bf16* y, float scale, float minimum, Q q) {
#pragma omp simd
    for (int i = 0; i < N; ++i) y[i] = to_bf16(scale * float(q(i)) - minimum);
}

// y[i] = scale * q(i), for `N` values.
template <int N, class Q>
inline void scaled(bf16* y, float scale, Q q) {
#pragma omp simd
    for (int i = 0; i < N; ++i) y[i] = to_bf16(scale * float(q(i)));
}

struct Q8_0 {  // factor, 32 int8
    static constexpr int values = 32, bytes = 34;
    static void decode(const uint8_t* x, bf16* y) {
        const uint8_t* q = x + 2;
        scaled<32>(y, factor(x), [=](int i) { return int(int8_t(q[i])); });
    }
};

struct Q4_0 {  // factor, 32 nibbles: values 0 to 15 are the low ones
    static constexpr int values = 32, bytes = 18;
    static void decode(const uint8_t* x, bf16* y) {
        const uint8_t* q = x + 2;
        scaled<16>(y, factor(x), [=](int i) { return int(q[i] & 15) - 8; });
        scaled<16>(y + 16, factor(x), [=](int i) { return int(q[i] >> 4) - 8; });
    }
};

// The 6-bit scale and minimum of sub-block `j` of 8. The upper bits of the last four are above those of the others.
inline void scale_and_minimum(const uint8_t* packed, int j, float d, float dmin, float& scale, float& minimum) {
    const bool late = j >= 4;
    const int s = late ? (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4) : packed[j] & 63;
    const int m = late ? (packed[j + 4] >> 4) | (packed[j] >> 6 << 4) : packed[j + 4] & 63;
    scale = d * float(s), minimum = dmin * float(m);
}

// Two factors, 12 bytes of scales and minima, [32 bytes of fifth bits,] 128 bytes of nibbles: 32 bytes hold two
// sub-blocks of 32 values, the first in the low nibbles.
template <bool FIFTH>
struct K45 {
    static constexpr int values = 256, bytes = FIFTH ? 176 : 144;
    static void decode(const uint8_t* x, bf16* y) {
        const float d = factor(x), dmin = factor(x + 2);
        const uint8_t *fifth = x + 16, *q = x + (FIFTH ? 48 : 16);
        for (int j = 0; j < 8; j += 2, q += 32, y += 64) {
            float scale, minimum;
            scale_and_minimum(x + 4, j, d, dmin, scale, minimum);
            affine<32>(y, scale, minimum, [=](int i) { return (q[i] & 15) | (FIFTH ? (fifth[i] >> j & 1) << 4 : 0); });
            scale_and_minimum(x + 4, j + 1, d, dmin, scale, minimum);
            affine<32>(y + 32, scale, minimum,
                       [=](int i) { return (q[i] >> 4) | (FIFTH ? (fifth[i] >> (j + 1) & 1) << 4 : 0); });
        }
    }
};

struct Q6_K {  // 128 bytes of low nibbles, 64 of upper pairs of bits, 16 int8 scales, factor
    static constexpr int values = 256, bytes = 210;
    static void decode(const uint8_t* x, bf16* y) {
        const float d = factor(x + 208);
        const int8_t* scales = (const int8_t*)(x + 192);
        for (int part = 0; part < 16; ++part, y += 16) {  // 16 values with one scale
            const int column = part % 2 * 16, quarter = part / 2 % 4, of_half = part / 8;
            const uint8_t* low = x + of_half * 64 + quarter % 2 * 32 + column;
            const uint8_t* high = x + 128 + of_half * 32 + column;
            const int nibble = quarter / 2 * 4, pair = quarter * 2;
            scaled<16>(y, d * float(scales[part]),
                       [=](int i) { return ((low[i] >> nibble & 15) | (high[i] >> pair & 3) << 4) - 32; });
        }
    }
};

template <class Type>
int64_t over(const uint8_t* x, bf16* y, int64_t blocks, int64_t threads) {
    return spread({1, blocks * Type::values, threads}, Type::values, 16, [=](const Run& run) {
        for (int64_t i = run.unit; i < run.unit + run.full; ++i) {
            __builtin_prefetch(x + i * Type::bytes + AHEAD / 4);
            Type::decode(x + i * Type::bytes, y + i * Type::values);
        }
        return 0;
    });
}

}  // namespace

extern "C" {

// x: `blocks` blocks of a type; y: their values. Each function is named after its type.
int64_t Q8_0_to_bf16(const uint8_t* x, bf16* y, int64_t blocks, int64_t threads) {
    return over<Q8_0>(x, y, blocks, threads);
}
int64_t Q4_0_to_bf16(const uint8_t* x, bf16* y, int64_t blocks, int64_t threads) {
    return over<Q4_0>(x, y, blocks, threads);
}
int64_t Q4_K_to_bf16(const uint8_t* x, bf16* y, int64_t blocks, int64_t threads) {
    return over<K45<false>>(x, y, blocks, threads);
}
int64_t Q5_K_to_bf16(const uint8_t* x, bf16* y, int64_t blocks, int64_t threads) {
    return over<K45<true>>(x, y, blocks, threads);
}
int64_t Q6_K_to_bf16(const uint8_t* x, bf16* y, int64_t blocks, int64_t threads) {
    return over<Q6_K>(x, y, blocks, threads);
}
}
