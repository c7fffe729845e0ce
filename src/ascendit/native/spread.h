// A tensor [rows, K] cut into units (blocks of 32, groups of 512, whole rows) and dealt to threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "streams.h"

namespace ascendit {

struct Shape {
    int64_t rows, length, threads;  // at most that many threads
};

struct Run {  // neighbouring units of one row
    int64_t value, code, unit;  // where they begin: index of the value, of the byte of codes, of the unit
    int64_t row, at;            // the row, and the unit counted in it
    int64_t full;               // units that have all their values
    int64_t tail;               // values of a last one that is short; 0: there is none

    void skip(int64_t units, int64_t values, int64_t bytes) {
        value += values, code += bytes, unit += units, at += units, full -= units;
    }
};

constexpr int64_t WORTH_A_THREAD = 1 << 17;  // values; encoding fewer is quicker than waking a thread
constexpr int64_t AT_A_TIME = 1 << 19;       // values, at most; a thread that other programs hold up takes fewer

// f(run) for all units of `unit` values with codes of `bits`, as the threads get to them; the sum of what f returns.
template <class F>
int64_t spread(Shape s, int64_t unit, int bits, F f) {
    if (s.length % unit == 0) s = {1, s.length * s.rows, s.threads};  // rows lie end to end, in all tensors
    const int64_t per_row = (s.length + unit - 1) / unit, all = s.rows * per_row;
    const int64_t stride = (s.length * bits + 7) / 8;  // a row of 4-bit codes ends with a whole byte
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
        const int64_t values = std::min(AT_A_TIME, s.rows * s.length / (4 * threads));
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

// one(x, out, unit of the run, values) for each unit of a run; the sum of what it returns. A short unit is filled
// up with zeros first, and only the codes that it has are kept.
template <int UNIT, int BITS, class T, class F>
int64_t each(const Run& run, const T* x, uint8_t* qdata, F one) {
    constexpr int BYTES = UNIT * BITS / 8;
    int64_t sum = 0;
    const bool keep_codes = qdata != nullptr;
    x += run.value;
    if (keep_codes) qdata += run.code;
    for (int64_t i = 0; i < run.full; ++i) sum += one(x + i * UNIT, qdata + i * BYTES, i, int64_t(UNIT));
    if (run.tail) {
        T filled[UNIT] = {};
        uint8_t out[BYTES];
        std::memcpy(filled, x + run.full * UNIT, run.tail * sizeof(T));
        sum += one(filled, out, run.full, run.tail);
        if (keep_codes) std::memcpy(qdata + run.full * BYTES, out, (run.tail * BITS + 7) / 8);
    }
    return sum;
}

}  // namespace ascendit
