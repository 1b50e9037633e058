// The heads of a Gated DeltaNet layer on a ragged batch: norm and input projection, convolution, the delta rule's inputs,
// and each section's form. These are the operators of the other files, called from here rather than from Python, which
// would be out of the caches after each of them and take as long as a small operator.
//
//   x          [N, H] or null              float32  read
//   residual   [N, H]                      float32  read and written: residual + x
//   projected  [N, C + HV * V + 2 * HV]    float32  written: queries, keys and values (C), gate, b, a
//   out        [N, HV, V]                  float32  written
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
  double seconds[4];    // written: norm and projection, convolution, the delta rule's inputs, the forms
};

}  // namespace kvb

using namespace kvb;

extern "C" void kvb_gated_delta_heads(GatedDeltaLayer* layer, const float* x, float* residual, const Batch* batch,
                                      float* projected, float* out) {
  const Shape& shape = layer->shape;
  const int64_t keys = shape.HK * shape.K, values = shape.HV * shape.V, channels = 2 * keys + values;
  const int64_t width = channels + values + 2 * shape.HV, tokens = batch->tokens;
  static thread_local Workspace space;
  float* qkv = space.get<float>(tokens * (channels + 2 * shape.HV));
  float *g = qkv + tokens * channels, *beta = g + tokens * shape.HV;
  const float* b = projected + channels + values;
  Laps laps(layer->seconds);
  kvb_add_rms_norm_linear(x, residual, layer->input_norm, layer->eps, tokens, layer->in_proj, projected);
  laps.end();
  kvb_causal_conv(projected, width, layer->conv_weight, layer->ring_pool, batch->rings, batch->cu_seqlens,
                  batch->context_lens, batch->parents, batch->kept_rings, qkv, batch->num_kept, batch->segments, channels,
                  layer->taps, layer->ring_len, layer->ring_dtype);
  laps.end();
  kvb_gated_delta_inputs(qkv, channels, b, b + shape.HV, width, layer->a_log, layer->dt_bias, g, beta, tokens, shape.HK,
                         shape.HV, shape.K);
  laps.end();
  for (const Section* s = batch->sections; s < batch->sections + batch->num_sections; ++s) {
    const float* q = qkv + s->first_token * channels;
    const int64_t gates = s->first_token * shape.HV;
    const Tokens own{q,       q + keys, q + 2 * keys, g + gates, beta + gates, nullptr,
                     nullptr, channels, channels,     channels,  shape.HV};
    RecordPages records = layer->records;
    records.page_table = s->page_table;
    records.table_stride = s->table_stride;
    float* to = out + s->first_token * values;
    if (s->form == kRecurrent)
      kvb_recurrent_decode(&shape, &own, &layer->states, s->slots, to, s->segments);
    else if (s->form == kBuffered)
      kvb_buffered_decode(&shape, &own, &layer->states, &records, s->slots, s->fill, s->fold, to, s->segments);
    else if (s->form == kChunked)
      kvb_chunked_prefill(&shape, &own, &layer->states, s->slots, s->cu_seqlens, s->fresh, to, s->segments);
    else
      kvb_buffered_verify(&shape, &own, &layer->states, &records, s->slots, s->fill, s->cu_seqlens, s->parents, to,
                          s->segments);
  }
  laps.end();
}
