// SwiGLU between two dense layers.
//
//   name     shape                                dtype    access
//   gate_up  [M, 2 I], row stride gate_up_stride  float32  read: gate in columns [0, I), up in [I, 2 I)
//   out      [M, I], contiguous                   float32  written
#include "activation.h"

#include <algorithm>

namespace kvb {
namespace {  // names of this file: two files may use the same one

// Below this many outputs waking the other threads costs more than it saves.
constexpr int64_t kSerialOutputs = 1 << 14;

static void swiglu_row(const float* gate, const float* up, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, swiglu(load(gate + i), load(up + i)));
  if (i < width) {
    float tail[3][kLanes] = {};
    std::copy(gate + i, gate + width, tail[0]);
    std::copy(up + i, up + width, tail[1]);
    store(tail[2], swiglu(load(tail[0]), load(tail[1])));
    std::copy(tail[2], tail[2] + width - i, out + i);
  }
}

}  // namespace
}  // namespace kvb

extern "C" void kvb_swiglu(const float* gate_up, int64_t stride, float* out, int64_t m, int64_t width) {
#pragma omp parallel for if (m * width >= kvb::kSerialOutputs)
  for (int64_t r = 0; r < m; ++r)
    kvb::swiglu_row(gate_up + r * stride, gate_up + r * stride + width, width, out + r * width);
}
