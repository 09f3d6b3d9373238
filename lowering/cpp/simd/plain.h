#pragma once

constexpr const char* SIMD_NAME = "no vectors";
constexpr int LANES = 4, ROWS_AT_ONCE = 2;
typedef float F __attribute__((vector_size(16)));
INLINE F fma(F a, F b, F c) { return a * b + c; }
INLINE float to_float(int8_t level) { return level; }
template <class Element> INLINE F widened(const Element* p) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class Element> INLINE F expanded(uint8_t bits, const Element* p) {
  F x{};
  for (int i = 0; i < 4; i++)
    if (bits >> i & 1) x[i] = to_float(*p++);
  return x;
}
INLINE Bytes looked_up(Bytes table, Bytes index) {
  Bytes x{};
  for (int i = 0; i < 16; i++) x[i] = table[index[i]];
  return x;
}
