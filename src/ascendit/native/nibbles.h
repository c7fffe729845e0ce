// MXFP4 times MXFP4 in int8: twice an FP4 value is an integer up to 12, so the products of a block of 32 are summed
// exactly in integers, in eight steps of four, and then scaled in float32. Needs AVX-512 VNNI.
#pragma once
#include <immintrin.h>

#include "gemm.h"
#include "tiles.h"

namespace ascendit {

constexpr int SHIFT = 12;  // makes the values of a weight unsigned
constexpr int BLOCK_STEPS = BLOCK / 4;
constexpr int TOGETHER = 3;  // tokens at a time; their integer and float32 sums fill the registers

// Packed FP4 -> bytes, twice the values plus `shift`.
struct Doubled {
    __m512i table;
    explicit Doubled(int shift) {
        int8_t twice[16];
        for (int code = 0; code < 16; ++code) {
            const int magnitude = int(2 * value_of<E2M1>(code & 7));
            twice[code] = int8_t(shift + (code & 8 ? -magnitude : magnitude));
        }
        table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)twice));
    }
    __m512i operator()(__m256i packed) const {
        const __m512i low = _mm512_cvtepu8_epi16(packed), high = _mm512_slli_epi16(low, 4);
        const __m512i code = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(0x0F), 0xA8);  // (low | high) & 15
        return _mm512_shuffle_epi8(table, code);
    }
};

inline __m256i packed_at(const uint8_t* qdata, int64_t count) {  // up to 64 values, padded with zeros
    return count >= 64 ? _mm256_loadu_si256((const __m256i*)qdata)
                         : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)qdata));
}

struct NibbleRows {
    static constexpr int per_step = 4;
    const uint8_t *qdata, *scale;
    int64_t length;
    Doubled doubled{SHIFT};

    const uint8_t* at(int64_t row, int64_t k) const { return qdata + (row * length + k) / 2; }
    __m512i steps(int64_t row, int64_t k, int64_t end) const { return doubled(packed_at(at(row, k), end - k)); }
};

// The scales of COLUMNS channels for the blocks from k to `end`: float32 [blocks][COLUMNS], divided by 4 because both
// sides of the product are doubled.
inline void fill_scales(const NibbleRows& rows, int64_t n, int64_t N, int64_t k, int64_t end, float* out) {
    for (int64_t block = k / BLOCK; block < end / BLOCK; ++block, out += COLUMNS)
        for (int i = 0; i < COLUMNS; ++i) {
            const int64_t row = std::min(n + i, N - 1);
            out[i] = 0.25f * power_of_two(int(rows.scale[row * (rows.length / BLOCK) + block]) - BIAS);
        }
}

// A stretch of a token: bytes, and for each block its scale and minus the sum that SHIFT adds.
constexpr int STRETCH = 512;  // values, which share one dual scale
struct NibbleToken {
    int8_t bytes[STRETCH];
    float scale[STRETCH / BLOCK];
    int32_t surplus[STRETCH / BLOCK];

    // From `count` packed values.
    void fill(const Doubled& doubled, const uint8_t* qdata, const uint8_t* scales, int64_t count) {
        for (int64_t k = 0; k < count; k += 2 * BLOCK) {
            const __m512i v = doubled(packed_at(qdata + k / 2, count - k));
            _mm512_storeu_si512(bytes + k, v);
            const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(SHIFT), v);
            surplus[k / BLOCK] = -_mm512_mask_reduce_add_epi32(0x00FF, sums);
            surplus[k / BLOCK + 1] = -_mm512_mask_reduce_add_epi32(0xFF00, sums);
        }
        for (int64_t b = 0; b < count / BLOCK; ++b)
            scale[b] = scales[b] == NAN_BYTE ? from_bits(0x7FC00000) : power_of_two(scales[b] - BIAS);
    }
};

// total += tokens x tile.
template <int R>
inline void multiply_nibbles(const NibbleToken* tokens, int64_t blocks, const uint32_t* tile, const float* scales,
                             Sums<R>& total) {
    for (int64_t b = 0; b < blocks; ++b, scales += COLUMNS) {
        Sums<R> sum;
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < VECTORS; ++j) sum[r][j] = (__m512)_mm512_set1_epi32(tokens[r].surplus[b]);
#pragma GCC unroll 8
        for (int s = 0; s < BLOCK_STEPS; ++s, tile += COLUMNS) {
            __m512i weight[VECTORS];
            for (int j = 0; j < VECTORS; ++j) {
                weight[j] = _mm512_load_si512(tile + j * LANES);
                asm("" : "+v"(weight[j]));  // otherwise GCC reloads it for each token
            }
            for (int r = 0; r < R; ++r) {
                const __m512i token = pair_of(tokens[r].bytes + b * BLOCK + 4 * s);
                for (int j = 0; j < VECTORS; ++j) sum[r][j] = Int8Dot::dot(sum[r][j], token, weight[j]);
            }
        }
        for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_set1_ps(tokens[r].scale[b]);
            for (int j = 0; j < VECTORS; ++j) {
                const __m512 as_float = _mm512_cvtepi32_ps((__m512i)sum[r][j]);
                const __m512 product = _mm512_mul_ps(as_float, _mm512_load_ps(scales + j * LANES));
                total[r][j] = _mm512_fmadd_ps(product, scale, total[r][j]);
            }
        }
    }
}

}  // namespace ascendit
