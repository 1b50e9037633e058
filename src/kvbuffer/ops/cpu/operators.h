// Operators of other files that gated_delta.cpp calls one after the other; each is described where it is defined.
#pragma once
#include "arguments.h"

namespace kvb {
struct Layer;  // linear.cpp
}

extern "C" {

void kvb_add_rms_norm_linear(const float* x, float* residual, const float* norm, float eps, int64_t m,
                             const kvb::Layer* layer, float* out);

void kvb_causal_conv(const float* x, int64_t x_stride, const float* weight, void* pool, const int32_t* rings,
                     const int32_t* cu_seqlens, const int32_t* context_lens, const int32_t* parents, float* out,
                     int64_t sequences, int64_t channels, int64_t taps, int64_t ring_len, int64_t pool_dtype);

void kvb_gated_delta_inputs(float* qk, int64_t qk_stride, const float* b, const float* a, int64_t ba_stride,
                            const float* a_log, const float* dt_bias, float* g, float* beta, int64_t N, int64_t HK,
                            int64_t HV, int64_t K);

void kvb_recurrent_decode(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                          const int32_t* slots, float* out, int64_t requests);

void kvb_buffered_decode(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                         const kvb::RecordPages* records, const int32_t* slots, const int32_t* fill,
                         const uint8_t* fold, float* out, int64_t requests);

}  // extern "C"
