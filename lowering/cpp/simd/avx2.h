#pragma once
#include <immintrin.h>

constexpr const char* SIMD_NAME = "AVX2";
constexpr int LANES = 8, ROWS_AT_ONCE = 2;
typedef __m256 F;
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F widened(__m128i x) {
  if constexpr (DTYPE == BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  else return _mm256_cvtph_ps(x);
}
INLINE F widened(const T* p) {
  if constexpr (DTYPE == FP32) return _mm256_loadu_ps((const float*)p);
  else return widened(_mm_loadu_si128((const __m128i*)p));
}

INLINE F of_levels(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
INLINE F widened(const int8_t* p) { return of_levels(_mm_loadl_epi64((const __m128i*)p)); }
INLINE Bytes looked_up(Bytes table, Bytes index) { return (Bytes)_mm_shuffle_epi8((__m128i)table, (__m128i)index); }

// For each byte of bits: where each of eight channels comes from, as bytes of a shuffle (bit 7: zero). size: of an element.
template <int size> struct Sources {
  alignas(64) uint8_t at[256][8 * size];
  constexpr Sources() : at() {
    for (int bits = 0; bits < 256; bits++)
      for (int channel = 0, rank = 0; channel < 8; channel++) {
        bool kept = bits >> channel & 1;
        for (int i = 0; i < size; i++) at[bits][channel * size + i] = kept ? rank * size + i : 0x80;
        rank += kept;
      }
  }
};
static constexpr Sources<1> SOURCES{};
static constexpr Sources<2> SOURCES_OF_16_BITS{};

INLINE F expanded(uint8_t bits, const T* p) {
  if constexpr (DTYPE == FP32) {
    // The sign of an index is that of a pruned channel, for which the blend takes zero.
    __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)SOURCES.at[bits]));
    __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)p), from);
    return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(from));
  } else {
    __m128i from = _mm_load_si128((const __m128i*)SOURCES_OF_16_BITS.at[bits]);
    return widened(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), from));
  }
}
INLINE F expanded(uint8_t bits, const int8_t* p) {
  __m128i from = _mm_loadl_epi64((const __m128i*)SOURCES.at[bits]);
  return of_levels(_mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)p), from));
}

// For each byte of bits: which of eight channels come, one after the other, as bytes of a shuffle or numbers of lanes.
struct Taken {
  alignas(64) uint8_t at[256][sizeof(T) == 4 ? 8 : 16];
  constexpr Taken() : at() {
    for (int bits = 0; bits < 256; bits++)
      for (int channel = 0, rank = 0; channel < 8; channel++) {
        if (!(bits >> channel & 1)) continue;
        if (sizeof(T) == 4) at[bits][rank] = channel;
        else {
          at[bits][2 * rank] = 2 * channel;
          at[bits][2 * rank + 1] = 2 * channel + 1;
        }
        rank++;
      }
  }
};
static constexpr Taken TAKEN{};

// Those of eight elements whose bit is set, one after the other; behind them, up to eight, anything.
INLINE void pack_eight(uint8_t bits, const T* from, T* to) {
  if constexpr (DTYPE == FP32) {
    __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)TAKEN.at[bits]));
    _mm256_storeu_ps((float*)to, _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)from), lanes));
  } else {
    __m128i bytes = _mm_load_si128((const __m128i*)TAKEN.at[bits]);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), bytes));
  }
}
INLINE uint64_t at_least(const Key* keys, Key least) {  // keys have no sign bit, so signed comparisons do
  uint64_t bits = 0;
  if constexpr (DTYPE == FP32) {
    const __m256i below = _mm256_set1_epi32((int)(least - 1));
    for (int i = 0; i < 8; i++) {
      __m256i is = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i*)(keys + 8 * i)), below);
      bits |= (uint64_t)(uint8_t)_mm256_movemask_ps(_mm256_castsi256_ps(is)) << 8 * i;
    }
  } else {
    const __m128i below = _mm_set1_epi16((short)(least - 1));
    for (int i = 0; i < 4; i++) {
      __m128i low = _mm_cmpgt_epi16(_mm_loadu_si128((const __m128i*)(keys + 16 * i)), below);
      __m128i high = _mm_cmpgt_epi16(_mm_loadu_si128((const __m128i*)(keys + 16 * i + 8)), below);
      bits |= (uint64_t)(uint16_t)_mm_movemask_epi8(_mm_packs_epi16(low, high)) << 16 * i;
    }
  }
  return bits;
}
