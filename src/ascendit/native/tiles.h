// A quantized weight [N, K] to tiles in the order of multiplication. Needs AVX-512 with VBMI.
//
// A tile has COLUMNS adjacent channels; a step is a 32-bit lane of each: two bfloat16 or four bytes adjacent along K.
// Scales that are powers of two are added to the exponent, which is exact.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "floats.h"
#include "transpose.h"

namespace ascendit {

constexpr int COLUMNS = 64, LANES = 16, BLOCK = 32;

// Scale bytes for which all values of a block are normal bfloat16, with headroom for sums.
template <class E>
struct Exact {
    static constexpr int smallest = E::emin - E::mbits, room = 24;  // exponent of the smallest value; bits for sums
    static constexpr int first = -126 - smallest + BIAS, last = 127 - E::emax + BIAS - room;
};

// The bfloat16 of each e4m3 magnitude, low and high bytes separately.
struct E4m3Table {
    alignas(64) uint8_t low[128], high[128];
    E4m3Table() {
        for (int code = 0; code < 128; ++code) {
            const uint32_t bits = code == E4M3::nan ? 0x7FC0 : to_bits(value_of<E4M3>(code)) >> 16;
            low[code] = uint8_t(bits), high[code] = uint8_t(bits >> 8);
        }
    }
};
struct E2m1Table {
    alignas(64) uint16_t value[32];  // repeated, since a lookup uses five bits
    E2m1Table() {
        for (int code = 0; code < 32; ++code)
            value[code] = uint16_t(to_bits(value_of<E2M1>(code & 7)) >> 16 | (code & 8) << 12);
    }
};

// 32 elements -> 32 bfloat16.
template <class E>
struct Decoder;
template <>
struct Decoder<E4M3> {
    __m512i low[2], high[2], twice;
    Decoder() {
        static const E4m3Table table;
        uint8_t index[64];
        for (int i = 0; i < 64; ++i) index[i] = uint8_t(i / 2);
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_load_si512(table.low + 64 * i);
            high[i] = _mm512_load_si512(table.high + 64 * i);
        }
        twice = _mm512_loadu_si512(index);
    }
    __m512i operator()(const uint8_t* qdata) const {
        const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)qdata));
        const __m512i code = _mm512_permutexvar_epi8(twice, both);  // each in both bytes of a lane
        __m512i v = _mm512_mask2_permutex2var_epi8(high[0], code, 0xAAAAAAAAAAAAAAAA, high[1]);
        v = _mm512_mask2_permutex2var_epi8(low[0], v, 0x5555555555555555, low[1]);
        return _mm512_ternarylogic_epi32(v, code, _mm512_set1_epi16(int16_t(0x8000)), 0xF8);  // v | (code & sign)
    }
};
template <>
struct Decoder<E2M1> {
    __m512i table;
    Decoder() {
        static const E2m1Table values;
        table = _mm512_load_si512(values.value);
    }
    __m512i operator()(const uint8_t* qdata) const {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)qdata));
        return _mm512_permutexvar_epi16(_mm512_or_si512(byte, _mm512_slli_epi32(byte, 12)), table);
    }
};

inline __m512i scaled(__m512i values, int byte) {
    const __mmask32 some = _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7FFF));  // zeros are unchanged
    return _mm512_mask_add_epi16(values, some, values, _mm512_set1_epi16(int16_t((byte - BIAS) * 128)));
}

// Whether a block has NaN or values that are not normal bfloat16. A block of zeros may have any scale.
template <class E>
inline bool unsupported(const Decoder<E>& decode, const uint8_t* qdata, int byte) {
    if (byte == NAN_BYTE) return true;
    const __m512i magnitude = _mm512_and_si512(decode(qdata), _mm512_set1_epi16(0x7FFF));
    if (_mm512_cmpge_epi16_mask(magnitude, _mm512_set1_epi16(0x7F80))) return true;
    return (byte < Exact<E>::first || byte > Exact<E>::last) && _mm512_test_epi16_mask(magnitude, magnitude);
}

// ---- sources of the steps of a row --------------------------------------------------------------

template <class E>
struct BlockRows {  // MX: qdata and scale bytes
    static constexpr int per_step = 2;
    const uint8_t *qdata, *scale;
    int64_t length;
    Decoder<E> decode{};

    const uint8_t* at(int64_t row, int64_t k) const { return qdata + (row * length + k) * E::bits / 8; }
    __m512i steps(int64_t row, int64_t k, int64_t) const {
        return scaled(decode(at(row, k)), scale[row * (length / BLOCK) + k / BLOCK]);
    }
};

struct Fp8Rows {  // e4m3, scaled after the sum
    static constexpr int per_step = 2;
    const uint8_t* qdata;
    int64_t length;
    Decoder<E4M3> decode{};

    const uint8_t* at(int64_t row, int64_t k) const { return qdata + row * length + k; }
    __m512i steps(int64_t row, int64_t k, int64_t) const { return decode(at(row, k)); }
};

struct ByteRows {  // int8 plus 128, since one side of the product must be unsigned
    static constexpr int per_step = 4;
    const uint8_t* qdata;
    int64_t length;

    const uint8_t* at(int64_t row, int64_t k) const { return qdata + row * length + k; }
    __m512i steps(int64_t row, int64_t k, int64_t end) const {
        const __mmask64 here = end - k >= 64 ? ~0ull : (1ull << (end - k)) - 1;
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(here, at(row, k)), _mm512_set1_epi8(int8_t(0x80)));
    }
};

// ---- tiles --------------------------------------------------------------------------------------

// Channels from `n`, values [k, end) -> tile [steps][COLUMNS]. Channels beyond the last repeat it.
template <class Rows>
inline void fill(const Rows& rows, int64_t n, int64_t N, int64_t k, int64_t end, uint32_t* tile) {
    for (; k < end; k += LANES * Rows::per_step, tile += LANES * COLUMNS)
        for (int j = 0; j < COLUMNS; j += LANES) {
            __m512i v[LANES];
            for (int i = 0; i < LANES; ++i) v[i] = rows.steps(std::min(n + j + i, N - 1), k, end);
            transpose(v);
            for (int i = 0; i < LANES; ++i) _mm512_store_si512(tile + i * COLUMNS + j, v[i]);
        }
}

}  // namespace ascendit
