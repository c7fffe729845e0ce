// Prefetch and non-temporal stores for large tensors.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ascendit {

constexpr int64_t LARGE = 1 << 24;  // bytes of output; smaller tensors stay in the cache for the next reader
constexpr int AHEAD = 4096;         // bytes; prefetch distance
constexpr int LINE = 64;

// Prefetch `bytes` that begin AHEAD of x.
inline void prefetch_ahead(const void* x, int bytes) {
    for (int at = 0; at < bytes; at += LINE) __builtin_prefetch((const void*)((uintptr_t)x + AHEAD + at));
}

// memcpy of complete cache lines by non-temporal stores, if `to` is aligned.
inline void write_past_cache(uint8_t* to, const uint8_t* from, int64_t bytes) {
#if defined(__SSE2__)
    if ((uintptr_t)to % LINE == 0) {
        for (int64_t at = 0; at < bytes; at += LINE) {
#if defined(__AVX512F__)
            _mm512_stream_si512((__m512i*)(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX__)
            for (int i = 0; i < LINE; i += 32)
                _mm256_stream_si256((__m256i*)(to + at + i), _mm256_loadu_si256((const __m256i*)(from + at + i)));
#else
            for (int i = 0; i < LINE; i += 16)
                _mm_stream_si128((__m128i*)(to + at + i), _mm_loadu_si128((const __m128i*)(from + at + i)));
#endif
        }
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

// Make non-temporal stores visible to other threads.
inline void end_of_writes() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace ascendit
