// Encode a block of 32 values under a scale.
#pragma once
#include "floats.h"
#include "lanes.h"

namespace ascendit {

// rint: ties to even, all signs preserved. msms: ties away from zero, signs dropped up to `unsigned_up_to`.
enum class Rounding { rint, msms };

constexpr int FIRST_BYTE = 32;  // from this scale byte on, subnormal bfloat16 values are 0 in every element

// msModelSlim drops the sign of zeros: in e2m1 only of zero itself, in e4m3 of all values that scaling by this byte
// rounds to zero in float32 (2^-150 and less). Returns the largest such magnitude in bfloat16 bits.
template <class E>
inline int unsigned_up_to(int byte) {
    if (E::packed || byte < 144) return 0;
    return byte <= 151 ? 1 << (byte - 144) : (byte - 150) << 7;
}

// Encode 32 bfloat16 values `v` with magnitudes `a` under a scale byte from FIRST_BYTE to 254; `base` is base_of it.
// Integers only. t: bits of the scaled value, its exponent relative to the subnormals of the element. A normal
// encoding is t without its last bits, rounded; a subnormal one is the mantissa shifted by the exponent. Both have
// 9 fractional bits before rounding.
template <class E, Rounding R>
inline Lanes encode_lanes(const Lanes& v, const Lanes& a, uint16_t base, int16_t no_sign) {
    constexpr uint16_t limit = E::largest << 9, sign = 1 << (E::bits - 1);
    Lanes qdata;
    for (int p = 0; p < PARTS; ++p) {
        const I16 t = (I16)(a.part[p] - base);
        const U16 mantissa = (a.part[p] & uint16_t(0x7F)) | uint16_t(0x80);
        const U16 small = shifted<1 + E::mbits>(mantissa, (t >> 7) + int16_t(1 + E::mbits));
        U16 c = t >= int16_t(128) ? (U16)t << (2 + E::mbits) : small;
        c = smaller(c, limit);
        U16 negative = (v.part[p] >> (16 - E::bits)) & sign;
        if (R == Rounding::rint) {
            c += uint16_t(255) + ((c >> 9) & uint16_t(1));
        } else {
            c += uint16_t(256);
            negative &= (U16)((I16)a.part[p] > no_sign);
        }
        qdata.part[p] = (c >> 9) | negative;
    }
    return qdata;
}

template <class E>
inline uint16_t base_of(int byte) {
    return uint16_t((byte + E::emin - 1) << 7);
}

template <class E, Rounding R>
inline Lanes encode_lanes(const Lanes& v, const Lanes& a, int byte) {
    return encode_lanes<E, R>(v, a, base_of<E>(byte), int16_t(R == Rounding::msms ? unsigned_up_to<E>(byte) : 0));
}

template <class E>
inline void store(const Lanes& qdata, uint8_t* out) {
    E::packed ? store_nibbles(qdata, out) : store_bytes(qdata, out);
}

// Encode a finite float32. `scaled`: x times 2^-exponent, rounded to float32. The same steps as
// `mx.elements.encode` and, for msms, `mx.msmodelslim`.
template <class E, Rounding R>
inline uint8_t encode_value(float x, float scaled) {
    const float magic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer, ties to even
    uint32_t bits = to_bits(scaled) & 0x7FFFFFFF;
    bits = bits < E::max_bits ? bits : E::max_bits;
    int e = int(bits >> 23) - BIAS;
    e = e < E::emin ? E::emin : e;
    const float steps = from_bits(bits) * from_bits(uint32_t(E::mbits - e + BIAS) << 23);
    const bool negative = R == Rounding::rint ? to_bits(scaled) >> 31 : (E::packed ? x : scaled) < 0.0f;
    const int rounded = R == Rounding::rint ? int(to_bits(steps + magic)) - int(to_bits(magic)) : int(steps + 0.5f);
    return uint8_t((rounded + ((e - E::emin) << E::mbits)) | int(negative) << (E::bits - 1));
}

// Encode 32 finite float32 values with an exponent from -127 to 127.
template <class E, Rounding R>
__attribute__((noinline)) void store_encoded(const float* x, int exponent, uint8_t* out) {
    const float scale = power_of_two(-exponent);
    uint8_t qdata[BLOCK];
    for (int i = 0; i < BLOCK; ++i) qdata[i] = encode_value<E, R>(x[i], x[i] * scale);
    if (!E::packed) std::memcpy(out, qdata, BLOCK);
    for (int i = 0; E::packed && i < BLOCK / 2; ++i) out[i] = uint8_t(qdata[2 * i] | qdata[2 * i + 1] << 4);
}

template <class T>
inline void widen(const T* x, float* out) {
    for (int i = 0; i < BLOCK; ++i) out[i] = to_float(x[i]);
}

template <class E>
__attribute__((noinline)) void tiny_block(const bf16* x, int byte, uint8_t* out) {
    float values[BLOCK];
    widen(x, values);
    store_encoded<E, Rounding::rint>(values, byte - BIAS, out);
}

// Output of a block with an infinity or a NaN.
template <class E>
inline void nan_block(uint8_t* out, uint8_t* scale) {
    std::memset(out, E::nan, E::block_bytes);
    *scale = NAN_BYTE;
}

// Encode one bfloat16 block. `table`: scale byte by the bits of the largest magnitude. Returns whether `mx.reference`
// must encode it again: the smallest values under msModelSlim's rules.
template <class E, Rounding R>
inline bool encode_block(const bf16* x, const uint8_t* table, uint8_t* out, uint8_t* scale) {
    const Lanes v = load(x), a = magnitudes(v);
    const uint32_t top = largest(a);
    if (__builtin_expect(top >= Input<bf16>::infinity, 0)) return nan_block<E>(out, scale), false;
    const int byte = *scale = table[top];
    if (__builtin_expect(byte < FIRST_BYTE && top > 0, 0)) {
        if (R == Rounding::rint) tiny_block<E>(x, byte, out);
        return R != Rounding::rint;
    }
    store<E>(encode_lanes<E, R>(v, a, top ? byte : BIAS), out);
    return false;
}

// BATCH bfloat16 blocks in two steps, so that the scales of the next batch are computed before this one is encoded:
// this gives the processor enough independent work.
template <class E, Rounding R>
struct Batch {
    static constexpr int last = R == Rounding::msms && !E::packed ? 143 : 254;  // above it, see `unsigned_up_to`
    const bf16* x;
    uint8_t* scale;
    uint16_t bases[BATCH];
    bool special;

    void compute_scales(const bf16* from, const uint8_t* table, uint8_t* to) {
        uint16_t tops[BATCH];
        largest_of_batch(from, tops);
        int outside = 0;  // negative if one byte is under FIRST_BYTE or above `last`
        for (int i = 0; i < BATCH; ++i) {
            hide(tops);
            const int byte = table[tops[i]];
            to[i] = uint8_t(byte);
            bases[i] = base_of<E>(byte);
            outside |= (byte - FIRST_BYTE) | (last - byte);
        }
        x = from, scale = to, special = outside < 0;
    }
    // Returns how many blocks `mx.reference` must encode again.
    int64_t encode(const uint8_t* table, uint8_t* out, uint8_t* unresolved) const {
        for (int i = 0; i < BATCH; ++i) {
            const Lanes v = load(x + i * BLOCK);
            store<E>(encode_lanes<E, R>(v, magnitudes(v), bases[i], 0), out + i * E::block_bytes);
        }
        if (R == Rounding::msms) std::memset(unresolved, 0, BATCH);
        return __builtin_expect(special, 0) ? encode_special(table, out, unresolved) : 0;
    }
    __attribute__((noinline)) int64_t encode_special(const uint8_t* table, uint8_t* out, uint8_t* unresolved) const {
        int64_t sum = 0;
        for (int i = 0; i < BATCH; ++i) {
            if (scale[i] >= FIRST_BYTE && scale[i] <= last) continue;
            const bool again = encode_block<E, R>(x + i * BLOCK, table, out + i * E::block_bytes, scale + i);
            if (R == Rounding::msms) unresolved[i] = again;
            sum += again;
        }
        return sum;
    }
};

struct Rule {  // exponent = E - shift + ((frac & mask) > threshold), see mx/scales.py
    int shift;
    uint32_t threshold, mask;
    int exponent(float amax) const {
        const uint32_t bits = to_bits(amax);
        const int e = int(bits >> 23) - BIAS - shift + int((bits & 0x7FFFFF & mask) > threshold);
        return e < -BIAS ? -BIAS : e > BIAS ? BIAS : e;
    }
};

// Encode one block of any input type.
template <class E, class T>
inline void encode_block(const T* x, const Rule& rule, uint8_t* out, uint8_t* scale) {
    const uint32_t top = largest_of(x, BLOCK);
    if (top >= Input<T>::infinity) return nan_block<E>(out, scale);
    const int exponent = rule.exponent(Input<T>::widen(top));
    float values[BLOCK];
    widen(x, values);
    store_encoded<E, Rounding::rint>(values, exponent, out);
    *scale = uint8_t(exponent + BIAS);
}

}  // namespace ascendit
