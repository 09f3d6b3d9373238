// Codes of kept elements, as lowering/codes.py describes them: an element is its level times its row's scale.
#pragma once
#include "format.h"

constexpr int TOP = 127;           // the level of the largest magnitude of a row
constexpr float TINY = 0x1p-119f;  // rows of smaller magnitudes count as zero

// int4: what each nibble stands for, for each floor. The fourth bit is the sign.
struct LevelTable {
  alignas(64) int8_t of[TOP + 1][16];
  constexpr LevelTable() : of() {
    for (int floor = 0; floor <= TOP; floor++)
      for (int i = 0; i < 8; i++) {
        int whole = 7 * (56 + floor), level = floor + ((TOP - floor) * i * (8 * i + floor) + whole / 2) / whole;
        of[floor][i] = level;
        of[floor][8 + i] = -level;
      }
  }
};
static constexpr LevelTable LEVELS{};

INLINE float scale_of(T peak) { return to_float(peak) * (1.0f / TOP); }

// int4: so many bytes as levels. A byte has two neighbours, the first in its lower half.
template <int bytes> INLINE void unpack(const uint8_t* from, Bytes levels, int8_t* to) {
  Bytes both{};
  memcpy(&both, from, bytes);
  Bytes low = both & 15, high = both >> 4;
  Bytes first = looked_up(levels, __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  memcpy(to, &first, bytes < 8 ? 2 * bytes : 16);
  if constexpr (bytes == 16) {
    Bytes second = __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    second = looked_up(levels, second);
    memcpy(to + 16, &second, 16);
  }
}
INLINE void unpack(const uint8_t* from, int kept, uint8_t floor, int8_t* to) {
  Bytes levels;
  memcpy(&levels, LEVELS.of[floor & TOP], 16);
  const int bytes = kept / 2;
  int at = 0;
  for (; at + 16 <= bytes; at += 16) unpack<16>(from + at, levels, to + 2 * at);
  for (; at < bytes; at += 4) unpack<4>(from + at, levels, to + 2 * at);
}

// Stores the kept elements of a row. They are read as whole vectors.
template <class Format> struct Encoder {
  static constexpr int ROOM = blocks_of(Format::HEAD_DIM, LANES) * LANES;
  alignas(64) T kept[ROOM];
  alignas(64) int32_t levels[ROOM];

  INLINE void encode(int count, typename Format::Stored* values, T& peak, uint8_t* floor) {
    Key top = 0;
    for (int i = 0; i < count; i++) top = key_of(kept[i]) > top ? key_of(kept[i]) : top;
    T largest;
    memcpy(&largest, &top, sizeof top);
    const bool finite = top < INFINITE;
    peak = finite ? largest : from_float(NAN);
    round(count, finite, to_float(largest));
    if constexpr (Format::CODE == INT8) {
      for (int i = 0; i < ROOM; i += LANES) {
        I level = integers(levels + i), negative = widened(kept + i) < 0.0f;
        put(levels + i, (level ^ negative) - negative);
      }
      for (int i = 0; i < count; i++) values[i] = levels[i];
    } else {
      int least = TOP;
      for (int i = 0; i < count; i++) least = levels[i] < least ? levels[i] : least;
      *floor = least;
      choose(LEVELS.of[least]);
      for (int i = 0; i < count / 2; i++) values[i] = levels[2 * i] | levels[2 * i + 1] << 4;
    }
  }

 private:
  static INLINE I integers(const int32_t* from) {
    I x;
    memcpy(&x, from, sizeof x);
    return x;
  }
  static INLINE void put(int32_t* to, I x) { memcpy(to, &x, sizeof x); }

  // Magnitudes -> the nearest levels, to even where two are as near.
  INLINE void round(int count, bool finite, float peak) {
    const float inverse = finite && peak >= TINY ? TOP / peak : 0;
    for (int i = 0; i < ROOM; i += LANES) {
      F magnitude = (F)((I)widened(kept + i) & 0x7FFFFFFF) * inverse;
      if (!finite) magnitude = F{};
      put(levels + i, __builtin_convertvector((magnitude + 0x1.8p23f) - 0x1.8p23f, I));
    }
  }
  // Levels -> nibbles: which of these eight is nearest, the smaller one where two are, and the sign.
  INLINE void choose(const int8_t* eight) {
    for (int i = 0; i < ROOM; i += LANES) {
      I twice = integers(levels + i) * 2, index{}, negative = widened(kept + i) < 0.0f;
      for (int n = 1; n < 8; n++) index -= twice > eight[n - 1] + eight[n];
      put(levels + i, index | (negative & 8));
    }
  }
};
