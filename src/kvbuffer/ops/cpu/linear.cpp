// Dense layers y = x Wᵀ + b on weights packed once (layouts and the order of the sums: gemm.h).
//
//   name    shape                                   dtype            access
//   weight  [N, K]                                  model            read (kvb_linear_pack)
//   packed  [ceil(N / kPanel), padded K, kPanel]    C::Element       written by kvb_linear_pack, read by kvb_linear
//   x       [M, K], row stride x_stride             float32          read
//   bias    [N] or null                             float32          read
//   out     [M, N], row stride out_stride           float32          written
//
// weight_scale is the power of two by which the packed weights were divided (1 unless computed in float16).
#include <omp.h>

#include <chrono>

#include "gemm.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

// Blocking for large M: a thread's packed rows stay in its L2 cache. Rows beyond kRowBytes are packed in slices of K, and
// a slice is used for kGroupPanels panels, whose sums wait for the next slice.
constexpr int64_t kBlockRows = 12 * kMaxRows;
constexpr int64_t kRowBytes = 512 * 1024;
constexpr int64_t kGroupPanels = 32;
// Below this many multiply-adds waking the other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 18;

template <class C>
static void linear(const float* x, int64_t x_stride, const typename C::Element* packed, float weight_scale,
                   const float* bias, float* out, int64_t out_stride, int64_t m, int64_t k, int64_t n) {
  using Row = typename C::Row;
  const int64_t width = padded_k<C>(k), panels = ceil_div(n, kPanel), row_blocks = ceil_div(m, kBlockRows);
  const int64_t units = row_blocks * panels;
#pragma omp parallel if (m * width * panels * kPanel >= kSerialWork)
  {
    static thread_local Workspace row_space, sum_space;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t last = units * (thread + 1) / threads;
    int64_t packed_block = -1;
    for (int64_t unit = units * thread / threads; unit < last;) {
      const int64_t row_block = unit / panels, panel = unit % panels;
      const int64_t first_row = m * row_block / row_blocks, rows = m * (row_block + 1) / row_blocks - first_row;
      const int64_t slice_blocks = std::max<int64_t>(1, kRowBytes / (rows * C::kRowBlock * sizeof(Row)));
      const int64_t slice = std::min(width, slice_blocks * C::kBlock);
      const int64_t group = slice == width ? 1 : std::min({kGroupPanels, panels - panel, last - unit});
      const Tiles tiles(rows);
      Row* row = row_space.get<Row>(rows * packed_width<C>(slice));
      float* sums = sum_space.get<float>(group * rows * kPanel);
      for (int64_t begin = 0; begin < width; begin += slice) {
        const int64_t depth = std::min(slice, width - begin);
        if (depth < width || packed_block != row_block)
          pack_rows<C>(tiles, [&](int64_t i) { return x + (first_row + i) * x_stride; }, begin, depth, k, weight_scale,
                       row);
        packed_block = row_block;
        for (int64_t p = 0; p < group; ++p)
          multiply<C>(tiles, row, packed_width<C>(depth), packed + ((panel + p) * width + begin) * kPanel, depth,
                      begin == 0, sums + p * rows * kPanel);
      }
      for (int64_t p = 0; p < group; ++p) {
        const int64_t column = (panel + p) * kPanel, columns = std::min<int64_t>(kPanel, n - column);
        for (int64_t r = 0; r < rows; ++r) {
          float* y = sums + (p * rows + r) * kPanel;
          for (int64_t i = 0; bias && i < columns; ++i) y[i] += bias[column + i];
          store_columns(y, columns, out + (first_row + r) * out_stride + column);
        }
      }
      unit += group;
    }
  }
}

template <class C>
static void pack(const typename C::Source* weight, int64_t n, int64_t k, float weight_scale,
                 typename C::Element* packed) {
  const int64_t panels = ceil_div(n, kPanel), panel_size = padded_k<C>(k) * kPanel;
  advise_huge_pages(packed, panels * panel_size * sizeof(*packed));
  // The same split as in linear(): on machines with several memory nodes each thread reads pages near it.
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; ++p)
      pack_panel(C{}, weight + p * kPanel * k, std::min<int64_t>(kPanel, n - p * kPanel), k, weight_scale,
                 packed + p * panel_size);
  }
}

// Time that a full tile of rows takes for kColumns columns, in the caches.
template <class C>
static double seconds_per_tile() {
  constexpr int kColumns = 128;
  alignas(64) typename C::Row x[kColumns / C::kBlock * kMaxRows * C::kRowBlock] = {};
  alignas(64) typename C::Element w[kColumns * kPanel] = {};
  alignas(64) float c[kMaxRows * kPanel];
  double best = 1;
  for (int repeat = 0; repeat < 200; ++repeat) {
    auto start = std::chrono::steady_clock::now();
    multiply_tile<C>(kMaxRows, x, w, kColumns / C::kBlock, true, c);
    asm volatile("" ::"r"(c) : "memory");  // as if the result were used
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// The fastest way to multiply bfloat16 on this CPU. An instruction that doubles the rate of one CPU may halve another's,
// so the ways are timed once; what rounds more has to be faster by far more than the noise.
static int bfloat16_compute() {
  int best = Widened::kCode;
  double time = seconds_per_tile<Widened>();
  auto consider = [&](auto c) {
    const double other = seconds_per_tile<decltype(c)>();
    if (other < 0.8 * time) time = other, best = decltype(c)::kCode;
  };
  (void)consider;  // a CPU may have none of these
#if defined(__AVX512FP16__)
  consider(Half{});
#endif
#if defined(__AVX512BF16__)
  consider(PairDot{});
#endif
  return best;
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" int64_t kvb_linear_packed_elements(int64_t n, int64_t k, int compute) {
  int64_t elements = 0;
  with_compute(compute, [&](auto c) { elements = ceil_div(n, kPanel) * kPanel * padded_k<decltype(c)>(k); });
  return elements;
}

extern "C" void kvb_linear_pack(const void* weight, int64_t n, int64_t k, int compute, float weight_scale,
                                void* packed) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    pack<C>(static_cast<const typename C::Source*>(weight), n, k, weight_scale,
            static_cast<typename C::Element*>(packed));
  });
}

extern "C" int kvb_bfloat16_compute() {
  static const int compute = bfloat16_compute();
  return compute;
}

extern "C" void kvb_linear(const float* x, int64_t x_stride, const void* packed, float weight_scale, const float* bias,
                           float* out, int64_t out_stride, int64_t m, int64_t k, int64_t n, int compute) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    linear<C>(x, x_stride, static_cast<const typename C::Element*>(packed), weight_scale, bias, out, out_stride, m, k,
              n);
  });
}
