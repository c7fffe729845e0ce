// Tokens (rows of an activation) as steps of a product, see `tiles.h`.
//
// Stored in the order that tiles read them: [stretch of K][token][bytes of a stretch], one stream per tile. In
// a row-major matrix every few cache lines would begin a new page, which hardware prefetchers do not cross.
#pragma once
#include "tiles.h"

namespace ascendit {

struct Streams {
    uint8_t* memory;
    int64_t tokens, bytes;  // tokens per chunk; bytes of a token in a stretch

    uint8_t* at(int64_t stretch, int64_t token) const { return memory + (stretch * tokens + token) * bytes; }
};

// Number of blocks of a row that are `unsupported`.
template <class E>
inline int64_t unsupported_in_row(const BlockRows<E>& rows, int64_t row) {
    const uint8_t* scale = rows.scale + row * (rows.length / BLOCK);
    int64_t sum = 0;
    for (int64_t k = 0; k < rows.length; k += BLOCK) sum += unsupported(rows.decode, rows.at(row, k), scale[k / BLOCK]);
    return sum;
}

// Values [k, end) of a token to bfloat16; returns the number of unsupported blocks. A block of byte 255 is NaN.
template <class E>
inline int64_t to_steps(const BlockRows<E>& rows, int64_t m, int64_t k, int64_t end, uint8_t* out) {
    const uint8_t* scale = rows.scale + m * (rows.length / BLOCK);
    int64_t count = 0;
    for (; k < end; k += BLOCK, out += 2 * BLOCK) {
        const int byte = scale[k / BLOCK];
        const __m512i values = rows.decode(rows.at(m, k));
        __m512i v = scaled(values, byte);
        if (__builtin_expect(byte < Exact<E>::first || byte > Exact<E>::last, 0)) {
            if (byte == NAN_BYTE)
                v = _mm512_set1_epi16(0x7FC0);
            else
                count += _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7FFF)) != 0;
        }
        _mm512_storeu_si512(out, v);
    }
    return count;
}

inline int64_t to_steps(const Fp8Rows& rows, int64_t m, int64_t k, int64_t end, uint8_t* out) {
    for (; k < end; k += BLOCK, out += 2 * BLOCK) _mm512_storeu_si512(out, rows.decode(rows.at(m, k)));
    return 0;
}

inline __mmask64 bytes_here(int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

// Copy the int8 values [k, end) of a token, and add them to `sum`.
inline void to_steps(const int8_t* token, int64_t k, int64_t end, uint8_t* out, int32_t* sum) {
    __m512i all = _mm512_setzero_si512();
    for (; k < end; k += 64, out += 64) {
        const __m512i v = _mm512_maskz_loadu_epi8(bytes_here(end - k), token + k);
        all = _mm512_dpbusd_epi32(all, _mm512_set1_epi8(1), v);
        _mm512_mask_storeu_epi8(out, bytes_here(end - k), v);
    }
    *sum += _mm512_reduce_add_epi32(all);
}

}  // namespace ascendit
