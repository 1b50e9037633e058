// Mixture of experts: top-k routing, and SwiGLU experts on packed weights (layouts and the order of the sums: gemm.h).
//
//   name            shape                                            dtype    access
//   logits          [M, E], contiguous                               model    read
//   expert_ids      [M, topk], contiguous                            int32    written by kvb_route, read by kvb_moe_mlp
//   expert_weights  [M, topk], contiguous                            float32  written by kvb_route, read by kvb_moe_mlp
//   x               [M, H], row stride x_stride                      model    read
//   gate_up         [E, ceil(padded I / kPanel), 2: gate, up] panels  model    written by kvb_experts_pack, then read
//   down            [E, ceil(H / kPanel)] panels                     model    written by kvb_experts_pack, then read
//   out             [M, H], contiguous                               model    written
//
// A token's experts are added in ascending order of their index, which does not depend on the batch. An index outside
// [0, E) adds nothing.
#include <omp.h>

#include <vector>

#include "activation.h"
#include "gemm.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

constexpr int64_t kGroupRows = 8 * kMaxRows;  // packed rows of a group stay in the L2 cache beside the weights
constexpr int64_t kPairsPerTask = 2;

struct ExpertShape {
  ExpertShape(int64_t h, int64_t i) : h(h), i(i), depth_h(padded_k(h)), depth_i(padded_k(i)) {}
  int64_t pairs() const { return ceil_div(depth_i, kPanel); }  // of one gate and one up panel
  int64_t panels() const { return ceil_div(h, kPanel); }       // of the down projection
  int64_t gate_up_size() const { return pairs() * 2 * kPanel * depth_h; }
  int64_t down_size() const { return panels() * kPanel * depth_i; }
  int64_t h, i, depth_h, depth_i;
};

// Up to kGroupRows slots (entries of expert_ids) of one expert: order[begin, begin + rows).
struct Group {
  int64_t expert, begin, rows;
};

// Sorts slots by expert, keeping the order of tokens within one, and cuts each expert's slots into groups.
static void group_slots(const int32_t* ids, int64_t slots, int64_t experts, std::vector<int64_t>& order,
                        std::vector<Group>& groups) {
  std::vector<int64_t> ends(experts + 1, 0);
  auto known = [&](int32_t id) { return id >= 0 && id < experts; };
  for (int64_t s = 0; s < slots; ++s)
    if (known(ids[s])) ++ends[ids[s] + 1];
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t done = 0; done < ends[e + 1]; done += kGroupRows)
      groups.push_back({e, ends[e] + done, std::min(kGroupRows, ends[e + 1] - done)});
    ends[e + 1] += ends[e];
  }
  order.resize(ends[experts]);
  for (int64_t s = 0; s < slots; ++s)
    if (known(ids[s])) order[ends[ids[s]]++] = s;
}

// Columns [panel * kPanel, ...) of the rows of a tile, silu(gate) * up, written as packed rows of the down projection.
template <class C>
static void store_hidden(const float* gate, const float* up, int64_t rows, int64_t panel, int64_t depth,
                         typename C::Row* tile) {
  for (int v = 0; v < kPanelVecs; ++v) {
    const int64_t column = panel * kPanel + v * kLanes;
    if (column >= depth) break;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * kPanel + v * kLanes;
      store(tile + (column / kBlock * rows + r) * kBlock + column % kBlock,
            swiglu(load(gate + at), load(up + at)));
    }
  }
}

template <class C>
static void moe_mlp(const typename C::Element* x, int64_t x_stride, const int32_t* ids, const float* weights,
                    const typename C::Element* gate_up, const typename C::Element* down, typename C::Element* out,
                    int64_t m, int64_t topk, int64_t experts, const ExpertShape shape) {
  using Row = typename C::Row;
  std::vector<int64_t> order;
  std::vector<Group> groups;
  group_slots(ids, m * topk, experts, order, groups);
  static thread_local Scratch hidden_scratch;
  Row* hidden = hidden_scratch.get<Row>(order.size() * shape.depth_i);
  const int64_t chunks = ceil_div(shape.pairs(), kPairsPerTask), tasks = groups.size() * chunks;
#pragma omp parallel
  {
    static thread_local Scratch row_scratch, sum_scratch;
    float* sums = sum_scratch.get<float>(std::max(2 * kGroupRows, kGroupRows + m) * kPanel);
    Row* rows = row_scratch.get<Row>(kGroupRows * shape.depth_h);
    int64_t packed_group = -1;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const Group& group = groups[task / chunks];
      const Tiles tiles(group.rows);
      if (packed_group != task / chunks)
        pack_rows<C>(tiles, [&](int64_t r) { return x + order[group.begin + r] / topk * x_stride; }, 0, shape.depth_h,
                     shape.h, rows);
      packed_group = task / chunks;
      const int64_t first = task % chunks * kPairsPerTask, last = std::min(first + kPairsPerTask, shape.pairs());
      for (int64_t pair = first; pair < last; ++pair) {
        const auto* panel = gate_up + group.expert * shape.gate_up_size() + pair * 2 * kPanel * shape.depth_h;
        float* up = sums + group.rows * kPanel;
        multiply<C>(tiles, rows, shape.depth_h, panel, shape.depth_h, true, sums);
        multiply<C>(tiles, rows, shape.depth_h, panel + kPanel * shape.depth_h, shape.depth_h, true, up);
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t begin = tiles.begin(t);
          store_hidden<C>(sums + begin * kPanel, up + begin * kPanel, tiles.size(t), pair, shape.depth_i,
                          hidden + (group.begin + begin) * shape.depth_i);
        }
      }
    }
    float* totals = sums + kGroupRows * kPanel;
#pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < shape.panels(); ++panel) {
      std::fill(totals, totals + m * kPanel, 0.f);
      for (const Group& group : groups) {
        const auto* weight = down + group.expert * shape.down_size() + panel * kPanel * shape.depth_i;
        multiply<C>(Tiles(group.rows), hidden + group.begin * shape.depth_i, shape.depth_i, weight, shape.depth_i, true,
                    sums);
        for (int64_t r = 0; r < group.rows; ++r) {
          const int64_t slot = order[group.begin + r];
          float* total = totals + slot / topk * kPanel;
          for (int v = 0; v < kPanelVecs; ++v)
            store(total + v * kLanes,
                  load(total + v * kLanes) + splat(weights[slot]) * load(sums + r * kPanel + v * kLanes));
        }
      }
      for (int64_t r = 0; r < m; ++r)
        store_columns(totals + r * kPanel, std::min<int64_t>(kPanel, shape.h - panel * kPanel),
                      out + r * shape.h + panel * kPanel);
    }
  }
}

template <class T>
static void pack_experts(const T* gate_up, const T* down, int64_t experts, const ExpertShape shape, T* packed_gate_up,
                         T* packed_down) {
  advise_huge_pages(packed_gate_up, experts * shape.gate_up_size() * sizeof(T));
  advise_huge_pages(packed_down, experts * shape.down_size() * sizeof(T));
  auto rows_left = [](int64_t rows, int64_t panel) { return std::clamp<int64_t>(rows - panel * kPanel, 0, kPanel); };
#pragma omp parallel for
  for (int64_t e = 0; e < experts; ++e) {
    T* to = packed_gate_up + e * shape.gate_up_size();
    for (int64_t pair = 0; pair < shape.pairs(); ++pair)
      for (int64_t half = 0; half < 2; ++half, to += kPanel * shape.depth_h)
        pack_panel(gate_up + ((e * 2 + half) * shape.i + pair * kPanel) * shape.h, rows_left(shape.i, pair), shape.h,
                   to);
    to = packed_down + e * shape.down_size();
    for (int64_t panel = 0; panel < shape.panels(); ++panel, to += kPanel * shape.depth_i)
      pack_panel(down + (e * shape.h + panel * kPanel) * shape.i, rows_left(shape.h, panel), shape.i, to);
  }
}

// Probabilities of one row into p [experts rounded up to kLanes].
template <class T>
static void softmax(const T* logits, int64_t experts, float* p) {
  const int64_t padded = ceil_div(experts, kLanes) * kLanes;
  for (int64_t e = 0; e < padded; ++e) p[e] = e < experts ? to_float(logits[e]) : -INFINITY;
  const float highest = *std::max_element(p, p + experts);
  for (int64_t e = 0; e < padded; e += kLanes) store(p + e, vexp(load(p + e) - splat(highest)));
  float sum = 0.f;
  for (int64_t e = 0; e < experts; ++e) sum += p[e];
  for (int64_t e = 0; e < experts; ++e) p[e] /= sum;
}

template <class T>
static void route(const T* logits, int32_t* ids, float* weights, int64_t m, int64_t experts, int64_t topk,
                  bool normalize) {
#pragma omp parallel if (m * experts >= 1 << 13)
  {
    std::vector<float> p(ceil_div(experts, kLanes) * kLanes);
#pragma omp for
    for (int64_t row = 0; row < m; ++row) {
      softmax(logits + row * experts, experts, p.data());
      int32_t* id = ids + row * topk;
      float* weight = weights + row * topk;
      // Insertion into the best so far; an equal probability stays behind the lower index, which came first.
      int64_t count = 0;
      for (int64_t e = 0; e < experts; ++e) {
        if (count == topk && !(p[e] > weight[count - 1])) continue;
        int64_t at = count < topk ? count++ : topk - 1;
        for (; at > 0 && p[e] > weight[at - 1]; --at) {
          weight[at] = weight[at - 1];
          id[at] = id[at - 1];
        }
        weight[at] = p[e];
        id[at] = static_cast<int32_t>(e);
      }
      float sum = 0.f;
      for (int64_t i = 0; i < topk; ++i) sum += weight[i];
      for (int64_t i = 0; i < topk; ++i) {
        T rounded;
        from_float(normalize ? weight[i] / sum : weight[i], &rounded);
        weight[i] = to_float(rounded);
      }
    }
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_experts_elements(int64_t experts, int64_t h, int64_t i, int64_t* gate_up, int64_t* down) {
  *gate_up = experts * ExpertShape(h, i).gate_up_size();
  *down = experts * ExpertShape(h, i).down_size();
}

extern "C" void kvb_experts_pack(const void* gate_up, const void* down, int64_t experts, int64_t h, int64_t i,
                                 int dtype, void* packed_gate_up, void* packed_down) {
  auto run = [&](auto element) {
    using T = decltype(element);
    pack_experts(static_cast<const T*>(gate_up), static_cast<const T*>(down), experts, ExpertShape(h, i),
                 static_cast<T*>(packed_gate_up), static_cast<T*>(packed_down));
  };
  dtype == 0 ? run(float{}) : run(bf16{});
}

extern "C" void kvb_moe_mlp(const void* x, int64_t x_stride, const int32_t* ids, const float* weights,
                            const void* gate_up, const void* down, void* out, int64_t m, int64_t topk, int64_t experts,
                            int64_t h, int64_t i, int compute) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    using T = typename C::Element;
    moe_mlp<C>(static_cast<const T*>(x), x_stride, ids, weights, static_cast<const T*>(gate_up),
               static_cast<const T*>(down), static_cast<T*>(out), m, topk, experts, ExpertShape(h, i));
  });
}

extern "C" void kvb_route(const void* logits, int32_t* ids, float* weights, int64_t m, int64_t experts, int64_t topk,
                          int normalize, int dtype) {
  if (dtype == 0)
    route(static_cast<const float*>(logits), ids, weights, m, experts, topk, normalize);
  else
    route(static_cast<const bf16*>(logits), ids, weights, m, experts, topk, normalize);
}
