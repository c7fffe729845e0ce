// Quantized linear: out = activation x weight^T + bias. The weight is decoded tile by tile into a buffer that stays
// in the cache, once per CHUNK tokens; a token is a row of the activation. Needs AVX-512 with BF16, VNNI and VBMI.
//
// Layout of both, as in `mx.Encoded`: qdata [rows, K], FP4 [rows, K / 2]; scale uint8 [rows, K / 32] or float32
// [rows]; dual float32 [rows, ceil(K / 512)]; K a multiple of 32. bias float32 [N] or null. out [M, N].
// mxfp8, fp8 and w4a8: values are converted to bfloat16 exactly, sums are float32; the return value counts blocks
// with a value that is not a normal bfloat16, and `out` is then invalid. int8: exact in int32. mxfp4 and its dual
// scale: each block exact in int32, sums of blocks in float32. int8_block: see int8_block.h.
#include "int8_block.h"
#include "products.h"

using namespace ascendit;

namespace {

constexpr int64_t WORTH_A_TASK = 96;  // tokens

inline __mmask16 channels(int64_t left) { return left >= LANES ? 0xFFFF : left > 0 ? (1u << left) - 1 : 0; }

// Apply the scales of rows and the bias, and round once.
void finish(const Call& c, int64_t m, int64_t n, const float* sums) {
    const bool by_row = c.kind == INT8 || c.kind == FP8;
    const __m512 token_scale = _mm512_set1_ps(by_row ? ((const float*)c.token_scale)[m] : 1.0f);
    for (int j = 0; j < COLUMNS; j += LANES) {
        const __mmask16 here = channels(c.N - n - j);
        if (!here) return;
        __m512 v = _mm512_load_ps(sums + j);
        if (c.kind == INT8)
            v = _mm512_cvtepi32_ps(_mm512_sub_epi32((__m512i)v, _mm512_set1_epi32(128 * c.token_sums[m])));
        if (by_row) {
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(here, (const float*)c.weight_scale + n + j));
            v = _mm512_mul_ps(v, token_scale);  // last, since it may be huge and the scale of the weight small
        }
        if (c.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(here, c.bias + n + j));
        const int64_t at = m * c.N + n + j;
        if (c.wide)
            _mm512_mask_storeu_ps((float*)c.out + at, here, v);
        else
            _mm256_mask_storeu_epi16((bf16*)c.out + at, here, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

// Tokens [first, last) of the chunk at `start`, times COLUMNS channels from n.
template <class Product>
void panel(const Call& c, const Product& product, int64_t start, int64_t first, int64_t last, int64_t n,
           const Memory& memory) {
    const int64_t shares = (last - first + Product::together - 1) / Product::together;
    for (int64_t k = 0; k < c.K; k += product.width) {
        const Piece piece{n, k, std::min(c.K, k + product.width)};
        Piece next{n, piece.end, std::min(c.K, piece.end + product.width)};
        if (piece.end == c.K) next = {n + COLUMNS * c.threads, 0, std::min(c.K, product.width)};  // likely next
        product.make_tile(piece, memory);
        for (int64_t m = first; m < last; m += Product::together) {
            float* sums = memory.sums + (m - first) * COLUMNS;
            product.prefetch(next, (m - first) / Product::together, shares);
            with_rows<Product::together>(last - m, [&](auto rows) {
                product.template multiply_rows<decltype(rows)::value>(piece, m, m - start, memory, sums);
            });
        }
    }
    for (int64_t m = first; m < last; ++m) finish(c, m, n, memory.sums + (m - first) * COLUMNS);
}

// Prepare each chunk of tokens on all threads, then distribute the panels.
template <class Product>
int64_t run(const Call& c, const Product& product) {
    int64_t unsupported = 0;
    const int64_t chunk = c.chunk();
    const int64_t wanted = (4 * c.threads + c.panels() - 1) / c.panels();
    const int64_t pieces = std::max<int64_t>(1, std::min(wanted, chunk / WORTH_A_TASK));
    const int64_t size = ((chunk + pieces - 1) / pieces + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel num_threads(int(c.threads))
    {
        const Memory memory(size);
        for (int64_t start = 0; start < c.M; start += chunk) {
            const int64_t stop = std::min(c.M, start + chunk);
#pragma omp for schedule(static) reduction(+ : unsupported)
            for (int64_t m = start; m < stop; ++m) unsupported += product.prepare(m, m - start);
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t first = start; first < stop; first += size)
                for (int64_t p = 0; p < c.panels(); ++p)
                    panel(c, product, start, first, std::min(stop, first + size), p * COLUMNS, memory);
        }
    }
    return unsupported;
}

template <class Dot, class Rows, class PreparePart>
int64_t run_steps(const Call& c, const Rows& rows, PreparePart prepare) {
    return run(c, StepProduct<Dot, Rows, PreparePart>{c, rows, prepare});
}

// Both sides as bfloat16.
template <class Tokens, class Rows>
int64_t run_bf16(const Call& c, const Tokens& tokens, const Rows& rows) {
    return run_steps<Bf16Dot>(c, rows, [tokens](int64_t m, int64_t k, int64_t end, uint8_t* out) {
        return to_steps(tokens, m, k, end, out);
    });
}

}  // namespace

extern "C" {

int64_t linear(int64_t kind, int64_t M, int64_t N, int64_t K, int64_t threads, const uint8_t* tokens,
               const uint8_t* token_scale, const float* token_dual, const uint8_t* weight, const uint8_t* weight_scale,
               const float* weight_dual, const uint32_t* decoded, const float* bias, uint8_t* work, int32_t* token_sums,
               void* out, int64_t wide) {
    const Call c{kind,         M,           N,       K,    threads, tokens,     token_scale, token_dual, weight,
                 weight_scale, weight_dual, decoded, bias, work,    token_sums, out,         wide};
    switch (kind) {
        case INT8:
            return run_steps<Int8Dot>(c, ByteRows{weight, K}, [&c](int64_t m, int64_t k, int64_t end, uint8_t* out) {
                if (k == 0) c.token_sums[m] = 0;
                to_steps((const int8_t*)c.tokens + m * c.K, k, end, out, c.token_sums + m);
                return 0;
            });
        case FP8: return run_bf16(c, Fp8Rows{tokens, K}, Fp8Rows{weight, K});
        case MXFP8:
            return run_bf16(c, BlockRows<E4M3>{tokens, token_scale, K}, BlockRows<E4M3>{weight, weight_scale, K});
        case W4A8:
            return run_bf16(c, BlockRows<E4M3>{tokens, token_scale, K}, BlockRows<E2M1>{weight, weight_scale, K});
        case INT8_BLOCK: return BlockProduct{c}.run();
        default: return run(c, NibbleProduct{c, NibbleRows{weight, weight_scale, K}});
    }
}

// out = x * mul_scale, x [M, K], mul_scale [K], rounded to bfloat16.
void smooth(int64_t M, int64_t K, int64_t threads, const bf16* x, const float* mul_scale, bf16* out) {
#pragma omp parallel for num_threads(int(threads))
    for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; ++k) out[m * K + k] = to_bf16(to_float(x[m * K + k]) * mul_scale[k]);
}

// Number of blocks of a weight with NaN or values that are not normal bfloat16. bits: 8 for e4m3, 4 for e2m1.
int64_t unsupported_blocks(int64_t bits, int64_t N, int64_t K, int64_t threads, const uint8_t* qdata,
                           const uint8_t* scale) {
    int64_t sum = 0;
#pragma omp parallel for num_threads(int(threads)) reduction(+ : sum)
    for (int64_t n = 0; n < N; ++n)
        sum += bits == 8 ? unsupported_in_row(BlockRows<E4M3>{qdata, scale, K}, n)
                         : unsupported_in_row(BlockRows<E2M1>{qdata, scale, K}, n);
    return sum;
}

// Write all tiles of a weight; the last channels are padded to COLUMNS. Row scales are not applied.
void decode_tiles(int64_t kind, int64_t N, int64_t K, int64_t threads, const uint8_t* qdata, const uint8_t* scale,
                  uint32_t* tiles) {
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic)
    for (int64_t n = 0; n < N; n += COLUMNS) {
        uint32_t* tile = tiles + n * (K / 2);
        if (kind == FP8)
            fill(Fp8Rows{qdata, K}, n, N, 0, K, tile);
        else if (kind == MXFP8)
            fill(BlockRows<E4M3>{qdata, scale, K}, n, N, 0, K, tile);
        else
            fill(BlockRows<E2M1>{qdata, scale, K}, n, N, 0, K, tile);
    }
}
}
