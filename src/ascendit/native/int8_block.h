// Linear layer of the scheme `int8_block`: int8 x int8, one float32 scale per block of 128 x 128 values on both sides.
//
//   y[m, n] = bias[n] + sum over blocks b of K: sa[m / 128, b] * sw[n / 128, b] * dot(m, n, b)
//
// Layout: activation int8 [M, K], sa float32 [ceil(M / 128), ceil(K / 128)]; weight int8 [N, K], sw float32
// [ceil(N / 128), ceil(K / 128)]; bias float32 [N] or null. Any M, N and K. Needs AVX-512 with BF16 and VNNI.
//
// Numbers: dot products of 128 bytes are exact in int32. Their scaled sum is float64, converted to float32 and then
// to the dtype of `out`, as PyTorch converts float64. float32 sums would change 1 of 10000 bfloat16 results.
//
// Cost of 16 results per block: 32 vpdpbusd and 2 multiply-adds in float64, on the same two pipes, so at least 6 % more
// than without scales. Scaling at the end of a block waits for its last vpdpbusd and adds 17 % on Zen 5. So the dot
// products are stored (`Pending`) and scaled between the vpdpbusd of the next block, which adds 7 %.
//
// Not one of the products of products.h, which share float32 sums that are complete after each call of multiply_rows.
#pragma once
#include "products.h"

namespace ascendit {

constexpr int64_t INT8_BLOCK = W4A8 + 1;  // continues Kind
constexpr int SIDE = 128;                 // values per scale, along each axis
constexpr int64_t WIDTH = 4 * SIDE;       // values of a tile along K: 32 KB of weight, which fits the L1 cache
constexpr int64_t MIN_TASK_ROWS = 96;

// WIDTH values of an activation row, padded with zeros.
struct ActivationRow {
    int8_t values[WIDTH];
    float scale[WIDTH / SIDE];
    int32_t offset[WIDTH / SIDE];  // cancels the 128 that ByteRows adds to each weight

    // from: `count` values, at most WIDTH; scales: of their blocks.
    void fill(const int8_t* from, const float* scales, int64_t count) {
        for (int64_t b = 0; b * SIDE < count; ++b) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t k = b * SIDE; k < (b + 1) * SIDE; k += 64) {
                const __mmask64 here = k < count ? bytes_here(count - k) : 0;
                const __m512i v = _mm512_maskz_loadu_epi8(here, from + k);
                sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(int8_t(128)), v);
                _mm512_storeu_si512(values + k, v);
            }
            scale[b] = scales[b];
            offset[b] = -_mm512_reduce_add_epi32(sums);
        }
    }
};
static_assert(sizeof(ActivationRow) <= 2 * WIDTH && WIDTH == GROUP);  // Call::work has 2 bytes per value

// Dot products [ROWS][COLUMNS] of one block, to be scaled and added to `sums`.
struct Pending {
    alignas(64) int32_t dots[ROWS * COLUMNS] = {};
    double factors[ROWS] = {};  // 0 for missing rows
    double* sums;

    void add(int row, int vector) const {
        const __m512d factor = _mm512_set1_pd(factors[row]);
        for (int half = 0; half < LANES; half += LANES / 2) {
            const int at = row * COLUMNS + vector * LANES + half;
            const __m512d dot = _mm512_cvtepi32_pd(_mm256_load_si256((const __m256i*)(dots + at)));
            _mm512_store_pd(sums + at, _mm512_fmadd_pd(dot, factor, _mm512_load_pd(sums + at)));
        }
    }
};

// Multiply R rows by the blocks of a tile. Each block adds the pending one to its sums and is then pending itself.
// Not inlined, and written with loops over constants, or GCC spills `dots`.
template <int R>
static __attribute__((noinline)) void multiply_blocks(const ActivationRow* rows, int64_t blocks, const uint32_t* tile,
                                                      const float* scales, double* sums, Pending& pending) {
    constexpr int STEPS_PER_VECTOR = SIDE / 4 / VECTORS;
    static_assert(STEPS_PER_VECTOR == 8 && ROWS <= STEPS_PER_VECTOR);
    const int8_t* values = rows->values;
    for (int64_t b = 0; b < blocks; ++b) {
        Sums<R> dots;
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < VECTORS; ++j) dots[r][j] = (__m512)_mm512_set1_epi32(rows[r].offset[b]);
        for (int vector = 0; vector < VECTORS; ++vector)
#pragma GCC unroll 8
            for (int s = 0; s < STEPS_PER_VECTOR; ++s, values += 4, tile += COLUMNS) {
                __m512i weight[VECTORS];
                for (int j = 0; j < VECTORS; ++j) {
                    weight[j] = _mm512_load_si512(tile + j * LANES);
                    asm("" : "+v"(weight[j]));  // or GCC loads it again for each row
                }
                for (int r = 0; r < R; ++r) {
                    const __m512i value = pair_of(values + r * sizeof(ActivationRow));
                    for (int j = 0; j < VECTORS; ++j) dots[r][j] = Int8Dot::dot(dots[r][j], value, weight[j]);
                }
                if (s < ROWS) pending.add(s, vector);
            }
        store_sums<R>(dots, (float*)pending.dots);
        for (int r = 0; r < ROWS; ++r) pending.factors[r] = r < R ? double(rows[r].scale[b]) * scales[b] : 0.0;
        pending.sums = sums;
    }
}

struct BlockProduct {
    const Call& c;
    const int64_t blocks = (c.K + SIDE - 1) / SIDE;
    const ByteRows weight{c.weight, c.K};
    const Streams streams{c.work, c.chunk(), sizeof(ActivationRow)};

    const float* scales(const uint8_t* of, int64_t row, int64_t k) const {
        return (const float*)of + row / SIDE * blocks + k / SIDE;
    }
    ActivationRow* activation(int64_t k, int64_t at) const { return (ActivationRow*)streams.at(k / WIDTH, at); }

    // m: index of the row; at: its index in the chunk.
    void prepare(int64_t m, int64_t at) const {
        for (int64_t k = 0; k < c.K; k += WIDTH)
            activation(k, at)->fill((const int8_t*)c.tokens + m * c.K + k, scales(c.token_scale, m, k),
                                    std::min(c.K - k, WIDTH));
    }

    // Rows [first, last) of the chunk at `start`, times COLUMNS channels from n. Buffers: tile [WIDTH / 4][COLUMNS],
    // sums [last - first, rounded up to ROWS][COLUMNS].
    void panel(int64_t start, int64_t first, int64_t last, int64_t n, uint32_t* tile, double* sums) const {
        double bias[COLUMNS] = {};
        for (int64_t j = 0; c.bias && j < std::min<int64_t>(COLUMNS, c.N - n); ++j) bias[j] = c.bias[n + j];
        for (int64_t m = 0; m < last - first; ++m) std::memcpy(sums + m * COLUMNS, bias, sizeof bias);
        Pending pending;
        pending.sums = sums;
        for (int64_t k = 0; k < c.K; k += WIDTH) {
            const Piece piece{n, k, std::min(c.K, k + WIDTH)};
            Piece next{n, piece.end, std::min(c.K, piece.end + WIDTH)};
            if (piece.end == c.K) next = {n + COLUMNS * c.threads, 0, std::min(c.K, WIDTH)};  // likely next
            fill(weight, n, c.N, k, piece.end, tile);  // the end of a short block is not filled: times 0
            for (int64_t m = first; m < last; m += ROWS) {
                prefetch_rows(weight, c.N, next, (m - first) / ROWS, (last - first + ROWS - 1) / ROWS);
                with_rows<ROWS>(last - m, [&](auto rows) {
                    multiply_blocks<decltype(rows)::value>(activation(k, m - start), (piece.end - k + SIDE - 1) / SIDE,
                                                           tile, scales(c.weight_scale, n, k),
                                                           sums + (m - first) * COLUMNS, pending);
                });
            }
        }
        for (int i = 0; i < ROWS * VECTORS; ++i) pending.add(i / VECTORS, i % VECTORS);
        for (int64_t m = first; m < last; ++m) store(m, n, sums + (m - first) * COLUMNS);
    }
    void store(int64_t m, int64_t n, const double* sums) const {
        for (int j = 0; j < COLUMNS && n + j < c.N; j += LANES) {
            const __mmask16 here = c.N - n - j >= LANES ? 0xFFFF : (1u << (c.N - n - j)) - 1;
            const __m256 low = _mm512_cvtpd_ps(_mm512_load_pd(sums + j));
            const __m256 high = _mm512_cvtpd_ps(_mm512_load_pd(sums + j + LANES / 2));
            const __m512 v = (__m512)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
            const int64_t at = m * c.N + n + j;
            if (c.wide)
                _mm512_mask_storeu_ps((float*)c.out + at, here, v);
            else
                _mm256_mask_storeu_epi16((bf16*)c.out + at, here, (__m256i)_mm512_cvtneps_pbh(v));
        }
    }

    // Returns 0: all values are supported. Divides the work like `run` of linear.cpp.
    int64_t run() const {
        const int64_t chunk = c.chunk(), wanted = (4 * c.threads + c.panels() - 1) / c.panels();
        const int64_t pieces = std::max<int64_t>(1, std::min(wanted, chunk / MIN_TASK_ROWS));
        const int64_t size = ((chunk + pieces - 1) / pieces + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel num_threads(int(c.threads))
        {
            const std::unique_ptr<char[]> buffer(new char[COLUMNS * (WIDTH + size * sizeof(double)) + 64]);
            const auto tile = (uint32_t*)(((uintptr_t)buffer.get() + 63) / 64 * 64);
            const auto sums = (double*)(tile + COLUMNS * WIDTH / 4);
            for (int64_t start = 0; start < c.M; start += chunk) {
                const int64_t stop = std::min(c.M, start + chunk);
#pragma omp for schedule(static)
                for (int64_t m = start; m < stop; ++m) prepare(m, m - start);
#pragma omp for schedule(dynamic) collapse(2)
                for (int64_t first = start; first < stop; first += size)
                    for (int64_t p = 0; p < c.panels(); ++p)
                        panel(start, first, std::min(stop, first + size), p * COLUMNS, tile, sums);
            }
        }
        return 0;
    }
};

}  // namespace ascendit
