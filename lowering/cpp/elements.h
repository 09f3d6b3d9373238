// Elements of a cache, and what their bits say.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Magnitude as an integer, NaN on top.
INLINE Key key_of(T x) {
  Key key;
  memcpy(&key, &x, sizeof key);
  key &= MAGNITUDE;
  return key > INFINITE ? MAGNITUDE : key;
}

// What is NaN, infinite or at least 2^97 in magnitude counts as extreme. In float16 that is NaN and infinity.
constexpr Key EXTREME = DTYPE == FP32 ? 0x70000000 : DTYPE == BF16 ? 0x7000 : INFINITE;

template <int HEAD_DIM> INLINE bool has_extreme(const T* row) {
  bool extreme = false;
  for (int c = 0; c < HEAD_DIM; c++) extreme |= key_of(row[c]) >= EXTREME;
  return extreme;
}
