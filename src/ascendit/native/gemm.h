// Tokens times a tile of a weight: sums in float32 or int32, stored for all tokens of a task.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tiles.h"

namespace ascendit {

constexpr int ROWS = 6, VECTORS = COLUMNS / LANES;  // sums of ROWS tokens x VECTORS vectors fill the registers

inline __m512i pair_of(const void* p) {  // one step of a token, in every lane
    int32_t step;
    std::memcpy(&step, p, 4);
    return _mm512_set1_epi32(step);
}

struct Bf16Dot {
    static __m512 dot(__m512 sum, __m512i token, __m512i weight) {
        return _mm512_dpbf16_ps(sum, (__m512bh)token, (__m512bh)weight);
    }
};
struct Int8Dot {  // the weight is unsigned
    static __m512 dot(__m512 sum, __m512i token, __m512i weight) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(token));  // GCC 12 spills with the intrinsic
        return sum;
    }
};

template <int R>
using Sums = __m512[R][VECTORS];

// Dual scales of a group, for tokens and channels.
struct Factors {
    const float *token, *channel;
    int64_t stride;  // of the tokens
};

// Load [R][COLUMNS] sums, or zeros.
template <int R>
inline void load_sums(const float* from, bool load, Sums<R>& sum) {
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j)
            sum[r][j] = load ? _mm512_load_ps(from + r * COLUMNS + j * LANES) : _mm512_setzero_ps();
}

template <int R>
inline void store_sums(const Sums<R>& sum, float* to) {
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) _mm512_store_ps(to + r * COLUMNS + j * LANES, sum[r][j]);
}

// to (+)= sum * token * channel
template <int R>
inline void add_scaled(const Sums<R>& sum, const Factors& f, bool add, float* to) {
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) {
            const __m512 by =
                _mm512_mul_ps(_mm512_set1_ps(f.token[r * f.stride]), _mm512_load_ps(f.channel + j * LANES));
            float* at = to + r * COLUMNS + j * LANES;
            _mm512_store_ps(at, _mm512_fmadd_ps(sum[r][j], by, add ? _mm512_load_ps(at) : _mm512_setzero_ps()));
        }
}

// sum += tokens x tile; `stride`: steps between tokens.
template <class Dot, int R>
inline void multiply(const uint32_t* tokens, int64_t stride, const uint32_t* tile, int64_t steps, Sums<R>& sum) {
    for (int64_t s = 0; s < steps; ++s, tile += COLUMNS) {
        __m512i weight[VECTORS];
        for (int j = 0; j < VECTORS; ++j) weight[j] = _mm512_load_si512(tile + j * LANES);
        for (int r = 0; r < R; ++r) {
            const __m512i token = pair_of(tokens + r * stride + s);
            for (int j = 0; j < VECTORS; ++j) sum[r][j] = Dot::dot(sum[r][j], token, weight[j]);
        }
    }
}

// Call f with min(rows, MOST) as a compile-time constant.
template <int MOST, class F>
inline void with_rows(int64_t rows, F f) {
    if constexpr (MOST > 1)
        if (rows < MOST) return with_rows<MOST - 1>(rows, f);
    f(std::integral_constant<int, MOST>{});
}

}  // namespace ascendit
