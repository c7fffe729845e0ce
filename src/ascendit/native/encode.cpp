// Encode to MX formats, int8 and fp8: bit-identical to `mx.reference`, at memory speed.
//
// Layout: x [rows, K] contiguous; qdata [rows, K], FP4 [rows, ceil(K / 2)]; scale uint8 [rows, ceil(K / 32)] or
// float32 [rows]; dual float32 [rows, ceil(K / 512)]. A partial last block is padded with zeros.
// `table`: scale byte by the bits of each bfloat16 magnitude, so that the rules are defined only in Python.
// Units that `mx.reference` must encode again are marked in `unresolved`, a byte per unit, and counted by the
// return value. `type` of x: 0 bfloat16, 1 float16, 2 float32. `element`: 0 e4m3, 1 e5m2, 2 e2m1, 3 int8.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "blocks.h"
#include "choose.h"
#include "energy.h"
#include "rows.h"
#include "scaled_tiles.h"
#include "spread.h"

using namespace ascendit;

namespace {

// f(x) with x cast to a pointer of its type.
template <class F>
int64_t as(const void* x, int64_t type, F f) {
    if (type == 0) return f((const bf16*)x);
    if (type == 1) return f((const half*)x);
    return f((const float*)x);
}

// f(e) with e of the type of the element.
template <class F>
int64_t with(int64_t element, F f) {
    if (element == 0) return f(E4M3{});
    if (element == 1) return f(E5M2{});
    return f(E2M1{});
}

// one(x, qdata, scale) for each block of a run; it returns whether the block is unresolved.
template <class E, class T, class F>
int64_t blocks_of(const Run& run, const T* x, uint8_t* qdata, uint8_t* scale, uint8_t* unresolved, F one) {
    return each<BLOCK, E::bits>(run, x, qdata, [=](const T* from, uint8_t* out, int64_t i, int64_t) {
        const bool again = one(from, out, scale + run.unit + i);
        if (unresolved) unresolved[run.unit + i] = again;
        return again;
    });
}

template <class E, class T, class F>
int64_t over_blocks(const T* x, Shape s, uint8_t* qdata, uint8_t* scale, uint8_t* unresolved, F one) {
    return spread(s, BLOCK, E::bits,
                  [=](const Run& run) { return blocks_of<E>(run, x, qdata, scale, unresolved, one); });
}

// The same for bfloat16 and a rule from a table, in batches.
template <class E, Rounding R>
int64_t over_batches(const bf16* x, Shape s, const uint8_t* table, uint8_t* qdata, uint8_t* scale,
                     uint8_t* unresolved) {
    const auto one = [=](const bf16* from, uint8_t* out, uint8_t* to) {
        return encode_block<E, R>(from, table, out, to);
    };
    constexpr int64_t BYTES = BATCH * E::block_bytes;
    const bool large = s.rows * s.length * E::bits / 8 >= LARGE;
    return spread(s, BLOCK, E::bits, [=](Run run) {
        uint8_t buffer[BYTES];
        Batch<E, R> batches[2];  // this and the next, alternating
        int64_t sum = 0;
        if (run.full >= BATCH) batches[0].compute_scales(x + run.value, table, scale + run.unit);
        for (int turn = 0; run.full >= BATCH; run.skip(BATCH, BATCH * BLOCK, BYTES), turn ^= 1) {
            const Batch<E, R>& batch = batches[turn];
            prefetch_ahead(batch.x, BATCH * BLOCK * sizeof(bf16));
            if (run.full >= 2 * BATCH)
                batches[turn ^ 1].compute_scales(batch.x + BATCH * BLOCK, table, batch.scale + BATCH);
            uint8_t* out = qdata + run.byte;
            sum += batch.encode(table, large ? buffer : out, unresolved + run.unit);
            if (large) write_past_cache(out, buffer, BYTES);
        }
        return sum + blocks_of<E>(run, x, qdata, scale, R == Rounding::msms ? unresolved : nullptr, one);
    });
}

template <class Dual, class T>
int64_t over_groups(const Dual& rule, const T* x, Shape s, uint8_t* qdata, uint8_t* scale, float* dual) {
    const int64_t blocks_per_row = (s.length + BLOCK - 1) / BLOCK;
    const bool large = s.rows * s.length / 2 >= LARGE;
    return spread(s, GROUP, E2M1::bits, [=](const Run& run) {
        uint8_t* first = scale + run.row * blocks_per_row + run.at * (GROUP / BLOCK);
        return each<GROUP, E2M1::bits>(run, x, qdata, [=](const T* from, uint8_t* out, int64_t i, int64_t values) {
            uint8_t buffer[GROUP / 2];
            const bool past = large && values == GROUP;
            encode_group(rule, from, int((values + BLOCK - 1) / BLOCK), past ? buffer : out,
                         first + i * (GROUP / BLOCK), dual + run.unit + i);
            if (past) write_past_cache(out, buffer, GROUP / 2);
            return 0;
        });
    });
}

template <class RowFormat, class T>
int64_t over_rows(const RowFormat& format, const T* x, Shape s, uint8_t* qdata, float* scale) {
    const bool large = s.rows * s.length >= LARGE;
    return spread(s, s.length, 8, [=](const Run& run) {
        for (int64_t i = run.unit; i < run.unit + run.full; ++i)
            encode_row(format, x + i * s.length, s.length, qdata + i * s.length, scale + i, large);
        return 0;
    });
}

}  // namespace

extern "C" {

const char* instructions() { return INSTRUCTIONS; }

// Request large pages for new memory, before it is written: the cost is per page.
int64_t prefer_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, first = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)memory + bytes) / page * page;
    return last > first ? madvise((void*)first, last - first, MADV_HUGEPAGE) : 0;
#else
    return 0;
#endif
}

// Multithreaded memcpy, as a baseline of benchmarks.
int64_t copy_bytes(const uint8_t* x, uint8_t* out, int64_t count, int64_t threads) {
    return spread({1, count, threads}, 4096, 8, [=](const Run& run) {
        std::memcpy(out + run.value, x + run.value, run.full * 4096 + run.tail);
        return 0;
    });
}

// A rule from a table. msms: msModelSlim's rounding, the only one with unresolved blocks.
int64_t encode_table(const bf16* x, int64_t rows, int64_t length, int64_t threads, int64_t element, int64_t msms,
                     const uint8_t* table, uint8_t* qdata, uint8_t* scale, uint8_t* unresolved) {
    const Shape s{rows, length, threads};
    return with(element, [=](auto e) {
        using E = decltype(e);
        if (msms) return over_batches<E, Rounding::msms>(x, s, table, qdata, scale, unresolved);
        return over_batches<E, Rounding::rint>(x, s, table, qdata, scale, unresolved);
    });
}

// msModelSlim's mse_round and fouroversix; tables [2, 32768].
int64_t encode_choice(const bf16* x, int64_t rows, int64_t length, int64_t threads, int64_t element,
                      const uint8_t* tables, uint8_t* qdata, uint8_t* scale, uint8_t* unresolved) {
    return with(element, [=](auto e) {
        using E = decltype(e);
        return over_blocks<E>(x, {rows, length, threads}, qdata, scale, unresolved,
                              [=](const bf16* from, uint8_t* out, uint8_t* to) {
                                  return choose_block<E>(from, tables, out, to);
                              });
    });
}

// A rule of two integers and a mask, see `Rule`, for all types of x.
int64_t encode_rule(const void* x, int64_t type, int64_t rows, int64_t length, int64_t threads, int64_t element,
                    int64_t shift, int64_t threshold, int64_t mask, uint8_t* qdata, uint8_t* scale) {
    const Rule rule{int(shift), uint32_t(threshold), uint32_t(mask)};
    return with(element, [=](auto e) {
        using E = decltype(e);
        return as(x, type, [=](auto* values) {
            return over_blocks<E>(values, {rows, length, threads}, qdata, scale, nullptr,
                                  [=](auto* from, uint8_t* out, uint8_t* to) {
                                      encode_block<E>(from, rule, out, to);
                                      return false;
                                  });
        });
    });
}

// Dual scale of bfloat16 or float32: the NPU's rule with the table of `floor`, or msModelSlim's with `early`.
int64_t encode_dual(const void* x, int64_t type, int64_t rows, int64_t length, int64_t threads, const uint8_t* table,
                    const int32_t* early, uint8_t* qdata, uint8_t* scale, float* dual) {
    const Shape s{rows, length, threads};
    const auto run = [=](auto* values) {
        if (table) return over_groups(NpuDual{table}, values, s, qdata, scale, dual);
        return over_groups(MsmsDual{early}, values, s, qdata, scale, dual);
    };
    return type == 0 ? run((const bf16*)x) : run((const float*)x);
}

// One scale per row. kind: 0 int8, 1 fp8, 2 msModelSlim's int8 with `lowest` -128 or -127.
int64_t encode_rows(const void* x, int64_t type, int64_t rows, int64_t length, int64_t threads, int64_t kind,
                    int64_t lowest, uint8_t* qdata, float* scale) {
    const Shape s{rows, length, threads};
    return as(x, type, [=](auto* values) {
        if (kind == 0) return over_rows(Int8{}, values, s, qdata, scale);
        if (kind == 1) return over_rows(Fp8{}, values, s, qdata, scale);
        if (type == 0) return over_rows(MsmsInt8<true>{int(lowest)}, values, s, qdata, scale);
        return over_rows(MsmsInt8<false>{int(lowest)}, values, s, qdata, scale);
    });
}

// One scale per tile of 128 x 128 values: scale float32 [ceil(rows / 128), ceil(length / 128)]. kind: 0 int8, 1 fp8.
int64_t encode_tiles(const void* x, int64_t type, int64_t rows, int64_t length, int64_t threads, int64_t kind,
                     uint8_t* qdata, float* scale) {
    const Shape s{rows, length, threads};
    return as(x, type, [=](auto* values) {
        if (kind == 0) return over_tiles(Int8{}, 127.0f, values, s, qdata, scale);
        return over_tiles(Fp8{}, 448.0f, values, s, qdata, scale);
    });
}

// Add the squared errors for each of 25 candidates to `sums`; tables [3, 32768], see `Search`.
int64_t search(const bf16* x, int64_t rows, int64_t length, int64_t threads, const uint8_t* tables, double* sums) {
    return spread({rows, length, threads}, BLOCK, 8, [=](const Run& run) {
        Search partial;
        each<BLOCK, 8>(run, x, (uint8_t*)nullptr, [&](const bf16* from, uint8_t*, int64_t, int64_t) {
            partial.add(from, tables);
            return 0;
        });
#pragma omp critical
        partial.add_to(sums);
        return 0;
    });
}

// Add signal and noise to `sums`. scale: E8M0 bytes of blocks of 32, or with `by_row` a float32 per row.
int64_t measure(const void* x, int64_t type, int64_t rows, int64_t length, int64_t threads, int64_t element,
             int64_t by_row, const uint8_t* qdata, const void* scale, const float* dual, double* sums) {
    const Quantized quantized{qdata, by_row ? nullptr : (const uint8_t*)scale, (const float*)scale, dual};
    return as(x, type, [=](auto* values) {
        return spread({rows, length, threads}, length, 8, [=](const Run& run) {
            Energy energy;
            for (int64_t row = run.unit; row < run.unit + run.full; ++row) {
                if (element == 0) add_row<E4M3>(energy, values, row, length, quantized);
                if (element == 1) add_row<E5M2>(energy, values, row, length, quantized);
                if (element == 2) add_row<E2M1>(energy, values, row, length, quantized);
                if (element == 3) add_row<Int8Element>(energy, values, row, length, quantized);
            }
#pragma omp critical
            energy.add_to(sums);
            return 0;
        });
    });
}
}
