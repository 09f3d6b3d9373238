// One decode step of one layer: takes the new tokens in, prunes those that leave the window, attends.
#include <algorithm>
#include <vector>
#include "attend.h"

enum MaskKind { NO_MASK, BOOLEAN, ADD_FP32, ADD_FP16, ADD_BF16 };
enum Problem { NONE, OUT_OF_PLACE, UNWRITTEN };
constexpr float MASKED = -1e4f;           // what an additive mask adds at most where it leaves a token out
constexpr int64_t LEAST_TOKENS = 512;     // of a split
constexpr int64_t LEAST_WORK = 1 << 15;   // elements, from which on threads pay

// Rows of new tokens, [batch, heads, tokens, channels], wherever they lie. This and Step are as lowering/native.py has them.
struct Rows {
  const T* first;
  int64_t batch_stride, head_stride, token_stride;

  const T* at(int64_t b, int64_t head, int64_t token) const {
    return first + b * batch_stride + head * head_stride + token * token_stride;
  }
};

struct Step {
  Rows query, key, value;
  Cache keys, values;
  const int64_t* position;
  const void* mask;
  const float* sinks;
  T* out;
  int64_t position_stride, mask_kind, mask_batch, mask_head, mask_query, mask_token, mask_tokens, mask_queries;
  int64_t batch, heads, queries, window, length, threads;
  double scale, softcap;
  const float *key_weights, *value_weights;  // [batch, heads, queries, channels], or null
};

struct Scratch {
  alignas(64) T query[MAX_QUERIES * GROUP * KEY_PADDED];  // [query token, query head of the group]
  alignas(64) TileCopy<Keys> key_copy;
  alignas(64) TileCopy<Values> value_copy;
  alignas(64) ExpandedTile<Keys> keys;
  alignas(64) ExpandedTile<Values> values;
  Weights work;
  Bias biases[GROUP];
};

static float mask_value(const Step& step, int64_t at) {
  switch (step.mask_kind) {
    case BOOLEAN: return ((const uint8_t*)step.mask)[at] ? 0 : -INFINITY;
    case ADD_FP32: return ((const float*)step.mask)[at];
    case ADD_FP16: return half_to_float(((const uint16_t*)step.mask)[at]);
    default: return as_float((uint32_t)((const uint16_t*)step.mask)[at] << 16);
  }
}

static int64_t slots(const Step& step) { return std::min(step.keys.slots(), step.values.slots()); }

// Where one row of the batch of a cache stands.
struct Row {
  int64_t start, end, held;

  Row(const Step& step, const Cache& cache, int64_t b) {
    const int64_t* counts = cache.counts + b * COUNTS;
    start = step.position ? step.position[b * step.position_stride] : counts[0];
    end = start + step.queries;
    held = std::max<int64_t>(std::min(counts[1], start), 0);
  }
  // The first token that is exact to a query token. Counts that fit no buffer lead into none.
  int64_t first_exact(const Step& step, int64_t query) const {
    return std::min(std::max(held, start + query + 1 - step.window), slots(step));
  }
};

// How a step is shared out over threads. What one of them does in no time is left to it.
struct Splits {
  int64_t count, threads;

  Splits(const Step& step) {
    int64_t rows = step.batch * step.heads, tokens = 0;
    for (int64_t b = 0; b < step.batch; b++) tokens = std::max(tokens, Row(step, step.keys, b).end);
    bool small = rows * tokens * (step.keys.kept + step.values.kept) < LEAST_WORK;
    threads = small ? 1 : step.threads;
    count = threads == 1 ? 1 : std::min(blocks_of(2 * threads, rows), blocks_of(std::max<int64_t>(tokens, 1), LEAST_TOKENS));
    threads = std::min(threads, rows * count);
  }
};

// Of one KV head of one row of the batch: a part of its packed tokens and, in the last split, all else.
struct Task {
  const Step& step;
  Scratch& scratch;
  Seen* seen;  // [query token, query head of the group]
  int64_t b, h;
  Row row;
  Head<Keys> keys;
  Head<Values> values;

  Task(const Step& step, Scratch& scratch, Seen* seen, int64_t bh)
      : step(step), scratch(scratch), seen(seen), b(bh / step.heads), h(bh % step.heads), row(step, step.keys, b),
        keys(step.keys, bh, step.batch * step.heads, step.window),
        values(step.values, bh, step.batch * step.heads, step.window) {}

  void run(int64_t split, int64_t splits) {
    for (int64_t r = 0; r < step.queries * GROUP; r++) seen[r].clear();
    lay_out_query();
    int64_t tokens = row.first_exact(step, 0), each = blocks_of(blocks_of(tokens, splits), TILE) * TILE;
    packed(split * each, std::min(tokens, (split + 1) * each), 0, step.queries);
    if (split != splits - 1) return;
    bool sees_later = step.mask_queries > 1;
    for (int64_t q = 0; q < step.queries; q++) {
      int64_t first = row.first_exact(step, q);
      packed(tokens, first, q, q + 1);
      exact(first, sees_later ? row.end : row.start + q + 1, q);
    }
  }

 private:
  void lay_out_query() {
    for (int64_t g = 0; g < GROUP; g++)
      for (int64_t q = 0; q < step.queries; q++) {
        T* to = scratch.query + (q * GROUP + g) * KEY_PADDED;
        memcpy(to, step.query.at(b, h * GROUP + g, q), KEY_DIM * sizeof(T));
        for (int c = KEY_DIM; c < KEY_PADDED; c++) to[c] = 0;
      }
  }

  // Packed tokens, for some of the query tokens.
  void packed(int64_t first, int64_t end, int64_t query, int64_t query_end) {
    for (; first < end; first += TILE) {
      int tokens = std::min<int64_t>(TILE, end - first);
      bool more = first + 2 * TILE <= end;
      auto key_tile = scratch.key_copy.open(keys, first, tokens, more);
      auto value_tile = scratch.value_copy.open(values, first, tokens, more);
      if (PASSES == 1 && query_end - query == 1 && value_tile.finite) {
        attend(key_tile, value_tile, first, tokens, query);
        continue;
      }
      int readable = blocks_of(tokens, TOGETHER) * TOGETHER;
      scratch.keys.expand(key_tile, readable);
      scratch.values.expand(value_tile, readable);
      for (int64_t q = query; q < query_end; q++) attend(scratch.keys, scratch.values, first, tokens, q);
    }
  }

  // Tokens of the ring, for one query token: to others they may be unknown, even if they are NaN.
  void exact(int64_t first, int64_t end, int64_t query) {
    for (; first < end; first += TILE) {
      int tokens = std::min<int64_t>(TILE, end - first), readable = blocks_of(tokens, TOGETHER) * TOGETHER;
      for (int i = 0; i < tokens; i++) {
        scratch.keys.put_exact(i, keys.exact(first + i));
        scratch.values.put_exact(i, values.exact(first + i));
      }
      scratch.keys.clear(tokens, readable);
      scratch.values.clear(tokens, readable);
      attend(scratch.keys, scratch.values, first, tokens, query);
    }
  }

  template <class KeyTile, class ValueTile>
  void attend(const KeyTile& key_tile, const ValueTile& value_tile, int64_t first, int tokens, int64_t query) {
    bool shared = step.mask_head == 0;
    if (step.mask_kind != NO_MASK)
      for (int64_t g = 0; g < (shared ? 1 : GROUP); g++) fill(scratch.biases[g], first, tokens, h * GROUP + g, query);
    auto rows = [&]<int ROWS>(std::integral_constant<int, ROWS>, int g) {
      int64_t at = query * GROUP + g;
      const Bias* bias = step.mask_kind == NO_MASK ? nullptr : scratch.biases + (shared ? 0 : g);
      attend_rows<ROWS>(key_tile, value_tile, tokens, scratch.query + at * KEY_PADDED, seen + at, scratch.work,
                        {(float)step.scale, (float)step.softcap}, bias, !shared, step.mask_kind == BOOLEAN);
    };
    for (int pass = 0; pass < PASSES - 1; pass++) rows(std::integral_constant<int, M>(), pass * M);
    rows(std::integral_constant<int, REST>(), (PASSES - 1) * M);
  }

  void fill(Bias& bias, int64_t first, int tokens, int64_t query_head, int64_t query) {
    int64_t at = b * step.mask_batch + query_head * step.mask_head + query * step.mask_query;
    if (step.mask_kind == BOOLEAN && step.mask_token == 1 && first + tokens <= step.mask_tokens) {
      const uint8_t* mask = (const uint8_t*)step.mask + at + first;
      for (int i = 0; i < tokens; i++) bias.of[i] = mask[i] ? 0 : -INFINITY;
      return;
    }
    for (int i = 0; i < tokens; i++)
      bias.of[i] = mask_value(step, at + std::min(first + i, step.mask_tokens - 1) * step.mask_token);
  }
};

// New rows of a KV head enter the ring; those that leave the window are packed. ``rows``, ``weights``: of all KV heads, of
// which this is the one at ``bh``; of the weights [L, HEAD_DIM] are for what leaves for each new row.
template <class Format>
static bool append(const Cache& cache, int64_t bh, const Rows& rows, const float* weights, const Step& step) {
  constexpr int HEAD_DIM = Format::HEAD_DIM;
  const Head<Format> head(cache, bh, step.batch * step.heads, step.window);
  const Row row(step, cache, bh / step.heads);
  if (weights) weights += bh * step.queries * HEAD_DIM;
  bool extreme = false;
  for (int64_t i = 0; i < step.queries; i++) {
    const T* from = rows.at(bh / step.heads, bh % step.heads, i);
    memcpy(head.exact(row.start + i), from, HEAD_DIM * sizeof(T));
    extreme |= has_extreme<HEAD_DIM>(from);
  }
  int64_t leaving = row.start - step.window, end = std::min(leaving + step.queries, head.slots);
  for (int64_t token = std::max(leaving, row.held); token < end; token++)
    head.prune(token, head.exact(token), weights ? weights + (token - leaving) * HEAD_DIM : nullptr);
  return extreme;
}

// The softmax over the parts of all splits, and what no value belongs to: sinks.
static void combine(const Step& step, const Seen* seen, int64_t splits, int64_t bh) {
  const int64_t rows = step.queries * GROUP, head = bh % step.heads * GROUP;
  for (int64_t g = 0; g < GROUP; g++)
    for (int64_t q = 0; q < step.queries; q++) {
      const Seen* part = seen + q * GROUP + g;
      const float sink = step.sinks ? step.sinks[head + g] : -INFINITY;
      float highest = sink;
      for (int64_t s = 0; s < splits; s++) highest = std::max(highest, part[s * rows].highest);
      float total = sink == -INFINITY ? 0 : expf(sink - highest - HEADROOM);
      alignas(64) float sums[VALUE_PADDED] = {};
      for (int64_t s = 0; s < splits; s++) {
        const Seen& x = part[s * rows];
        float share = x.highest == highest || x.highest == -INFINITY ? 1 : expf(x.highest - highest);
        total += share * sum(load(x.total));
        for (int c = 0; c < VALUE_PADDED; c += LANES) store(sums + c, fma(load(x.sums + c), splat(share), load(sums + c)));
      }
      T* out = step.out + ((bh * GROUP + g) * step.queries + q) * VALUE_DIM;
      for (int c = 0; c < VALUE_DIM; c++) out[c] = from_float(total == 0 ? 0 : sums[Unit::place(c)] / total);
    }
}

static void count(const Cache& cache, const Step& step, int64_t b, bool extreme) {
  const Row row(step, cache, b);
  int64_t* counts = cache.counts + b * COUNTS;
  counts[1] = std::max(std::min(counts[1], row.start), row.end - step.window - MAX_QUERIES);
  counts[0] = row.end;
  counts[2] |= extreme;
}

static Problem problem(const Step& step) {
  for (int64_t b = 0; b < step.batch; b++) {
    Row row(step, step.keys, b);
    int64_t written = std::min(step.keys.counts[b * COUNTS], step.values.counts[b * COUNTS]);
    int64_t room = slots(step) + step.window;
    if (step.length >= 0) room = std::min(room, step.length);
    if (row.start < 0 || row.start > written || row.end > room) return OUT_OF_PLACE;
    if (step.mask_kind == NO_MASK || step.length < 0) continue;
    int64_t query_heads = step.mask_head ? step.heads * GROUP : 1;
    for (int64_t head = 0; head < query_heads; head++)
      for (int64_t query = 0; query < step.mask_queries; query++) {
        int64_t at = b * step.mask_batch + head * step.mask_head + query * step.mask_query;
        for (int64_t token = row.end; token < step.mask_tokens; token++)
          if (mask_value(step, at + token * step.mask_token) > MASKED) return UNWRITTEN;
      }
  }
  return NONE;
}

extern "C" int decode_attention(const Step* given) {
  const Step& step = *given;
  if (Problem found = problem(step)) return found;
  const Splits splits(step);
  const int64_t rows = step.batch * step.heads, queries = step.queries * GROUP, tasks = rows * splits.count;
  static thread_local std::vector<Seen> kept_seen;
  static thread_local std::vector<uint8_t> kept_extreme;
  if ((int64_t)kept_seen.size() < tasks * queries) kept_seen.resize(tasks * queries);
  kept_extreme.assign(2 * rows, 0);
  Seen* seen = kept_seen.data();
  uint8_t* extreme = kept_extreme.data();
#pragma omp parallel num_threads(splits.threads) if (splits.threads > 1)
  {
    static thread_local Scratch scratch;
#pragma omp for
    for (int64_t bh = 0; bh < rows; bh++) {
      extreme[2 * bh] = append<Keys>(step.keys, bh, step.key, step.key_weights, step);
      extreme[2 * bh + 1] = append<Values>(step.values, bh, step.value, step.value_weights, step);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; i++)
      Task(step, scratch, seen + i * queries, i / splits.count).run(i % splits.count, splits.count);
#pragma omp for
    for (int64_t bh = 0; bh < rows; bh++) combine(step, seen + bh * splits.count * queries, splits.count, bh);
  }
  for (int64_t b = 0; b < step.batch; b++) {
    bool key = false, value = false;
    for (int64_t bh = b * step.heads; bh < (b + 1) * step.heads; bh++) key |= extreme[2 * bh], value |= extreme[2 * bh + 1];
    count(step.keys, step, b, key);
    count(step.values, step, b, value);
  }
  return NONE;
}
