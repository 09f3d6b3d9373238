// Attention of the query tokens of one KV head to a tile of tokens after the other, with a running softmax.
#pragma once
#include "cache.h"
#include "functions.h"

constexpr int TILE = 64;      // tokens
constexpr int TOGETHER = 4;   // tokens whose scores are computed at once
constexpr int AHEAD = TILE;   // tokens that a prefetch is ahead

// Query heads of the group are worked on M at a time, so that their sums stay in registers, and the rest after them.
constexpr int PASSES = blocks_of(GROUP, ROWS_AT_ONCE), M = blocks_of(GROUP, PASSES), REST = GROUP - (PASSES - 1) * M;

constexpr int KEY_PADDED = padded(KEY_DIM), VALUE_PADDED = padded(VALUE_DIM);

// Weights are this much smaller (2^-24), so that their products with huge values do not overflow where the average of
// the values does not. float32 has room for it below.
constexpr float HEADROOM = 16.6355323f;

// What scores are multiplied with, and bounded by unless it is 0.
struct Scoring {
  float scale, softcap;
};

// Packed rows that stand one after the other, from the first token of a tile on.
template <int HEAD_DIM> struct PackedTile {
  static constexpr int WORDS = words_of(HEAD_DIM);
  const T* values;
  const uint32_t* bitmap;
  int kept;
  bool more;  // whether there is a tile behind this one

  INLINE PackedRow row(int token) const { return {bitmap + token * WORDS, values + (long)token * kept}; }
  INLINE void prefetch(int token) const {
    if (!more) return;
    const char* ahead = (const char*)(values + (long)(token + AHEAD) * kept);
    for (int i = 0; i < TOGETHER * kept * (int)sizeof(T); i += 64) __builtin_prefetch(ahead + i, 0, 2);
    __builtin_prefetch(bitmap + (token + AHEAD) * WORDS, 0, 2);
  }
};

// A tile whose rows may be read as vectors: where that would leave the buffers, and behind the last token, it is a copy.
template <int HEAD_DIM> struct TileCopy {
  static constexpr int WORDS = words_of(HEAD_DIM);
  // A row is read from its start on to HEAD_DIM elements at most, whatever its bits say, and LANES past them.
  static constexpr int READ = HEAD_DIM + 2 * LANES;
  T values[TILE * HEAD_DIM + READ];
  uint32_t bitmap[TILE * WORDS];

  PackedTile<HEAD_DIM> open(const Head<HEAD_DIM>& head, int64_t first, int tokens, bool more) {
    const T* from = head.values + first * head.kept;
    const uint32_t* bits = head.bitmap + first * WORDS;
    int64_t left = ((head.behind + 1) * head.slots - first) * head.kept;
    if (tokens == TILE && (TILE - 1) * head.kept + READ <= left) return {from, bits, (int)head.kept, more};
    memcpy(values, from, tokens * head.kept * sizeof(T));
    memset(values + tokens * head.kept, 0, READ * sizeof(T));
    memcpy(bitmap, bits, tokens * WORDS * 4);
    memset(bitmap + tokens * WORDS, 0, (TILE - tokens) * WORDS * 4);
    return {values, bitmap, (int)head.kept, false};
  }
};

// Rows that are expanded already: packed ones that several groups of query rows read, and exact ones of the ring.
template <int HEAD_DIM> struct ExpandedTile {
  static constexpr int UNITS = units_of(HEAD_DIM);
  Unit::Reg units[TILE * UNITS];

  struct Row {
    const Unit::Reg* units;
    INLINE Unit::Reg read(int unit) { return units[unit]; }
  };
  INLINE Row row(int token) const { return {units + token * UNITS}; }
  INLINE void prefetch(int) const {}

  void expand(const PackedTile<HEAD_DIM>& packed, int tokens) {
    for (int token = 0; token < tokens; token++) {
      if (token % TOGETHER == 0) packed.prefetch(token);
      PackedRow row = packed.row(token);
      for (int unit = 0; unit < UNITS; unit++) units[token * UNITS + unit] = row.read(unit);
    }
  }
  void put(int token, const T* row) {
    constexpr int WHOLE = HEAD_DIM / Unit::CHANNELS;
    for (int unit = 0; unit < WHOLE; unit++) units[token * UNITS + unit] = Unit::read(row + unit * Unit::CHANNELS);
    if constexpr (WHOLE < UNITS) {
      T last[Unit::CHANNELS] = {};
      memcpy(last, row + WHOLE * Unit::CHANNELS, (HEAD_DIM - WHOLE * Unit::CHANNELS) * sizeof(T));
      units[token * UNITS + WHOLE] = Unit::read(last);
    }
  }
  void clear(int from, int to) {
    for (int i = from * UNITS; i < to * UNITS; i++) units[i] = Unit::Reg{};
  }
};

// What a query row has seen so far.
struct Seen {
  alignas(64) float sums[VALUE_PADDED];  // of weighted values, at the places of Unit
  alignas(64) float total[LANES];        // of weights, in parts
  float highest;                         // score

  INLINE void clear() {
    memset(this, 0, sizeof *this);
    highest = -INFINITY;
  }
};

// Of one tile, for M query rows.
struct Weights {
  alignas(64) float scores[M * TILE];
  alignas(64) Unit::Weight weights[M * TILE];
};

// What is added to the scores of a query row, or, of a boolean mask, what they are replaced by where it is -inf.
struct Bias {
  alignas(64) float of[TILE];
};

template <int ROWS, class Tile> INLINE void score(const Tile& keys, int tokens, const T* query, float* scores) {
  for (int token = 0; token < tokens; token += TOGETHER) {
    keys.prefetch(token);
    F sums[TOGETHER][ROWS] = {};
    decltype(keys.row(0)) row[TOGETHER] = {keys.row(token), keys.row(token + 1), keys.row(token + 2), keys.row(token + 3)};
#pragma GCC unroll 16
    for (int unit = 0; unit < units_of(KEY_DIM); unit++) {
      Unit::Reg key[TOGETHER];
#pragma GCC unroll 4
      for (int u = 0; u < TOGETHER; u++) key[u] = row[u].read(unit);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        Unit::Reg q = Unit::read(query + r * KEY_PADDED + unit * Unit::CHANNELS);
#pragma GCC unroll 4
        for (int u = 0; u < TOGETHER; u++) sums[u][r] = Unit::dot(sums[u][r], key[u], q);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      store_sums(scores + r * TILE + token, sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
  }
}

// Scores of ``tokens`` tokens -> weights relative to the highest score so far; what was summed up before is rescaled.
INLINE void weigh(Seen& seen, float* scores, Unit::Weight* weights, int tokens, Scoring scoring, const Bias* bias, bool boolean) {
  F highest = splat(-INFINITY);
  for (int i = 0; i < TILE; i += LANES) {
    F x = load(scores + i) * scoring.scale;
    if (scoring.softcap != 0) x = scoring.softcap * tanh(x / scoring.softcap);
    if (bias) {
      F b = load(bias->of + i);
      x = boolean ? (b == -INFINITY ? b : x) : x + b;
    }
    if (i + LANES > tokens)
      for (int lane = 0; lane < LANES; lane++)
        if (i + lane >= tokens) x[lane] = -INFINITY;
    highest = x > highest ? x : highest;
    store(scores + i, x);
  }
  float higher = largest(highest);
  if (higher > seen.highest) {
    F less = exp(splat(seen.highest - higher));
    if (seen.highest == -INFINITY) less = F{};
    seen.highest = higher;
    for (int c = 0; c < VALUE_PADDED; c += LANES) store(seen.sums + c, load(seen.sums + c) * less);
    store(seen.total, load(seen.total) * less);
  }
  float reference = seen.highest == -INFINITY ? 0 : seen.highest;  // where all are -inf, so are the differences
  F total = load(seen.total);
  for (int i = 0; i < TILE; i += LANES) {
    F weight = exp(load(scores + i) - reference - HEADROOM);
    total += weight;
    Unit::store(weights + i, weight);
  }
  store(seen.total, total);
}

// Adds up weighted values, in passes over the tile of as many channels as four vectors of sums have.
template <int ROWS, class Tile> INLINE void add_up(const Tile& values, int tokens, const Unit::Weight* weights, Seen* seen) {
  constexpr int UNITS = units_of(VALUE_DIM), AT_ONCE = 4 / Unit::ACCS;
  decltype(values.row(0)) row[TILE];
  for (int token = 0; token < tokens; token++) row[token] = values.row(token);
#pragma GCC unroll 16
  for (int first = 0; first < UNITS; first += AT_ONCE) {
    constexpr int ACCS = 4;
    const int vectors = (UNITS - first < AT_ONCE ? UNITS - first : AT_ONCE) * Unit::ACCS;
    const int at = first * Unit::CHANNELS;
    F sums[ROWS][ACCS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int i = 0; i < ACCS; i++)
        if (i < vectors) sums[r][i] = load(seen[r].sums + at + i * LANES);
    for (int token = 0; token < tokens; token += 2) {
      if (first == 0 && token % TOGETHER == 0) values.prefetch(token);
      auto one = row[token], two = row[token + 1];
#pragma GCC unroll 4
      for (int i = 0; i < AT_ONCE; i++) {
        if (first + i >= UNITS) continue;
        Unit::Reg x = one.read(first + i), y = two.read(first + i);
        auto pair = Unit::pair(x, y);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
          for (int half = 0; half < Unit::ACCS; half++)
            sums[r][i * Unit::ACCS + half] = Unit::add(sums[r][i * Unit::ACCS + half], pair, half, weights + r * TILE + token);
      }
      row[token] = one, row[token + 1] = two;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int i = 0; i < ACCS; i++)
        if (i < vectors) store(seen[r].sums + at + i * LANES, sums[r][i]);
  }
}

// ROWS query rows against a tile. Tiles have a multiple of TOGETHER rows that may be read.
template <int ROWS, class KeyTile, class ValueTile>
inline void attend_rows(const KeyTile& keys, const ValueTile& values, int tokens, const T* query, Seen* seen, Weights& work,
                        Scoring scoring, const Bias* bias, int bias_step, bool boolean) {
  int readable = blocks_of(tokens, TOGETHER) * TOGETHER;
  score<ROWS>(keys, readable, query, work.scores);
  for (int r = 0; r < ROWS; r++)
    weigh(seen[r], work.scores + r * TILE, work.weights + r * TILE, tokens, scoring, bias ? bias + r * bias_step : nullptr, boolean);
  add_up<ROWS>(values, readable, work.weights, seen);
}
