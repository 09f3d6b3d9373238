#pragma once
#include <immintrin.h>

#if defined(__AVX512BF16__)
constexpr const char* SIMD_NAME = "AVX-512 with BF16";
#else
constexpr const char* SIMD_NAME = "AVX-512";
#endif
constexpr int LANES = 16, ROWS_AT_ONCE = 6;
typedef __m512 F;
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F widened(__m256i x) {
  if constexpr (DTYPE == BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  else return _mm512_cvtph_ps(x);
}
INLINE F widened(const T* p) {
  if constexpr (DTYPE == FP32) return _mm512_loadu_ps((const float*)p);
  else return widened(_mm256_loadu_si256((const __m256i*)p));
}
INLINE F of_levels(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
INLINE F widened(const int8_t* p) { return of_levels(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes looked_up(Bytes table, Bytes index) { return (Bytes)_mm_shuffle_epi8((__m128i)table, (__m128i)index); }
INLINE F expanded(uint16_t bits, const T* p) {
  if constexpr (DTYPE == FP32) return _mm512_maskz_expandloadu_ps(bits, p);
  else return widened(_mm256_maskz_expandloadu_epi16(bits, p));
}
INLINE F expanded(uint16_t bits, const int8_t* p) { return of_levels(_mm_maskz_expandloadu_epi8(bits, p)); }
INLINE uint64_t at_least(const Key* keys, Key least) {
  if constexpr (DTYPE == FP32) {
    uint64_t bits = 0;
    for (int i = 0; i < 4; i++)
      bits |= (uint64_t)_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + 16 * i), _mm512_set1_epi32(least)) << 16 * i;
    return bits;
  } else {
    const __m512i bound = _mm512_set1_epi16(least);
    return _mm512_cmpge_epu16_mask(_mm512_loadu_si512(keys), bound) |
           (uint64_t)_mm512_cmpge_epu16_mask(_mm512_loadu_si512(keys + 32), bound) << 32;
  }
}
