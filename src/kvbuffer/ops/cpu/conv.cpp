// Short causal convolution over ragged sequences whose last inputs lie in rings.
//
// name          shape            dtype               use
// x             [N, x_stride]    float32             read: the first C columns
// weight        [W, C]           float32             read (transposed from the checkpoint's [C, 1, W])
// pool          [num_rings, R, C]  float32 | bfloat16  read and written: position p of a request lies in row p % R
// rings         [S]              int32               read
// cu_seqlens    [S + 1]          int32               read
// context_lens  [S]              int32               read: position of each sequence's first token
// out           [N, C]           float32             written: silu(conv(x))
#include <algorithm>

#include "vec.h"

namespace kvb {
namespace {

struct Conv {
  const float* x;
  int64_t x_stride;
  const float* weight;
  const int32_t *rings, *cu_seqlens, *context_lens;
  float* out;
  int64_t sequences, channels, taps, ring_len;
};

// Below this many outputs waking the other threads costs more than it saves.
constexpr int64_t kSerialOutputs = 1 << 13;
constexpr int64_t kBlock = 256;
constexpr int64_t kMaxTaps = 16;

// out[c] = silu(sum over taps of weight[i][c] * inputs[i][c]); the inputs before the sequence have the ring's type.
template <class T>
void convolve(const float* weight, int64_t C, const T* const* past, int64_t num_past, const float* const* inputs,
              int64_t num_inputs, int64_t n, float* out) {
  const float* own_weight = weight + num_past * C;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Vec acc{};
    for (int64_t i = 0; i < num_past; ++i) acc += load(weight + i * C + c) * load(past[i] + c);
    for (int64_t i = 0; i < num_inputs; ++i) acc += load(own_weight + i * C + c) * load(inputs[i] + c);
    store(out + c, silu(acc));
  }
  for (; c < n; ++c) {
    float acc = 0.f;
    for (int64_t i = 0; i < num_past; ++i) acc += weight[i * C + c] * to_float(past[i][c]);
    for (int64_t i = 0; i < num_inputs; ++i) acc += own_weight[i * C + c] * inputs[i][c];
    out[c] = acc * sigmoid(acc);
  }
}

template <class T>
void convolve_block(const Conv& conv, T* pool, int64_t c0) {
  const int64_t C = conv.channels, W = conv.taps, R = conv.ring_len, n = std::min(kBlock, C - c0);
  const T* past[kMaxTaps];
  const float* inputs[kMaxTaps];
  for (int64_t s = 0; s < conv.sequences; ++s) {
    const int64_t begin = conv.cu_seqlens[s], len = conv.cu_seqlens[s + 1] - begin, context = conv.context_lens[s];
    T* ring = pool + conv.rings[s] * R * C + c0;
    for (int64_t t = 0; t < len; ++t) {
      // Taps reach back to the position t - W + 1; before the request's start there is nothing to add.
      const int64_t oldest = std::max(t - W + 1, -context), num_past = std::max<int64_t>(0, -oldest);
      for (int64_t i = 0; i < num_past; ++i) past[i] = ring + (context + oldest + i) % R * C;
      const int64_t first = std::max<int64_t>(0, oldest), num_inputs = t - first + 1;
      for (int64_t i = 0; i < num_inputs; ++i) inputs[i] = conv.x + (begin + first + i) * conv.x_stride + c0;
      const float* weight = conv.weight + (W - num_past - num_inputs) * C + c0;
      convolve(weight, C, past, num_past, inputs, num_inputs, n, conv.out + (begin + t) * C + c0);
    }
    for (int64_t t = std::max<int64_t>(0, len - R); t < len; ++t) {
      const float* row = conv.x + (begin + t) * conv.x_stride + c0;
      T* kept = ring + (context + t) % R * C;
      int64_t c = 0;
      for (; c + kLanes <= n; c += kLanes) store(kept + c, load(row + c));
      for (; c < n; ++c) from_float(row[c], kept + c);
    }
  }
}

template <class T>
void causal_conv(const Conv& conv, T* pool) {
  // A task owns its channels in every ring, so reading and writing need no barrier, sequences run in order (one may go
  // on where another stopped), and one request alone still uses every thread.
  const int64_t blocks = (conv.channels + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (conv.cu_seqlens[conv.sequences] * conv.channels > kSerialOutputs)
  for (int64_t block = 0; block < blocks; ++block) convolve_block(conv, pool, block * kBlock);
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_causal_conv(const float* x, int64_t x_stride, const float* weight, void* pool, const int32_t* rings,
                                const int32_t* cu_seqlens, const int32_t* context_lens, float* out, int64_t sequences,
                                int64_t channels, int64_t taps, int64_t ring_len, int64_t pool_dtype) {
  const Conv conv{x, x_stride, weight, rings, cu_seqlens, context_lens, out, sequences, channels, taps, ring_len};
  if (pool_dtype)
    causal_conv(conv, static_cast<bf16*>(pool));
  else
    causal_conv(conv, static_cast<float*>(pool));
}
