// A block of 32 values as 16-bit lanes: one register with AVX-512, two with AVX2, four with NEON and SSE2.
// Arithmetic uses vector types of GCC and Clang, and intrinsics for operations that they lack.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE4_1__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ascendit {

#if defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int REGISTER = 64;
constexpr const char* INSTRUCTIONS = "AVX-512";
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
constexpr const char* INSTRUCTIONS = "AVX2";
#elif defined(__aarch64__)
constexpr int REGISTER = 16;
constexpr const char* INSTRUCTIONS = "NEON";
#else
constexpr int REGISTER = 16;
constexpr const char* INSTRUCTIONS = "plain C++";
#endif

constexpr int BLOCK = 32, LANES = REGISTER / 2, PARTS = BLOCK / LANES;
typedef uint16_t U16 __attribute__((vector_size(REGISTER)));
typedef int16_t I16 __attribute__((vector_size(REGISTER)));
typedef uint32_t U32 __attribute__((vector_size(REGISTER)));
typedef uint8_t Octets __attribute__((vector_size(LANES)));
typedef uint8_t Packed __attribute__((vector_size(LANES / 2)));

struct Lanes {
    U16 part[PARTS];
};

inline Lanes load(const uint16_t* x) {
    Lanes v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

inline Lanes magnitudes(const Lanes& v) {
    Lanes a;
    for (int p = 0; p < PARTS; ++p) a.part[p] = v.part[p] & uint16_t(0x7FFF);
    return a;
}

// The largest of 32 lanes.
inline uint32_t largest(const Lanes& v) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m512i all = (__m512i)v.part[0];
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#elif defined(__AVX2__)
    const __m256i half = _mm256_max_epu16((__m256i)v.part[0], (__m256i)v.part[1]);
#endif
#if defined(__AVX2__)
    const __m128i top = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(top, _mm_set1_epi16(-1)));
    return uint16_t(~_mm_extract_epi16(least, 0));
#else
    U16 top = v.part[0];
    for (int p = 1; p < PARTS; ++p) top = v.part[p] > top ? v.part[p] : top;
#if defined(__aarch64__)
    return vmaxvq_u16((uint16x8_t)top);
#else
    uint16_t result = 0;
    for (int i = 0; i < LANES; ++i) result = top[i] > result ? top[i] : result;
    return result;
#endif
#endif
}

constexpr int BATCH = 16;  // blocks whose scales are computed before they are encoded

// The largest magnitudes of 16 bfloat16 blocks. AVX-512: merges halves of two registers into one, four times.
inline void largest_of_batch(const uint16_t* x, uint16_t* out) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const auto block = [=](int slot) {  // in output order
        const __m512i v = _mm512_loadu_si512(x + BLOCK * (slot % 4 * 4 + slot / 4));
        return _mm512_and_si512(v, _mm512_set1_epi16(0x7FFF));
    };
    const auto two = [&](int slot) {
        const __m512i a = block(slot), b = block(slot + 1);
        return _mm512_max_epu16(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
    };
    const auto four = [&](int slot) {
        const __m512i a = two(slot), b = two(slot + 2);
        return _mm512_max_epu16(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
    };
    const auto eight = [&](int slot) {
        const __m512i a = four(slot), b = four(slot + 4);
        return _mm512_max_epu16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    };
    const __m512 a = (__m512)eight(0), b = (__m512)eight(8);
    const __m512i halves =
        _mm512_max_epu16((__m512i)_mm512_shuffle_ps(a, b, 0x88), (__m512i)_mm512_shuffle_ps(a, b, 0xDD));
    const __m512i all = _mm512_max_epu16(halves, _mm512_srli_epi32(halves, 16));
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(all));
#else
    for (int i = 0; i < BATCH; ++i) out[i] = uint16_t(largest(magnitudes(load(x + i * BLOCK))));
#endif
}

// Hide the content of memory from the compiler, which would otherwise extract 16 scalars from a register.
template <class T>
inline void hide(T& memory) {
    asm("" : "+m"(memory));
}

inline U16 smaller(U16 a, uint16_t b) {  // GCC uses two instructions instead of one
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (U16)_mm512_min_epu16((__m512i)a, _mm512_set1_epi16(int16_t(b)));
#elif defined(__AVX2__)
    return (U16)_mm256_min_epu16((__m256i)a, _mm256_set1_epi16(int16_t(b)));
#else
    return a < b ? a : U16{} + b;
#endif
}

// value << count for counts from 0 to MAX, 0 for negative counts; undefined above MAX.
template <int MAX>
inline U16 shifted(U16 value, I16 count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (U16)_mm512_sllv_epi16((__m512i)value, (__m512i)count);
#elif defined(__AVX2__)  // no 16-bit variable shift: multiply by 2^count, looked up by the low byte
    const __m256i powers = _mm256_broadcastsi128_si256(_mm_set_epi64x(0, 0x8040201008040201));
    const __m256i least = _mm256_max_epi16((__m256i)count, _mm256_set1_epi16(-1));
    const __m256i index = _mm256_or_si256(least, _mm256_set1_epi16(int16_t(0x8000)));
    return value * (U16)_mm256_shuffle_epi8(powers, index);
#elif defined(__aarch64__)  // negative counts shift to the right
    return (U16)vshlq_u16((uint16x8_t)value, (int16x8_t)count) & (U16)(count >= int16_t(0));
#else
    U16 out = value & (U16)(count == int16_t(0));
    for (int n = 1; n <= MAX; ++n) out |= (value << n) & (U16)(count == int16_t(n));
    return out;
#endif
}

// The low bytes of 32 lanes.
inline void store_bytes(const Lanes& v, uint8_t* out) {
    for (int p = 0; p < PARTS; ++p) {
        const Octets low = __builtin_convertvector(v.part[p], Octets);
        std::memcpy(out + p * LANES, &low, sizeof low);
    }
}

// The low nibbles of 32 lanes, the even lane in the low nibble of each of 16 bytes.
inline void store_nibbles(const Lanes& v, uint8_t* out) {
    for (int p = 0; p < PARTS; ++p) {
        U32 pair = (U32)v.part[p];  // little endian: the even lane is the low half
        pair |= pair >> 12;
        const Packed low = __builtin_convertvector(pair & 0xFFu, Packed);
        std::memcpy(out + p * (LANES / 2), &low, sizeof low);
    }
}

}  // namespace ascendit
