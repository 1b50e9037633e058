// Where the keys and values of a layer's tokens lie.
//
//   pages         [num_pages, 2, HKV, 16*D]  model dtype  index 0: keys (D, 16); index 1: values (16, D)
//   page_table    [B, max_pages]             int32        page ids of each request, row stride given
//   cu_seqlens    [B + 1]                    int32        where each request's new tokens start in the batch
//   context_lens  [B]                        int32        tokens in the pages before this step
//
// Keys lie dimension-major inside their page so that the 16 tokens of a page fill vector lanes: scores need
// neither a horizontal sum per token nor a transposition, and a slot never written spoils only its own lane.
#pragma once
#include <cstdint>

namespace kvb {

constexpr int kPage = 16;     // tokens in a page
constexpr int kMaxDim = 256;  // largest head dimension

struct Sequences {
  const int32_t *page_table, *cu_seqlens, *context_lens;
  int64_t table_stride, num_seqs;

  const int32_t* pages_of(int64_t b) const { return page_table + b * table_stride; }
};

}  // namespace kvb
