// A whole mixture-of-experts layer: norm, router, the experts of each token, and the gated expert that all tokens share.
// These are the operators of the other files; called one by one from Python they would take much longer.
//
//   x         [M, H] or null     float32  read
//   residual  [M, H]             float32  read and written: residual + x
//   out       [M, H]             float32  written; may be x
#include "gemm.h"
#include "laps.h"
#include "operators.h"

namespace kvb {

// kvbuffer/ops/sparse_moe.py mirrors this struct field by field.
struct SparseMoeLayer {
  const float* norm;
  const Layer *router, *shared_gate;
  SwigluWeights experts, shared;
  int64_t num_experts, top_k, normalize;
  double eps;
  double seconds[4];  // written: norm and routing, the shared expert, the experts, their sum
};

}  // namespace kvb

using namespace kvb;

extern "C" void kvb_sparse_moe(SparseMoeLayer* layer, const float* x, float* residual, float* out, int64_t m) {
  const SwigluWeights &experts = layer->experts, &shared = layer->shared;
  const int64_t h = experts.hidden, slots = m * layer->top_k;
  static thread_local Workspace space;
  float* normed = space.get<float>(m * (2 * h + layer->num_experts + 1) + 2 * slots);
  float *shared_out = normed + m * h, *logits = shared_out + m * h, *gate = logits + m * layer->num_experts;
  float* weights = gate + m;
  int32_t* ids = reinterpret_cast<int32_t*>(weights + slots);
  Laps laps(layer->seconds);
  kvb_add_rms_norm(x, residual, layer->norm, normed, m, h, layer->eps);
  kvb_linear(normed, h, m, layer->router, logits, layer->num_experts);
  kvb_route(logits, ids, weights, m, layer->num_experts, layer->top_k, static_cast<int>(layer->normalize));
  laps.end();
  kvb_linear(normed, h, m, layer->shared_gate, gate, 1);
  kvb_mlp(normed, h, nullptr, nullptr, 0, shared.gate_up, shared.down, shared.gate_up_scale, shared.down_scale,
          shared_out, m, h, shared.intermediate, static_cast<int>(shared.compute));
  laps.end();
  kvb_moe_mlp(normed, h, ids, weights, experts.gate_up, experts.down, experts.gate_up_scale, experts.down_scale, out, m,
              layer->top_k, layer->num_experts, h, experts.intermediate, static_cast<int>(experts.compute));
  laps.end();
#pragma omp parallel for schedule(static) if (m * h > 1 << 16)
  for (int64_t r = 0; r < m; ++r) {
    const float share = sigmoid(gate[r]);
    for (int64_t i = 0; i < h; ++i) out[r * h + i] += share * shared_out[r * h + i];
  }
  laps.end();
}
