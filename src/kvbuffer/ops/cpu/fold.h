// Folding a request's first records into a state.
#pragma once
#include "records.h"
#include "states.h"

namespace kvb {

struct FoldScratch {
  Scratch weights, decay, keys, values, rows;
};

// S = A S + sum over the first n records of (their keys as decayed since) (outer) (their values). K steps ahead.
template <class S, class E>
inline void fold_records(const State<S>& state, const Records<E>& records, int64_t n, FoldScratch& scratch,
                         Ahead& ahead) {
  const Shape& shape = records.shape;
  const int64_t K = padded(shape.K), V = shape.V, rows = n * shape.pairs;
  float *weights = scratch.weights.reserve(n * K), *decay = scratch.decay.reserve(K);
  float *keys = scratch.keys.reserve(rows * K), *values = scratch.values.reserve(rows * V);
  record_weights(records, n, weights, decay);
  for_weighted_keys(records, n, weights, [&](int64_t row, int64_t r, Vec e) { store(keys + row * K + r, e); });
  records.for_pages(0, n, [&](int64_t first, int64_t count) {
    float* to = values + first * shape.pairs * V;
    for_vectors(records.values(first), count * shape.pairs * V, [&](int64_t i, Vec e) { store(to + i, e); });
  });
  fold_state(state, shape.K, V, decay, keys, values, rows, scratch.rows.reserve(kRoundRows * V), ahead);
}

}  // namespace kvb
