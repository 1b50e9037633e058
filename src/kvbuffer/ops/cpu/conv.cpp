// Short causal convolution over ragged sequences, with rolling inputs.
//
// name        shape                     dtype          use
// x           [N, x_stride]             float32        read: the first C columns
// weight      [W, C]                    float32        read (transposed from the checkpoint's [C, 1, W])
// state       [num_slots, W-1, C]       float32        read and written: the last W-1 inputs of each request
// slots       [B]                       int32          read
// cu_seqlens  [B + 1]                   int32          read
// fresh       [B]                       uint8          read: nothing came before, the state is not read
// out         [N, C]                    float32        written: silu(conv(x))
#include <algorithm>
#include <vector>

#include "vec.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

// Below this many outputs waking the other threads costs more than it saves.
constexpr int64_t kSerialOutputs = 1 << 13;

static void causal_conv(const float* x, int64_t x_stride, const float* weight, float* state, const int32_t* slots,
                        const int32_t* cu_seqlens, const uint8_t* fresh, float* out, int64_t B, int64_t C, int64_t W) {
  // Tasks are channel blocks of requests: a task owns its slice of the rolling inputs, so reading and updating need no
  // barrier, and one request alone still uses every thread.
  const int64_t block = 512, blocks = (C + block - 1) / block;
#pragma omp parallel for schedule(static) collapse(2) if (cu_seqlens[B] * C > kSerialOutputs)
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t blk = 0; blk < blocks; ++blk) {
      const int64_t c0 = blk * block, n = std::min(block, C - c0), begin = cu_seqlens[b],
                    len = cu_seqlens[b + 1] - begin;
      if (len == 0) continue;
      float* past = state + slots[b] * (W - 1) * C + c0;
      if (fresh[b])
        for (int64_t i = 0; i < W - 1; ++i) std::memset(past + i * C, 0, n * sizeof(float));
      // Input at position t of this chunk; negative positions are rolling inputs.
      auto row = [&](int64_t t) { return t >= 0 ? x + (begin + t) * x_stride + c0 : past + (t + W - 1) * C; };
      for (int64_t t = 0; t < len; ++t) {
        float* o = out + (begin + t) * C + c0;
        int64_t c = 0;
        for (; c + kLanes <= n; c += kLanes) {
          Vec acc{};
          for (int64_t i = 0; i < W; ++i) acc += load(weight + i * C + c0 + c) * load(row(t - W + 1 + i) + c);
          store(o + c, silu(acc));
        }
        for (; c < n; ++c) {
          float acc = 0.f;
          for (int64_t i = 0; i < W; ++i) acc += weight[i * C + c0 + c] * row(t - W + 1 + i)[c];
          o[c] = acc * sigmoid(acc);
        }
      }
      // Ascending order: a row is overwritten only after it has been moved down.
      for (int64_t i = 0; i < W - 1; ++i) std::memmove(past + i * C, row(len - W + 1 + i), n * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace kvb

extern "C" void kvb_causal_conv(const float* x, int64_t x_stride, const float* weight, float* state,
                                const int32_t* slots, const int32_t* cu_seqlens, const uint8_t* fresh, float* out,
                                int64_t B, int64_t C, int64_t W) {
  kvb::causal_conv(x, x_stride, weight, state, slots, cu_seqlens, fresh, out, B, C, W);
}
