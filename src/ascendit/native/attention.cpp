// softmax(q k^T / sqrt(d)) v on BF16; scores and sums are float32. See attention.h.
#include "attention.h"

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
        for (int j0 = 0; j0 < width; j0 += PANEL) {
            const int columns = std::min(PANEL, width - j0);
            for (int j = 0; j < columns; ++j) {
                const bf16* from = a.k + ((first + j0 + j) * a.H + h) * a.d;
                for (int p = 0; p < a.d / 2; ++p)
                    if (j0 + j < rows)
                        std::memcpy(to + p * columns + j, from + 2 * p, 4);
                    else
                        to[p * columns + j] = 0;
            }
            to += columns * a.d / 2;
        }
    }

    void multiply(const void* queries, const void* keys, int width, float* scores) const {
        ascendit::attention::multiply((const bf16*)queries, int(a.d), (const bf16*)keys, int(a.d / 2), scores, KEYS, width, false);
    }
};

}  // namespace

// top, sum: float32 [H, S], or null: the largest score, and the sum of exponentials relative to it. parts: BF16
// numbers per probability, 1 or 2.
extern "C" void attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* top, float* sum,
                               int64_t S, int64_t L, int64_t H, int64_t d, int64_t parts, int64_t threads) {
    const Problem a{q, k, v, out, top, sum, S, L, H, d, parts};
    attend(a, Bf16Scores{a}, threads);
}
