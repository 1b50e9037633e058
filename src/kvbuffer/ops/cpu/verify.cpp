// Verification on a KV buffer: any number of new tokens per request against state, records and one another.
//
//   shape, tokens, states, records  see arguments.h; N tokens, request after request
//   slots       [B]         int32    read: row of the states of each request; -1 for none
//   fill        [B]         int32    read: records in the buffer before this call
//   cu_seqlens  [B + 1]     int32    read: borders of the requests among the tokens
//   parents     [N]         int32    read: the token that each one follows, -1 the buffer's end; null for chains
//   out         [N, HV, V]  float32  written
//
// All vectors that the tokens read with are multiplied by the state in one pass over it, each decayed by what lies
// between the buffer's end and its token. What the tokens see of one another follows in their order, because what a
// token writes may need what those before it wrote. One task is one (request, value head), in a fixed order of
// operations: neither the batch nor the threads show in the result. V is a multiple of the vector width.
#include <omp.h>

#include "verify_block.h"

namespace kvb {
namespace {

// Tokens of a chain that are worked on together; to those after them they are records like any other. A tree is one
// block: records would not tell its branches apart.
constexpr int64_t kChainBlock = 32;

// Sets all of a block but the tokens' values.
template <int NX, class E>
void read_before(const Verify& v, const Records<E>& records, const Block& block, int64_t slot, VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t V = shape.V, K = padded(shape.K), pairs = shape.pairs;
  const auto with_state = [&](auto&& f) {
    if (slot >= 0)
      with_state_type(v.states,
                      [&](auto type) { f(state_of<decltype(type)>(v.states, shape, slot, records.value_head)); });
  };
  float* scales = scratch.scales.reserve(K);
  std::fill_n(scales, K, 1.f);
  with_state([&](auto state) { apply_row_scales(state, shape.K, scales); });
  if (shape.decay_width == 1)
    decay_scores<NX>(v, records, block, scales, scratch);
  else
    decay_vectors<NX>(v, records, block, scales, scratch);
  records.for_pages(0, block.records, [&](int64_t first, int64_t count) {
    float* to = block.values + first * pairs * V;
    for_vectors(records.values(first), count * pairs * V, [&](int64_t i, Vec e) { store(to + i, e); });
  });
  all_products(block.values, block.old, V, block.scores, block.from_records, scratch.ahead);
  if (slot < 0) std::fill_n(block.from_state, block.vectors.count * V, 0.f);
  with_state(
      [&](auto state) { all_state_products(state, shape.K, V, block.vectors, block.from_state, scratch.ahead); });
}

// Adds what its ancestors in the block answer to token t, writes its output, and appends what it writes.
template <int NX, class E>
void finish_token(const Verify& v, const Records<E>& records, const Block& block, int64_t t) {
  const Shape& shape = v.shape;
  const int64_t V = shape.V, pairs = shape.pairs, rows = block.start + t * pairs;
  const Tokens::Head token = v.tokens.at(shape, block.first + t, records.value_head);
  const OwnScores own = own_scores(token, shape);
  float* out = v.out + ((block.first + t) * shape.HV + records.value_head) * V;
  E* values = records.values(block.records + t);
  for_column_blocks(V, [&](int64_t c, auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    Vec answers[NV][NX];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) {
        const int64_t x = t * NX + i, at = x * V + c + j * kLanes;
        answers[j][i] = block.left[x] * load(block.from_state + at) + load(block.from_records + at);
      }
    for (int64_t r = block.start; r < rows; ++r) {
      Vec score[NX];
#pragma GCC unroll 2
      for (int i = 0; i < NX; ++i) score[i] = held(splat(*block.scores.element(t * NX + i, r)));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        const Vec value = held(load(block.values + r * V + c + j * kLanes));
#pragma GCC unroll 2
        for (int i = 0; i < NX; ++i) answers[j][i] += score[i] * value;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const int64_t column = c + j * kLanes;
      const auto [u, removed, output] = written(token, own, column, answers[j]);
      store(out + column, output);
      const auto write = [&](int64_t pair, Vec x) {
        store(values + pair * V + column, x);
        store(block.values + (rows + pair) * V + column, as_stored<E>(x));
      };
      write(pairs - 1, u);
      if (pairs > 1) write(0, removed);
    }
  });
  append_decay(records, block.records + t, token);
}

// Prepares to fetch what the task after this one reads while the vectors of this one's first block are multiplied.
template <class E>
void look_ahead(const Verify& v, int64_t task, int64_t end, int64_t rows, int64_t vectors, Ahead& ahead) {
  const Shape& shape = v.shape;
  ahead.clear();
  if (task == end) return;
  const int64_t request = task / shape.HV, value_head = task % shape.HV, slot = v.slots[request];
  if (slot >= 0)
    with_state_type(v.states, [&](auto type) {
      expect_state(state_of<decltype(type)>(v.states, shape, slot, value_head), shape.K, shape.V, true, ahead);
    });
  const int64_t first = v.cu_seqlens[request], count = v.cu_seqlens[request + 1] - first;
  Records<E>(v.records, shape, request, value_head).expect(v.fill[request] + count, ahead);
  for (int64_t token = first; token < first + count; ++token)
    expect_token(v.tokens.at(shape, token, value_head), shape, v.out + (token * shape.HV + value_head) * shape.V, ahead);
  ahead.spread(product_steps(rows, shape.V, vectors));
}

template <int NX, class E>
void verify_head(const Verify& v, int64_t task, int64_t last, VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t request = task / shape.HV, value_head = task % shape.HV;
  const Records<E> records(v.records, shape, request, value_head);
  const int64_t begin = v.cu_seqlens[request], end = v.cu_seqlens[request + 1], slot = v.slots[request];
  const int64_t step = v.parents ? end - begin : kChainBlock, K = padded(shape.K);
  const int64_t rows = slot < 0 ? v.fill[request] * shape.pairs : shape.K;
  look_ahead<E>(v, task + 1, last, rows, std::min(step, end - begin) * NX, scratch.ahead);
  const bool as_read = shape.decay_width == 1 && !v.states.scales;  // nothing is due to single rows of the state
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = std::min(step, end - first), vectors = count * NX;
    const int64_t before = v.fill[request] + first - begin, old = before * shape.pairs;
    const int64_t start = (old + kScoreKeys - 1) / kScoreKeys * kScoreKeys, rows = start + count * shape.pairs;
    const Block block{first,
                      count,
                      before,
                      old,
                      start,
                      v.parents ? v.parents + begin : nullptr,
                      v.tokens.at(shape, first, value_head).g,
                      {scratch.reads.reserve(vectors * K), vectors},
                      {(as_read ? scratch.reads : scratch.vectors).reserve(vectors * K), vectors},
                      scratch.left.reserve(vectors),
                      {scratch.scores.reserve(vectors * padded(rows)), vectors},
                      scratch.keys.reserve(rows * K),
                      scratch.values.reserve(rows * shape.V),
                      scratch.from_state.reserve(vectors * shape.V),
                      scratch.from_records.reserve(vectors * shape.V)};
    read_before<NX>(v, records, block, slot, scratch);
    for (int64_t t = 0; t < count; ++t) finish_token<NX>(v, records, block, t);
  }
}

// The first of the tasks, in their order, that a thread takes: as much work to each, though requests may have very
// different numbers of tokens.
int64_t task_at(const Verify& v, int64_t thread, int64_t threads) {
  // Multiply-adds of a head by those of one vector with one row; reading the state counts as one token more.
  const auto work = [&](int64_t request) {
    const int64_t tokens = v.cu_seqlens[request + 1] - v.cu_seqlens[request];
    return (tokens + 1) * (v.shape.K + 2 * v.fill[request] + tokens);
  };
  int64_t left = 0;
  for (int64_t request = 0; request < v.requests; ++request) left += work(request);
  left = left * v.shape.HV * thread / threads;
  int64_t request = 0;
  for (; request < v.requests && left >= work(request) * v.shape.HV; ++request) left -= work(request) * v.shape.HV;
  return request * v.shape.HV + (request < v.requests ? left / work(request) : 0);
}

template <int NX, class E>
void verify(const Verify& v) {
  const Shape& shape = v.shape;
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local VerifyScratch scratch;
    // Keys first: the value heads of a group share them, and later tokens of a long chain read them as records.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < v.requests * shape.HK; ++task) {
      const int64_t request = task / shape.HK, value_head = task % shape.HK * (shape.HV / shape.HK);
      const Records<E> records(v.records, shape, request, value_head);
      for (int64_t token = v.cu_seqlens[request], i = v.fill[request]; token < v.cu_seqlens[request + 1]; ++token, ++i)
        append_keys(records, i, v.tokens.at(shape, token, value_head));
    }
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    scratch.group = kNoGroup;
    const int64_t begin = task_at(v, thread, threads), end = task_at(v, thread + 1, threads);
    for (int64_t task = begin; task < end; ++task) verify_head<NX, E>(v, task, end, scratch);
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_buffered_verify(const Shape* shape, const Tokens* tokens, const StatePool* states,
                                    const RecordPages* records, const int32_t* slots, const int32_t* fill,
                                    const int32_t* cu_seqlens, const int32_t* parents, float* out, int64_t requests) {
  const Verify v{*shape, *tokens, *states, *records, slots, fill, cu_seqlens, parents, out, requests};
  with_reads(*tokens, [&](auto reads) {
    with_record_type(*records, [&](auto e) { verify<decltype(reads)::value, decltype(e)>(v); });
  });
}
