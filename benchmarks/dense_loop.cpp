// Attention over a dense cache, as tuned as the kernels of this project: their loops, over rows that are not packed.
#include <algorithm>
#include <vector>
#include "attend.h"

struct Dense {
  const T *query, *keys, *values;
  T* out;
  int64_t rows, tokens, threads;
  double scale;
};

template <int HEAD_DIM> struct DenseTile {
  struct Row {
    const T* row;
    INLINE Unit::Reg read(int unit) { return Unit::read(row + unit * Unit::CHANNELS); }
  };
  static constexpr Scales<false> scales{};
  const T* rows;
  INLINE Row row(int token) const { return {rows + (long)token * HEAD_DIM}; }
  INLINE void prefetch(int token) const {
    const char* ahead = (const char*)(rows + (long)(token + AHEAD) * HEAD_DIM);
    for (int i = 0; i < TOGETHER * HEAD_DIM * (int)sizeof(T); i += 64) __builtin_prefetch(ahead + i, 0, 2);
  }
};

extern "C" void dense_attention(const Dense* given) {
  static_assert(PASSES * M == GROUP && KEY_PADDED == KEY_DIM && VALUE_PADDED == VALUE_DIM);
  const Dense& step = *given;
  const int64_t splits = blocks_of(2 * step.threads, step.rows), tasks = step.rows * splits;
  const int64_t each = blocks_of(blocks_of(step.tokens, splits), TILE) * TILE;
  static std::vector<Seen> kept_seen;
  kept_seen.resize(tasks * GROUP);
  Seen* seen = kept_seen.data();
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
  {
    static thread_local Weights work;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; i++) {
      const int64_t row = i / splits, first = i % splits * each;
      for (int r = 0; r < GROUP; r++) seen[i * GROUP + r].clear();
      for (int64_t token = first; token + TILE <= std::min(first + each, step.tokens); token += TILE)
        for (int pass = 0; pass < PASSES; pass++)
          attend_rows<M>(DenseTile<KEY_DIM>{step.keys + (row * step.tokens + token) * KEY_DIM},
                         DenseTile<VALUE_DIM>{step.values + (row * step.tokens + token) * VALUE_DIM}, TILE,
                         step.query + (row * GROUP + pass * M) * KEY_DIM, seen + i * GROUP + pass * M, work,
                         {(float)step.scale, 0}, nullptr, 0, false);
    }
#pragma omp for
    for (int64_t row = 0; row < step.rows; row++)
      for (int g = 0; g < GROUP; g++) {
        const Seen* part = seen + row * splits * GROUP + g;
        float highest = -INFINITY, total = 0, sums[VALUE_DIM] = {};
        for (int64_t s = 0; s < splits; s++) highest = std::max(highest, part[s * GROUP].highest);
        for (int64_t s = 0; s < splits; s++) {
          float share = expf(part[s * GROUP].highest - highest);
          total += share * sum(load(part[s * GROUP].total));
          for (int c = 0; c < VALUE_DIM; c++) sums[c] += share * part[s * GROUP].sums[c];
        }
        for (int c = 0; c < VALUE_DIM; c++) step.out[(row * GROUP + g) * VALUE_DIM + c] = from_float(sums[Unit::place(c)] / total);
      }
  }
}
