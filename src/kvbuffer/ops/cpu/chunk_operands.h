// What the products of one chunk and value head need (the formulas are in chunked.cpp), and how it is prepared under
// scalar decays.
//
//   name           shape            what
//   query, read    [K, C] panels    q_t and what the correction reads the state with, decayed since the chunk's start
//   write[r]       [C, K] panels    keys of pair r, decayed to the chunk's end
//   query_scores   [C, C] per pair  score(q, key r) of each token with itself and those before it, otherwise zero
//   read_scores    [C, C] per pair  as query_scores; the token itself counts for nothing
//   decay          [K]              of the state's rows over the chunk
//
// C is kChunk: tokens past a chunk's end have zero rows. A removal's pair comes first.
#pragma once
#include "chunk_tiles.h"

namespace kvb {
namespace {

constexpr int kChunk = 64;
// Vector decays treat so many tokens together; scores on the diagonal are computed in tiles that are no larger.
constexpr int kBlockTokens = std::max(kLanes, kTileRows);

// Rows of a chunk's inputs [kChunk, width], zero padded to full chunks and panels; null where the family has none.
struct ChunkRows {
  float *query, *read, *key[2], *g;
};

struct Operands {
  Panels query, read, write[2];
  float *query_scores[2], *read_scores[2], *decay;
};

// exp(x) for x <= 0, zero where that is no normal number.
inline Vec decay_exp(Vec x) { return x < splat(-87.f) ? Vec{} : vexp(x); }

// Zeroes the scores of each row t with the tokens after it, as far as a tile reads.
inline void mask_scores(float* scores) {
  for (int t = 0; t < kChunk; ++t)
    std::fill(scores + t * kChunk + t + 1, scores + t * kChunk + (t / kBlockTokens + 1) * kBlockTokens, 0.f);
}

// products[t, j] = x_t . y_j for j <= t < tokens, of [K, C] panels; also some with j > t.
inline void causal_products(Panels x, Panels y, int64_t K, int64_t tokens, float* products) {
  for (int64_t t = 0; t < tokens; t += kTileRows)
    for (int64_t j = 0; j < t + kTileRows; j += kPanel) {
      Tile tile;
      multiply_add<1, kPanel>(tile, x.at(t), y.at(j), K);
      tile.store_to(products + t * kChunk + j, kChunk);
    }
}

// out = x with column t scaled by weights[t].
inline void scale_columns(Panels x, const float* weights, Panels out) {
  for (int64_t t = 0; t < kChunk; t += kLanes) {
    const Vec weight = load(weights + t);
    for (int64_t r = 0; r < x.rows; ++r) store(out.at(t) + r * kPanel, weight * load(x.at(t) + r * kPanel));
  }
}

// What value heads of one key head share when decays are scalars: transposed inputs and their plain products.
struct KeyHead {
  Panels query, key;
  float *query_products, *key_products;  // the latter null when nothing reads
};

inline void key_head_products(const ChunkRows& rows, int64_t K, int64_t width, int64_t tokens, const KeyHead& out) {
  for (int64_t t = 0; t < kChunk; t += kLanes) {
    transpose_rows(rows.query + t * width, width, width, out.query.at(t), kPanel);
    transpose_rows(rows.key[0] + t * width, width, width, out.key.at(t), kPanel);
  }
  causal_products(out.query, out.key, K, tokens, out.query_products);
  if (out.key_products) causal_products(out.key, out.key, K, tokens, out.key_products);
}

// Operands under one decay for all rows of the state, where scores are plain products times the decay between two
// tokens. g: the chunk's log-decays, 0 past its end.
inline void scalar_operands(const ChunkRows& rows, const KeyHead& shared, const float* g, int64_t tokens, int64_t width,
                            const Operands& out) {
  // Summed in float64: the difference of two large sums is a small log-decay.
  double through[kChunk], sum = 0;
  alignas(64) float from_start[kChunk], to_end[kChunk];
  // A bound whose exponential is zero: sums of infinities would have no difference.
  for (int t = 0; t < kChunk; ++t) through[t] = sum += std::max(g[t], -1e4f);
  for (int t = 0; t < kChunk; ++t) from_start[t] = through[t], to_end[t] = sum - through[t];
  for (int t = 0; t < kChunk; t += kLanes) {
    store(from_start + t, decay_exp(load(from_start + t)));
    store(to_end + t, decay_exp(load(to_end + t)));
  }
  std::fill_n(out.decay, width, from_start[kChunk - 1]);
  scale_columns(shared.query, from_start, out.query);
  if (shared.key_products) scale_columns(shared.key, from_start, out.read);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < width; c += kLanes)
      store(out.write[0].at(c) + t * kPanel, to_end[t] * load(rows.key[0] + t * width + c));
  for (int64_t t = 0; t < ceil_div(tokens, kTileRows) * kTileRows; ++t) {
    alignas(64) float ratio[kChunk];
    for (int j = 0; j < kChunk; ++j) ratio[j] = through[t] - through[j];
    for (int64_t j = t * kChunk; j <= t * kChunk + t; j += kLanes) {
      const Vec decay = decay_exp(load(ratio + j % kChunk));
      store(out.query_scores[0] + j, decay * load(shared.query_products + j));
      if (shared.key_products) store(out.read_scores[0] + j, decay * load(shared.key_products + j));
    }
  }
}

}  // namespace
}  // namespace kvb
