// A dense SwiGLU layer, y = down(silu(gate x) * up x), in one parallel region. The weights are those of one expert.
//
//   x         [M, H], row stride x_stride                float32  read
//   residual  [M, H], contiguous, or null                float32  read and written: residual + x; the layer then takes
//                                                                 rms_norm(residual) * norm in the place of x
//   norm      [H]                                        float32  read
//   gate_up   [ceil(I / kPanel), 2: gate, up] panels     packed   read (kvb_experts_pack)
//   down      [ceil(H / kPanel)] panels                  packed   read (kvb_experts_pack)
//   out       [M, H], contiguous                         float32  written
#include "dense.h"
#include "experts.h"
#include "norm.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

struct Input {
  const float* x;
  int64_t stride;
  float* residual;
  const float* norm;
  float eps;
};

template <class C>
static void mlp(const Input& input, const Dense<C>& gate_up, const Dense<C>& down, float* out, int64_t m, int64_t h,
                int64_t i) {
  static thread_local Workspace normed_space, hidden_space;
  float* hidden = hidden_space.get<float>(m * i);
  float* normed = input.residual ? normed_space.get<float>(m * h) : nullptr;
  Shares gate_up_shares, down_shares;
#pragma omp parallel if (gate_up.work(m) >= kSerialWork)
  {
    if (normed) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < m; ++r)
        add_rms_norm_row(input.x + r * input.stride, input.residual + r * h, input.norm, input.eps, h, normed + r * h);
    }
    multiply_part<2>(gate_up_shares, normed ? normed : input.x, normed ? h : input.stride, m, gate_up,
                     [&](int64_t row, int64_t panel, const float* sums, int64_t up) {
                       const int64_t column = panel / 2 * kPanel;
                       store_hidden(sums, sums + up, std::min<int64_t>(kPanel, i - column), hidden + row * i + column);
                     });
#pragma omp barrier
    multiply_part<1>(down_shares, hidden, i, m, down, [&](int64_t row, int64_t panel, const float* sums, int64_t) {
      const int64_t column = panel * kPanel;
      store_columns(sums, std::min<int64_t>(kPanel, h - column), out + row * h + column);
    });
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_mlp(const float* x, int64_t x_stride, float* residual, const float* norm, float eps,
                        const void* gate_up, const void* down, float gate_up_scale, float down_scale, float* out,
                        int64_t m, int64_t h, int64_t i, int compute) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    const auto dense = [](const void* packed, float scale, int64_t k, int64_t panels) {
      return Dense<C>{static_cast<const typename C::Element*>(packed), scale, k, panels};
    };
    const ExpertShape<C> shape(h, i);
    mlp({x, x_stride, residual, norm, eps}, dense(gate_up, gate_up_scale, h, 2 * shape.pairs()),
        dense(down, down_scale, i, shape.panels()), out, m, h, i);
  });
}
