// Causal attention of new tokens over paged keys and values. See paged_kv.h for the pages' layout.
#include <omp.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention_tiles.h"
#include "paged_kv.h"
#include "vec.h"

namespace kvb {
namespace {

constexpr int kSplit = 512;      // tokens whose partial result is computed on its own
constexpr int kBlockRows = 128;  // (token, head) rows that share one pass over keys and values
constexpr int kSplitRows = 64;   // up to here, the partial results of all splits may be kept at once
constexpr int kFewRows = 16;     // up to here, reading keys and values costs more than computing with them

template <class T>
struct Attention {
  const float *q, *gate;  // gate: null when there is none
  const T* pages;
  float* out;
  int64_t gate_stride, heads, kv_heads, dim;
  Sequences seqs;
  const uint64_t* paths;  // of each token: its path in its tree, bit i being the request's new token i; null for chains

  int64_t group() const { return heads / kv_heads; }
};

// Consecutive new tokens of one request, for the query heads that share one key/value head. Its rows are the
// heads of the first token, then those of the second, and so on.
struct Block {
  int64_t request, head;
  int64_t token, count;  // the first one's index in the batch, and how many
  int64_t start;         // tokens of the request before the first one

  int64_t limit() const { return start + count; }
  int64_t splits() const { return (limit() + kSplit - 1) / kSplit; }
  // Rows before this one see nothing from position `at` on.
  int64_t first_row(int64_t at, int64_t group) const { return std::max<int64_t>(0, at - start) * group; }
};

// Softmax-weighted values of some tokens, not yet divided by the weights' sum.
struct Partial {
  float *acc, *max, *sum;  // [rows, D], [rows], [rows]

  static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
  static Partial at(float* p, int64_t rows, int64_t dim) { return {p, p + rows * dim, p + rows * (dim + 1)}; }
};

// Memory of one thread.
struct AttentionScratch {
  struct alignas(64) Line {
    float value[16];
  };
  std::vector<Line> storage;
  float *q, *scores, *scale, *lanes;  // [rows, D], [rows, kUnit], [rows], [rows, kLanes]
  float *keys, *values;               // [kUnit, D]
  Partial part, total;

  void reserve(int64_t rows, int64_t dim) {
    const int64_t part_size = Partial::size(rows, dim);
    if (place(rows, dim, part_size) > storage.size()) {
      storage.resize(place(rows, dim, part_size));
      place(rows, dim, part_size);
    }
  }

  static AttentionScratch& of_thread(int64_t rows, int64_t dim) {
    thread_local AttentionScratch scratch;
    scratch.reserve(rows, dim);
    return scratch;
  }

 private:
  // Lays the arrays out in `storage` and returns the number of lines they need.
  size_t place(int64_t rows, int64_t dim, int64_t part_size) {
    size_t used = 0;
    const auto take = [&](int64_t floats) {
      float* start = reinterpret_cast<float*>(storage.data() + used);
      used += (floats + 15) / 16;
      return start;
    };
    q = take(rows * dim);
    scores = take(rows * kUnit);
    scale = take(rows);
    lanes = take(rows * kLanes);
    keys = take(kUnit * dim);
    values = take(kUnit * dim);
    part = Partial::at(take(part_size), rows, dim);
    total = Partial::at(take(part_size), rows, dim);
    return used;
  }
};

// The pages of the tokens from `at` up to `end`. A page past them is masked or unused: any other stands in.
template <class T>
Unit<T> unit_at(const Attention<T>& a, const Block& block, int64_t at, int64_t end) {
  const int32_t* table = a.seqs.pages_of(block.request);
  const auto page_of = [&](int64_t token) {
    const int64_t page = table[(token < block.limit() ? token : at) / kPage];
    const T* keys = a.pages + (page * 2 * a.kv_heads + block.head) * kPage * a.dim;
    return Page<T>{keys, keys + a.kv_heads * kPage * a.dim};
  };
  Unit<T> unit;
  unit.tokens = std::min<int64_t>(kUnit, end - at);
  for (int64_t p = 0; p < kUnit / kPage; ++p) {
    unit.page[p] = page_of(at + p * kPage);
    unit.next[p] = page_of(at + kUnit + p * kPage);
  }
  return unit;
}

// Many rows share a unit: widen it once, unless it is float32 already.
Unit<float> widened(const Unit<float>& unit, int64_t, AttentionScratch&) { return unit; }
Unit<float> widened(const Unit<bf16>& unit, int64_t dim, AttentionScratch& scratch) {
  Unit<float> wide{};
  wide.tokens = unit.tokens;
  for (int64_t p = 0; p < kUnit / kPage; ++p) {
    float *keys = scratch.keys + p * kPage * dim, *values = scratch.values + p * kPage * dim;
    wide.page[p] = {keys, values};
    if (p * kPage >= unit.tokens) continue;
    for (int64_t i = 0; i < kPage * dim; i += kLanes) store(keys + i, load(unit.page[p].keys + i));
    for (int64_t i = 0; i < kPage * dim; i += kLanes) store(values + i, load(unit.page[p].values + i));
  }
  return wide;
}

uint64_t first_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << std::max<int64_t>(count, 0)) - 1; }

// Which tokens of the unit at `at` the block's token `t` sees: all before it, or in a tree those of its path.
template <class T>
uint64_t visible_tokens(const Attention<T>& a, const Block& block, int64_t t, int64_t at) {
  static_assert(kUnit == 64, "one bit for each token of a unit");
  const uint64_t path = a.paths ? a.paths[block.token + t] : 0;
  if (!path) return first_bits(block.start + t + 1 - at);
  const int64_t context = a.seqs.context_lens[block.request], distance = context - at;
  if (distance >= kUnit) return first_bits(kUnit);
  return first_bits(distance) | (distance >= 0 ? path << distance : distance > -64 ? path >> -distance : 0);
}

template <bool kAhead, class T, class E>
void attend_unit(const Attention<T>& a, const Unit<E>& unit, const Block& block, int64_t at, AttentionScratch& scratch,
                 const Partial& part) {
  const int64_t group = a.group(), dim = a.dim;
  const int64_t first = block.first_row(at, group), rows = block.count * group;
  float* scores = scratch.scores + first * kUnit;
  score_unit<kAhead>(scratch.q + first * dim, unit, rows - first, dim, scores);
  for (int64_t r = first; r < rows; ++r)
    softmax_row(scratch.scores + r * kUnit, visible_tokens(a, block, r / group, at), part.max + r,
                scratch.lanes + r * kLanes, scratch.scale + r);
  value_unit<kAhead>(scores, unit, scratch.scale + first, rows - first, dim, part.acc + first * dim);
}

// Attention of a block's rows to the tokens of one split.
template <class T>
void attend_split(const Attention<T>& a, const Block& block, int64_t split, AttentionScratch& scratch,
                  const Partial& part) {
  const int64_t rows = block.count * a.group();
  const int64_t begin = split * kSplit, end = std::min(begin + kSplit, block.limit());
  std::fill_n(part.acc, rows * a.dim, 0.f);
  std::fill_n(part.max, rows, kLowest);
  std::fill_n(scratch.lanes, rows * kLanes, 0.f);
  for (int64_t at = begin; at < end; at += kUnit) {
    const Unit<T> unit = unit_at(a, block, at, end);
    if (rows <= kFewRows)
      attend_unit<true>(a, unit, block, at, scratch, part);
    else
      attend_unit<false>(a, widened(unit, a.dim, scratch), block, at, scratch, part);
  }
  for (int64_t r = 0; r < rows; ++r) part.sum[r] = hsum(load(scratch.lanes + r * kLanes));
}

// total += part, each being relative to its own maximum. One function for every caller: the same bits.
void merge(const Partial& total, const Partial& part, int64_t first_row, int64_t rows, int64_t dim) {
  for (int64_t r = first_row; r < rows; ++r) {
    const float max = std::max(total.max[r], part.max[r]);
    const float keep = vexp(splat(total.max[r] - max))[0], add = vexp(splat(part.max[r] - max))[0];
    for (int64_t d = r * dim; d < (r + 1) * dim; d += kLanes)
      store(total.acc + d, load(total.acc + d) * keep + load(part.acc + d) * add);
    total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
    total.max[r] = max;
  }
}

void clear(const Partial& total, int64_t rows, int64_t dim) {
  std::fill_n(total.acc, rows * dim, 0.f);
  std::fill_n(total.max, rows, kLowest);
  std::fill_n(total.sum, rows, 0.f);
}

// Float32 queries with the softmax scale folded in.
template <class T>
void load_queries(const Attention<T>& a, const Block& block, float* q) {
  const float scale = 1.f / std::sqrt(static_cast<float>(a.dim));
  const int64_t group_size = a.group() * a.dim;
  for (int64_t t = 0; t < block.count; ++t) {
    const float* from = a.q + ((block.token + t) * a.heads + block.head * a.group()) * a.dim;
    for (int64_t d = 0; d < group_size; d += kLanes) store(q + t * group_size + d, load(from + d) * scale);
  }
}

// Divides by the sum of the weights and gates.
template <class T>
void write_rows(const Attention<T>& a, const Block& block, const Partial& total) {
  const int64_t group = a.group();
  for (int64_t r = 0; r < block.count * group; ++r) {
    const int64_t token = block.token + r / group, head = block.head * group + r % group;
    float* out = a.out + (token * a.heads + head) * a.dim;
    const float inverse = 1.f / total.sum[r];
    const float* gate = a.gate ? a.gate + token * a.gate_stride + head * a.dim : nullptr;
    for (int64_t d = 0; d < a.dim; d += kLanes) {
      Vec x = load(total.acc + r * a.dim + d) * inverse;
      if (gate) x = x * sigmoid(load(gate + d));
      store(out + d, x);
    }
  }
}

template <class T>
std::vector<Block> make_blocks(const Attention<T>& a) {
  const int64_t block_tokens = std::max<int64_t>(1, kBlockRows / a.group());
  std::vector<Block> blocks;
  for (int64_t b = 0; b < a.seqs.num_seqs; ++b) {
    const int64_t begin = a.seqs.cu_seqlens[b], end = a.seqs.cu_seqlens[b + 1];
    for (int64_t token = begin; token < end; token += block_tokens)
      for (int64_t h = 0; h < a.kv_heads; ++h)
        blocks.push_back({b, h, token, std::min(block_tokens, end - token), a.seqs.context_lens[b] + token - begin});
  }
  // Longest first, so that no thread is left with a long block at the end.
  std::sort(blocks.begin(), blocks.end(),
            [](const Block& x, const Block& y) { return x.count * x.limit() > y.count * y.limit(); });
  return blocks;
}

template <class T>
void attend_blocks(const Attention<T>& a, const std::vector<Block>& blocks, int64_t max_rows) {
#pragma omp parallel
  {
    AttentionScratch& scratch = AttentionScratch::of_thread(max_rows, a.dim);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& block = blocks[i];
      const int64_t rows = block.count * a.group();
      load_queries(a, block, scratch.q);
      clear(scratch.total, rows, a.dim);
      for (int64_t split = 0; split < block.splits(); ++split) {
        attend_split(a, block, split, scratch, scratch.part);
        merge(scratch.total, scratch.part, block.first_row(split * kSplit, a.group()), rows, a.dim);
      }
      write_rows(a, block, scratch.total);
    }
  }
}

// The same sums with every split a task of its own: for few blocks with long contexts.
template <class T>
void attend_splits(const Attention<T>& a, const std::vector<Block>& blocks, int64_t max_rows) {
  struct Task {
    int64_t block, split;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_task;
  for (size_t i = 0; i < blocks.size(); ++i) {
    first_task.push_back(tasks.size());
    for (int64_t split = 0; split < blocks[i].splits(); ++split) tasks.push_back({static_cast<int64_t>(i), split});
  }
  const int64_t part_size = Partial::size(max_rows, a.dim);
  const std::unique_ptr<float[]> parts(new float[tasks.size() * part_size]);
  const auto part_of = [&](int64_t task) { return Partial::at(&parts[task * part_size], max_rows, a.dim); };
#pragma omp parallel
  {
    AttentionScratch& scratch = AttentionScratch::of_thread(max_rows, a.dim);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) {
      load_queries(a, blocks[tasks[i].block], scratch.q);
      attend_split(a, blocks[tasks[i].block], tasks[i].split, scratch, part_of(i));
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& block = blocks[i];
      const int64_t rows = block.count * a.group();
      clear(scratch.total, rows, a.dim);
      for (int64_t split = 0; split < block.splits(); ++split)
        merge(scratch.total, part_of(first_task[i] + split), block.first_row(split * kSplit, a.group()), rows, a.dim);
      write_rows(a, block, scratch.total);
    }
  }
}

template <class T>
void paged_attention(const Attention<T>& a) {
  const std::vector<Block> blocks = make_blocks(a);
  int64_t max_rows = 0, max_splits = 0;
  for (const Block& block : blocks) {
    max_rows = std::max(max_rows, block.count * a.group());
    max_splits = std::max(max_splits, block.splits());
  }
  const int64_t threads = omp_get_max_threads();
  const bool few = threads > 1 && static_cast<int64_t>(blocks.size()) < 4 * threads;
  if (few && max_rows <= kSplitRows && max_splits > 1)
    attend_splits(a, blocks, max_rows);
  else
    attend_blocks(a, blocks, max_rows);
}

// The paths of the tokens of trees; 0 for tokens of chains.
std::vector<uint64_t> tree_paths(const Sequences& seqs, const int32_t* parents) {
  std::vector<uint64_t> paths(seqs.cu_seqlens[seqs.num_seqs]);
  for (int64_t b = 0; b < seqs.num_seqs; ++b) {
    const int64_t begin = seqs.cu_seqlens[b], count = seqs.cu_seqlens[b + 1] - begin;
    bool chain = true;
    for (int64_t i = 0; i < count; ++i) chain &= parents[begin + i] == i - 1;
    if (chain) continue;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t parent = parents[begin + i];
      paths[begin + i] = (parent < 0 ? 0 : paths[begin + parent]) | uint64_t{1} << i;
    }
  }
  return paths;
}

}  // namespace
}  // namespace kvb

using namespace kvb;

//   q            [N, H, D]         float32      read
//   pages, page_table, cu_seqlens, context_lens: see paged_kv.h, read
//   gate         [N, gate_stride]  float32      read     rows of H*D; null for none
//   parents      [N]               int32        read     the token that each follows among its request's new ones, -1 the
//                                                        last in the pages; null for chains
//   out          [N, H*D]          float32      written
extern "C" void kvb_paged_attention(const float* q, const void* pages, const int32_t* page_table, int64_t table_stride,
                                    const int32_t* cu_seqlens, const int32_t* context_lens, const float* gate,
                                    int64_t gate_stride, const int32_t* parents, float* out, int64_t num_seqs, int64_t heads, int64_t kv_heads,
                                    int64_t dim, int page_dtype) {
  const Sequences seqs{page_table, cu_seqlens, context_lens, table_stride, num_seqs};
  const std::vector<uint64_t> paths = parents ? tree_paths(seqs, parents) : std::vector<uint64_t>();
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    paged_attention(Attention<T>{q, gate, static_cast<const T*>(pages), out, gate_stride, heads, kv_heads, dim, seqs,
                                 parents ? paths.data() : nullptr});
  };
  page_dtype == 0 ? run(static_cast<float*>(nullptr)) : run(static_cast<bf16*>(nullptr));
}
