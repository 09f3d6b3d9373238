// A whole cache tensor: compressed, or made dense again.
#include <algorithm>
#include "cache.h"

using Rows = Format<ROW_DIM, ROW_CODE, ROW_BITMAP>;
constexpr int HEAD_DIM = ROW_DIM;

// As lowering/native.py has it.
struct Prompt {
  T* dense;
  Cache cache;
  int64_t batch_stride, head_stride, token_stride;  // of ``dense``
  int64_t batch, heads, tokens, window, threads;
  const float* weights;  // [batch, heads, channels], or null

  T* row(int64_t bh, int64_t token) const {
    return dense + bh / heads * batch_stride + bh % heads * head_stride + token * token_stride;
  }
};

constexpr int64_t CHUNK_TOKENS = 256;  // that a thread works on at a time

// Into buffers of zeros, whose counts say how many tokens are written.
extern "C" void compress(const Prompt* prompt) {
  const Prompt& given = *prompt;
  const int64_t rows = given.batch * given.heads, chunks = std::max<int64_t>(blocks_of(given.tokens, CHUNK_TOKENS), 1);
#pragma omp parallel for num_threads(given.threads) if (given.threads > 1) schedule(dynamic)
  for (int64_t i = 0; i < rows * chunks; i++) {
    const int64_t bh = i / chunks, chunk = i % chunks, b = bh / given.heads;
    const int64_t written = std::clamp<int64_t>(given.cache.counts[b * COUNTS], 0, given.tokens);
    const Head<Rows> head(given.cache, bh, rows, given.window);
    const int64_t pruned = std::min(std::max<int64_t>(written - given.window, 0), head.slots);
    const int64_t first = chunk * CHUNK_TOKENS, end = std::min(first + CHUNK_TOKENS, written);
    const float* weights = given.weights ? given.weights + bh * HEAD_DIM : nullptr;
    bool extreme = false;
    for (int64_t token = first; token < end; token++) {
      const T* row = given.row(bh, token);
      extreme |= token < pruned ? head.prune(token, row, weights) : has_extreme<HEAD_DIM>(row);
      if (token >= written - head.ring_slots) memcpy(head.exact(token), row, HEAD_DIM * sizeof(T));
    }
    if (extreme) {
#pragma omp atomic write
      given.cache.counts[b * COUNTS + 2] = 1;
    }
  }
}

extern "C" void decompress(const Prompt* prompt) {
  const Prompt& given = *prompt;
  const int64_t rows = given.batch * given.heads, chunks = blocks_of(given.tokens, CHUNK_TOKENS);
#pragma omp parallel for num_threads(given.threads) if (given.threads > 1) schedule(dynamic)
  for (int64_t i = 0; i < rows * chunks; i++) {
    const int64_t bh = i / chunks, first = i % chunks * CHUNK_TOKENS;
    const int64_t* counts = given.cache.counts + bh / given.heads * COUNTS;
    const Head<Rows> head(given.cache, bh, rows, given.window);
    const int64_t pruned = std::min(std::max(counts[1], counts[0] - given.window), head.slots);
    for (int64_t token = first; token < std::min(first + CHUNK_TOKENS, given.tokens); token++) {
      T* row = given.row(bh, token);
      if (token >= pruned && token < counts[0]) {
        memcpy(row, head.exact(token), HEAD_DIM * sizeof(T));
        continue;
      }
      if (token < pruned) head.expand(token, row);
      else memset(row, 0, HEAD_DIM * sizeof(T));
    }
  }
}

// The name of what the compiler took of simd.h.
extern "C" const char* simd() { return SIMD_NAME; }
