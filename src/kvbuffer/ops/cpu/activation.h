// SwiGLU, silu(gate) * up. Each intermediate is rounded to the model's dtype T, as separate operators would round it.
#pragma once
#include "vec.h"

namespace kvb {

template <class T>
static inline Vec round_to(Vec x) {
  T rounded[kLanes];
  store(rounded, x);
  return load(rounded);
}

template <class T>
static inline Vec swiglu(Vec gate, Vec up) {
  return round_to<T>(round_to<T>(silu(gate)) * up);
}

}  // namespace kvb
