#pragma once
#include <arm_neon.h>

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
