// SwiGLU between two dense layers.
//
//   name     shape                               dtype   access
//   gate_up  [M, 2 I], row stride gate_up_stride  model   read: gate in columns [0, I), up in [I, 2 I)
//   out      [M, I], contiguous                   model   written
#include "activation.h"

#include <algorithm>

namespace kvb {
namespace {  // names of this file: two files may use the same one

// Below this many outputs waking the other threads costs more than it saves.
constexpr int64_t kSerialOutputs = 1 << 14;

template <class T>
static void swiglu_row(const T* gate, const T* up, int64_t width, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, swiglu(load(gate + i), load(up + i)));
  if (i < width) {
    T tail[3][kLanes] = {};
    std::copy(gate + i, gate + width, tail[0]);
    std::copy(up + i, up + width, tail[1]);
    store(tail[2], swiglu(load(tail[0]), load(tail[1])));
    std::copy(tail[2], tail[2] + width - i, out + i);
  }
}

template <class T>
static void swiglu_rows(const T* gate_up, int64_t stride, T* out, int64_t m, int64_t width) {
#pragma omp parallel for if (m * width >= kSerialOutputs)
  for (int64_t r = 0; r < m; ++r)
    swiglu_row(gate_up + r * stride, gate_up + r * stride + width, width, out + r * width);
}

}  // namespace
}  // namespace kvb

extern "C" void kvb_swiglu(const void* gate_up, int64_t gate_up_stride, void* out, int64_t m, int64_t width,
                           int dtype) {
  using namespace kvb;
  if (dtype == 0)
    swiglu_rows(static_cast<const float*>(gate_up), gate_up_stride, static_cast<float*>(out), m, width);
  else
    swiglu_rows(static_cast<const bf16*>(gate_up), gate_up_stride, static_cast<bf16*>(out), m, width);
}
