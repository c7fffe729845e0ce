// Divides a tensor [rows, K] into units (blocks of 32, groups of 512, or rows) and distributes them over threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "streams.h"

namespace ascendit {

struct Shape {
    int64_t rows, length, threads;  // at most `threads` threads
};

struct Run {  // consecutive units of one row
    int64_t value, byte, unit;  // index of the first value, byte of qdata, and unit
    int64_t row, at;            // the row, and the first unit in it
    int64_t full;               // complete units
    int64_t tail;               // values of a partial last unit, or 0

    void skip(int64_t units, int64_t values, int64_t bytes) {
        value += values, byte += bytes, unit += units, at += units, full -= units;
    }
};

constexpr int64_t WORTH_A_THREAD = 1 << 17;  // values; waking a thread takes longer than encoding fewer
constexpr int64_t MAX_TASK = 1 << 19;        // values; small tasks balance the load if other programs run

// Call f(run) for all units of `unit` values of `bits` bits, on threads; returns the sum of the results.
template <class F>
int64_t spread(Shape s, int64_t unit, int bits, F f) {
    if (s.length % unit == 0) s = {1, s.length * s.rows, s.threads};  // rows are contiguous in all tensors
    const int64_t per_row = (s.length + unit - 1) / unit, all = s.rows * per_row;
    const int64_t stride = (s.length * bits + 7) / 8;  // rows of FP4 begin at a byte
    const auto stretch = [&](int64_t first, int64_t last) {
        int64_t sum = 0;
        while (first < last) {
            const int64_t row = first / per_row, at = first % per_row, end = std::min(per_row, at + last - first);
            const int64_t tail = end == per_row ? s.length % unit : 0, value = at * unit;
            const int64_t full = end - at - (tail > 0);
            sum += f(Run{row * s.length + value, row * stride + value * bits / 8, first, row, at, full, tail});
            first += end - at;
        }
        return sum;
    };
#ifdef _OPENMP
    const int threads = int(std::min(s.threads, 1 + s.rows * s.length / WORTH_A_THREAD));
    if (threads > 1) {
        const int64_t values = std::min(MAX_TASK, s.rows * s.length / (4 * threads));
        const int64_t step = std::max<int64_t>(1, values / unit);
        int64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : sum)
        for (int64_t first = 0; first < all; first += step) {
            sum += stretch(first, std::min(all, first + step));
            end_of_writes();
        }
        return sum;
    }
#endif
    const int64_t sum = stretch(0, all);
    end_of_writes();
    return sum;
}

// Call one(x, out, unit of the run, values) for each unit of a run; returns the sum of the results. A partial unit
// is padded with zeros, and only its own values are written.
template <int UNIT, int BITS, class T, class F>
int64_t each(const Run& run, const T* x, uint8_t* qdata, F one) {
    constexpr int BYTES = UNIT * BITS / 8;
    int64_t sum = 0;
    const bool has_output = qdata != nullptr;
    x += run.value;
    if (has_output) qdata += run.byte;
    for (int64_t i = 0; i < run.full; ++i) sum += one(x + i * UNIT, qdata + i * BYTES, i, int64_t(UNIT));
    if (run.tail) {
        T padded[UNIT] = {};
        uint8_t out[BYTES];
        std::memcpy(padded, x + run.full * UNIT, run.tail * sizeof(T));
        sum += one(padded, out, run.full, run.tail);
        if (has_output) std::memcpy(qdata + run.full * BYTES, out, (run.tail * BITS + 7) / 8);
    }
    return sum;
}

}  // namespace ascendit
