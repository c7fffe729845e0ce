// softmax(q k^T / sqrt(d)) v, with scores from int8 queries and keys and values in BF16. Needs AVX-512 BF16, VNNI, VBMI.
//
// Layout as in attention.h; d 64 or 128. Numbers: `quantized_attention.qk_int8`.
//
// VPDPBUSD multiplies unsigned by signed bytes. Keys are stored plus 128; the sum of a query row times -128 is the
// first value of its int32 sums. 256 products add up to less than 2^24, which float32 holds.
#include <vector>

#include "attention.h"
#include "gemm.h"

namespace ascendit::attention {
namespace {

constexpr int STEP = 64, LARGEST_HEAD = 128;  // STEP: bytes in a register
static_assert(PANEL == COLUMNS && PAIRED % LANES == 0);

// One row to int8; returns the scale: the largest magnitude / 127, NaN if a value is not finite.
float quantize(const float* x, int64_t d, int8_t* out) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t c = 0; c < d; c += LANES) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + c), _mm512_set1_epi32(0x7FFFFFFF));
        largest = _mm512_max_epu32(largest, bits);
    }
    const float top = from_bits(_mm512_reduce_max_epu32(largest));
    const float scale = top < INFINITY ? top / 127.0f : NAN;
    const __m512 divisor = _mm512_set1_ps(scale == 0.0f ? INFINITY : scale);
    for (int64_t c = 0; c < d; c += LANES) {
        const __m512i n = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + c), divisor));
        _mm_storeu_si128((__m128i*)(out + c), _mm512_cvtsepi32_epi8(n));
    }
    return scale;
}

// out = x - mean, in float32; mean: [d] or null.
inline void subtract(const bf16* x, const float* mean, int64_t d, float* out) {
    for (int64_t c = 0; c < d; ++c) out[c] = to_float(x[c]) - (mean ? mean[c] : 0.0f);
}

struct Queries {  // QUERIES rows, each with its scale and the first value of its sums
    int8_t* values;
    float* scale;
    int32_t* offset;
    Queries(const void* room, int64_t d)
        : values((int8_t*)room), scale((float*)(values + QUERIES * d)), offset((int32_t*)(scale + QUERIES)) {}
};

// Scores [ROWS][VECTORS * LANES] of a panel of keys [d / 4][VECTORS * LANES][4], which their scales [..] follow.
template <int VECTORS>
inline void score_panel(const Queries q, int row, int64_t d, const uint8_t* keys, float* scores) {
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < VECTORS; ++j) sum[r][j] = (__m512)_mm512_set1_epi32(q.offset[row + r]);
    for (int64_t c = 0; c < d; c += 4, keys += VECTORS * LANES * 4) {
        __m512i key[VECTORS];
        for (int j = 0; j < VECTORS; ++j) key[j] = _mm512_load_si512(keys + j * LANES * 4);
        for (int r = 0; r < ROWS; ++r) {
            const __m512i query = ascendit::pair_of(q.values + (row + r) * d + c);
            for (int j = 0; j < VECTORS; ++j) sum[r][j] = Int8Dot::dot(sum[r][j], query, key[j]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
        const __m512 scale = _mm512_load_ps((const float*)keys + j * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(q.scale[row + r]));
            const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sum[r][j]), by);
            _mm512_store_ps(scores + r * KEYS + j * LANES, score);
        }
    }
}

struct Int8Scores {
    const Problem& a;
    const float* means;  // of the keys, [H, d]

    int64_t query_bytes() const { return a.d + sizeof(float) + sizeof(int32_t); }
    int64_t key_bytes() const { return a.d + sizeof(float); }
    float scale() const { return a.scale(); }

    void pack_queries(int64_t h, int64_t first, int rows, void* out) const {
        const Queries to(out, a.d);
        float x[LARGEST_HEAD];
        for (int r = 0; r < QUERIES; ++r) {
            int8_t* values = to.values + r * a.d;
            to.scale[r] = 0.0f;
            std::memset(values, 0, a.d);
            if (r < rows) {
                subtract(a.q + ((first + r) * a.H + h) * a.d, nullptr, a.d, x);
                to.scale[r] = quantize(x, a.d, values);
            }
            int32_t sum = 0;
            for (int64_t c = 0; c < a.d; ++c) sum += values[c];
            to.offset[r] = -128 * sum;
        }
    }

    // Panels of 64 keys, or 32 in the last: [d / 4][keys][4], and their scales [keys].
    void pack_keys(int64_t h, int64_t first, int rows, int width, void* out) const {
        alignas(64) int8_t values[LANES * LARGEST_HEAD];
        float x[LARGEST_HEAD];
        uint8_t* panel = (uint8_t*)out;
        for (int start = 0; start < width; start += PANEL) {
            const int columns = std::min(PANEL, width - start);
            float* scales = (float*)(panel + columns * a.d);
            for (int j = 0; j < columns; j += LANES) {
                for (int i = 0; i < LANES; ++i) {
                    const int row = start + j + i;
                    if (row < rows) subtract(a.k + ((first + row) * a.H + h) * a.d, means + h * a.d, a.d, x);
                    scales[j + i] = row < rows ? quantize(x, a.d, values + i * a.d) : 0.0f;
                }
                pack_lanes(values, (uint32_t*)panel + j, columns);
            }
            panel += columns * key_bytes();
        }
    }

    // LANES rows of int8 to one lane each, plus 128.
    void pack_lanes(const int8_t* rows, uint32_t* to, int columns) const {
        for (int64_t c = 0; c < a.d; c += STEP) {
            __m512i v[LANES];
            for (int i = 0; i < LANES; ++i)
                v[i] = _mm512_xor_si512(_mm512_load_si512(rows + i * a.d + c), _mm512_set1_epi8(int8_t(0x80)));
            transpose(v);
            for (int i = 0; i < LANES; ++i) _mm512_store_si512(to + (c / 4 + i) * columns, v[i]);
        }
    }

    void multiply(const void* queries, const void* keys, int width, float* scores) const {
        const Queries q(queries, a.d);
        for (int j = 0; j < width; j += PANEL) {
            const uint8_t* panel = (const uint8_t*)keys + j * key_bytes();
            for (int row = 0; row < QUERIES; row += ROWS)
                if (width - j >= PANEL)
                    score_panel<PANEL / LANES>(q, row, a.d, panel, scores + row * KEYS + j);
                else
                    score_panel<PAIRED / LANES>(q, row, a.d, panel, scores + row * KEYS + j);
        }
    }
};

// Mean of the keys over all tokens, float32 [H, d], summed in float64.
std::vector<float> key_means(const Problem& a, int64_t threads) {
    std::vector<float> means(a.H * a.d);
#pragma omp parallel for num_threads(int(threads))
    for (int64_t h = 0; h < a.H; ++h) {
        double sums[LARGEST_HEAD] = {};
        for (int64_t l = 0; l < a.L; ++l)
            for (int64_t c = 0; c < a.d; ++c) sums[c] += to_float(a.k[(l * a.H + h) * a.d + c]);
        for (int64_t c = 0; c < a.d; ++c) means[h * a.d + c] = float(sums[c] / a.L);
    }
    return means;
}

// Scores of the keys without their mean are lower by q . mean / sqrt(d).
void add_means(const Problem& a, const float* means, int64_t threads) {
#pragma omp parallel for num_threads(int(threads))
    for (int64_t s = 0; s < a.S; ++s)
        for (int64_t h = 0; h < a.H; ++h) {
            float dot = 0.0f;
            for (int64_t c = 0; c < a.d; ++c) dot += to_float(a.q[(s * a.H + h) * a.d + c]) * means[h * a.d + c];
            a.top[h * a.S + s] += dot / std::sqrt(float(a.d));
        }
}

}  // namespace

// Returns whether there was memory.
extern "C" int64_t attention_qk_int8(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* top, float* sum,
                                     int64_t S, int64_t L, int64_t H, int64_t d, int64_t parts, int64_t threads) {
    const Problem a{q, k, v, out, top, sum, S, L, H, d, parts};
    try {
        const std::vector<float> means = key_means(a, threads);
        attend(a, Int8Scores{a, means.data()}, threads);
        if (a.top) add_means(a, means.data(), threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

}  // namespace ascendit::attention
