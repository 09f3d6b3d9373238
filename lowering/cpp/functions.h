// Functions of vectors of float32.
#pragma once
#include <initializer_list>
#include "simd.h"

// e^x for x <= 88: 2^n 2^r with x log2(e) = n + r and |r| <= 1/2; 0 where float32 ends, below -87. NaN stays NaN. The
// polynomial is the Taylor series of 2^r, whose error is 2e-8 at most.
INLINE F exp(F x) {
  F bounded = x < -87.0f ? splat(-87.0f) : x;
  F n = (bounded * 1.44269504f + 0x1.8p23f) - 0x1.8p23f, r = fma(bounded, splat(1.44269504f), -n);
  r = fma(bounded, splat(1.92596299e-8f), r);  // the rest of log2(e)
  F p = splat(1.5252734e-5f);
  for (float c : {1.5403530e-4f, 1.33335581e-3f, 9.6181291e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    p = fma(p, r, splat(c));
  I exponent = (__builtin_convertvector(n, I) + 127) << 23;
  return x < -87.0f ? F{} : p * (F)exponent;
}

// To 1e-7, which is absolute: of a bounded score it is what float32 has anyway.
INLINE F tanh(F x) {
  F bounded = x > 20.0f ? splat(20.0f) : x;
  bounded = bounded < -20.0f ? splat(-20.0f) : bounded;
  F y = exp(2.0f * bounded);
  return (y - 1.0f) / (y + 1.0f);
}
