// Functions of vectors of float32.
#pragma once
#include <initializer_list>
#include "simd.h"

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
