// RMSNorm of single rows, each reduced in one fixed order.
#pragma once
#include "vec.h"

namespace kvb {

static inline float sum_squares(const float* x, int64_t n) {
  Vec acc{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    acc += v * v;
  }
  float s = hsum(acc);
  for (; i < n; ++i) s += x[i] * x[i];
  return s;
}

// residual += x (unless x is null), then out = rms_norm(residual) * weight.
static inline void add_rms_norm_row(const float* x, float* residual, const float* weight, float eps, int64_t dim,
                                    float* out) {
  int64_t i = 0;
  if (x) {
    for (; i + kLanes <= dim; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
    for (; i < dim; ++i) residual[i] += x[i];
  }
  const float scale = 1.f / std::sqrt(sum_squares(residual, dim) / dim + eps);
  for (i = 0; i + kLanes <= dim; i += kLanes) store(out + i, load(residual + i) * scale * load(weight + i));
  for (; i < dim; ++i) out[i] = residual[i] * scale * weight[i];
}

// out = rms_norm(x) * weight * silu(gate)
static inline void gated_rms_norm_row(const float* x, const float* gate, const float* weight, float eps, int64_t dim,
                                      float* out) {
  const float scale = 1.f / std::sqrt(sum_squares(x, dim) / dim + eps);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i) * silu(load(gate + i)));
  for (; i < dim; ++i) out[i] = x[i] * scale * weight[i] * gate[i] * sigmoid(gate[i]);
}

}  // namespace kvb
