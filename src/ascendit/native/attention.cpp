// softmax(q k^T / sqrt(d)) v on BF16; scores and sums are float32. See attention.h.
#include "attention.h"

#include "transpose.h"

using namespace ascendit;
using namespace ascendit::attention;

namespace {

struct Bf16Scores {
    const Problem& a;

    int64_t query_bytes() const { return a.d * 2; }
    int64_t key_bytes() const { return a.d * 2; }
    float scale() const { return a.scale(); }

    void pack_queries(int64_t h, int64_t first, int rows, void* out) const {  // [QUERIES][d]
        bf16* to = (bf16*)out;
        for (int r = 0; r < rows; ++r) std::memcpy(to + r * a.d, a.q + ((first + r) * a.H + h) * a.d, a.d * 2);
        std::fill(to + rows * a.d, to + QUERIES * a.d, bf16(0));
    }

    // Panels [d / 2][64 keys, or 32 in the last][2].
    void pack_keys(int64_t h, int64_t first, int rows, int width, void* out) const {
        uint32_t* to = (uint32_t*)out;
        for (int panel = 0; panel < width; panel += PANEL) {
            const int columns = std::min(PANEL, width - panel);
            for (int j = panel; j < panel + columns; j += LANES)
                pack_lanes(h, first + j, rows - j, columns, to + j - panel);
            to += columns * a.d / 2;
        }
    }

    void pack_lanes(int64_t h, int64_t first, int rows, int stride, uint32_t* to) const {  // LANES keys
        for (int64_t c = 0; c < a.d; c += 2 * LANES, to += LANES * stride) {
            __m512i v[LANES];
            for (int i = 0; i < LANES; ++i)
                v[i] = i < rows ? _mm512_loadu_si512(a.k + ((first + i) * a.H + h) * a.d + c) : _mm512_setzero_si512();
            transpose(v);
            for (int i = 0; i < LANES; ++i) _mm512_storeu_si512(to + i * stride, v[i]);
        }
    }

    void multiply(const void* queries, const void* keys, int width, float* scores) const {
        const int d = int(a.d);
        multiply_bf16((const bf16*)queries, d, (const bf16*)keys, d / 2, scores, KEYS, width, false);
    }
};

}  // namespace

// top, sum: float32 [H, S], or null: the largest score, and the sum of exponentials relative to it. parts: BF16
// numbers per probability, 1 or 2. Returns whether there was memory.
extern "C" int64_t attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* top, float* sum,
                                  int64_t S, int64_t L, int64_t H, int64_t d, int64_t parts, int64_t threads) {
    const Problem a{q, k, v, out, top, sum, S, L, H, d, parts};
    try {
        attend(a, Bf16Scores{a}, threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}
