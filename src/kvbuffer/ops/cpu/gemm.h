// Micro-kernels and packed layouts shared by the dense layers (linear.cpp) and the experts (moe.cpp).
//
// Weights [N, K] are packed once into panels of kPanel outputs. K is zero padded to whole blocks and N to whole panels, so
// kernels have no tails. A float32 panel is [K][kPanel]; a panel of 16-bit weights is [K / 2][kPanel][2], the pairs of
// consecutive k side by side: what pair-wise instructions read, and one shift or mask away from float32.
//
// Rows are packed per call, in tiles of up to kMaxRows rows: a tile is [K / kBlock][rows][kRowBlock], so that the kernel
// reads it through one pointer with constant offsets.
//
// Every output is one float32 chain of additions along ascending k, whatever the tile and the blocking (stopping between
// two blocks stores the float32 sum and loads it back, which changes no bit). So a row's result depends neither on the
// other rows nor on the number of threads.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "vec.h"
#if defined(__AVX512BF16__) || defined(__AVX512FP16__)
#include <immintrin.h>
#endif

namespace kvb {

constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes;
// The accumulators of a full tile, two weight vectors and one broadcast fill the register file: 32 registers or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif

// Weights are fetched this far ahead into the L2 cache: more than the latency of memory times one core's share of its
// bandwidth. Past the end of a panel lies the next one.
constexpr uintptr_t kPrefetchBytes = 16384;
// A slice of a panel that stays in the L1 cache while all tiles of rows pass over it.
constexpr int64_t kSliceBytes = 32 * 1024;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How products are computed. Source: an element of the checkpoint; Element: a stored weight; Row: a packed activation;
// kBlock: columns of K that are computed together; kRowBlock: Rows that a packed row takes for them. The codes are the C
// interface's.
struct Float32 {
  static constexpr int kCode = 0, kBlock = 16, kRowBlock = kBlock;
  using Source = float;
  using Element = float;
  using Row = float;
};
struct Widened {  // bfloat16 widened to float32 in registers: exact products, float32 sums
  static constexpr int kCode = 1, kBlock = 16, kRowBlock = kBlock;
  using Source = bf16;
  using Element = bf16;
  using Row = float;
};
struct PairDot {  // activations rounded to bfloat16; pairs multiplied and added by one instruction
  static constexpr int kCode = 2, kBlock = 16, kRowBlock = kBlock;
  using Source = bf16;
  using Element = bf16;
  using Row = bf16;
};

// Half: products and short sums in float16, twice as fast as in float32 and still more accurate than activations rounded
// to bfloat16 (8 bits of mantissa against 11). Range is kept by powers of two, which round nothing: one for all of the
// weights, below 1, and one per row and block of 64 columns, below 256. So 32 products add up to less than 2^13, and
// a bfloat16 weight is kept exactly down to 2^-17 of the largest. The two halves of a pair of columns are summed apart,
// and after 32 products each the sums go to float32: rounding grows with the root of 32, not of K. A packed row's block
// is 64 values and the float32 that scales their sum.
#if defined(__AVX512FP16__)
typedef _Float16 half;
typedef half VecHalf __attribute__((vector_size(kLanes * 4)));

struct Half {
  static constexpr int kCode = 3, kBlock = 64, kRowBlock = kBlock + 2;
  using Source = bf16;
  using Element = half;
  using Row = half;
};
#endif

template <class C>
static inline int64_t padded_k(int64_t k) {
  return ceil_div(k, C::kBlock) * C::kBlock;
}
// Rows that `columns` columns of one packed row take.
template <class C>
static inline int64_t packed_width(int64_t columns) {
  return columns / C::kBlock * C::kRowBlock;
}

// One K block of a tile: acc[r][v] += x[r][k] * w[k][v].
template <int R>
static inline void multiply_block(Float32, Vec (&acc)[R][kPanelVecs], const float* x, const float* w) {
  constexpr int kBlock = Float32::kBlock;
  for (int k = 0; k < kBlock; ++k) {
    Vec b[kPanelVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) b[v] = load(w + k * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec a = splat(x[r * kBlock + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += a * b[v];
    }
  }
}

template <int R>
static inline void multiply_block(Widened, Vec (&acc)[R][kPanelVecs], const float* x, const bf16* w) {
  constexpr int kBlock = Widened::kBlock;
  for (int k = 0; k < kBlock; k += 2) {
    Vec even[kPanelVecs], odd[kPanelVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) {
      VecU pair;
      std::memcpy(&pair, w + k * kPanel + v * 2 * kLanes, sizeof(pair));
      VecU low = pair << 16, high = pair & 0xffff0000u;
      even[v] = (Vec)low;
      odd[v] = (Vec)high;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec a = splat(x[r * kBlock + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += a * even[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec a = splat(x[r * kBlock + k + 1]);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += a * odd[v];
    }
  }
}

#if defined(__AVX512BF16__)
template <int R>
static inline void multiply_block(PairDot, Vec (&acc)[R][kPanelVecs], const bf16* x, const bf16* w) {
  constexpr int kBlock = PairDot::kBlock;
  for (int k = 0; k < kBlock; k += 2) {
    __m512bh b[kPanelVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) std::memcpy(&b[v], w + k * kPanel + v * 2 * kLanes, sizeof(b[v]));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, x + r * kBlock + k, sizeof(pair));
      __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v)
        acc[r][v] = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[r][v]), a, b[v]));
    }
  }
}
#endif

template <class Element>
static inline void prefetch_block(const Element* w, size_t count) {
#pragma GCC unroll 64
  for (size_t i = 0; i < count * sizeof(Element); i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(w) + kPrefetchBytes + i), 0, 2);
}

// c[r][panel] (+)= x tile * w panel over `blocks` K blocks; `first` starts the sums instead of continuing them.
template <class C, int R>
struct RowTile {
  static void multiply(const typename C::Row* x, const typename C::Element* w, int64_t blocks, bool first, float* c) {
    Vec acc[R][kPanelVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = first ? Vec{} : load(c + r * kPanel + v * kLanes);
    for (int64_t block = 0; block < blocks; ++block) {
      prefetch_block(w, C::kBlock * kPanel);
      multiply_block<R>(C{}, acc, x, w);
      x += R * C::kRowBlock;
      w += C::kBlock * kPanel;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVecs; ++v) store(c + r * kPanel + v * kLanes, acc[r][v]);
  }
};

#if defined(__AVX512FP16__)
// The intrinsics without a mask start from an undefined vector, which GCC warns of.
constexpr __mmask16 kAll = 0xffff;

// The sums of a pair's two halves, added and widened: lane i is output i.
static inline Vec pair_sums(VecHalf x) {
  VecU bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const VecU swapped = (bits << 16) | (bits >> 16);
  VecHalf other;
  std::memcpy(&other, &swapped, sizeof(other));
  const VecHalf sums = x + other;
  std::memcpy(&bits, &sums, sizeof(bits));
  const __m256i low = _mm512_maskz_cvtepi32_epi16(kAll, reinterpret_cast<__m512i>(bits));
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(kAll, low));
}

template <int R>
struct RowTile<Half, R> {
  static void multiply(const half* x, const half* w, int64_t blocks, bool first, float* c) {
    for (int64_t block = 0; block < blocks; ++block) {
      VecHalf acc[R][kPanelVecs] = {};
#pragma GCC unroll 2
      for (int k = 0; k < Half::kBlock; k += 2) {
        if (k % 4 == 0) prefetch_block(w + k * kPanel, 4 * kPanel);
        VecHalf b[kPanelVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVecs; ++v) std::memcpy(&b[v], w + k * kPanel + v * 2 * kLanes, sizeof(b[v]));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int pair;
          std::memcpy(&pair, x + r * Half::kRowBlock + k, sizeof(pair));
          const VecI pairs = pair - VecI{};
          VecHalf a;
          std::memcpy(&a, &pairs, sizeof(a));
#pragma GCC unroll 8
          for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += a * b[v];
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float scale;
        std::memcpy(&scale, x + r * Half::kRowBlock + Half::kBlock, sizeof(scale));
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVecs; ++v) {
          float* sum = c + r * kPanel + v * kLanes;
          const Vec before = first && block == 0 ? Vec{} : load(sum);
          store(sum, before + scale * pair_sums(acc[r][v]));
        }
      }
      x += R * Half::kRowBlock;
      w += Half::kBlock * kPanel;
    }
  }
};
#endif

template <class C>
using TileFunction = void (*)(const typename C::Row*, const typename C::Element*, int64_t, bool, float*);

template <class C, size_t... I>
static constexpr std::array<TileFunction<C>, sizeof...(I)> tile_functions(std::index_sequence<I...>) {
  return {&RowTile<C, static_cast<int>(I) + 1>::multiply...};
}

template <class C>
static inline void multiply_tile(int64_t rows, const typename C::Row* x, const typename C::Element* w, int64_t blocks,
                                 bool first, float* c) {
  static constexpr auto functions = tile_functions<C>(std::make_index_sequence<kMaxRows>{});
  functions[rows - 1](x, w, blocks, first, c);
}

// `rows` rows as nearly equal tiles: the fewest tiles that hold them.
struct Tiles {
  explicit Tiles(int64_t rows)
      : count(ceil_div(rows, kMaxRows)), base(count ? rows / count : 0), extra(rows - base * count) {}
  int64_t begin(int64_t tile) const { return tile * base + std::min(tile, extra); }
  int64_t size(int64_t tile) const { return base + (tile < extra); }
  int64_t count, base, extra;
};

// c [rows][kPanel] = packed rows * one panel of `depth` columns. A tile of packed rows starts at its first row * x_stride.
template <class C>
static void multiply(const Tiles& tiles, const typename C::Row* x, int64_t x_stride, const typename C::Element* w,
                     int64_t depth, float* c) {
  constexpr int64_t kSlice = kSliceBytes / (kPanel * sizeof(typename C::Element)) / C::kBlock * C::kBlock;
  for (int64_t k = 0; k < depth; k += kSlice)
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t), begin = tiles.begin(t);
      multiply_tile<C>(rows, x + begin * x_stride + packed_width<C>(k) * rows, w + k * kPanel,
                       std::min(kSlice, depth - k) / C::kBlock, k == 0, c + begin * kPanel);
    }
}

// The first `columns` of one row of sums.
static inline void store_columns(const float* sums, int64_t columns, float* out) {
  std::memcpy(out, sums, columns * sizeof(float));
}

// Calls run(Float32 | Widened | PairDot | Half) for a code of the C interface.
template <class Run>
static inline void with_compute(int code, Run run) {
  if (code == Float32::kCode) run(Float32{});
#if defined(__AVX512BF16__)
  else if (code == PairDot::kCode) run(PairDot{});
#endif
#if defined(__AVX512FP16__)
  else if (code == Half::kCode) run(Half{});
#endif
  else run(Widened{});
}

// Memory of one thread that grows as needed and is kept between calls; contents are undefined after `get`.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  template <class T>
  T* get(int64_t count) {
    size_t bytes = ceil_div(count * sizeof(T), 64) * 64;
    if (bytes > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      bytes_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace kvb
