// A compressed cache tensor: its buffers, as lowering/format.py describes them with order=rows.
#pragma once
#include "rows.h"

constexpr int BLOCK = 32;             // tokens
constexpr int MAX_QUERIES = 16;       // tokens of a step; the ring has as many slots more than the window
constexpr int COUNTS = 3;             // tokens written; the first that the ring holds; whether anything extreme came in

struct Cache {
  T* values;
  uint32_t* bitmap;
  T* window;
  int64_t* counts;
  int64_t blocks;  // of a row of the batch and a KV head
  int64_t kept;

  int64_t slots() const { return blocks * BLOCK; }
};

// One KV head of one row of the batch; ``behind``: how many more stand behind it in the buffers.
template <int HEAD_DIM> struct Head {
  static constexpr int WORDS = words_of(HEAD_DIM);
  T* values;
  uint32_t* bitmap;
  T* ring;
  int64_t slots, kept, behind, ring_slots;

  Head(const Cache& cache, int64_t head, int64_t heads, int64_t window)
      : values(cache.values + head * cache.slots() * cache.kept),
        bitmap(cache.bitmap + head * cache.slots() * WORDS),
        ring(cache.window + head * (window + MAX_QUERIES) * HEAD_DIM),
        slots(cache.slots()), kept(cache.kept), behind(heads - 1 - head), ring_slots(window + MAX_QUERIES) {}

  T* exact(int64_t token) const { return ring + token % ring_slots * HEAD_DIM; }

  // Prunes a row into the place of a token.
  bool prune(int64_t token, const T* row) const {
    Pruner<HEAD_DIM> pruner;
    bool extreme = pruner.prune(row, kept);
    pruner.pack(row, values + token * kept, bitmap + token * WORDS);
    return extreme;
  }
};
