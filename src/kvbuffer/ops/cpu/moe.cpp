// Mixture of experts: top-k routing, and SwiGLU experts on packed weights (layouts and the order of the sums: gemm.h).
//
//   name            shape                                            dtype    access
//   logits          [M, E], contiguous                               float32  read
//   expert_ids      [M, topk], contiguous                            int32    written by kvb_route, read by kvb_moe_mlp
//   expert_weights  [M, topk], contiguous                            float32  written by kvb_route, read by kvb_moe_mlp
//   x               [M, H], row stride x_stride                      float32  read
//   gate_up         [E, ceil(I / kPanel), 2: gate, up] panels        packed   written by kvb_experts_pack, then read
//   down            [E, ceil(H / kPanel)] panels                     packed   written by kvb_experts_pack, then read
//   out             [M, H], contiguous                               float32  written
//
// A token's experts are added in ascending order of their index, which does not depend on the batch. An index outside
// [0, E) adds nothing.
#include <omp.h>

#include <vector>

#include "experts.h"
#include "shares.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

constexpr int64_t kGroupRows = 8 * kMaxRows;  // packed rows of a group stay in the L2 cache beside the weights
constexpr int64_t kPairsPerTask = 2;
// The panels of the down projection are shared out in this many turns per thread, so that one can help the other.
constexpr int64_t kTurns = 2;
constexpr int64_t kTotalBytes = 256 * 1024;  // of a turn's sums over the experts

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

template <class C>
static void moe_mlp(const float* x, int64_t x_stride, const int32_t* ids, const float* weights,
                    const typename C::Element* gate_up, const typename C::Element* down, WeightScales scales,
                    float* out, int64_t m, int64_t topk, int64_t experts, const ExpertShape<C> shape) {
  using Row = typename C::Row;
  std::vector<int64_t> order;
  std::vector<Group> groups;
  group_slots(ids, m * topk, experts, order, groups);
  static thread_local Workspace hidden_space, packed_space;
  const int64_t width_h = packed_width<C>(shape.depth_h), width_i = packed_width<C>(shape.depth_i);
  float* hidden = hidden_space.get<float>(order.size() * shape.i);
  Row* packed_hidden = packed_space.get<Row>(order.size() * width_i);
  const int64_t chunks = ceil_div(shape.pairs(), kPairsPerTask);
  // A turn is consecutive panels, which of each expert lie together: as many as there may be, and as their sums fit.
  const int64_t fitting = kTotalBytes / (std::max<int64_t>(m, 1) * kPanel * static_cast<int64_t>(sizeof(float)));
  const int64_t turn = std::max<int64_t>(1, std::min(fitting, ceil_div(shape.panels(), kTurns * omp_get_max_threads())));
  Shares gate_up_shares, down_shares;
#pragma omp parallel
  {
    static thread_local Workspace row_space, sum_space;
    float* sums = sum_space.get<float>(kGroupRows * 2 * kPanel + m * turn * kPanel);
    Row* rows = row_space.get<Row>(kGroupRows * width_h);
    int64_t packed_group = -1;
    gate_up_shares.take(groups.size() * chunks, [&](int64_t task) {
      const Group& group = groups[task / chunks];
      const Tiles tiles(group.rows);
      if (packed_group != task / chunks)
        pack_rows<C>(tiles, [&](int64_t r) { return x + order[group.begin + r] / topk * x_stride; }, shape.h,
                     scales.gate_up, rows);
      packed_group = task / chunks;
      const int64_t first = task % chunks * kPairsPerTask, last = std::min(first + kPairsPerTask, shape.pairs());
      for (int64_t pair = first; pair < last; ++pair) {
        const auto* panel = gate_up + group.expert * shape.gate_up_size() + pair * 2 * kPanel * shape.depth_h;
        float* up = sums + group.rows * kPanel;
        multiply<C>(tiles, rows, width_h, panel, shape.depth_h, sums);
        multiply<C>(tiles, rows, width_h, panel + kPanel * shape.depth_h, shape.depth_h, up);
        for (int64_t r = 0; r < group.rows; ++r)
          store_hidden(sums + r * kPanel, up + r * kPanel, std::min<int64_t>(kPanel, shape.i - pair * kPanel),
                       hidden + (group.begin + r) * shape.i + pair * kPanel);
      }
    });
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (size_t g = 0; g < groups.size(); ++g)
      pack_rows<C>(Tiles(groups[g].rows), [&](int64_t r) { return hidden + (groups[g].begin + r) * shape.i; }, shape.i,
                   scales.down, packed_hidden + groups[g].begin * width_i);
    float* totals = sums + kGroupRows * 2 * kPanel;
    down_shares.take(ceil_div(shape.panels(), turn), [&](int64_t task) {
      const int64_t first = task * turn, last = std::min(first + turn, shape.panels()), width = (last - first) * kPanel;
      std::fill(totals, totals + m * width, 0.f);
      for (const Group& group : groups)
        for (int64_t panel = first; panel < last; ++panel) {
          const auto* weight = down + group.expert * shape.down_size() + panel * kPanel * shape.depth_i;
          multiply<C>(Tiles(group.rows), packed_hidden + group.begin * width_i, width_i, weight, shape.depth_i, sums);
          for (int64_t r = 0; r < group.rows; ++r) {
            const int64_t slot = order[group.begin + r];
            float* total = totals + slot / topk * width + (panel - first) * kPanel;
            for (int v = 0; v < kPanelVecs; ++v)
              store(total + v * kLanes,
                    load(total + v * kLanes) + splat(weights[slot]) * load(sums + r * kPanel + v * kLanes));
          }
        }
      for (int64_t r = 0; r < m; ++r)
        store_columns(totals + r * width, std::min(width, shape.h - first * kPanel), out + r * shape.h + first * kPanel);
    });
  }
}

template <class C>
static void pack_experts(const typename C::Source* gate_up, const typename C::Source* down, int64_t experts,
                         WeightScales scales, const ExpertShape<C> shape, typename C::Element* packed_gate_up,
                         typename C::Element* packed_down) {
  auto rows_left = [](int64_t rows, int64_t panel) { return std::clamp<int64_t>(rows - panel * kPanel, 0, kPanel); };
#pragma omp parallel
  for (int64_t e = 0; e < experts; ++e) {
#pragma omp for nowait
    for (int64_t pair = 0; pair < shape.pairs(); ++pair)
      for (int64_t part = 0; part < 2; ++part)
        pack_panel(C{}, gate_up + ((e * 2 + part) * shape.i + pair * kPanel) * shape.h, rows_left(shape.i, pair),
                   shape.h, scales.gate_up,
                   packed_gate_up + e * shape.gate_up_size() + (pair * 2 + part) * kPanel * shape.depth_h);
#pragma omp for nowait
    for (int64_t panel = 0; panel < shape.panels(); ++panel)
      pack_panel(C{}, down + (e * shape.h + panel * kPanel) * shape.i, rows_left(shape.h, panel), shape.i, scales.down,
                 packed_down + e * shape.down_size() + panel * kPanel * shape.depth_i);
  }
}

// Probabilities of one row into p [experts rounded up to kLanes].
static void softmax(const float* logits, int64_t experts, float* p) {
  const int64_t padded = ceil_div(experts, kLanes) * kLanes;
  for (int64_t e = 0; e < padded; ++e) p[e] = e < experts ? logits[e] : -INFINITY;
  const float highest = *std::max_element(p, p + experts);
  for (int64_t e = 0; e < padded; e += kLanes) store(p + e, vexp(load(p + e) - splat(highest)));
  float sum = 0.f;
  for (int64_t e = 0; e < experts; ++e) sum += p[e];
  for (int64_t e = 0; e < experts; ++e) p[e] /= sum;
}

static void route(const float* logits, int32_t* ids, float* weights, int64_t m, int64_t experts, int64_t topk,
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
      for (int64_t i = 0; normalize && i < topk; ++i) weight[i] /= sum;
    }
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_experts_elements(int64_t experts, int64_t h, int64_t i, int compute, int64_t* gate_up,
                                     int64_t* down) {
  with_compute(compute, [&](auto c) {
    const ExpertShape<decltype(c)> shape(h, i);
    *gate_up = experts * shape.gate_up_size();
    *down = experts * shape.down_size();
  });
}

extern "C" void kvb_experts_pack(const void* gate_up, const void* down, int64_t experts, int64_t h, int64_t i,
                                 int compute, float gate_up_scale, float down_scale, void* packed_gate_up,
                                 void* packed_down) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    using Source = typename C::Source;
    using Element = typename C::Element;
    pack_experts<C>(static_cast<const Source*>(gate_up), static_cast<const Source*>(down), experts,
                    {gate_up_scale, down_scale}, ExpertShape<C>(h, i), static_cast<Element*>(packed_gate_up),
                    static_cast<Element*>(packed_down));
  });
}

extern "C" void kvb_moe_mlp(const float* x, int64_t x_stride, const int32_t* ids, const float* weights,
                            const void* gate_up, const void* down, float gate_up_scale, float down_scale, float* out,
                            int64_t m, int64_t topk, int64_t experts, int64_t h, int64_t i, int compute) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    using Element = typename C::Element;
    moe_mlp<C>(x, x_stride, ids, weights, static_cast<const Element*>(gate_up), static_cast<const Element*>(down),
               {gate_up_scale, down_scale}, out, m, topk, experts, ExpertShape<C>(h, i));
  });
}

extern "C" void kvb_route(const float* logits, int32_t* ids, float* weights, int64_t m, int64_t experts, int64_t topk,
                          int normalize) {
  route(logits, ids, weights, m, experts, topk, normalize);
}
