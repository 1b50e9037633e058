// The embedding and the blocks of a model, each a token mixer or an MLP, on a ragged batch. All of it is operators of the
// other files; between two calls from Python the interpreter would run with cold caches, which takes as long as a small
// operator.
//
//   residual  [N, H]  float32  written: the residual stream
//   x         [N, H]  float32  written: the last block's output, still to be added to it
#include "gemm.h"
#include "laps.h"
#include "operators.h"

namespace kvb {

// kvbuffer/ops/blocks.py mirrors the structs of this file field by field.

enum BlockKind : int64_t { kGatedDelta, kAttention, kSwiglu, kSparseMoe };

struct GatedDeltaBlock {
  GatedDeltaLayer* heads;
  int64_t value_heads, value_dim, channels;  // channels: C of the convolution
  const float* norm;                         // [value_dim], of each head's output
  double eps;
  const Layer* out_proj;
};

struct AttentionBlock {
  const Layer* qkv_proj;
  const float *input_norm, *q_norm, *k_norm, *cos, *sin;
  int64_t half;  // of the rotated dimensions
  void* pages;
  int64_t heads, kv_heads, dim, page_dtype, hidden;
  double eps;
  const Layer* out_proj;
  double seconds[3];  // written: norm and projection, attention's inputs, attention
};

struct SwigluBlock {
  const float* norm;
  double eps;
  SwigluWeights weights;
};

struct Block {
  int64_t kind;
  void* layer;     // GatedDeltaBlock, AttentionBlock, SwigluBlock or SparseMoeLayer
  double seconds;  // written: what all of it took
};

struct Embedding {
  const void* rows;  // [vocabulary, H]
  int64_t dtype, hidden;
};

namespace {  // names of this file: two files may use the same one

template <class T>
static void embed(const T* rows, int64_t hidden, const Batch& batch, float* out) {
#pragma omp parallel for schedule(static) if (batch.tokens >= 8)
  for (int64_t r = 0; r < batch.tokens; ++r)
    for (int64_t i = 0; i < hidden; ++i) out[r * hidden + i] = to_float(rows[batch.token_ids[r] * hidden + i]);
}

struct Stream {
  const float* x;  // what is still to be added to the residual; null at first
  float *residual, *out;
};

static void run(const GatedDeltaBlock& block, const Stream& stream, const Batch& batch) {
  const int64_t values = block.value_heads * block.value_dim;
  const int64_t width = block.channels + values + 2 * block.value_heads;
  static thread_local Workspace space;
  float* heads = space.get<float>(batch.tokens * (values + width));
  float* projected = heads + batch.tokens * values;
  kvb_gated_delta_heads(block.heads, stream.x, stream.residual, &batch, projected, heads);
  kvb_gated_rms_norm_linear(heads, projected + block.channels, width, block.norm, block.value_dim, block.eps,
                            batch.tokens, block.out_proj, stream.out);
}

static void run(AttentionBlock& block, const Stream& stream, const Batch& batch) {
  const int64_t queries = block.heads * block.dim, width = 2 * (queries + block.kv_heads * block.dim);
  static thread_local Workspace space;
  float* projected = space.get<float>(batch.tokens * (width + 2 * queries));
  float *q = projected + batch.tokens * width, *heads = q + batch.tokens * queries;
  const int page_dtype = static_cast<int>(block.page_dtype);
  Laps laps(block.seconds);
  kvb_add_rms_norm_linear(stream.x, stream.residual, block.input_norm, block.eps, batch.tokens, block.qkv_proj,
                          projected);
  laps.end();
  kvb_attention_inputs(projected, width, block.q_norm, block.k_norm, block.cos, block.sin, block.half, batch.positions,
                       q, block.pages, batch.attention_table, batch.attention_stride, batch.cu_seqlens,
                       batch.context_lens, batch.tokens, batch.segments, block.heads, block.kv_heads, block.dim, 1,
                       block.eps, page_dtype);
  laps.end();
  kvb_paged_attention(q, block.pages, batch.attention_table, batch.attention_stride, batch.cu_seqlens,
                      batch.context_lens, projected + queries, width, batch.parents, heads, batch.segments, block.heads,
                      block.kv_heads, block.dim, page_dtype);
  laps.end();
  kvb_linear(heads, queries, batch.tokens, block.out_proj, stream.out, block.hidden);
}

static void run(const SwigluBlock& block, const Stream& stream, const Batch& batch) {
  const SwigluWeights& w = block.weights;
  kvb_mlp(stream.x, w.hidden, stream.residual, block.norm, block.eps, w.gate_up, w.down, w.gate_up_scale, w.down_scale,
          stream.out, batch.tokens, w.hidden, w.intermediate, static_cast<int>(w.compute));
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_blocks(const Embedding* embedding, Block* blocks, int64_t count, const Batch* batch,
                                  float* residual, float* x) {
  if (embedding->dtype == 0)
    embed(static_cast<const float*>(embedding->rows), embedding->hidden, *batch, residual);
  else
    embed(static_cast<const bf16*>(embedding->rows), embedding->hidden, *batch, residual);
  for (int64_t i = 0; i < count; ++i) {
    Block& block = blocks[i];
    const Stream stream{i ? x : nullptr, residual, x};
    Laps laps(&block.seconds);
    switch (block.kind) {
      case kGatedDelta: run(*static_cast<GatedDeltaBlock*>(block.layer), stream, *batch); break;
      case kAttention: run(*static_cast<AttentionBlock*>(block.layer), stream, *batch); break;
      case kSwiglu: run(*static_cast<SwigluBlock*>(block.layer), stream, *batch); break;
      case kSparseMoe:
        kvb_sparse_moe(static_cast<SparseMoeLayer*>(block.layer), stream.x, residual, x, batch->tokens);
    }
    laps.end();
  }
}
