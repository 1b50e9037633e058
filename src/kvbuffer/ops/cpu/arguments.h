// What the linear-attention kernels are handed, for every family. kvbuffer/ops/cpu/arguments.py mirrors these structs
// field by field; kvbuffer/ops/layout.py says what the tensors mean.
#pragma once
#include <cstdint>

namespace kvb {

struct Shape {
  int64_t HK, HV, K, V;
  int64_t pairs;        // key-value pairs that a token writes: 1, or 2 under a removal rule
  int64_t decay_width;  // log-decays of a token and value head: K for vector decays, otherwise 1

  int64_t key_head(int64_t value_head) const { return value_head / (HV / HK); }
};

//   q, k           [N, HK, K]            float32  read; rows strided
//   v              [N, HV, V]            float32  read; rows strided
//   g              [N, HV, decay_width]  float32  read; rows strided; null without decay
//   beta           [N, HV]               float32  read; null unless the delta rule
//   removal_read   [N, HK, K]            float32  read; null unless a removal rule
//   removal_write  [N, HK, K]            float32  as removal_read
struct Tokens {
  const float *q, *k, *v, *g, *beta, *removal_read, *removal_write;
  int64_t q_stride, k_stride, v_stride, g_stride;

  // What one value head sees of one token; null where the tensor is.
  struct Head {
    const float *q, *k, *v, *g, *beta, *removal_read, *removal_write;
  };
  Head at(const Shape& shape, int64_t token, int64_t value_head) const {
    const int64_t key = shape.key_head(value_head) * shape.K, removal = token * shape.HK * shape.K + key;
    return {q + token * q_stride + key,
            k + token * k_stride + key,
            v + token * v_stride + value_head * shape.V,
            g ? g + token * g_stride + value_head * shape.decay_width : nullptr,
            beta ? beta + token * shape.HV + value_head : nullptr,
            removal_read ? removal_read + removal : nullptr,
            removal_write ? removal_write + removal : nullptr};
  }
};

//   data    [num_slots, HV, K, V]  float32 | bfloat16 | int8
//   scales  [num_slots, HV, K]     float32, null unless int8
struct StatePool {
  void* data;
  float* scales;
  int64_t dtype;
};

//   keys        [num_pages, HK, page_size, pairs * K]     float32 | bfloat16
//   values      [num_pages, HV, page_size, pairs * V]     as keys
//   decays      [num_pages, HV, page_size, decay_width]   float32
//   page_table  [B, table_stride]                         int32
struct RecordPages {
  void *keys, *values;
  float* decays;
  const int32_t* page_table;
  int64_t table_stride, page_size, dtype;
};

}  // namespace kvb
