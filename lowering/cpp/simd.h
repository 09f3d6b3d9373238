// Vectors of float32. One file for each kind of processor, of which the compiler takes the best that it may (or what
// SIMD_AVX2 and SIMD_NONE ask for); all else is written on top.
//
// Of a kind of processor it takes
//   F, LANES            a vector of float32
//   fma(a, b, c)        a * b + c, rounded once
//   widened(p)          LANES elements from p on, of the cache's dtype or levels of one byte
//   expanded(bits, p)   LANES channels, of which those whose bit is set come from p on, one after the other; may read
//                       LANES elements from p on
//   looked_up(table, i) the bytes of a table that these indices, up to 15, stand for
//   ROWS_AT_ONCE        query rows whose sums fit in its registers, four tokens at a time
//   at_least(keys, k)   which of 64 keys are at least k, as bits
#pragma once
#include <utility>
#include "elements.h"

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

typedef uint8_t Bytes __attribute__((vector_size(16)));

#if defined(SIMD_AVX512)
#include "simd/avx512.h"
#elif defined(SIMD_AVX2)
#include "simd/avx2.h"
#else
#if defined(SIMD_NEON)
#include "simd/neon.h"
#else
#include "simd/plain.h"
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
