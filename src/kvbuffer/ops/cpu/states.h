// States as they are stored: one [K, V] matrix per slot and value head, in float32, bfloat16, or int8 with one float32
// scale per row.
//
// Whoever reads a state multiplies it by vectors from the left. An int8 row's scale then goes into the vectors
// (`apply_row_scales`), so that the loop over the elements is the same for every type: a conversion and its sums.
#pragma once
#include "arguments.h"
#include "rows.h"

namespace kvb {

// The state of one request and value head: [K, V], and [K] scales if S is int8_t.
template <class S>
struct State {
  S* data;
  float* scales;

  static constexpr bool kQuantised = std::is_same<S, int8_t>::value;
};

template <class S>
inline State<S> state_of(const StatePool& pool, const Shape& shape, int64_t slot, int64_t value_head) {
  const int64_t head = slot * shape.HV + value_head;
  return {static_cast<S*>(pool.data) + head * shape.K * shape.V, pool.scales ? pool.scales + head * shape.K : nullptr};
}

// Calls f with a value of the states' element type.
template <class F>
inline void with_state_type(const StatePool& pool, F&& f) {
  switch (pool.dtype) {
    case 0:
      return f(float{});
    case 1:
      return f(bf16{});
    default:
      return f(int8_t{});
  }
}

// x[r] *= scale of row r.
template <class S>
inline void apply_row_scales(const State<S>& state, int64_t K, float* x) {
  if constexpr (State<S>::kQuantised)
    for (int64_t r = 0; r < K; ++r) x[r] *= state.scales[r];
}

// The largest absolute value of a row. Floats without their sign are ordered as integers are.
static inline float largest(const float* row, int64_t V) {
  VecI max{};
  for (int64_t c = 0; c < V; c += kLanes) {
    const VecI bits = (VecI)load(row + c) & 0x7fffffff;
    max = bits > max ? bits : max;
  }
  float lane[kLanes];
  store(lane, (Vec)max);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// Rounds a row of V floats to nearest; its largest element becomes +-127. Returns the scale.
static inline float quantise_row(const float* row, int64_t V, int8_t* to) {
  const float scale = largest(row, V) / 127.f;
  const float inverse = scale > 0.f ? 1.f / scale : 0.f;
  // Added to a small float, 1.5 * 2^23 leaves it rounded to an integer in the lowest bits.
  const Vec shift = splat(12582912.f);
  for (int64_t c = 0; c < V; c += kLanes) {
    const VecI rounded = (VecI)(load(row + c) * inverse + shift) - (VecI)shift;
    const VecB b = __builtin_convertvector(__builtin_convertvector(rounded, VecS), VecB);
    std::memcpy(to + c, &b, sizeof(b));
  }
  return scale;
}

// Row r of a state as floats, and back.
template <class S>
inline void load_row(const State<S>& state, int64_t r, int64_t V, float* row) {
  float scale = 1.f;
  if constexpr (State<S>::kQuantised) scale = state.scales[r];
  for (int64_t c = 0; c < V; c += kLanes) store(row + c, scale * load(state.data + r * V + c));
}
template <class S>
inline void store_row(const State<S>& state, int64_t r, int64_t V, const float* row) {
  S* to = state.data + r * V;
  if constexpr (State<S>::kQuantised)
    state.scales[r] = quantise_row(row, V, to);
  else
    for (int64_t c = 0; c < V; c += kLanes) store(to + c, load(row + c));
}

template <class S>
inline void clear_state(const State<S>& state, int64_t K, int64_t V) {
  std::memset(static_cast<void*>(state.data), 0, K * V * sizeof(S));
  if constexpr (State<S>::kQuantised) std::fill_n(state.scales, K, 0.f);
}
template <class S>
inline void copy_state(const State<S>& from, int64_t K, int64_t V, const State<S>& to) {
  std::memcpy(static_cast<void*>(to.data), from.data, K * V * sizeof(S));
  if constexpr (State<S>::kQuantised) std::copy_n(from.scales, K, to.scales);
}

// S = diag(decay) S + sum over i < n of weighted_keys[i] (outer) values[i], rounded to S once.
//
//   decay          [K]
//   weighted_keys  [n, padded(K)]
//   values         [n, V]
//   row            [V] work space
//
// Together with add_products one compiled copy for every caller, so that a buffer of one token has the recurrence's
// bits: a clone specialised for n = 1 could round its multiply-adds differently.
template <class S>
KVB_SINGLE_COPY void fold_state(const State<S>& state, int64_t K, int64_t V, const float* decay,
                                const float* weighted_keys, const float* values, int64_t n, float* row) {
  const int64_t stride = padded(K);
  for (int64_t r = 0; r < K; ++r) {
    S* elements = state.data + r * V;
    float keep = decay[r];
    if constexpr (State<S>::kQuantised) keep *= state.scales[r];
    for_column_blocks(V, [&](int64_t c, auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      prefetch<NV>(elements + c);
      Vec x[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) x[j] = keep * load(elements + c + j * kLanes);
      for (int64_t i = 0; i < n; ++i) {
        const float weight = weighted_keys[i * stride + r];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) x[j] += weight * load(values + i * V + c + j * kLanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        if constexpr (State<S>::kQuantised)
          store(row + c + j * kLanes, x[j]);
        else
          store(elements + c + j * kLanes, x[j]);
      }
    });
    if constexpr (State<S>::kQuantised) state.scales[r] = quantise_row(row, V, elements);
  }
}

}  // namespace kvb
