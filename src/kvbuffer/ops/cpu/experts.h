// What SwiGLU experts (moe.cpp) and dense SwiGLU layers (mlp.cpp), which are one expert for all tokens, have in common:
// packed weights in which each panel of the gate is followed by the one of the up projection, and what becomes of their
// products.
#pragma once
#include "packing.h"

namespace kvb {

template <class C>
struct ExpertShape {
  ExpertShape(int64_t h, int64_t i) : h(h), i(i), depth_h(padded_k<C>(h)), depth_i(padded_k<C>(i)) {}
  int64_t pairs() const { return ceil_div(i, kPanel); }   // of one gate and one up panel
  int64_t panels() const { return ceil_div(h, kPanel); }  // of the down projection
  int64_t gate_up_size() const { return pairs() * 2 * kPanel * depth_h; }
  int64_t down_size() const { return panels() * kPanel * depth_i; }
  int64_t h, i, depth_h, depth_i;
};

// What the two packed weights were divided by: powers of two, 1 unless computed in float16.
struct WeightScales {
  float gate_up, down;
};

// silu(gate) * up of the first `columns` columns of a row.
static inline void store_hidden(const float* gate, const float* up, int64_t columns, float* hidden) {
  float row[kPanel];
  for (int v = 0; v < kPanel; v += kLanes) store(row + v, silu(load(gate + v)) * load(up + v));
  std::memcpy(hidden, row, columns * sizeof(float));
}

}  // namespace kvb
