// Vectors of float32, and units: what the attending loops read, multiply and add at a time. One part for each kind of
// processor, of which the compiler takes the best that it may (or what SIMD asks for); all else is written on top.
//
// Of a kind of processor it takes
//   F, LANES            a vector of float32
//   fma(a, b, c)        a * b + c, rounded once
//   widened(p)          LANES elements from p on
//   expanded(bits, p)   LANES channels, of which those whose bit is set come from p on, one after the other; may read
//                       LANES elements from p on
//   ROWS_AT_ONCE        query rows whose sums fit in its registers, four tokens at a time
//   at_least(keys, k)   which of 64 keys are at least k, as bits
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI2__)
#define HAS_AVX512
#endif

#if !defined(SIMD_AVX2) && !defined(SIMD_NONE) && defined(HAS_AVX512)
#define SIMD_AVX512
#elif !defined(SIMD_NONE) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#undef SIMD_AVX2
#define SIMD_AVX2
#elif !defined(SIMD_NONE) && defined(__ARM_NEON) && defined(__aarch64__)
#define SIMD_NEON
#endif

#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
#include <immintrin.h>
#elif defined(SIMD_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

using T = std::conditional_t<DTYPE == FP32, float, uint16_t>;             // an element of the cache
using Key = std::conditional_t<DTYPE == FP32, uint32_t, uint16_t>;        // its magnitude, as an integer
constexpr Key INFINITE = DTYPE == FP32 ? 0x7F800000 : DTYPE == BF16 ? 0x7F80 : 0x7C00;
constexpr Key MAGNITUDE = DTYPE == FP32 ? 0x7FFFFFFF : 0x7FFF;            // of a key; also the key of NaN

INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// One element as float32, in plain C++.
INLINE float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return as_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Shifted to float32's exponent field, the exponent is 112 too small; the product also makes denormals normal.
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}
INLINE uint16_t float_to_half(float x) {
  uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520: halfway to what is past the largest
  if (magnitude < 0x38800000)                         // denormal: the sum leaves its bits at the end of the mantissa
    return sign | (uint16_t)(as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
  return sign | (uint16_t)((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}
INLINE float to_float(float x) { return x; }
INLINE float to_float(uint16_t x) { return DTYPE == BF16 ? as_float((uint32_t)x << 16) : half_to_float(x); }
INLINE T from_float(float x) {
  if constexpr (DTYPE == FP32) return x;
  else if constexpr (DTYPE == FP16) return float_to_half(x);
  else {
    uint32_t bits = as_bits(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return bits >> 16 | 0x40;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
}

#if defined(SIMD_AVX512)

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
INLINE F expanded(uint16_t bits, const T* p) {
  if constexpr (DTYPE == FP32) return _mm512_maskz_expandloadu_ps(bits, p);
  else return widened(_mm256_maskz_expandloadu_epi16(bits, p));
}
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

#elif defined(SIMD_AVX2)

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

// For each byte of bits: where each of eight channels comes from, as bytes of a shuffle (bit 7: zero).
struct Sources {
  alignas(64) uint8_t at[256][sizeof(T) == 4 ? 8 : 16];
  constexpr Sources() : at() {
    for (int bits = 0; bits < 256; bits++)
      for (int channel = 0, rank = 0; channel < 8; channel++) {
        bool kept = bits >> channel & 1;
        if (sizeof(T) == 4) at[bits][channel] = kept ? rank : 0x80;
        else {
          at[bits][2 * channel] = kept ? 2 * rank : 0x80;
          at[bits][2 * channel + 1] = kept ? 2 * rank + 1 : 0x80;
        }
        rank += kept;
      }
  }
};
static constexpr Sources SOURCES{};

INLINE F expanded(uint8_t bits, const T* p) {
  if constexpr (DTYPE == FP32) {
    // The sign of an index is that of a pruned channel, for which the blend takes zero.
    __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)SOURCES.at[bits]));
    __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)p), from);
    return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(from));
  } else {
    __m128i from = _mm_load_si128((const __m128i*)SOURCES.at[bits]);
    return widened(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), from));
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

#else

#if defined(SIMD_NEON)
constexpr const char* SIMD_NAME = "NEON";
constexpr int LANES = 4, ROWS_AT_ONCE = 4;
typedef float32x4_t F;
INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
INLINE F widened(uint16x4_t x) {
  if constexpr (DTYPE == BF16) return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
  else return vcvt_f32_f16(vreinterpret_f16_u16(x));
}
INLINE F widened(const T* p) {
  if constexpr (DTYPE == FP32) return vld1q_f32((const float*)p);
  else return widened(vld1_u16((const uint16_t*)p));
}

// For each nibble of bits: where each byte of four channels comes from; out of range: zero.
struct Sources {
  alignas(16) uint8_t at[16][4 * sizeof(T)];
  constexpr Sources() : at() {
    for (int bits = 0; bits < 16; bits++)
      for (int channel = 0, rank = 0; channel < 4; channel++) {
        bool kept = bits >> channel & 1;
        for (int i = 0; i < (int)sizeof(T); i++)
          at[bits][channel * sizeof(T) + i] = kept ? rank * sizeof(T) + i : 0xFF;
        rank += kept;
      }
  }
};
static constexpr Sources SOURCES{};

INLINE F expanded(uint8_t bits, const T* p) {
  if constexpr (DTYPE == FP32)
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32((const float*)p)), vld1q_u8(SOURCES.at[bits])));
  else return widened(vreinterpret_u16_u8(vtbl1_u8(vreinterpret_u8_u16(vld1_u16((const uint16_t*)p)), vld1_u8(SOURCES.at[bits]))));
}
#else
constexpr const char* SIMD_NAME = "no vectors";
constexpr int LANES = 4, ROWS_AT_ONCE = 2;
typedef float F __attribute__((vector_size(16)));
INLINE F fma(F a, F b, F c) { return a * b + c; }
INLINE F widened(const T* p) { return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
INLINE F expanded(uint8_t bits, const T* p) {
  F x{};
  for (int i = 0; i < 4; i++)
    if (bits >> i & 1) x[i] = to_float(*p++);
  return x;
}
#endif
INLINE uint64_t at_least(const Key* keys, Key least) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i++) bits |= (uint64_t)(keys[i] >= least) << i;
  return bits;
}

#endif

typedef int32_t I __attribute__((vector_size(4 * LANES)));

INLINE F splat(float x) { return F{} + x; }
INLINE F load(const float* p) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
INLINE float largest(F x) {  // NaN is passed over
  float y = -INFINITY;
  for (int i = 0; i < LANES; i++) y = x[i] > y ? x[i] : y;
  return y;
}
INLINE float sum(F x) {
  float y = 0;
  for (int i = 0; i < LANES; i++) y += x[i];
  return y;
}

// 2^n and 2^r - 1 for x log2(e) = n + r with |r| <= 1/2, x <= 88: exp(x) is power * (rest + 1). NaN stays NaN.
// The polynomial is the Taylor series of 2^r, whose error is 2e-8 at most.
struct Exponential {
  F power, rest;
};
INLINE Exponential exponential(F x) {
  x = x < -87.0f ? splat(-87.0f) : x;  // where float32 ends
  F y = x * 1.44269504f, n = (y + 0x1.8p23f) - 0x1.8p23f, r = fma(x, splat(1.44269504f), -n);
  r = fma(x, splat(1.92596299e-8f), r);  // the rest of log2(e)
  F p = splat(1.5252734e-5f);
  for (float c : {1.5403530e-4f, 1.33335581e-3f, 9.6181291e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f})
    p = fma(p, r, splat(c));
  I exponent = (__builtin_convertvector(n, I) + 127) << 23;
  return {(F)exponent, p * r};
}
INLINE F exp(F x) {
  Exponential e = exponential(x);
  F y = fma(e.power, e.rest, e.power);
  return x < -87.0f ? F{} : y;
}
INLINE F tanh(F x) {  // (e^2x - 1) / (e^2x + 1); e^2x - 1 keeps its accuracy near zero
  F bounded = x > 20.0f ? splat(20.0f) : x;
  bounded = bounded < -20.0f ? splat(-20.0f) : bounded;
  Exponential e = exponential(2.0f * bounded);
  F above_one = fma(e.power, e.rest, e.power - 1.0f);
  return above_one / (above_one + 2.0f);
}

// The sums of four vectors.
template <int... i> INLINE F sum4(F a, F b, F c, F d, std::integer_sequence<int, i...>) {
  // Within groups of four lanes: first the halves of pairs, then of fours.
  F ab = __builtin_shufflevector(a, b, ((i / 4 * 4) + (i % 4 / 2) + (i % 2 ? LANES : 0))...) +
         __builtin_shufflevector(a, b, ((i / 4 * 4) + 2 + (i % 4 / 2) + (i % 2 ? LANES : 0))...);
  F cd = __builtin_shufflevector(c, d, ((i / 4 * 4) + (i % 4 / 2) + (i % 2 ? LANES : 0))...) +
         __builtin_shufflevector(c, d, ((i / 4 * 4) + 2 + (i % 4 / 2) + (i % 2 ? LANES : 0))...);
  return __builtin_shufflevector(ab, cd, ((i / 4 * 4) + (i % 2) + (i % 4 / 2 ? LANES : 0))...) +
         __builtin_shufflevector(ab, cd, ((i / 4 * 4) + 2 + (i % 2) + (i % 4 / 2 ? LANES : 0))...);
}
INLINE void store_sums(float* to, F a, F b, F c, F d) {
  F x = sum4(a, b, c, d, std::make_integer_sequence<int, LANES>());
  typedef float Four __attribute__((vector_size(16)));
  Four total{}, part;
  for (int i = 0; i < LANES / 4; i++) {
    memcpy(&part, (const char*)&x + 16 * i, 16);
    total += part;
  }
  memcpy(to, &total, 16);
}

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
  static INLINE Reg read(const T* p) { return widened(p); }
  static INLINE Reg expand(uint32_t bits, const T* p) { return expanded(bits, p); }
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
