// SwiGLU in float32; the caller rounds the result once.
#pragma once
#include "vec.h"

namespace kvb {

static inline Vec swiglu(Vec gate, Vec up) { return silu(gate) * up; }

}  // namespace kvb
