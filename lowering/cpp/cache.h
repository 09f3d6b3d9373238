// A compressed cache tensor: its buffers, as lowering/buffers.py describes them with order=rows.
#pragma once
#include <algorithm>
#include "rows.h"

constexpr int BLOCK = 32;             // tokens
constexpr int MAX_QUERIES = 16;       // tokens of a step; the ring has as many slots more than the window
constexpr int COUNTS = 3;             // tokens written; the first that the ring holds; whether anything extreme came in

struct Cache {
  void* values;
  uint32_t* bitmap;  // like the next two null where the format has none
  T* peaks;
  uint8_t* floors;
  T* window;
  int64_t* counts;
  int64_t blocks;  // of a row of the batch and a KV head
  int64_t kept;

  int64_t slots() const { return blocks * BLOCK; }
};

// One KV head of one row of the batch; ``behind``: how many more stand behind it in the buffers.
template <class Format> struct Head {
  using Stored = typename Format::Stored;
  static constexpr int HEAD_DIM = Format::HEAD_DIM, WORDS = Format::WORDS;
  Stored* values;
  uint32_t* bitmap;
  T* peaks;
  uint8_t* floors;
  T* ring;
  int64_t slots, kept, row_size, behind, ring_slots;

  Head(const Cache& cache, int64_t head, int64_t heads, int64_t window)
      : values((Stored*)cache.values + head * cache.slots() * Format::stored(cache.kept)),
        bitmap(cache.bitmap + head * cache.slots() * WORDS),
        peaks(cache.peaks + head * cache.slots()),
        floors(cache.floors + head * cache.slots()),
        ring(cache.window + head * (window + MAX_QUERIES) * HEAD_DIM),
        slots(cache.slots()), kept(cache.kept), row_size(Format::stored(cache.kept)), behind(heads - 1 - head),
        ring_slots(window + MAX_QUERIES) {}

  T* exact(int64_t token) const { return ring + token % ring_slots * HEAD_DIM; }

  // Prunes a row into the place of a token, see Pruner. Returns whether an element is extreme.
  bool prune(int64_t token, const T* row, const float* weights) const {
    Stored* to = values + token * row_size;
    if constexpr (!Format::CODED) return pruned(token, row, weights, to);
    else {
      Encoder<Format> encoder;
      bool extreme;
      if constexpr (Format::HAS_BITMAP) extreme = pruned(token, row, weights, encoder.kept);
      else {
        memcpy(encoder.kept, row, HEAD_DIM * sizeof(T));
        extreme = has_extreme<HEAD_DIM>(row);
      }
      encoder.encode(kept, to, peaks[token], floors + token);
      return extreme;
    }
  }

  // What a packed row stands for, with zeros.
  void expand(int64_t token, T* row) const {
    memset(row, 0, HEAD_DIM * sizeof(T));
    int8_t levels[HEAD_DIM];
    const Stored* stored = values + token * row_size;
    if constexpr (Format::CODE == INT4) unpack(stored, kept, floors[token], levels);
    float scale = 0;
    if constexpr (Format::CODED) scale = scale_of(peaks[token]);
    auto element = [&](int i) -> T {
      if constexpr (!Format::CODED) return stored[i];
      else return from_float((Format::CODE == INT4 ? levels[i] : (int8_t)stored[i]) * scale);
    };
    if constexpr (!Format::HAS_BITMAP) {
      for (int c = 0; c < HEAD_DIM; c++) row[c] = element(c);
      return;
    }
    int next = 0;
    for (int word = 0; word < WORDS; word++)
      for (uint32_t bits = bitmap[token * WORDS + word]; bits && next < kept; bits &= bits - 1)
        row[std::min(word * WORD + __builtin_ctz(bits), HEAD_DIM - 1)] = element(next++);
  }

 private:
  bool pruned(int64_t token, const T* row, const float* weights, T* to) const {
    Pruner<HEAD_DIM> pruner;
    bool extreme = pruner.prune(row, kept, weights);
    pruner.pack(row, to, bitmap + token * WORDS);
    return extreme;
  }
};
