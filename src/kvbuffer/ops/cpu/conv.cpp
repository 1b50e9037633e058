// Short causal convolution over ragged sequences whose last inputs lie in rings.
//
// name          shape            dtype               use
// x             [N, x_stride]    float32             read: the first C columns
// weight        [W, C]           float32             read (transposed from the checkpoint's [C, 1, W])
// pool          [num_rings, R, C]  float32 | bfloat16  read and written: position p of a request lies in row p % R
// rings         [S]              int32               read
// cu_seqlens    [S + 1]          int32               read
// context_lens  [S]              int32               read: position of each sequence's first token
// parents       [N]              int32               read: the token that each follows in its sequence, -1 the ring's
//                                                    last; null for chains
// kept          [M, 3]           int32               read: (ring, sequence, count), sequences ascending: the ring is
//                                                    left with what the sequence's holds after `count` of its tokens
// out           [N, C]           float32             written: silu(conv(x))
#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace kvb {
namespace {

struct Conv {
  const float* x;
  int64_t x_stride;
  const float* weight;
  const int32_t *rings, *cu_seqlens, *context_lens, *parents, *kept;
  float* out;
  int64_t num_kept, sequences, channels, taps, ring_len;
};

// Below this many outputs waking the other threads costs more than it saves.
constexpr int64_t kSerialOutputs = 1 << 13;
constexpr int64_t kBlock = 512;
constexpr int64_t kMaxTaps = 16;

template <int64_t n>
using Count = std::integral_constant<int64_t, n>;

// out[c] = silu(sum over taps of weight[i][c] * inputs[i][c]); the inputs before the sequence have the ring's type.
// Counts are of type int64_t, or constants.
template <class T, class Past, class Inputs>
void convolve(const float* weight, int64_t C, const T* const* past, Past num_past, const float* const* inputs,
              Inputs num_inputs, int64_t n, float* out) {
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

// Fetches the rows of a ring that a sequence's first token reads, and the one that it writes. Rings lie far apart, so
// the processor does not see the next one coming.
template <class T>
void prefetch_ring(const Conv& conv, const T* pool, int64_t sequence, int64_t c0, int64_t n) {
  const int64_t context = conv.context_lens[sequence], R = conv.ring_len;
  for (int64_t p = std::max<int64_t>(0, context - conv.taps + 1); p <= context; ++p) {
    const char* row = reinterpret_cast<const char*>(pool + (conv.rings[sequence] * R + p % R) * conv.channels + c0);
    for (int64_t at = 0; at < n * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(row + at);
  }
}

// Leaves in `ring` what it holds after the first `len` tokens of a sequence, whose inputs begin at `x`.
template <class T>
void keep_inputs(const Conv& conv, const float* x, int64_t context, int64_t len, int64_t n, T* ring) {
  for (int64_t t = std::max<int64_t>(0, len - conv.ring_len); t < len; ++t) {
    const float* row = x + t * conv.x_stride;
    T* kept = ring + (context + t) % conv.ring_len * conv.channels;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) store(kept + c, load(row + c));
    for (; c < n; ++c) from_float(row[c], kept + c);
  }
}

template <class T>
void convolve_block(const Conv& conv, T* pool, int64_t c0) {
  const int64_t C = conv.channels, W = conv.taps, R = conv.ring_len, n = std::min(kBlock, C - c0);
  const T* past[kMaxTaps];
  const float* inputs[kMaxTaps];
  const int32_t *kept = conv.kept, *kept_end = kept + 3 * conv.num_kept;
  for (int64_t s = 0; s < conv.sequences; ++s) {
    const int64_t begin = conv.cu_seqlens[s], len = conv.cu_seqlens[s + 1] - begin, context = conv.context_lens[s];
    T* ring = pool + conv.rings[s] * R * C + c0;
    if (s + 1 < conv.sequences) prefetch_ring(conv, pool, s + 1, c0, n);
    for (int64_t t = 0; t < len; ++t) {
      // Taps reach back along the token's path, then into the ring; before the request's start there is nothing to add.
      int64_t num_inputs = 0;
      for (int64_t i = t; i >= 0 && num_inputs < W; i = conv.parents ? conv.parents[begin + i] : i - 1)
        inputs[num_inputs++] = conv.x + (begin + i) * conv.x_stride + c0;
      std::reverse(inputs, inputs + num_inputs);
      const int64_t num_past = std::min(W - num_inputs, context), oldest = context - num_past;
      for (int64_t i = 0; i < num_past; ++i) past[i] = ring + (oldest + i) % R * C;
      const float* weight = conv.weight + (W - num_past - num_inputs) * C + c0;
      float* out = conv.out + (begin + t) * C + c0;
      // Models have four taps: a token with all of its past, and the second, third and later ones behind it.
      if (num_past == 3 && num_inputs == 1)
        convolve(weight, C, past, Count<3>(), inputs, Count<1>(), n, out);
      else if (num_past == 2 && num_inputs == 2)
        convolve(weight, C, past, Count<2>(), inputs, Count<2>(), n, out);
      else if (num_past == 1 && num_inputs == 3)
        convolve(weight, C, past, Count<1>(), inputs, Count<3>(), n, out);
      else if (num_past == 0 && num_inputs == 4)
        convolve(weight, C, past, Count<0>(), inputs, Count<4>(), n, out);
      else
        convolve(weight, C, past, num_past, inputs, num_inputs, n, out);
    }
    const float* x = conv.x + begin * conv.x_stride + c0;
    for (; kept < kept_end && kept[1] == s; kept += 3) {
      T* other = pool + kept[0] * R * C + c0;
      for (int64_t row = 0; row < R; ++row) std::copy_n(ring + row * C, n, other + row * C);
      keep_inputs(conv, x, context, kept[2], n, other);
    }
    keep_inputs(conv, x, context, len, n, ring);
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
                                const int32_t* cu_seqlens, const int32_t* context_lens, const int32_t* parents,
                                const int32_t* kept, float* out, int64_t num_kept, int64_t sequences, int64_t channels,
                                int64_t taps, int64_t ring_len, int64_t pool_dtype) {
  const Conv conv{x,    x_stride, weight,   rings,     cu_seqlens, context_lens, parents,
                  kept, out,      num_kept, sequences, channels,   taps,         ring_len};
  if (pool_dtype)
    causal_conv(conv, static_cast<bf16*>(pool));
  else
    causal_conv(conv, static_cast<float*>(pool));
}
