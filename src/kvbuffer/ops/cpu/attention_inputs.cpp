// Queries, keys and values of a step's new tokens: norm, rotary embedding, write to pages.
#include <algorithm>
#include <type_traits>

#include "paged_kv.h"
#include "vec.h"

namespace kvb {
namespace {

struct Rotary {
  const float *cos, *sin;  // of one position, [half]
  int64_t half;
};

// Zero-centred RMS norm of one head, then rotated: out [D].
static void norm_rotate(const float* x, const float* weight, float eps, const Rotary& rotary, int64_t dim,
                        float* out) {
  Vec squares{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec v = load(x + d);
    squares += v * v;
  }
  const float rms = 1.f / std::sqrt(hsum(squares) / static_cast<float>(dim) + eps);
  for (int64_t d = 0; d < dim; d += kLanes) store(out + d, load(x + d) * rms * (load(weight + d) + 1.f));
  for (int64_t i = 0; i < rotary.half; ++i) {
    const float a = out[i], b = out[i + rotary.half];
    out[i] = a * rotary.cos[i] - b * rotary.sin[i];
    out[i + rotary.half] = b * rotary.cos[i] + a * rotary.sin[i];
  }
}

template <class T>
void attention_inputs(const float* qkv, int64_t row_stride, const float* q_norm, const float* k_norm, const float* cos,
                      const float* sin, int64_t half, const int32_t* positions, float* q_out, T* pages,
                      const Sequences& seqs, int64_t num_tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                      int64_t norm_groups, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < num_tokens; ++i) {
    const int32_t* end = seqs.cu_seqlens + seqs.num_seqs + 1;
    const int64_t b = std::upper_bound(seqs.cu_seqlens, end, static_cast<int32_t>(i)) - seqs.cu_seqlens - 1;
    const int64_t slot = seqs.context_lens[b] + i - seqs.cu_seqlens[b];
    T* page = pages + seqs.pages_of(b)[slot / kPage] * 2 * kv_heads * kPage * dim;
    const Rotary rotary{cos + positions[i] * half, sin + positions[i] * half, half};
    const float* row = qkv + i * row_stride;
    const float* k = row + 2 * heads * dim;
    const float* v = k + kv_heads * dim;
    for (int64_t h = 0; h < heads; ++h)
      norm_rotate(row + h * dim, q_norm + h * norm_groups / heads * dim, eps, rotary, dim, q_out + (i * heads + h) * dim);
    float head[kMaxDim];
    for (int64_t h = 0; h < kv_heads; ++h) {
      norm_rotate(k + h * dim, k_norm + h * norm_groups / kv_heads * dim, eps, rotary, dim, head);
      T* keys = page + h * kPage * dim + slot % kPage;
      for (int64_t d = 0; d < dim; ++d) from_float(head[d], keys + d * kPage);
      T* value = page + ((kv_heads + h) * kPage + slot % kPage) * dim;
      for (int64_t d = 0; d < dim; d += kLanes) store(value + d, load(v + h * dim + d));
    }
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

//   qkv        [N, row_stride]  float32      read     rows: q (H*D), gate (H*D), k (HKV*D), v (HKV*D)
//   q_norm     [G, D]           float32      read     zero-centred: the factor is 1 + weight; G: norm_groups, the
//   k_norm     [G, D]           float32      read     heads being in as many equal groups
//   cos, sin   [max_len, half]  float32      read     half: half of the rotated dimensions
//   positions  [N]              int32        read
//   q_out      [N, H, D]        float32      written
//   pages      see paged_kv.h   model dtype  written  at the new tokens' slots
//   page_table, cu_seqlens, context_lens: see paged_kv.h, read
extern "C" void kvb_attention_inputs(const float* qkv, int64_t row_stride, const float* q_norm, const float* k_norm,
                                     const float* cos, const float* sin, int64_t half, const int32_t* positions,
                                     float* q_out, void* pages, const int32_t* page_table, int64_t table_stride,
                                     const int32_t* cu_seqlens, const int32_t* context_lens, int64_t num_tokens,
                                     int64_t num_seqs, int64_t heads, int64_t kv_heads, int64_t dim,
                                     int64_t norm_groups, float eps, int page_dtype) {
  const Sequences seqs{page_table, cu_seqlens, context_lens, table_stride, num_seqs};
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attention_inputs(qkv, row_stride, q_norm, k_norm, cos, sin, half, positions,
                     q_out, static_cast<T*>(pages), seqs, num_tokens, heads, kv_heads, dim, norm_groups, eps);
  };
  page_dtype == 0 ? run(static_cast<float*>(nullptr)) : run(static_cast<bf16*>(nullptr));
}
