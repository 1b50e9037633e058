// The row-wise operators around a linear-attention layer: residual add + RMSNorm, gated RMSNorm, and the delta rule's
// inputs (normalised keys and queries, gates). Each row is reduced in one fixed order by one thread.
#include "norm.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

// Small calls stay on one thread: waking the others costs more than the work.
constexpr int64_t kParallelElements = 1 << 14;

// name      shape    dtype          use
// x         [N, D]   float32        read
// residual  [N, D]   float32        read and written: residual + x (no add when x is null)
// weight    [D]      float32        read: the factor itself (1 + w for zero-centred norms)
// out       [N, D]   float32        written
static void add_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t N, int64_t D, float eps) {
#pragma omp parallel for schedule(static) if (N * D > kParallelElements)
  for (int64_t r = 0; r < N; ++r)
    add_rms_norm_row(x ? x + r * D : nullptr, residual + r * D, weight, eps, D, out + r * D);
}

// name    shape              dtype          use
// x       [N, H, V]          float32        read
// gate    [N, gate_stride]   float32        read: the first H * V columns
// weight  [V]                float32        read
// out     [N, H, V]          float32        written: rms_norm(x) * weight * silu(gate)
static void gated_rms_norm(const float* x, const float* gate, int64_t gate_stride, const float* weight, float* out, int64_t N,
                           int64_t H, int64_t V, float eps) {
#pragma omp parallel for schedule(static) collapse(2) if (N * H * V > kParallelElements)
  for (int64_t r = 0; r < N; ++r)
    for (int64_t h = 0; h < H; ++h)
      gated_rms_norm_row(x + (r * H + h) * V, gate + r * gate_stride + h * V, weight, eps, V, out + (r * H + h) * V);
}

// name     shape             dtype          use
// qk       [N, qk_stride]    float32        read and written in place: H heads of K columns, each made unit length;
//                                           the first half of the heads (queries) also scaled by K^-1/2
// b, a     [N, ba_stride]    float32        read: HV columns each
// a_log    [HV]              float32        read
// dt_bias  [HV]              float32        read
// g, beta  [N, HV]           float32        written: -exp(a_log) softplus(a + dt_bias), sigmoid(b)
static void gated_delta_inputs(float* qk, int64_t qk_stride, const float* b, const float* a, int64_t ba_stride,
                               const float* a_log, const float* dt_bias, float* g, float* beta, int64_t N, int64_t HK,
                               int64_t HV, int64_t K) {
  const float query_scale = 1.f / std::sqrt((float)K);
#pragma omp parallel for schedule(static) if (N * HK * K > kParallelElements)
  for (int64_t r = 0; r < N; ++r) {
    for (int64_t h = 0; h < 2 * HK; ++h) {
      float* x = qk + r * qk_stride + h * K;
      const float scale = 1.f / std::sqrt(sum_squares(x, K) + 1e-6f) * (h < HK ? query_scale : 1.f);
      int64_t i = 0;
      for (; i + kLanes <= K; i += kLanes) store(x + i, load(x + i) * scale);
      for (; i < K; ++i) x[i] *= scale;
    }
    for (int64_t h = 0; h < HV; ++h) {
      g[r * HV + h] = -std::exp(a_log[h]) * softplus(a[r * ba_stride + h] + dt_bias[h]);
      beta[r * HV + h] = sigmoid(b[r * ba_stride + h]);
    }
  }
}

}  // namespace
}  // namespace kvb

extern "C" {

void kvb_add_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t N, int64_t D,
                      double eps) {
  kvb::add_rms_norm(x, residual, weight, out, N, D, eps);
}

void kvb_gated_rms_norm(const float* x, const float* gate, int64_t gate_stride, const float* weight, float* out,
                        int64_t N, int64_t H, int64_t V, double eps) {
  kvb::gated_rms_norm(x, gate, gate_stride, weight, out, N, H, V, eps);
}

void kvb_gated_delta_inputs(float* qk, int64_t qk_stride, const float* b, const float* a, int64_t ba_stride,
                            const float* a_log, const float* dt_bias, float* g, float* beta, int64_t N, int64_t HK,
                            int64_t HV, int64_t K) {
  kvb::gated_delta_inputs(qk, qk_stride, b, a, ba_stride, a_log, dt_bias, g, beta, N, HK, HV, K);
}

}  // extern "C"
