// A dense layer as part of a parallel region, so that several steps can share one: linear.cpp and mlp.cpp.
#pragma once
#include <omp.h>

#include "packing.h"

namespace kvb {

// Blocking for large M: a thread's packed rows stay in its L2 cache. Rows beyond kRowBytes are packed in slices of K,
// and a slice is used for kGroupPanels panels, whose sums wait for the next slice.
constexpr int64_t kBlockRows = 12 * kMaxRows;
constexpr int64_t kRowBytes = 512 * 1024;
constexpr int64_t kGroupPanels = 32;
// Below this many multiply-adds waking the other threads costs more than it saves.
constexpr int64_t kSerialWork = 1 << 18;

// Packed weights [panels * kPanel, K], divided by `scale`.
template <class C>
struct Dense {
  const typename C::Element* packed;
  float scale;
  int64_t k, panels;

  int64_t width() const { return padded_k<C>(k); }
  int64_t work(int64_t rows) const { return rows * width() * panels * kPanel; }
};

struct DenseScratch {
  Workspace rows, sums;

  static DenseScratch& of_thread() {
    static thread_local DenseScratch scratch;
    return scratch;
  }
};

// The calling thread's share of the products of x [m, K] with the weights. Panels are taken in sets of kSet, and
// store(row, panel, sums, stride) gets the finished sums of one row: those of panel + p at sums + p * stride.
template <int64_t kSet, class C, class Store>
static void multiply_share(const float* x, int64_t x_stride, int64_t m, const Dense<C>& w, Store store) {
  using Row = typename C::Row;
  DenseScratch& scratch = DenseScratch::of_thread();
  const int64_t width = w.width(), sets = w.panels / kSet, row_blocks = ceil_div(m, kBlockRows);
  const int64_t units = row_blocks * sets, threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int64_t last = units * (thread + 1) / threads;
  int64_t packed_block = -1;
  for (int64_t unit = units * thread / threads; unit < last;) {
    const int64_t row_block = unit / sets, set = unit % sets;
    const int64_t first_row = m * row_block / row_blocks, rows = m * (row_block + 1) / row_blocks - first_row;
    const int64_t slice_blocks = std::max<int64_t>(1, kRowBytes / (rows * C::kRowBlock * sizeof(Row)));
    const int64_t slice = std::min(width, slice_blocks * C::kBlock);
    const int64_t group = slice == width ? 1 : std::min({kGroupPanels / kSet, sets - set, last - unit});
    const Tiles tiles(rows);
    Row* row = scratch.rows.get<Row>(rows * packed_width<C>(slice));
    float* sums = scratch.sums.get<float>(group * kSet * rows * kPanel);
    for (int64_t begin = 0; begin < width; begin += slice) {
      const int64_t depth = std::min(slice, width - begin);
      if (depth < width || packed_block != row_block)
        pack_rows<C>(tiles, [&](int64_t i) { return x + (first_row + i) * x_stride; }, begin, depth, w.k, w.scale, row);
      packed_block = row_block;
      for (int64_t p = 0; p < group * kSet; ++p)
        multiply<C>(tiles, row, packed_width<C>(depth), w.packed + ((set * kSet + p) * width + begin) * kPanel, depth,
                    begin == 0, sums + p * rows * kPanel);
    }
    for (int64_t s = 0; s < group; ++s)
      for (int64_t r = 0; r < rows; ++r)
        store(first_row + r, (set + s) * kSet, sums + (s * kSet * rows + r) * kPanel, rows * kPanel);
    unit += group;
  }
}

}  // namespace kvb
