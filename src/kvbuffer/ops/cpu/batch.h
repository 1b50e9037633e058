// A step's ragged batch, as operators take it that are called for a whole layer, or for all of them.
// kvbuffer/ops/batch.py mirrors these structs field by field, and says what the tensors mean.
#pragma once
#include <cstdint>

namespace kvb {

enum Form : int64_t { kRecurrent, kBuffered, kChunked, kAppended, kVerified };

// Segments that the linear-attention layers compute in one form.
struct Section {
  int64_t form, segments, first_token;
  const int32_t *cu_seqlens, *slots, *page_table;
  int64_t table_stride;
  const int32_t* fill;
  const uint8_t *fold, *fresh;
  const int32_t* parents;  // null where all are chains
};

struct Batch {
  int64_t tokens, segments;
  const int64_t* token_ids;
  const int32_t *positions, *cu_seqlens, *context_lens, *attention_table;
  int64_t attention_stride;
  const int32_t *rings, *parents, *kept_rings;
  int64_t num_kept;
  const Section* sections;
  int64_t num_sections;
};

}  // namespace kvb
