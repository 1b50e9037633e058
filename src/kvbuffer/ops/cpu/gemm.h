// Micro-kernels and packed layouts shared by the dense layers (linear.cpp) and the experts (moe.cpp).
//
// Weights [N, K] are packed once into panels of kPanel outputs. K is zero padded to whole blocks of kBlock and N to
// whole panels, so kernels have no tails. A float32 panel is [K][kPanel]; a bfloat16 panel is [K / 2][kPanel][2], the
// pairs of consecutive k side by side: what the dot-product instruction reads, and one shift or mask away from float32.
//
// Rows are packed per call, in tiles of up to kMaxRows rows: a tile is [K / kBlock][rows][kBlock], so that the kernel
// reads it through one pointer with constant offsets.
//
// Every output is one float32 chain of fused multiply-adds along ascending k, whatever the tile and the blocking
// (stopping between two blocks stores the float32 sum and loads it back, which changes no bit). So a row's result
// depends neither on the other rows nor on the number of threads.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "vec.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace kvb {

constexpr int kBlock = 16;
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
constexpr uintptr_t kPrefetchBytes = 8192;
// A slice of a panel that stays in the L1 cache while all tiles of rows pass over it.
constexpr int64_t kSliceBytes = 32 * 1024;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t padded_k(int64_t k) { return ceil_div(k, kBlock) * kBlock; }

// How products are computed. Element: a stored weight; Row: a packed activation. The codes are the C interface's.
struct Float32 {
  static constexpr int kCode = 0;
  using Element = float;
  using Row = float;
};
struct Widened {  // bfloat16 widened to float32 in registers: exact products, float32 sums
  static constexpr int kCode = 1;
  using Element = bf16;
  using Row = float;
};
struct PairDot {  // bfloat16 pairs multiplied and added by one instruction
  static constexpr int kCode = 2;
  using Element = bf16;
  using Row = bf16;
};

// One K block of a tile: acc[r][v] += x[r][k] * w[k][v].
template <int R>
static inline void multiply_block(Float32, Vec (&acc)[R][kPanelVecs], const float* x, const float* w) {
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
  for (int k = 0; k < kBlock; k += 2) {
    Vec even[kPanelVecs], odd[kPanelVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) {
      VecU pair;
      std::memcpy(&pair, w + k * kPanel + v * 2 * kLanes, sizeof(pair));
      VecU low = pair << 16, high = pair & 0xffff0000u;
      even[v] = reinterpret_cast<Vec&>(low);
      odd[v] = reinterpret_cast<Vec&>(high);
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

// c[r][panel] (+)= x tile * w panel over `blocks` K blocks; `first` starts the sums instead of continuing them.
template <class C, int R>
static void multiply_tile_of(const typename C::Row* x, const typename C::Element* w, int64_t blocks, bool first,
                             float* c) {
  Vec acc[R][kPanelVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) acc[r][v] = first ? Vec{} : load(c + r * kPanel + v * kLanes);
  for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 64
    for (size_t i = 0; i < kBlock * kPanel * sizeof(*w); i += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(w) + kPrefetchBytes + i), 0, 2);
    multiply_block<R>(C{}, acc, x, w);
    x += R * kBlock;
    w += kBlock * kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) store(c + r * kPanel + v * kLanes, acc[r][v]);
}

template <class C>
using TileFunction = void (*)(const typename C::Row*, const typename C::Element*, int64_t, bool, float*);

template <class C, size_t... I>
static constexpr std::array<TileFunction<C>, sizeof...(I)> tile_functions(std::index_sequence<I...>) {
  return {&multiply_tile_of<C, static_cast<int>(I) + 1>...};
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

// c [rows][kPanel] (+)= packed rows * one panel over `depth` columns of K. A tile of packed rows starts at its first
// row * x_stride.
template <class C>
static void multiply(const Tiles& tiles, const typename C::Row* x, int64_t x_stride, const typename C::Element* w,
                     int64_t depth, bool first, float* c) {
  constexpr int64_t kSlice = kSliceBytes / (kPanel * sizeof(typename C::Element)) / kBlock * kBlock;
  for (int64_t k = 0; k < depth; k += kSlice)
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t), begin = tiles.begin(t);
      multiply_tile<C>(rows, x + begin * x_stride + k * rows, w + k * kPanel, std::min(kSlice, depth - k) / kBlock,
                       first && k == 0, c + begin * kPanel);
    }
}

template <class Out, class In>
static inline void copy_row_block(const In* from, int64_t count, Out* to) {
  for (int i = 0; i < kBlock; ++i) from_float(i < count ? to_float(from[i]) : 0.f, to + i);
}
static inline void copy_row_block(const bf16* from, int64_t count, bf16* to) {
  for (int i = 0; i < kBlock; ++i) to[i] = i < count ? from[i] : bf16{0};
}

// Packs columns [k, k + width) of all rows; row(i) points to row i, which ends at column `total_k` and is zero padded.
template <class C, class RowAt>
static void pack_rows(const Tiles& tiles, RowAt row, int64_t k, int64_t width, int64_t total_k,
                      typename C::Row* packed) {
  for (int64_t t = 0; t < tiles.count; ++t)
    for (int64_t block = 0; block < width; block += kBlock)
      for (int64_t r = 0; r < tiles.size(t); ++r, packed += kBlock) {
        const auto* from = row(tiles.begin(t) + r) + k + block;
        int64_t valid = total_k - k - block;
        if (valid >= kBlock)
          copy_row_block(from, kBlock, packed);
        else
          copy_row_block(from, valid, packed);
      }
}

// The first `columns` of one row of sums, rounded to the output's dtype.
template <class T>
static inline void store_columns(const float* sums, int64_t columns, T* out) {
  if (columns == kPanel)
    for (int v = 0; v < kPanelVecs; ++v) store(out + v * kLanes, load(sums + v * kLanes));
  else
    for (int64_t n = 0; n < columns; ++n) from_float(sums[n], out + n);
}

// Calls run(Float32 | Widened | PairDot) for a code of the C interface.
template <class Run>
static inline void with_compute(int code, Run run) {
  if (code == Float32::kCode) run(Float32{});
#if defined(__AVX512BF16__)
  else if (code == PairDot::kCode) run(PairDot{});
#endif
  else run(Widened{});
}

// Packs rows [0, rows) of a row-major weight into one panel; outputs and columns beyond the weight are zero.
static inline void pack_panel(const float* weight, int64_t rows, int64_t k, float* panel) {
  for (int64_t i = 0; i < padded_k(k); ++i)
    for (int64_t n = 0; n < kPanel; ++n) *panel++ = n < rows && i < k ? weight[n * k + i] : 0.f;
}
static inline void pack_panel(const bf16* weight, int64_t rows, int64_t k, bf16* panel) {
  for (int64_t i = 0; i < padded_k(k); i += 2)
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t j = i; j < i + 2; ++j) *panel++ = n < rows && j < k ? weight[n * k + j] : bf16{0};
}

// Asks for huge pages under newly allocated weights: streaming through 4 KB pages loses bandwidth to page walks. Advice
// only, so a refusal is ignored.
static inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t{4095};
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory of one thread that grows as needed and is kept between calls; contents are undefined after `get`.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
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
