// One token of each request through the heads of a Gated DeltaNet layer: norm and input projection, convolution, the
// delta rule's inputs, decode. These are the operators of the other files, called from here rather than from Python,
// which would be out of the caches after each of them and take as long as a small operator.
//
//   x          [B, H] or null     float32  read
//   residual   [B, H]             float32  read and written: residual + x
//   rings, cu_seqlens (0 to B), context_lens, slots, page_table, fill, fold: see conv.cpp and decode.cpp; a null fold
//                                          decodes by the recurrence
//   projected  [B, C + HV * V + 2 * HV]    float32  written: queries, keys and values (C), gate, b, a
//   out        [B, HV, V]         float32  written
#include "gemm.h"
#include "laps.h"
#include "operators.h"

namespace kvb {

// A layer and its memory. kvbuffer/ops/gated_delta.py mirrors this struct field by field.
struct GatedDeltaLayer {
  const Layer* in_proj;
  const float *input_norm, *conv_weight, *a_log, *dt_bias;
  void* ring_pool;
  int64_t taps, ring_len, ring_dtype;
  double eps;
  Shape shape;
  StatePool states;
  RecordPages records;  // but for the page table
  double seconds[4];    // written: what each operator took
};

}  // namespace kvb

using namespace kvb;

extern "C" void kvb_gated_delta_decode(GatedDeltaLayer* layer, const float* x, float* residual, const int32_t* rings,
                                       const int32_t* cu_seqlens, const int32_t* context_lens, const int32_t* slots,
                                       const int32_t* page_table, int64_t table_stride, const int32_t* fill,
                                       const uint8_t* fold, float* projected, float* out, int64_t requests) {
  const Shape& shape = layer->shape;
  const int64_t keys = shape.HK * shape.K, values = shape.HV * shape.V, channels = 2 * keys + values;
  const int64_t width = channels + values + 2 * shape.HV;
  static thread_local Workspace space;
  float* qkv = space.get<float>(requests * (channels + 2 * shape.HV));
  float *g = qkv + requests * channels, *beta = g + requests * shape.HV;
  const float* b = projected + channels + values;
  Laps laps(layer->seconds);
  kvb_add_rms_norm_linear(x, residual, layer->input_norm, layer->eps, requests, layer->in_proj, projected);
  laps.end();
  kvb_causal_conv(projected, width, layer->conv_weight, layer->ring_pool, rings, cu_seqlens, context_lens, nullptr,
                  nullptr, qkv, 0, requests, channels, layer->taps, layer->ring_len, layer->ring_dtype);
  laps.end();
  kvb_gated_delta_inputs(qkv, channels, b, b + shape.HV, width, layer->a_log, layer->dt_bias, g, beta, requests,
                         shape.HK, shape.HV, shape.K);
  laps.end();
  const Tokens tokens{qkv,     qkv + keys, qkv + 2 * keys, g,        beta,    nullptr,
                      nullptr, channels,   channels,       channels, shape.HV};
  RecordPages records = layer->records;
  records.page_table = page_table;
  records.table_stride = table_stride;
  if (fold)
    kvb_buffered_decode(&shape, &tokens, &layer->states, &records, slots, fill, fold, out, requests);
  else
    kvb_recurrent_decode(&shape, &tokens, &layer->states, slots, out, requests);
  laps.end();
}
