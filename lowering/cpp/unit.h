// What the attending loops read, multiply and add at a time.
#pragma once
#include "simd.h"

// A unit: CHANNELS channels of a row, as they go into a sum of products (K), and two tokens at a time into ACCS vectors
// of sums (V).
#if defined(SIMD_AVX512) && defined(__AVX512BF16__)
constexpr bool PAIRS_OF_BF16 = DTYPE == BF16;
#else
constexpr bool PAIRS_OF_BF16 = false;
#endif

template <bool pairs> struct UnitOf {
  using Reg = F;
  using Weight = float;
  static constexpr int CHANNELS = LANES, ACCS = 1;
  struct Pair {
    F first, second;
  };
  template <class Element> static INLINE Reg read(const Element* p) { return widened(p); }
  template <class Element> static INLINE Reg expand(uint32_t bits, const Element* p) { return expanded(bits, p); }
  static INLINE F dot(F sum, Reg a, Reg b) { return fma(a, b, sum); }
  static INLINE Pair pair(Reg first, Reg second) { return {first, second}; }
  static INLINE F add(F sum, const Pair& x, int, const Weight* weight) {
    return fma(x.second, splat(weight[1]), fma(x.first, splat(weight[0]), sum));
  }
  static INLINE void store(Weight* to, F x) { ::store(to, x); }
  static constexpr int place(int channel) { return channel; }
};

#if defined(SIMD_AVX512) && defined(__AVX512BF16__)
// Products of two neighbours of bfloat16 at once, of channels for K and of tokens for V: half the instructions.
template <> struct UnitOf<true> {
  using Reg = __m512i;
  using Weight = uint16_t;
  static constexpr int CHANNELS = 32, ACCS = 2;
  struct Pair {
    __m512i half[2];
  };
  static INLINE Reg read(const T* p) { return _mm512_loadu_si512(p); }
  static INLINE Reg expand(uint32_t bits, const T* p) { return _mm512_maskz_expandloadu_epi16(bits, p); }
  static INLINE Reg read(const int8_t* p) { return of_levels(_mm256_loadu_si256((const __m256i*)p)); }
  static INLINE Reg expand(uint32_t bits, const int8_t* p) { return of_levels(_mm256_maskz_expandloadu_epi8(bits, p)); }
  static INLINE Reg of_levels(__m256i x) {  // which bfloat16 has exactly
    __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)), high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
  }
  static INLINE F dot(F sum, Reg a, Reg b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static INLINE Pair pair(Reg first, Reg second) {
    return {{_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)}};
  }
  static INLINE F add(F sum, const Pair& x, int which, const Weight* weight) {
    int both;
    memcpy(&both, weight, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)x.half[which], (__m512bh)_mm512_set1_epi32(both));
  }
  static INLINE void store(Weight* to, F x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
  // Unpacking takes the lower four of each eight channels into the first vector, the upper four into the second.
  static constexpr int place(int channel) {
    int inside = channel % 32;
    return channel - inside + (inside & 4 ? 16 : 0) + inside / 8 * 4 + inside % 4;
  }
};
#endif
using Unit = UnitOf<PAIRS_OF_BF16>;
