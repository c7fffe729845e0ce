// Products, each with its own tiles. A product fills the tile of some channels and then adds tokens x tile to sums
// [token][COLUMNS], `together` tokens at a time.
#pragma once
#include <memory>

#include "gemm.h"
#include "nibbles.h"
#include "tokens.h"

namespace ascendit {

constexpr int64_t CHUNK = 1024, STEPS = 256, GROUP = 512;  // tokens, steps of a tile, values per dual scale

enum Kind : int64_t { INT8, FP8, MXFP8, MXFP4, DUAL, W4A8 };  // scheme of weight and activation

struct Call {
    int64_t kind, M, N, K, threads;
    const uint8_t *tokens, *token_scale;
    const float* token_dual;
    const uint8_t *weight, *weight_scale;
    const float* weight_dual;
    const uint32_t* decoded;  // tiles from decode_tiles, or null
    const float* bias;
    uint8_t* work;        // for CHUNK tokens: 2 bytes per value, K rounded up to 512
    int32_t* token_sums;  // [M], int8 only
    void* out;
    int64_t wide;  // out is float32 instead of bfloat16

    int64_t panels() const { return (N + COLUMNS - 1) / COLUMNS; }
    int64_t groups() const { return (K + GROUP - 1) / GROUP; }
    int64_t chunk() const { return std::min(CHUNK, M); }
};

struct Memory {  // buffers of one thread
    const std::unique_ptr<uint32_t[]> room;
    uint32_t* const tile;
    float *const scales, *const factors, *const sums;
    explicit Memory(int64_t tokens)
        : room(new uint32_t[(STEPS + STEPS / BLOCK_STEPS + 1 + tokens) * COLUMNS + LANES]),
          tile((uint32_t*)(((uintptr_t)room.get() + 63) / 64 * 64)),
          scales((float*)(tile + STEPS * COLUMNS)),
          factors(scales + STEPS / BLOCK_STEPS * COLUMNS),
          sums(factors + COLUMNS) {}
};

// Channels [n, n + COLUMNS) and values [k, end).
struct Piece {
    int64_t n, k, end;
};

// Prefetch share `i` of `of` of the source of a piece: a few cache lines per group of tokens.
template <class Rows>
inline void prefetch_rows(const Rows& rows, int64_t N, const Piece& p, int64_t i, int64_t of) {
    for (int64_t row = p.n + COLUMNS * i / of; row < p.n + COLUMNS * (i + 1) / of && row < N; ++row)
        for (const uint8_t *at = rows.at(row, p.k), *stop = rows.at(row, p.end); at < stop; at += 64)
            _mm_prefetch((const char*)at, _MM_HINT_T1);
}

inline void prefetch_tile(const uint32_t* tile, int64_t steps, int64_t i, int64_t of) {
    for (int64_t line = steps * VECTORS * i / of; line < steps * VECTORS * (i + 1) / of; ++line)
        _mm_prefetch((const char*)(tile + line * LANES), _MM_HINT_T1);
}

inline void fill_factors(const Call& c, const Piece& p, float* out) {
    for (int i = 0; i < COLUMNS; ++i) out[i] = c.weight_dual[std::min(p.n + i, c.N - 1) * c.groups() + p.k / GROUP];
}

inline Factors factors_of(const Call& c, int64_t m, int64_t k, const Memory& memory) {
    return {c.token_dual + m * c.groups() + k / GROUP, memory.factors, c.groups()};
}

// Steps of bfloat16 or bytes, summed by dot-product instructions. prepare_part(m, k, end, out) writes those of a token.
template <class Dot, class Rows, class PreparePart>
struct StepProduct {
    static constexpr int64_t together = ROWS, width = STEPS * Rows::per_step;
    const Call& c;
    const Rows rows;
    const PreparePart prepare_part;
    const Streams streams{c.work, c.chunk(), STEPS * 4};

    int64_t prepare(int64_t m, int64_t at) const {
        int64_t sum = 0;
        for (int64_t k = 0; k < c.K; k += width)
            sum += prepare_part(m, k, std::min(c.K, k + width), streams.at(k / width, at));
        return sum;
    }
    void make_tile(const Piece& p, const Memory& memory) const {
        if (!c.decoded) fill(rows, p.n, c.N, p.k, p.end, memory.tile);
    }
    void prefetch(const Piece& p, int64_t i, int64_t of) const {
        if (!c.decoded) return prefetch_rows(rows, c.N, p, i, of);
        if (p.n < c.N) prefetch_tile(decoded(p), (p.end - p.k) / Rows::per_step, i, of);
    }
    const uint32_t* decoded(const Piece& p) const { return c.decoded + (p.n * c.K + p.k * COLUMNS) / Rows::per_step; }
    // m: index of the token; at: its index in the chunk.
    template <int R>
    void multiply_rows(const Piece& p, int64_t m, int64_t at, const Memory& memory, float* to) const {
        const uint32_t* tokens = (const uint32_t*)streams.at(p.k / width, at);
        Sums<R> sum;
        load_sums<R>(to, p.k > 0, sum);
        multiply<Dot, R>(tokens, STEPS, c.decoded ? decoded(p) : memory.tile, (p.end - p.k) / Rows::per_step, sum);
        store_sums<R>(sum, to);
    }
};

// FP4 as bytes. A tile has the width of a dual-scale group, which also fits the L1 cache.
struct NibbleProduct {
    static constexpr int64_t together = TOGETHER, width = STRETCH;
    static_assert(STRETCH == GROUP && sizeof(NibbleToken) <= 2 * STRETCH);
    const Call& c;
    const NibbleRows rows;
    const Doubled doubled{0};
    const Streams streams{c.work, c.chunk(), sizeof(NibbleToken)};

    int64_t prepare(int64_t m, int64_t at) const {
        for (int64_t k = 0; k < c.K; k += width)
            token(k, at)->fill(doubled, c.tokens + (m * c.K + k) / 2, c.token_scale + (m * c.K + k) / BLOCK,
                               std::min(c.K - k, width));
        return 0;
    }
    NibbleToken* token(int64_t k, int64_t at) const { return (NibbleToken*)streams.at(k / width, at); }
    void make_tile(const Piece& p, const Memory& memory) const {
        fill(rows, p.n, c.N, p.k, p.end, memory.tile);
        fill_scales(rows, p.n, c.N, p.k, p.end, memory.scales);
        if (c.kind == DUAL) fill_factors(c, p, memory.factors);
    }
    void prefetch(const Piece& p, int64_t i, int64_t of) const { prefetch_rows(rows, c.N, p, i, of); }
    template <int R>
    void multiply_rows(const Piece& p, int64_t m, int64_t at, const Memory& memory, float* to) const {
        Sums<R> sum;
        load_sums<R>(to, c.kind != DUAL && p.k > 0, sum);
        multiply_nibbles<R>(token(p.k, at), (p.end - p.k) / BLOCK, memory.tile, memory.scales, sum);
        if (c.kind == DUAL)
            add_scaled<R>(sum, factors_of(c, m, p.k, memory), p.k > 0, to);
        else
            store_sums<R>(sum, to);
    }
};

}  // namespace ascendit
