// Formats with one float32 scale per tile of 128 x 128 values: scale = max|x| / 127 (int8) or 448 (fp8), qdata =
// x / scale rounded to nearest, ties to even. Both divisions are float32, as in npu_dynamic_block_quant. A tile of
// zeros has scale 0; a tile with infinities or NaN has scale NaN.
#pragma once
#include "rows.h"
#include "spread.h"

namespace ascendit {

constexpr int TILE = 128, STRIP = 4 * TILE;  // a strip of TILE rows x STRIP values stays in the L2 cache

// largest[i] = max(largest[i], |x[i]|), as bits. 16 bits suffice for the magnitudes of 16-bit types.
template <class T, class Bits>
inline void update_largest(const T* __restrict x, int64_t n, Bits* __restrict largest) {
    for (int64_t i = 0; i < n; ++i) {
        const Bits bits = Bits(magnitude(x[i]));
        largest[i] = bits > largest[i] ? bits : largest[i];
    }
}

// `height` rows of `width` <= STRIP values, `stride` apart, and the scales of their tiles.
template <class RowFormat, class T>
inline void encode_strip(const RowFormat format, float max, const T* x, int64_t height, int64_t width, int64_t stride,
                         uint8_t* qdata, float* scale) {
    std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t> largest[STRIP] = {};
    for (int64_t row = 0; row < height; ++row) update_largest(x + row * stride, width, largest);
    for (int64_t k = 0; k < width; k += TILE, ++scale) {
        const int64_t count = std::min<int64_t>(TILE, width - k);
        const uint32_t top = *std::max_element(largest + k, largest + k + count);
        const bool finite = top < Input<T>::infinity;
        *scale = finite ? Input<T>::widen(top) / max : NAN;
        for (int64_t row = 0; row < height; ++row) {
            uint8_t* out = qdata + row * stride + k;
            if (finite)
                encode_values(format, x + row * stride + k, count, not_zero(*scale), out);
            else
                std::memset(out, format.nonfinite, count);
        }
    }
}

// qdata [rows, length], scale [ceil(rows / TILE), ceil(length / TILE)].
template <class RowFormat, class T>
inline int64_t over_tiles(const RowFormat format, float max, const T* x, Shape s, uint8_t* qdata, float* scale) {
    const int64_t tiles = (s.length + TILE - 1) / TILE;
    const int threads = int(std::min(s.threads, 1 + s.rows * s.length / WORTH_A_THREAD));
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t row = 0; row < s.rows; row += TILE)
        for (int64_t k = 0; k < s.length; k += STRIP) {
            const int64_t at = row * s.length + k;
            encode_strip(format, max, x + at, std::min<int64_t>(TILE, s.rows - row),
                         std::min<int64_t>(STRIP, s.length - k), s.length, qdata + at,
                         scale + row / TILE * tiles + k / TILE);
        }
    return 0;
}

}  // namespace ascendit
