// bfloat16, float16 and float32 as bits, and the elements of MX formats.
#pragma once
#include <cstdint>
#include <cstring>

namespace ascendit {

using bf16 = uint16_t;
struct half {  // IEEE float16
    uint16_t bits;
};

// See `mx.formats.Element`; `largest` and `nan` are encodings.
template <int EBITS, int MBITS, int EMAX, int LARGEST, int NAN_CODE>
struct Element {
    static constexpr int bits = 1 + EBITS + MBITS, mbits = MBITS, emax = EMAX, emin = 2 - (1 << (EBITS - 1));
    static constexpr int largest = LARGEST, nan = NAN_CODE, block_bytes = 32 * bits / 8;
    static constexpr bool packed = bits == 4;
    static constexpr uint32_t max_bits = (LARGEST << (23 - MBITS)) + (uint32_t(emin + 126) << 23);  // float32
};
using E4M3 = Element<4, 3, 8, 0x7E, 0x7F>;
using E5M2 = Element<5, 2, 15, 0x7B, 0x7F>;
using E2M1 = Element<2, 1, 2, 0x7, 0>;

constexpr int BIAS = 127, NAN_BYTE = 255;

inline float from_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint32_t to_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

inline float power_of_two(int exponent) {  // exponent in [-127, 127]
    return from_bits(exponent > -BIAS ? uint32_t(exponent + BIAS) << 23 : 1u << 22);
}

// Bits of |x|, in the same order as the values; `Input`: the bits of infinity, and bits to float32.
inline uint32_t magnitude(bf16 x) { return x & 0x7FFF; }
inline uint32_t magnitude(half x) { return x.bits & 0x7FFF; }
inline uint32_t magnitude(float x) { return to_bits(x) & 0x7FFFFFFF; }

template <class T>
struct Input;
template <>
struct Input<bf16> {
    static constexpr uint32_t infinity = 0x7F80;
    static float widen(uint32_t bits) { return from_bits(bits << 16); }
};
template <>
struct Input<half> {
    static constexpr uint32_t infinity = 0x7C00;
    static float widen(uint32_t bits) {
        const float finite = from_bits(bits << 13) * 0x1p112f;  // exact, subnormals too
        return from_bits(bits >= infinity ? 0x7F800000 : to_bits(finite));
    }
};
template <>
struct Input<float> {
    static constexpr uint32_t infinity = 0x7F800000;
    static float widen(uint32_t bits) { return from_bits(bits); }
};

// To float32, exact. A float16 NaN becomes an infinity, since its value is never used.
inline float to_float(bf16 x) { return from_bits(uint32_t(x) << 16); }
inline float to_float(half x) {
    return from_bits(to_bits(Input<half>::widen(magnitude(x))) | uint32_t(x.bits & 0x8000) << 16);
}
inline float to_float(float x) { return x; }

// float32, not NaN, to bfloat16, ties to even.
inline bf16 to_bf16(float f) {
    const uint32_t bits = to_bits(f);
    return bf16((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Bits of the largest magnitude; at least those of infinity if a value is not finite.
template <class T>
inline uint32_t largest_of(const T* x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) top = magnitude(x[i]) > top ? magnitude(x[i]) : top;
    return top;
}
template <>
inline uint32_t largest_of(const bf16* x, int64_t n) {  // in 16-bit lanes
    uint16_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint16_t bits = x[i] & 0x7FFF;
        top = bits > top ? bits : top;
    }
    return top;
}

// The value of an encoding without its sign.
template <class E>
inline float value_of(uint32_t code) {
    const float normal = from_bits((code << (23 - E::mbits)) + (uint32_t(E::emin + BIAS - 1) << 23));
    const float subnormal = float(int32_t(code)) * from_bits(uint32_t(E::emin - E::mbits + BIAS) << 23);
    return code >> E::mbits ? normal : subnormal;
}

}  // namespace ascendit
