// States as they are stored: one [K, V] matrix per slot and value head, in float32, bfloat16, or int8 with one float32
// scale per row.
//
// Whoever reads a state multiplies it by vectors from the left. An int8 row's scale then goes into the vectors
// (`apply_row_scales`), so that the loop over the elements is the same for every type: a conversion and its sums.
#pragma once
#include "arguments.h"
#include "int8_products.h"
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

// The state that the next task reads. A fold or a verification takes long enough to fetch `all` of it. Beside rows that
// are only read once, every line of small elements, every other one of float32: the longer memory takes for a row, the
// more its prefetchers do by themselves.
template <class S>
inline void expect_state(const State<S>& state, int64_t K, int64_t V, bool all, Ahead& ahead) {
  ahead.expect(state.data, K * V * sizeof(S), all || sizeof(S) < 4 ? 1 : 2);
  if constexpr (State<S>::kQuantised) ahead.expect(state.scales, K * sizeof(float));
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

// out[x] += the vectors' products with a state [K, V], as add_products. The vectors [padded(K)] have the rows' scales in
// them.
template <int NX, class S>
inline void add_state_products(const State<S>& state, int64_t K, int64_t V, const float* const (&x)[NX],
                               float* const (&out)[NX], Ahead& ahead) {
#if defined(KVB_INT8_PRODUCTS)
  if constexpr (State<S>::kQuantised)
    if (V % kIntegerColumns == 0 && K <= kIntegerRows) {
      int32_t pairs[NX][kIntegerRows / 2];
      float units[NX];
      for (int i = 0; i < NX; ++i) units[i] = quantise_pairs(x[i], kLanes, K, pairs[i]);
      return add_integer_products<NX>(state.data, K, V, *pairs, units, out, ahead);
    }
#endif
  add_products(state.data, K, V, x, out, ahead);
}

// The scale of an int8 row, and its inverse, with which its largest element becomes +-127.
struct RowScale {
  float scale, inverse;

  // Of the largest absolute value, as the bits of a float in one of the lanes.
  explicit RowScale(VecI bits) {
    const float largest = hmax(bits);
    scale = largest / 127.f;
    inverse = scale > 0.f ? 127.f / largest : 0.f;  // two divisions at once, instead of one after the other
  }
};
// The bits of absolute values. Floats without their sign are ordered as integers are.
static inline VecI size_bits(Vec x) { return (VecI)x & 0x7fffffff; }
static inline VecI larger(VecI a, VecI b) { return a > b ? a : b; }

// Rounds a row of V floats to nearest. Returns the scale.
static inline float quantise_row(const float* row, int64_t V, int8_t* to) {
  VecI largest{};
  for (int64_t c = 0; c < V; c += kLanes) largest = larger(largest, size_bits(load(row + c)));
  const RowScale by(largest);
  for (int64_t c = 0; c < V; c += kLanes) store(to + c, load(row + c) * by.inverse);
  return by.scale;
}
// The same of a row in registers.
template <int NV>
inline __attribute__((always_inline)) float quantise_vectors(const Vec (&row)[NV], int8_t* to) {
  VecI largest[NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) largest[j] = size_bits(row[j]);
#pragma GCC unroll 4
  for (int width = NV / 2; width > 0; width /= 2)
#pragma GCC unroll 4
    for (int j = 0; j < width; ++j) largest[j] = larger(largest[j], largest[j + width]);
  const RowScale by(largest[0]);
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) store(to + j * kLanes, row[j] * by.inverse);
  return by.scale;
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

// Rows of an int8 state that are rounded together, so that one's scale is not waited for.
constexpr int kRoundRows = 8;
// Rows of records up to which a fold waits for memory rather than for its arithmetic.
constexpr int64_t kFewRecords = 2;

// Rows r to r + R of `fold_state`, kMost vectors of columns at a time, as floats to `to` [R, V] or rounded to where they
// come from. Each row of values is loaded once for all of them.
template <int R, int kMost, class S>
inline __attribute__((always_inline)) void fold_rows(State<S> state, int64_t r, int64_t K, int64_t V, const float* decay,
                      const float* weighted_keys, const float* values, int64_t n, float* to) {
  const int64_t stride = padded(K);
  S* elements = state.data + r * V;
  for_column_blocks<kMost>(V, [=](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    Vec x[R][NV];
#pragma GCC unroll 4
    for (int a = 0; a < R; ++a) {
      float keep = decay[r + a];
      if constexpr (State<S>::kQuantised) keep *= state.scales[r + a];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) x[a][j] = keep * load(elements + a * V + c + j * kLanes);
    }
    const float *weight = weighted_keys + r, *value = values + c;
    for (int64_t i = 0; i < n; ++i, weight += stride, value += V) {
      Vec factor[R];
#pragma GCC unroll 4
      for (int a = 0; a < R; ++a) factor[a] = held(splat(weight[a]));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        const Vec v = held(load(value + j * kLanes));
#pragma GCC unroll 4
        for (int a = 0; a < R; ++a) x[a][j] += factor[a] * v;
      }
    }
    if constexpr (State<S>::kQuantised)
      if (one_block(V)) {
#pragma GCC unroll 4
        for (int a = 0; a < R; ++a) state.scales[r + a] = quantise_vectors(x[a], elements + a * V);
        return;
      }
#pragma GCC unroll 4
    for (int a = 0; a < R; ++a)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        if constexpr (State<S>::kQuantised)
          store(to + a * V + c + j * kLanes, x[a][j]);
        else
          store(elements + a * V + c + j * kLanes, x[a][j]);
      }
  });
}

// S = diag(decay) S + sum over i < n of weighted_keys[i] (outer) values[i], rounded to S once.
//
//   decay          [K]
//   weighted_keys  [n, padded(K)]
//   values         [n, V]
//   rows           [kRoundRows, V] work space
//
// A step ahead with each row. Together with add_products one compiled copy for every caller, so that a buffer of one
// token has the recurrence's bits: a clone specialised for n = 1 could round its multiply-adds differently.
template <class S>
KVB_SINGLE_COPY void fold_state(const State<S>& state, int64_t K, int64_t V, const float* decay,
                                const float* weighted_keys, const float* values, int64_t n, float* rows, Ahead& ahead) {
  for (int64_t first = 0; first < K; first += kRoundRows) {
    const int64_t last = std::min(first + kRoundRows, K);
    int64_t r = first;
    const auto fold = [&](auto count, auto most) {
      constexpr int R = decltype(count)::value, kMost = decltype(most)::value;
      for (; r + R <= last; r += R) {
        for (int a = 0; a < R; ++a) ahead.step();
        fold_rows<R, kMost>(state, r, K, V, decay, weighted_keys, values, n, rows + (r - first) * V);
      }
    };
    const std::integral_constant<int, kBlockVecs> whole;
    // Many records are a matter of arithmetic, few ones of memory, which likes whole rows. An int8 row needs its largest
    // element.
    if constexpr (!State<S>::kQuantised)
      if (n > kFewRecords)
        fold(std::integral_constant<int, 4>(), std::integral_constant<int, kBlockVecs / 2>());
    fold(std::integral_constant<int, 2>(), whole);
    fold(std::integral_constant<int, 1>(), whole);
    if constexpr (State<S>::kQuantised)
      for (r = one_block(V) ? last : first; r < last; ++r) store_row(state, r, V, rows + (r - first) * V);
  }
}

}  // namespace kvb
