// Operators of other files that are called one after the other from C++; each is described where it is defined.
#pragma once
#include "arguments.h"
#include "batch.h"

namespace kvb {
struct Layer;            // linear.cpp
struct GatedDeltaLayer;  // gated_delta.cpp
struct SparseMoeLayer;   // sparse_moe.cpp

// Packed SwiGLU weights, of a dense layer or of all experts. kvbuffer/ops/moe.py mirrors this struct field by field.
struct SwigluWeights {
  const void *gate_up, *down;
  double gate_up_scale, down_scale;
  int64_t hidden, intermediate, compute;
};

}  // namespace kvb

extern "C" {

void kvb_linear(const float* x, int64_t x_stride, int64_t m, const kvb::Layer* layer, float* out, int64_t out_stride);

void kvb_add_rms_norm_linear(const float* x, float* residual, const float* norm, float eps, int64_t m,
                             const kvb::Layer* layer, float* out);

void kvb_gated_rms_norm_linear(const float* x, const float* gate, int64_t gate_stride, const float* norm,
                               int64_t norm_dim, float eps, int64_t m, const kvb::Layer* layer, float* out);

void kvb_add_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t N, int64_t D,
                      double eps);

void kvb_causal_conv(const float* x, int64_t x_stride, const float* weight, void* pool, const int32_t* rings,
                     const int32_t* cu_seqlens, const int32_t* context_lens, const int32_t* parents,
                     const int32_t* kept, float* out, int64_t num_kept, int64_t sequences, int64_t channels,
                     int64_t taps, int64_t ring_len, int64_t pool_dtype);

void kvb_gated_delta_inputs(float* qk, int64_t qk_stride, const float* b, const float* a, int64_t ba_stride,
                            const float* a_log, const float* dt_bias, float* g, float* beta, int64_t N, int64_t HK,
                            int64_t HV, int64_t K);

void kvb_recurrent_decode(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                          const int32_t* slots, float* out, int64_t requests);

void kvb_buffered_decode(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                         const kvb::RecordPages* records, const int32_t* slots, const int32_t* fill,
                         const uint8_t* fold, float* out, int64_t requests);

void kvb_buffered_verify(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                         const kvb::RecordPages* records, const int32_t* slots, const int32_t* fill,
                         const int32_t* cu_seqlens, const int32_t* parents, float* out, int64_t requests);

void kvb_chunked_prefill(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                         const int32_t* slots, const int32_t* cu_seqlens, const uint8_t* fresh, float* out, int64_t B);

void kvb_gated_delta_heads(kvb::GatedDeltaLayer* layer, const float* x, float* residual, const kvb::Batch* batch,
                           float* projected, float* out);

void kvb_attention_inputs(const float* qkv, int64_t row_stride, const float* q_norm, const float* k_norm,
                          const float* cos, const float* sin, int64_t half, const int32_t* positions, float* q_out,
                          void* pages, const int32_t* page_table, int64_t table_stride, const int32_t* cu_seqlens,
                          const int32_t* context_lens, int64_t num_tokens, int64_t num_seqs, int64_t heads,
                          int64_t kv_heads, int64_t dim, int64_t norm_groups, float eps, int page_dtype);

void kvb_paged_attention(const float* q, const void* pages, const int32_t* page_table, int64_t table_stride,
                         const int32_t* cu_seqlens, const int32_t* context_lens, const float* gate,
                         int64_t gate_stride, const int32_t* parents, float* out, int64_t num_seqs, int64_t heads,
                         int64_t kv_heads, int64_t dim, int page_dtype);

void kvb_mlp(const float* x, int64_t x_stride, float* residual, const float* norm, float eps, const void* gate_up,
             const void* down, float gate_up_scale, float down_scale, float* out, int64_t m, int64_t h, int64_t i,
             int compute);

void kvb_route(const float* logits, int32_t* ids, float* weights, int64_t m, int64_t experts, int64_t topk,
               int normalize);

void kvb_moe_mlp(const float* x, int64_t x_stride, const int32_t* ids, const float* weights, const void* gate_up,
                 const void* down, float gate_up_scale, float down_scale, float* out, int64_t m, int64_t topk,
                 int64_t experts, int64_t h, int64_t i, int compute);

void kvb_sparse_moe(kvb::SparseMoeLayer* layer, const float* x, float* residual, float* out, int64_t m);

}  // extern "C"
