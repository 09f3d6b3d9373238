// A row is one token of one KV head. Packed: its kept elements in channel order, and a bit for each channel, unless all
// are kept.
#pragma once
#include "codes.h"

// The bits of ``channels`` channels, the ``at``-th so many of a row. Bits behind the last channel are 0.
template <int channels> INLINE uint32_t bits_of(const uint32_t* words, int at) {
  const uint8_t* bytes = (const uint8_t*)words;
  if constexpr (channels == 32) return words[at];
  else if constexpr (channels == 16) {
    uint16_t bits;
    memcpy(&bits, bytes + 2 * at, 2);
    return bits;
  } else if constexpr (channels == 8) return bytes[at];
  else return bytes[at / 2] >> (at % 2 * 4) & 15;
}

// Reads a packed row from its first channel to its last, a unit at a time.
template <class Element, bool has_bitmap> struct PackedRow {
  const uint32_t* words;
  const Element* next;
  INLINE Unit::Reg read(int unit) {
    uint32_t bits = bits_of<Unit::CHANNELS>(words, unit);
    Unit::Reg x = Unit::expand(bits, next);
    next += __builtin_popcount(bits);
    return x;
  }
};
template <class Element> struct PackedRow<Element, false> {
  const Element* row;
  INLINE Unit::Reg read(int unit) { return Unit::read(row + unit * Unit::CHANNELS); }
};

// Prunes rows of HEAD_DIM channels.
template <int HEAD_DIM> struct Pruner {
  static constexpr int PARTS = blocks_of(HEAD_DIM, 64), WORDS = blocks_of(HEAD_DIM, WORD);
  alignas(64) Key keys[PARTS * 64];
  uint64_t kept[PARTS];  // a bit for each channel
  static constexpr Key OCTAVES = 4 * (DTYPE == FP32 ? 1 << 23 : DTYPE == BF16 ? 1 << 7 : 1 << 10);  // a factor of 16

  // Sets ``kept`` to the elements of largest magnitude, of equals the lower channels. Returns whether one is extreme.
  // weights: what magnitudes count times, by channel; null for 1.
  INLINE bool prune(const T* row, int count, const float* weights) {
    if (weights) {
      alignas(64) T ranked[HEAD_DIM];
      for (int c = 0; c < HEAD_DIM; c++) ranked[c] = from_float(to_float(row[c]) * weights[c]);
      prune(ranked, count, nullptr);
      return has_extreme<HEAD_DIM>(row);
    }
    Key top = 0;
    for (int c = 0; c < HEAD_DIM; c++) {
      keys[c] = key_of(row[c]);
      top = keys[c] > top ? keys[c] : top;
    }
    for (int c = HEAD_DIM; c < PARTS * 64; c++) keys[c] = 0;
    choose(top, count);
    return top >= EXTREME;
  }

  // Writes the kept elements and the words of the bitmap.
  INLINE void pack(const T* row, T* values, uint32_t* words) const {
    memcpy(words, kept, 4 * WORDS);
#if defined(SIMD_AVX2)
    T packed[HEAD_DIM + 8], *to = packed;
    for (int c = 0; c < HEAD_DIM; c += 8) {
      uint8_t bits = kept[c / 64] >> c % 64;
      pack_eight(bits, row + c, to);
      to += __builtin_popcount(bits);
    }
    memcpy(values, packed, (to - packed) * sizeof(T));
#else
    for (int part = 0; part < PARTS; part++) {
#if defined(SIMD_AVX512)
      constexpr int LANES_OF_T = 64 / sizeof(T);
      for (int i = 0; i < 64; i += LANES_OF_T) {
        if (part * 64 + i >= HEAD_DIM) break;
        int here = HEAD_DIM - part * 64 - i;
        uint64_t lanes = here >= LANES_OF_T ? ~0ull : (1ull << here) - 1, bits = kept[part] >> i & lanes;
        if constexpr (DTYPE == FP32) {
          bits &= 0xFFFF;
          __m512i x = _mm512_maskz_loadu_epi32(lanes, row + part * 64 + i);
          int n = __builtin_popcountll(bits);
          _mm512_mask_storeu_epi32(values, (1u << n) - 1, _mm512_maskz_compress_epi32(bits, x));
          values += n;
        } else {
          bits &= 0xFFFFFFFF;
          __m512i x = _mm512_maskz_loadu_epi16(lanes, row + part * 64 + i);
          int n = __builtin_popcountll(bits);
          _mm512_mask_storeu_epi16(values, (1ull << n) - 1, _mm512_maskz_compress_epi16(bits, x));
          values += n;
        }
      }
#else
      for (uint64_t bits = kept[part]; bits; bits &= bits - 1) *values++ = row[part * 64 + __builtin_ctzll(bits)];
#endif
    }
#endif
  }

 private:
  // The largest key that at least ``count`` keys reach: between ``low``, which more reach, and ``high``, which fewer do.
  // Keys are spread evenly enough for a guess by their numbers to be near; every third guess halves what is left. Most rows
  // are cut where just as many keys are above, long before low and high meet. ``top``: the largest key.
  INLINE void choose(Key top, int count) {
    if (count == HEAD_DIM) {
      mark(0);
      clear_behind();
      return;
    }
    Key low = 0, high = top + 1, first = top > OCTAVES ? top - OCTAVES : 1;
    int above_low = HEAD_DIM, above_high = 0;
    for (int i = 0; high - low > 1; i++) {
      float share = i % 3 == 2 ? 0.5f : (float)(above_low - count) / (above_low - above_high);
      Key step = (Key)((high - low) * share), guess = i == 0 ? first : low + (step > 0 ? step : 1);
      if (guess >= high) guess = high - 1;
      int reached = mark(guess);
      if (reached == count) return;
      (reached > count ? low : high) = guess;
      (reached > count ? above_low : above_high) = reached;
    }
    mark(low);
    drop_last_equals(low, count);
  }

  INLINE int mark(Key least) {
    int n = 0;
    for (int part = 0; part < PARTS; part++) n += __builtin_popcountll(kept[part] = at_least(keys + 64 * part, least));
    return n;
  }
  INLINE void clear_behind() {
    if constexpr (HEAD_DIM % 64 != 0) kept[PARTS - 1] &= (1ull << HEAD_DIM % 64) - 1;
  }

  // Of the channels that just reach the threshold, the last ones go, until ``count`` are left.
  INLINE void drop_last_equals(Key threshold, int count) {
    int room = count;
    uint64_t above[PARTS];
    for (int part = 0; part < PARTS; part++)
      room -= __builtin_popcountll(above[part] = at_least(keys + 64 * part, threshold + 1));
    for (int part = 0; part < PARTS; part++) {
      uint64_t equal = kept[part] & ~above[part];
      int surplus = __builtin_popcountll(equal) - room;
      for (; surplus > 0; surplus--) equal &= ~(1ull << (63 - __builtin_clzll(equal)));
      room -= __builtin_popcountll(equal);
      kept[part] = above[part] | equal;
    }
  }
};
