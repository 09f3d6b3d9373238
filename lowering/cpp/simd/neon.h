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

INLINE F of_levels(uint8x8_t x) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(x)))));
}
INLINE uint8x8_t four_bytes(const void* p) {
  uint32_t bytes;
  memcpy(&bytes, p, 4);
  return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
INLINE F widened(const int8_t* p) { return of_levels(four_bytes(p)); }
INLINE Bytes looked_up(Bytes table, Bytes index) { return (Bytes)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }

// For each nibble of bits: where each byte of four channels comes from; out of range: zero. size: of an element.
template <int size> struct Sources {
  alignas(16) uint8_t at[16][4 * size];
  constexpr Sources() : at() {
    for (int bits = 0; bits < 16; bits++)
      for (int channel = 0, rank = 0; channel < 4; channel++) {
        bool kept = bits >> channel & 1;
        for (int i = 0; i < size; i++) at[bits][channel * size + i] = kept ? rank * size + i : 0xFF;
        rank += kept;
      }
  }
};
static constexpr Sources<sizeof(T)> SOURCES{};
static constexpr Sources<1> SOURCES_OF_BYTES{};

INLINE F expanded(uint8_t bits, const T* p) {
  if constexpr (DTYPE == FP32)
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32((const float*)p)), vld1q_u8(SOURCES.at[bits])));
  else return widened(vreinterpret_u16_u8(vtbl1_u8(vreinterpret_u8_u16(vld1_u16((const uint16_t*)p)), vld1_u8(SOURCES.at[bits]))));
}
INLINE F expanded(uint8_t bits, const int8_t* p) {
  return of_levels(vtbl1_u8(four_bytes(p), four_bytes(SOURCES_OF_BYTES.at[bits])));
}
