// Attention of the query tokens of one KV head to a tile of tokens after the other, with a running softmax.
#pragma once
#include "cache.h"
#include "functions.h"

constexpr int TILE = 64;      // tokens
constexpr int TOGETHER = 4;   // tokens whose scores are computed at once
constexpr int AHEAD = TILE;   // tokens that a prefetch is ahead

// Query heads of the group are worked on M at a time, so that their sums stay in registers, and the rest after them.
constexpr int PASSES = blocks_of(GROUP, ROWS_AT_ONCE), M = blocks_of(GROUP, PASSES), REST = GROUP - (PASSES - 1) * M;

using Keys = Format<KEY_DIM, KEY_CODE, KEY_BITMAP>;
using Values = Format<VALUE_DIM, VALUE_CODE, VALUE_BITMAP>;
constexpr int KEY_PADDED = padded(KEY_DIM), VALUE_PADDED = padded(VALUE_DIM);

// Weights are this much smaller (2^-24), so that their products with huge values do not overflow where the average of
// the values does not. float32 has room for it below.
constexpr float HEADROOM = 16.6355323f;

// What scores are multiplied with, and bounded by unless it is 0.
struct Scoring {
  float scale, softcap;
};

// What the rows of a tile are multiplied with: with a code, each has a scale.
template <bool coded> struct Scales {
  alignas(64) float of[TILE];
  INLINE F load(int token) const { return ::load(of + token); }
};
template <> struct Scales<false> {
  INLINE float load(int) const { return 1; }
};

// Packed rows that stand one after the other, from the first token of a tile on.
template <class Format> struct PackedTile {
  static constexpr int WORDS = Format::WORDS;
  using Row = PackedRow<typename Format::Element, Format::HAS_BITMAP>;
  const typename Format::Element* elements;
  const uint32_t* bitmap;
  const Scales<Format::CODED>& scales;
  int kept;
  bool finite;        // whether all scales are
  const char* ahead;  // where the values of the next tile stand; null: there is none
  int row_bytes;

  INLINE Row row(int token) const {
    const auto* first = elements + (long)token * kept;
    if constexpr (Format::HAS_BITMAP) return {bitmap + token * WORDS, first};
    else return {first};
  }
  INLINE void prefetch(int token) const {
    if (!ahead) return;
    for (int i = 0; i < TOGETHER * row_bytes; i += 64) __builtin_prefetch(ahead + token * row_bytes + i, 0, 2);
    if constexpr (Format::HAS_BITMAP) __builtin_prefetch(bitmap + (token + AHEAD) * WORDS, 0, 2);
  }
};

// A tile whose rows may be read as vectors: where that would leave the buffers, and behind the last token, it is a copy;
// so it is of int4, as levels.
template <class Format> struct TileCopy {
  static constexpr int HEAD_DIM = Format::HEAD_DIM, WORDS = Format::WORDS;
  using Element = typename Format::Element;
  // A row is read from its start on to HEAD_DIM elements at most, whatever its bits say, and LANES past them.
  static constexpr int READ = HEAD_DIM + 2 * LANES;
  Element elements[TILE * HEAD_DIM + READ];
  uint32_t bitmap[TILE * WORDS];
  Scales<Format::CODED> scales;

  PackedTile<Format> open(const Head<Format>& head, int64_t first, int tokens, bool more) {
    const auto* values = head.values + first * head.row_size;
    const uint32_t* bits = nullptr;
    if constexpr (Format::HAS_BITMAP) bits = bits_from(head.bitmap + first * WORDS, tokens);
    bool finite = true;
    if constexpr (Format::CODED) finite = read_scales(head.peaks + first, tokens);
    const int row_bytes = head.row_size * sizeof *values;
    const char* ahead = more ? (const char*)values + TILE * row_bytes : nullptr;
    return {elements_from(head, first, tokens), bits, scales, (int)head.kept, finite, ahead, row_bytes};
  }

 private:
  const Element* elements_from(const Head<Format>& head, int64_t first, int tokens) {
    const auto* from = head.values + first * head.row_size;
    if constexpr (Format::CODE == INT4)
      for (int i = 0; i < tokens; i++)
        unpack(from + i * head.row_size, head.kept, head.floors[first + i], elements + i * head.kept);
    else {
      int64_t left = ((head.behind + 1) * head.slots - first) * head.kept;
      if (tokens == TILE && (TILE - 1) * head.kept + READ <= left) return from;
      memcpy(elements, from, tokens * head.kept * sizeof(Element));
    }
    memset(elements + tokens * head.kept, 0, READ * sizeof(Element));
    return elements;
  }
  const uint32_t* bits_from(const uint32_t* from, int tokens) {
    if (tokens == TILE) return from;
    memcpy(bitmap, from, tokens * WORDS * 4);
    memset(bitmap + tokens * WORDS, 0, (TILE - tokens) * WORDS * 4);
    return bitmap;
  }
  // Returns whether all are finite. Behind the last token they are 0.
  bool read_scales(const T* from, int tokens) {
    T peaks[TILE] = {};
    memcpy(peaks, from, tokens * sizeof(T));
    F zeros{};
    for (int i = 0; i < TILE; i += LANES) {
      F scale = widened(peaks + i) * (1.0f / TOP);
      zeros += scale * 0.0f;
      store(scales.of + i, scale);
    }
    return sum(zeros) == 0;
  }
};

// Rows that are expanded already: packed ones that several groups of query rows read, and exact ones of the ring.
template <class Format> struct ExpandedTile {
  static constexpr int HEAD_DIM = Format::HEAD_DIM, UNITS = Format::UNITS;
  Unit::Reg units[TILE * UNITS];
  Scales<Format::CODED> scales;

  struct Row {
    const Unit::Reg* units;
    INLINE Unit::Reg read(int unit) { return units[unit]; }
  };
  INLINE Row row(int token) const { return {units + token * UNITS}; }
  INLINE void prefetch(int) const {}

  void expand(const PackedTile<Format>& packed, int tokens) {
    scales = packed.scales;
    for (int token = 0; token < tokens; token++) {
      if (token % TOGETHER == 0) packed.prefetch(token);
      auto row = packed.row(token);
      for (int unit = 0; unit < UNITS; unit++) units[token * UNITS + unit] = row.read(unit);
      if (!packed.finite) put_what_is_not_finite(token, packed);
    }
  }
  void put_exact(int token, const T* row) {
    if constexpr (Format::CODED) scales.of[token] = 1;
    put(token, row);
  }
  void clear(int from, int to) {
    for (int i = from * UNITS; i < to * UNITS; i++) units[i] = Unit::Reg{};
  }

 private:
  void put(int token, const T* row) {
    constexpr int WHOLE = HEAD_DIM / Unit::CHANNELS;
    for (int unit = 0; unit < WHOLE; unit++) units[token * UNITS + unit] = Unit::read(row + unit * Unit::CHANNELS);
    if constexpr (WHOLE < UNITS) {
      T last[Unit::CHANNELS] = {};
      memcpy(last, row + WHOLE * Unit::CHANNELS, (HEAD_DIM - WHOLE * Unit::CHANNELS) * sizeof(T));
      units[token * UNITS + WHOLE] = Unit::read(last);
    }
  }
  // Only what was kept of a row is NaN with its scale: the scale of a value is a factor of all channels.
  void put_what_is_not_finite(int token, const PackedTile<Format>& packed) {
    if constexpr (Format::CODED) {
      if (std::isfinite(scales.of[token])) return;
      T row[HEAD_DIM];
      for (int c = 0; c < HEAD_DIM; c++) {
        bool kept = !Format::HAS_BITMAP || packed.bitmap[token * Format::WORDS + c / WORD] >> c % WORD & 1;
        row[c] = from_float(kept ? NAN : 0.0f);
      }
      put_exact(token, row);
    }
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
    typename Tile::Row row[TOGETHER] = {keys.row(token), keys.row(token + 1), keys.row(token + 2), keys.row(token + 3)};
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
// Scales of keys are factors of scores, and those of values of weights.
template <class KeyScales, class ValueScales>
INLINE void weigh(Seen& seen, float* scores, Unit::Weight* weights, int tokens, Scoring scoring, const Bias* bias,
                  bool boolean, const KeyScales& key_scales, const ValueScales& value_scales) {
  F highest = splat(-INFINITY);
  for (int i = 0; i < TILE; i += LANES) {
    F x = load(scores + i) * scoring.scale * key_scales.load(i);
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
    Unit::store(weights + i, weight * value_scales.load(i));
  }
  store(seen.total, total);
}

// Adds up weighted values, in passes over the tile of as many channels as four vectors of sums have.
template <int ROWS, class Tile> INLINE void add_up(const Tile& values, int tokens, const Unit::Weight* weights, Seen* seen) {
  constexpr int UNITS = units_of(VALUE_DIM), AT_ONCE = 4 / Unit::ACCS;
  typename Tile::Row row[TILE];
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
    weigh(seen[r], work.scores + r * TILE, work.weights + r * TILE, tokens, scoring, bias ? bias + r * bias_step : nullptr,
          boolean, keys.scales, values.scales);
  add_up<ROWS>(values, readable, work.weights, seen);
}
