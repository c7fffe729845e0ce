// softmax(q k^T / sqrt(d)) v on BF16, scores and sums in float32. Needs AVX-512 BF16.
//
// Layout: q, out [S, H, d]; k, v [L, H, d]; contiguous, BF16; d a multiple of 32, at most 256.
//
// The keys and values of each head are packed once for VDPBF16PS: two neighbours along the summed axis share a
// 32-bit lane. Blocks of 48 queries process blocks of 256 keys with a running maximum and sum, so that scores
// stay in the cache.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int QUERIES = 48, KEYS = 256, LANES = 16, ROWS = 6;
constexpr float LOG2_E = 1.44269504089f;
using bf16 = uint16_t;

inline __m512 exp2_ps(__m512 x) {  // 2^x for x <= 0, relative error under 2e-7; 0 below 2^-126
    const __m512 integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, integer);  // [-0.5, 0.5]
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, integer);
}

inline __m512bh pair_of(const bf16* p) {  // two neighbours, in every lane
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh vector_of(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// c[ROWS][COLUMNS * 16] (+)= a[ROWS][2 * pairs] b, with b packed as [pairs][stride lanes][2].
template <int COLUMNS>
inline void product(const bf16* a, int lda, const bf16* b, int stride, int pairs, float* c, int ldc, bool add) {
    __m512 sum[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLUMNS; ++j)
            sum[r][j] = add ? _mm512_loadu_ps(c + r * ldc + j * LANES) : _mm512_setzero_ps();
    for (int p = 0; p < pairs; ++p) {
        __m512bh right[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) right[j] = vector_of(b + (int64_t(p) * stride + j * LANES) * 2);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh left = pair_of(a + r * lda + 2 * p);
            for (int j = 0; j < COLUMNS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], left, right[j]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLUMNS; ++j) _mm512_storeu_ps(c + r * ldc + j * LANES, sum[r][j]);
}

// c[QUERIES][columns] (+)= a b, four or two vectors of columns at a time.
void multiply(const bf16* a, int lda, const bf16* b, int stride, int pairs, float* c, int ldc, int columns, bool add) {
    for (int r = 0; r < QUERIES; r += ROWS) {
        int j = 0;
        for (; j + 4 * LANES <= columns; j += 4 * LANES)
            product<4>(a + r * lda, lda, b + 2 * j, stride, pairs, c + r * ldc + j, ldc, add);
        for (; j < columns; j += 2 * LANES)
            product<2>(a + r * lda, lda, b + 2 * j, stride, pairs, c + r * ldc + j, ldc, add);
    }
}

struct Shape {
    int64_t S, L, H, d, padded;  // padded: L rounded up to a multiple of 32
};

// Keys of head h to [block of KEYS][d / 2][keys of the block][2], padded with zeros.
void pack_keys(const bf16* k, const Shape& s, int64_t h, bf16* out) {
    for (int64_t start = 0; start < s.padded; start += KEYS) {
        const int64_t width = std::min<int64_t>(KEYS, s.padded - start);
        bf16* block = out + start * s.d;
        for (int64_t j = 0; j < width; ++j) {
            const int64_t row = start + j;
            const bf16* from = k + (row * s.H + h) * s.d;
            for (int64_t p = 0; p < s.d / 2; ++p)
                for (int i = 0; i < 2; ++i) block[(p * width + j) * 2 + i] = row < s.L ? from[2 * p + i] : 0;
        }
    }
}

// Values of head h to [padded / 2][d][2].
void pack_values(const bf16* v, const Shape& s, int64_t h, bf16* out) {
    for (int64_t p = 0; p < s.padded / 2; ++p)
        for (int i = 0; i < 2; ++i) {
            const int64_t row = 2 * p + i;
            const bf16* from = v + (row * s.H + h) * s.d;
            for (int64_t c = 0; c < s.d; ++c) out[(p * s.d + c) * 2 + i] = row < s.L ? from[c] : 0;
        }
}

struct Sums {  // per query [H, S], or null: the largest score, and the sum of exponentials relative to it
    float *top, *sum;
};

struct Work {  // buffers of one thread
    std::vector<bf16> q, p, p_low;
    std::vector<float> scores, out, top, sum;
    explicit Work(int64_t d)
        : q(QUERIES * d), p(QUERIES * KEYS), p_low(QUERIES * KEYS), scores(QUERIES * KEYS), out(QUERIES * d),
          top(QUERIES), sum(QUERIES) {}
};

// Scores of one row to probabilities: updates the maximum and rescales earlier sums. A probability is the sum of
// two BF16 numbers; with one, its rounding error would be as large as that of the output.
void softmax_row(Work& w, int row, int width, int valid, float scale, int64_t d) {
    float* s = w.scores.data() + row * KEYS;
    for (int j = valid; j < width; ++j) s[j] = -INFINITY;
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int j = 0; j < width; j += LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(s + j));
    const float top = std::max(w.top[row], _mm512_reduce_max_ps(largest) * scale);
    const float rescale = std::exp2(w.top[row] - top);
    w.top[row] = top;
    const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(-top);
    __m512 total = _mm512_setzero_ps();
    for (int j = 0; j < width; j += LANES) {
        const __m512 e = exp2_ps(_mm512_fmadd_ps(_mm512_loadu_ps(s + j), factor, offset));
        total = _mm512_add_ps(total, e);
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(e);
        const __m512 low = _mm512_sub_ps(e, _mm512_cvtpbh_ps((__m256bh)high));
        _mm256_storeu_si256((__m256i*)(w.p.data() + row * KEYS + j), high);
        _mm256_storeu_si256((__m256i*)(w.p_low.data() + row * KEYS + j), (__m256i)_mm512_cvtneps_pbh(low));
    }
    w.sum[row] = w.sum[row] * rescale + _mm512_reduce_add_ps(total);
    if (rescale != 1.0f) {
        float* o = w.out.data() + row * d;
        const __m512 f = _mm512_set1_ps(rescale);
        for (int64_t c = 0; c < d; c += LANES) _mm512_storeu_ps(o + c, _mm512_mul_ps(_mm512_loadu_ps(o + c), f));
    }
}

void query_block(const bf16* q, const bf16* keys, const bf16* values, bf16* out, const Sums& sums, const Shape& s,
               int64_t h, int64_t first, float scale, Work& w) {
    const int rows = int(std::min<int64_t>(QUERIES, s.S - first)), d = int(s.d);
    std::fill(w.q.begin(), w.q.end(), bf16(0));
    for (int r = 0; r < rows; ++r) std::memcpy(&w.q[r * d], q + ((first + r) * s.H + h) * d, d * sizeof(bf16));
    std::fill(w.out.begin(), w.out.end(), 0.0f);
    std::fill(w.top.begin(), w.top.end(), -INFINITY);
    std::fill(w.sum.begin(), w.sum.end(), 0.0f);
    for (int64_t start = 0; start < s.padded; start += KEYS) {
        const int width = int(std::min<int64_t>(KEYS, s.padded - start));
        const int valid = int(std::min<int64_t>(width, s.L - start));
        multiply(w.q.data(), d, keys + start * d, width, d / 2, w.scores.data(), KEYS, width, false);
        for (int r = 0; r < QUERIES; ++r) softmax_row(w, r, width, valid, scale, d);
        multiply(w.p.data(), KEYS, values + start * d, d, width / 2, w.out.data(), d, d, true);
        multiply(w.p_low.data(), KEYS, values + start * d, d, width / 2, w.out.data(), d, d, true);
    }
    for (int r = 0; r < rows; ++r) {
        const __m512 f = _mm512_set1_ps(1.0f / w.sum[r]);
        bf16* to = out + ((first + r) * s.H + h) * d;
        for (int c = 0; c < d; c += LANES) {
            const __m512 o = _mm512_mul_ps(_mm512_loadu_ps(&w.out[r * d + c]), f);
            _mm256_storeu_si256((__m256i*)(to + c), (__m256i)_mm512_cvtneps_pbh(o));
        }
        if (!sums.top) continue;
        sums.top[h * s.S + first + r] = w.top[r] / LOG2_E;
        sums.sum[h * s.S + first + r] = w.sum[r];
    }
}

}  // namespace

extern "C" void attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* top, float* sum,
                               int64_t S, int64_t L, int64_t H, int64_t d, int64_t threads) {
    const Shape s{S, L, H, d, (L + 31) / 32 * 32};
    const Sums sums{top, sum};
    const float scale = LOG2_E / std::sqrt(float(d));  // scores are exponents of two
    std::vector<bf16> keys(s.padded * H * d), values(s.padded * H * d);
    const int64_t blocks = (S + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < 2 * H; ++i) {
            const int64_t h = i / 2, at = h * s.padded * d;
            i % 2 ? pack_values(v, s, h, &values[at]) : pack_keys(k, s, h, &keys[at]);
        }
        Work work(d);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < H * blocks; ++i) {
            const int64_t h = i / blocks, at = h * s.padded * d;
            query_block(q, &keys[at], &values[at], out, sums, s, h, (i % blocks) * QUERIES, scale, work);
        }
    }
}
