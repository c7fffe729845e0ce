// Elementwise operators on BF16, each in one pass: computed in float32 and rounded once to nearest even.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;

inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline bf16 to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const bf16 rounded = bf16((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    return f != f ? bf16(0x7FC0) : rounded;
}

inline float fused(float a, float b, float c) {  // a b + c; all other products are rounded, as in PyTorch
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

inline float exp2f_fast(float x) {  // relative error under 2e-7 for |x| < 126
    const float integer = std::nearbyintf(x);
    const float f = x - integer;
    float p = 1.5403530e-4f;
    p = fused(p, f, 1.3333558e-3f);
    p = fused(p, f, 9.6181291e-3f);
    p = fused(p, f, 5.5504109e-2f);
    p = fused(p, f, 2.4022651e-1f);
    p = fused(p, f, 6.9314718e-1f);
    p = fused(p, f, 1.0f);
    const int32_t power = (int32_t(integer) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

}  // namespace

extern "C" {

// out = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x / (1 + 2^(-c (x + 0.044715 x^3)))
void gelu_tanh_bf16(const bf16* x, bf16* out, int64_t n, int64_t threads) {
    const float c = -2.0f * 0.7978845608028654f * 1.44269504089f;
#pragma omp parallel for simd schedule(static) num_threads(int(threads))
    for (int64_t i = 0; i < n; ++i) {
        const float f = to_float(x[i]);
        float u = c * (f + 0.044715f * f * f * f);
        const bool vanishes = u > 125.0f;  // 1 + tanh is 0 in float32
        u = vanishes ? 125.0f : (u < -125.0f ? -125.0f : u);
        const float y = vanishes ? -0.0f : f / (1.0f + exp2f_fast(u));
        out[i] = to_bf16(f != f ? f : y);
    }
}

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight
void rms_norm_bf16(const bf16* x, const float* weight, bf16* out, int64_t rows, int64_t D, int64_t threads,
                   float eps) {
#pragma omp parallel for schedule(static) num_threads(int(threads))
    for (int64_t r = 0; r < rows; ++r) {
        const bf16* from = x + r * D;
        bf16* to = out + r * D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < D; ++i) sum += to_float(from[i]) * to_float(from[i]);
        const float inverse = 1.0f / std::sqrt(sum / float(D) + eps);
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) to[i] = to_bf16(to_float(from[i]) * inverse * weight[i]);
    }
}

// Rotate pairs (x[2i], x[2i+1]) of each head by the angles of the token. x [S, H, d]; cos, sin [S, d / 2].
void rope_bf16(const bf16* x, const float* cos, const float* sin, bf16* out, int64_t S, int64_t H, int64_t d,
               int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(int(threads))
    for (int64_t s = 0; s < S; ++s)
        for (int64_t h = 0; h < H; ++h) {
            const bf16* from = x + (s * H + h) * d;
            bf16* to = out + (s * H + h) * d;
#pragma omp simd
            for (int64_t i = 0; i < d / 2; ++i) {
                const float a = to_float(from[2 * i]), b = to_float(from[2 * i + 1]);
                const float c = cos[s * (d / 2) + i], t = sin[s * (d / 2) + i];
                to[2 * i] = to_bf16(a * c - b * t);
                to[2 * i + 1] = to_bf16(a * t + b * c);
            }
        }
}

// out = x + y * gate; x, y, out [rows, D], gate [D]
void gated_residual_bf16(const bf16* x, const bf16* y, const float* gate, bf16* out, int64_t rows, int64_t D,
                         int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(int(threads))
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) {
            const int64_t at = r * D + i;
            out[at] = to_bf16(to_float(x[at]) + to_float(y[at]) * gate[i]);
        }
    }
}

}
