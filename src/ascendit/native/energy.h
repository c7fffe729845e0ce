// Signal and noise energy: sums of x^2 and (x - decoded)^2 in double.
#pragma once
#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "rows.h"

namespace ascendit {

struct Int8Element {
    static constexpr int bits = 8;
    static constexpr bool packed = false;
};

struct Energy {  // eight independent sums, for vector instructions
    static constexpr int SUMS = 8;
    double signal[SUMS] = {}, noise[SUMS] = {};

    void add_to(double* sums) const {
        for (int i = 0; i < SUMS; ++i) {
            sums[0] += signal[i];
            sums[1] += noise[i];
        }
    }
};

struct Quantized {  // output of an encoder; scales are E8M0 `bytes`, or if null a float32 `scale` per row
    const uint8_t *qdata, *bytes;
    const float *scale, *dual;
};

template <class E>
inline float decoded(uint32_t code) {
    constexpr uint32_t sign = 1u << (E::bits - 1);
    return from_bits(to_bits(value_of<E>(code & (sign - 1))) | (code & sign) << (32 - E::bits));
}
template <>
inline float decoded<Int8Element>(uint32_t code) {
    return float(int8_t(code));
}

// Add 32 values. Decoding is as in `mx.decode`: element x scale, rounded, x dual, rounded.
template <class E, class T>
inline void add(Energy& sum, const T* x, const uint8_t* code, float scale, float dual) {
    float inputs[BLOCK], values[BLOCK];
    uint8_t qdata[BLOCK];
    std::memcpy(qdata, code, BLOCK * E::bits / 8);
    if (E::packed) {
        uint16_t pairs[BLOCK / 2];  // little endian: the low nibble comes first
        for (int i = 0; i < BLOCK / 2; ++i) pairs[i] = uint16_t((code[i] | code[i] << 4) & 0x0F0F);
        std::memcpy(qdata, pairs, BLOCK);
    }
    for (int i = 0; i < BLOCK; ++i) inputs[i] = to_float(x[i]);
    for (int i = 0; i < BLOCK; ++i) values[i] = decoded<E>(qdata[i]) * scale * dual;
    for (int start = 0; start < BLOCK; start += Energy::SUMS)
        for (int i = 0; i < Energy::SUMS; ++i) {
            const double signal = inputs[start + i], noise = signal - double(values[start + i]);
            sum.signal[i] += signal * signal;
            sum.noise[i] += noise * noise;
        }
}

// Add a row in blocks of 32, also if the scale is per row; the last block is padded with zeros.
template <class E, class T>
void add_row(Energy& sum, const T* x, int64_t row, int64_t length, const Quantized& w) {
    constexpr int BYTES = BLOCK * E::bits / 8;
    const int64_t blocks = (length + BLOCK - 1) / BLOCK, groups = (length + GROUP - 1) / GROUP;
    const uint8_t* code = w.qdata + row * ((length * E::bits + 7) / 8);
    x += row * length;
    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t byte = w.bytes ? w.bytes[row * blocks + b] : 0;
        const float scale = !w.bytes ? w.scale[row] : byte == NAN_BYTE ? NAN : power_of_two(byte - BIAS);
        const float dual = w.dual ? w.dual[row * groups + b / (GROUP / BLOCK)] : 1.0f;
        const int64_t n = length - b * BLOCK;
        if (n >= BLOCK) {
            add<E>(sum, x + b * BLOCK, code + b * BYTES, scale, dual);
            continue;
        }
        T from[BLOCK] = {};
        uint8_t bytes[BYTES] = {};
        std::memcpy(from, x + b * BLOCK, n * sizeof(T));
        std::memcpy(bytes, code + b * BYTES, (n * E::bits + 7) / 8);
        add<E>(sum, from, bytes, scale, dual);
    }
}

}  // namespace ascendit
