// softmax(q k^T / sqrt(d)) v, whose scores come from a template parameter: BF16 in attention.cpp. Needs AVX-512 BF16.
//
// Layout: q, out [S, H, d]; k, v [L, H, d]; contiguous, BF16; d a multiple of 32, at most 256.
//
// Keys and values of each head are packed once. Blocks of QUERIES queries process blocks of KEYS keys with a running
// maximum and sum, so that scores stay in the cache. Scores are exponents of two.
//
// A class of scores, made from a Problem, packs in any layout of a constant number of bytes per row:
//
//     int64_t query_bytes() const, key_bytes() const;                      per row, multiples of 4
//     void pack_queries(int64_t h, int64_t first, int rows, void* out);    QUERIES rows, those from `rows` zero
//     void pack_keys(int64_t h, int64_t first, int rows, int width, void* out);  width a multiple of PAIRED
//     void multiply(const void* queries, const void* keys, int width, float* scores);  to [QUERIES][KEYS]
//     float scale() const;                                                 factor of these scores
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

namespace ascendit::attention {

constexpr int QUERIES = 48, KEYS = 512, LANES = 16, ROWS = 6, PANEL = 64, PAIRED = 32;
constexpr float LOG2_E = 1.44269504089f;
using bf16 = uint16_t;

struct Problem {  // one attention, and the largest score and the sum of exponentials relative to it [H, S], or null
    const bf16 *q, *k, *v;
    bf16* out;
    float *top, *sum;
    int64_t S, L, H, d;
    int64_t parts;  // BF16 numbers per probability: 1 or 2

    int64_t padded() const { return (L + PAIRED - 1) / PAIRED * PAIRED; }
    float scale() const { return LOG2_E / std::sqrt(float(d)); }
};

inline __m512 in_register(float x) {  // in every lane; the compiler would load a constant again for each use
    __m512 v = _mm512_set1_ps(x);
    asm volatile("" : "+v"(v));
    return v;
}

// 2^x for x <= 0, relative error under 4e-6; exactly 1 for 0.
struct Exp2 {
    const __m512 c1 = in_register(6.931242e-1f), c2 = in_register(2.4024099e-1f), c3 = in_register(5.5906426e-2f);
    const __m512 c4 = in_register(9.582853e-3f), one = in_register(1);

    __m512 operator()(__m512 x) const {
        const __m512 integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 f = _mm512_sub_ps(x, integer);  // [-0.5, 0.5]
        __m512 p = _mm512_fmadd_ps(c4, f, c3);
        p = _mm512_fmadd_ps(p, f, c2);
        p = _mm512_fmadd_ps(p, f, c1);
        p = _mm512_fmadd_ps(p, f, one);
        return _mm512_scalef_ps(p, integer);
    }
};

inline __m512bh pair_of(const bf16* p) {  // two neighbours, in every lane
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh vector_of(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// c[ROWS][COLUMNS * 16] (+)= a[ROWS][2 * pairs] b, with b packed as [pairs][COLUMNS * 16][2].
template <int COLUMNS>
inline void product(const bf16* a, int lda, const bf16* b, int pairs, float* c, int ldc, bool add) {
    __m512 sum[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLUMNS; ++j)
            sum[r][j] = add ? _mm512_loadu_ps(c + r * ldc + j * LANES) : _mm512_setzero_ps();
    for (int p = 0; p < pairs; ++p) {
        __m512bh right[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) right[j] = vector_of(b + (p * COLUMNS + j) * LANES * 2);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh left = pair_of(a + r * lda + 2 * p);
            for (int j = 0; j < COLUMNS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLUMNS; ++j) _mm512_storeu_ps(c + r * ldc + j * LANES, sum[r][j]);
}

// c[QUERIES][columns] (+)= a[QUERIES][2 * pairs] b, with b packed as panels [pairs][64 columns, or 32 in the last][2].
inline void multiply_bf16(const bf16* a, int lda, const bf16* b, int pairs, float* c, int ldc, int columns, bool add) {
    for (int j = 0; j < columns; j += PANEL) {
        const bf16* panel = b + int64_t(j) * pairs * 2;
        for (int r = 0; r < QUERIES; r += ROWS)
            if (columns - j >= PANEL)
                product<4>(a + r * lda, lda, panel, pairs, c + r * ldc + j, ldc, add);
            else
                product<2>(a + r * lda, lda, panel, pairs, c + r * ldc + j, ldc, add);
    }
}

inline __m512i widened(const bf16* p, bool inside) {  // 16 values in 32-bit lanes, or zeros
    return inside ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) : _mm512_setzero_si512();
}

// `width` values of head h, those from `rows` zero, to panels [width / 2][64 of d, or 32 in the last][2].
inline void pack_values(const Problem& a, int64_t h, int64_t first, int rows, int width, bf16* out) {
    const int64_t step = a.H * a.d;
    for (int64_t c = 0; c < a.d; c += PANEL) {
        const int columns = int(std::min<int64_t>(PANEL, a.d - c));
        const bf16* from = a.v + (first * a.H + h) * a.d + c;
        for (int row = 0; row < width; row += 2, from += 2 * step)
            for (int j = 0; j < columns; j += LANES, out += 2 * LANES) {
                const __m512i even = widened(from + j, row < rows), odd = widened(from + step + j, row + 1 < rows);
                _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }
}

class Buffer {  // memory that stays for the next call of this thread
    static constexpr std::align_val_t PAGE{4096};
    uint8_t* room = nullptr;
    size_t bytes = 0;

  public:
    ~Buffer() { operator delete(room, PAGE); }
    uint8_t* at_least(size_t needed) {
        if (needed > bytes) {
            operator delete(room, PAGE);
            room = nullptr, bytes = 0;
            room = (uint8_t*)operator new(needed, PAGE);
            bytes = needed;
        }
        return room;
    }
};

// Outside of `attend`, whose own variables the threads of OpenMP would never destroy.
inline thread_local Buffer packed, work;

struct Work {  // buffers of one thread
    bf16 *p, *p_low;
    float *scores, *out, *top, *sum;
    void* q;

    static int64_t bytes(int64_t d, int64_t query_bytes) {
        return QUERIES * (KEYS * 8 + d * 4 + 4 + LANES * 4 + query_bytes);
    }
    Work(uint8_t* room, int64_t d)
        : p((bf16*)room), p_low(p + QUERIES * KEYS), scores((float*)(p_low + QUERIES * KEYS)),
          out(scores + QUERIES * KEYS), top(out + QUERIES * d), sum(top + QUERIES), q(sum + QUERIES * LANES) {}
};

// Update the maximum of a row, after which earlier sums are rescaled.
inline void raise_top(const Work& w, int row, int width, float scale, int64_t d) {
    const float* s = w.scores + row * KEYS;
    __m512 largest = _mm512_loadu_ps(s);
    for (int j = LANES; j < width; j += LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(s + j));
    const float top = _mm512_reduce_max_ps(largest) * scale;
    if (!(top > w.top[row])) return;
    const __m512 f = _mm512_set1_ps(std::exp2(w.top[row] - top));
    float *o = w.out + row * d, *sum = w.sum + row * LANES;
    for (int64_t c = 0; c < d; c += LANES) _mm512_storeu_ps(o + c, _mm512_mul_ps(_mm512_loadu_ps(o + c), f));
    _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), f));
    w.top[row] = top;
}

// Scores to probabilities, each the sum of PARTS BF16 numbers.
template <int PARTS>
void exponentiate(const Work& w, int width, float scale) {
    const Exp2 exp2;
    const __m512 factor = in_register(scale);
    for (int row = 0; row < QUERIES; ++row) {
        const float* s = w.scores + row * KEYS;
        bf16 *high_to = w.p + row * KEYS, *low_to = w.p_low + row * KEYS;
        const __m512 offset = _mm512_set1_ps(-w.top[row]);
        __m512 total = _mm512_loadu_ps(w.sum + row * LANES);
        for (int j = 0; j < width; j += LANES) {
            const __m512 e = exp2(_mm512_fmadd_ps(_mm512_loadu_ps(s + j), factor, offset));
            total = _mm512_add_ps(total, e);
            const __m256i high = (__m256i)_mm512_cvtneps_pbh(e);
            _mm256_storeu_si256((__m256i*)(high_to + j), high);
            if (PARTS == 1) continue;
            const __m512 low = _mm512_sub_ps(e, _mm512_cvtpbh_ps((__m256bh)high));
            _mm256_storeu_si256((__m256i*)(low_to + j), (__m256i)_mm512_cvtneps_pbh(low));
        }
        _mm512_storeu_ps(w.sum + row * LANES, total);
    }
}

// Scores of the first `valid` of `width` keys to probabilities; those of other keys are 0.
inline void softmax(const Work& w, int width, int valid, float scale, const Problem& a) {
    for (int row = 0; row < QUERIES; ++row) {
        std::fill(w.scores + row * KEYS + valid, w.scores + row * KEYS + width, -INFINITY);
        raise_top(w, row, width, scale, a.d);
    }
    a.parts == 1 ? exponentiate<1>(w, width, scale) : exponentiate<2>(w, width, scale);
}

inline void store_rows(const Problem& a, int64_t h, int64_t first, int rows, const Work& w) {
    for (int r = 0; r < rows; ++r) {
        const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(w.sum + r * LANES));
        const __m512 f = _mm512_set1_ps(1.0f / sum);
        bf16* to = a.out + ((first + r) * a.H + h) * a.d;
        for (int c = 0; c < a.d; c += LANES) {
            const __m512 o = _mm512_mul_ps(_mm512_loadu_ps(w.out + r * a.d + c), f);
            _mm256_storeu_si256((__m256i*)(to + c), (__m256i)_mm512_cvtneps_pbh(o));
        }
        if (!a.top) continue;
        a.top[h * a.S + first + r] = w.top[r] / LOG2_E;
        a.sum[h * a.S + first + r] = sum;
    }
}

template <class Scores>
void attend_rows(const Problem& a, const Scores& scores, const uint8_t* keys, const bf16* values, int64_t h,
                 int64_t first, const Work& w) {
    const int rows = int(std::min<int64_t>(QUERIES, a.S - first)), d = int(a.d);
    scores.pack_queries(h, first, rows, w.q);
    std::fill_n(w.out, QUERIES * d, 0.0f);
    std::fill_n(w.top, QUERIES, -INFINITY);
    std::fill_n(w.sum, QUERIES * LANES, 0.0f);
    for (int64_t start = 0; start < a.padded(); start += KEYS) {
        const int width = int(std::min<int64_t>(KEYS, a.padded() - start));
        const int valid = int(std::min<int64_t>(width, a.L - start));
        scores.multiply(w.q, keys + start * scores.key_bytes(), width, w.scores);
        softmax(w, width, valid, scores.scale(), a);
        multiply_bf16(w.p, KEYS, values + start * d, width / 2, w.out, d, d, true);
        if (a.parts == 2) multiply_bf16(w.p_low, KEYS, values + start * d, width / 2, w.out, d, d, true);
    }
    store_rows(a, h, first, rows, w);
}

constexpr int64_t KEPT_BYTES = 64 << 20;  // of packed keys and values; one head at least

template <class Scores>
void attend(const Problem& a, const Scores& scores, int64_t threads) {
    const int64_t values_at = a.padded() * scores.key_bytes(), head_bytes = values_at + a.padded() * a.d * 2;
    const int64_t together = std::clamp<int64_t>(KEPT_BYTES / head_bytes, 1, a.H);
    const int64_t row_blocks = (a.S + QUERIES - 1) / QUERIES, key_blocks = (a.L + KEYS - 1) / KEYS;
    uint8_t* const heads = packed.at_least(together * head_bytes);
#pragma omp parallel num_threads(int(threads))
    {
        const Work w(work.at_least(Work::bytes(a.d, scores.query_bytes())), a.d);
        for (int64_t h = 0; h < a.H; h += together) {
            const int64_t count = std::min(together, a.H - h);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count * key_blocks; ++i) {
                const int64_t first = i % key_blocks * KEYS, head = i / key_blocks;
                const int rows = int(std::min<int64_t>(KEYS, a.L - first));
                const int width = (rows + PAIRED - 1) / PAIRED * PAIRED;
                uint8_t* to = heads + head * head_bytes;
                scores.pack_keys(h + head, first, rows, width, to + first * scores.key_bytes());
                pack_values(a, h + head, first, rows, width, (bf16*)(to + values_at) + first * a.d);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count * row_blocks; ++i) {
                const int64_t first = i % row_blocks * QUERIES, head = i / row_blocks;
                const uint8_t* from = heads + head * head_bytes;
                attend_rows(a, scores, from, (const bf16*)(from + values_at), h + head, first, w);
            }
        }
    }
}

}  // namespace ascendit::attention
