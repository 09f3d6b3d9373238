// A format of lowering/format.py with order=rows, as far as loops are built for it.
#pragma once
#include "unit.h"

enum Code { NO_CODE, INT8, INT4 };  // numbered as CODES there
constexpr int WORD = 32;            // channels of a word of the bitmap

constexpr int64_t blocks_of(int64_t things, int64_t size) { return (things + size - 1) / size; }
constexpr int units_of(int head_dim) { return blocks_of(head_dim, Unit::CHANNELS); }
constexpr int padded(int head_dim) { return units_of(head_dim) * Unit::CHANNELS; }

template <int head_dim, int code, bool has_bitmap> struct Format {
  static constexpr int HEAD_DIM = head_dim, CODE = code, WORDS = blocks_of(head_dim, WORD), UNITS = units_of(head_dim);
  static constexpr bool CODED = code != NO_CODE, HAS_BITMAP = has_bitmap;
  using Element = std::conditional_t<CODED, int8_t, T>;               // as the loops read it: with a code its level
  using Stored = std::conditional_t<code == INT4, uint8_t, Element>;  // of int4: two elements

  static constexpr int64_t stored(int64_t elements) { return code == INT4 ? elements / 2 : elements; }
};
