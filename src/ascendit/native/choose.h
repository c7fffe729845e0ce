// msModelSlim's rules that try two scales for a block and compare the errors.
#pragma once
#include <cmath>

#include "blocks.h"

namespace ascendit {

struct Errors {  // sums of squared errors of one block under two scales
    double first = 0.0, second = 0.0;
    bool second_may_win = false;  // whether any of its 32 errors is smaller
};

// Encode a block under a scale, with its 32 squared errors in float32, each step rounded as in PyTorch.
template <class E>
inline Lanes attempt(const Lanes& v, const Lanes& a, const float* magnitudes, int byte, float* squares) {
    const Lanes qdata = encode_lanes<E, Rounding::msms>(v, a, byte);
    const float scale = power_of_two(byte - BIAS);
    uint8_t bytes[BLOCK];
    store_bytes(qdata, bytes);
    for (int i = 0; i < BLOCK; ++i) {
        const float error = magnitudes[i] - value_of<E>(bytes[i] & ((1 << (E::bits - 1)) - 1)) * scale;
        squares[i] = error * error;
    }
    return qdata;
}

template <class E>
inline Errors compare(const Lanes& v, const Lanes& a, int byte, int other, Lanes* qdata) {
    uint16_t bits[BLOCK];
    float values[BLOCK], squares[2][BLOCK];
    std::memcpy(bits, &a, sizeof bits);
    widen(bits, values);
    qdata[0] = attempt<E>(v, a, values, byte, squares[0]);
    qdata[1] = attempt<E>(v, a, values, other, squares[1]);
    double first = 0.0, second = 0.0;
    int smaller = 0;
#pragma omp simd reduction(+ : first, second, smaller)
    for (int i = 0; i < BLOCK; ++i) {
        first += squares[0][i];
        second += squares[1][i];
        smaller += squares[1][i] < squares[0][i];
    }
    return {first, second, smaller > 0};
}

// Encode one block with the second scale if its mean float32 error is less. `tables`: two scale bytes by the bits
// of the largest magnitude. If no single error is less, the sum is not, in any order of summation. If the difference of
// the sums exceeds the float32 rounding error, the double sums decide; otherwise the block is unresolved.
template <class E>
inline bool choose_block(const bf16* x, const uint8_t* tables, uint8_t* out, uint8_t* scale) {
    const Lanes v = load(x), a = magnitudes(v);
    const uint32_t top = largest(a);
    if (top >= Input<bf16>::infinity) return nan_block<E>(out, scale), false;
    const int byte = tables[top], other = tables[top + 0x8000];
    if (byte == other || byte < FIRST_BYTE || other < FIRST_BYTE) {
        encode_block<E, Rounding::msms>(x, tables, out, scale);
        return top > 0 && (byte < FIRST_BYTE || other < FIRST_BYTE);
    }
    Lanes qdata[2];
    const Errors errors = compare<E>(v, a, byte, other, qdata);
    const double total = errors.first + errors.second, difference = errors.first - errors.second;
    const bool second = errors.second_may_win && difference > 0.0;
    store<E>(qdata[second], out);
    *scale = uint8_t(second ? other : byte);
    const bool certain = total > 1e-30 && total < 1e30 && std::abs(difference) > total * 0x1p-18;
    return errors.second_may_win && !certain;
}

constexpr int CANDIDATES = 25;

// Sums of squared errors of e2m1 blocks for each of CANDIDATES constants in ascending order. The scale byte of a block
// is `first` for candidates before index `turn`, then `second`. `tables`: first, second, turn.
struct Search {
    double first[CANDIDATES + 1] = {}, second[CANDIDATES + 1] = {};  // indexed by turn

    void add(const bf16* x, const uint8_t* tables) {
        const Lanes v = load(x), a = magnitudes(v);
        const uint32_t top = largest(a);
        if (top >= Input<bf16>::infinity) return;  // counts as a block of zeros
        Lanes qdata[2];
        const Errors errors = compare<E2M1>(v, a, tables[top], tables[top + 0x8000], qdata);
        const int turn = tables[top + 0x10000];
        first[turn] += errors.first;
        second[turn] += errors.second;
    }
    void add_to(double* sums) const {  // one per candidate
        for (int c = 0; c < CANDIDATES; ++c)
            for (int turn = 0; turn <= CANDIDATES; ++turn) sums[c] += c < turn ? first[turn] : second[turn];
    }
};

}  // namespace ascendit
