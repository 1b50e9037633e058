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

#include "states.h"
#include "tokens.h"
#include "verify_tiles.h"

namespace kvb {
namespace {

// Tokens of a chain that are worked on together; to those after them they are records like any other. A tree is one
// block: records would not tell its branches apart.
constexpr int64_t kChainBlock = 32;

struct Verify {
  const Shape& shape;
  const Tokens& tokens;
  const StatePool& states;
  const RecordPages& records;
  const int32_t *slots, *fill, *cu_seqlens, *parents;
  float* out;
  int64_t requests;
};

struct VerifyScratch {
  Scratch vectors, among, keys, values, answers;         // of a block
  Scratch old_keys, old_values, total, weights, scores;  // of the records before it
  Scratch decay, path, left, written;                    // of a token
  Ahead ahead;
};

// New tokens of one request that one value head works on together. "Stored" is as rounded to the records' type: what
// other tokens see of a token. Vector t * NX + i is vector i of token t.
struct Block {
  int64_t first, count;    // tokens of the call
  int64_t before;          // records that all of them see
  const int32_t* parents;  // null for a chain
  const float* g;          // of token `first`; null without decay
  Vectors vectors;         // count * NX of K elements, as the buffer's end sees them
  Vectors among;           // count * NX of count * pairs elements: scores with the block's keys, 0 if no ancestor's
  float* keys;             // [count * pairs, padded(K)] stored
  float* values;           // [count * pairs, V] stored
  float* answers;          // [count * NX, V] what state, records and ancestors answer to the vectors

  int64_t parent(int64_t t) const { return parents ? parents[t] : t - 1; }
};

// The records before a block, in order.
struct Before {
  int64_t rows;   // records times pairs
  float* keys;    // [rows, padded(K)] decayed to the buffer's end
  float* values;  // [rows, V]
  float* total;   // [padded(K)] what is left of the state there
};

template <class E>
Before gather(const Records<E>& records, int64_t n, VerifyScratch& scratch) {
  const Shape& shape = records.shape;
  const int64_t V = shape.V, K = padded(shape.K), rows = n * shape.pairs;
  const Before before{rows, scratch.old_keys.reserve(rows * K), scratch.old_values.reserve(rows * V),
                      scratch.total.reserve(K)};
  float* weights = scratch.weights.reserve(n * K);
  record_weights(records, n, weights, before.total);
  for_weighted_keys(records, n, weights, [&](int64_t row, int64_t r, Vec e) { store(before.keys + row * K + r, e); });
  records.for_pages(0, n, [&](int64_t first, int64_t count) {
    float* values = before.values + first * shape.pairs * V;
    for_vectors(records.values(first), count * shape.pairs * V, [&](int64_t i, Vec e) { store(values + i, e); });
  });
  return before;
}

// Sets keys and vectors of token t; the vectors as the token's parent sees them.
template <int NX, class E>
void set_token(const Verify& v, const Block& block, int64_t value_head, int64_t t, VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t K = padded(shape.K);
  const Tokens::Head token = v.tokens.at(shape, block.first + t, value_head);
  for_token_keys(token, [&](int64_t pair, const float* key) {
    float* stored = block.keys + (t * shape.pairs + pair) * K;
    for_vectors(key, shape.K, [&](int64_t r, Vec e) {
      E lanes[kLanes];
      store(lanes, e);
      store(stored + r, load(lanes));
    });
  });
  float *decay = scratch.decay.reserve(K), *x[NX];
  for (int i = 0; i < NX; ++i) x[i] = block.vectors.at(t * NX + i, 0);
  token_decay(token, shape, decay);
  token_reads(token, shape, decay, x, block.vectors.piece());
}

// Both of these set the scores among the block's tokens and decay the vectors to the buffer's end. Going up a path, the
// decays so far are a sum of logarithms <= 0: nothing overflows, and no small one is lost in a difference.

// One decay for all of a key is a factor of its score.
template <int NX>
void walk_paths(const Verify& v, const Block& block, VerifyScratch& scratch) {
  const int64_t pairs = v.shape.pairs, keys = block.count * pairs, K = padded(v.shape.K);
  constexpr float kNoAncestor = 1.f;
  score_all(block.vectors, block.keys, keys, K, block.among);
  float* left = scratch.left.reserve(padded(keys));
  for (int64_t t = 0; t < block.count; ++t) {
    std::fill_n(left, padded(keys), kNoAncestor);
    float path = 0.f;
    for (int64_t j = block.parent(t); j >= 0; j = block.parent(j)) {
      std::fill_n(left + j * pairs, pairs, path);
      if (block.g) path += block.g[j * v.tokens.g_stride];
    }
    for (int64_t r = 0; r < t * pairs; r += kLanes) {
      const Vec sum = load(left + r), factor = vexp(sum);
      for (int64_t i = t * NX; i < (t + 1) * NX; ++i) {
        float* scores = block.among.at(i, r);
        store(scores, sum == kNoAncestor ? Vec{} : factor * load(scores));
      }
    }
    const Vec total = vexp(splat(path));
    for (int64_t i = t * NX; i < (t + 1) * NX; ++i)
      for (int64_t r = 0; r < K; r += kLanes) store(block.vectors.at(i, r), total * load(block.vectors.at(i, r)));
  }
}

// One decay per element of a key.
template <int NX>
void walk_vector_paths(const Verify& v, const Block& block, VerifyScratch& scratch) {
  const int64_t pairs = v.shape.pairs, K = padded(v.shape.K);
  float *path = scratch.path.reserve(K), *left = scratch.left.reserve(K);
  for (int64_t t = 0; t < block.count; ++t) {
    for (int64_t r = 0; r < t * pairs; r += kLanes)
      for (int64_t i = t * NX; i < (t + 1) * NX; ++i) store(block.among.at(i, r), Vec{});
    std::fill_n(path, K, 0.f);
    std::fill_n(left, K, 1.f);
    for (int64_t j = block.parent(t); j >= 0; j = block.parent(j)) {
      for (int64_t row = j * pairs; row < (j + 1) * pairs; ++row)
        for (int64_t i = t * NX; i < (t + 1) * NX; ++i) {
          Vec score{};
          for (int64_t r = 0; r < K; r += kLanes)
            score += load(block.vectors.at(i, r)) * load(left + r) * load(block.keys + row * K + r);
          block.among.at(i, row / kLanes * kLanes)[row % kLanes] = hsum(score);
        }
      for_vectors(block.g + j * v.tokens.g_stride, v.shape.K, [&](int64_t r, Vec g) {
        const Vec sum = load(path + r) + g;
        store(path + r, sum);
        store(left + r, vexp(sum));
      });
    }
    for (int64_t i = t * NX; i < (t + 1) * NX; ++i)
      for (int64_t r = 0; r < K; r += kLanes)
        store(block.vectors.at(i, r), load(left + r) * load(block.vectors.at(i, r)));
  }
}

// Sets the answers to what records and state say to the vectors, and leaves the vectors as the state's rows see them.
void read_before(const Verify& v, const Block& block, const Before& before, int64_t slot, int64_t value_head,
                 VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t V = shape.V, K = padded(shape.K), count = block.vectors.count;
  const Vectors scores{scratch.scores.reserve(count * padded(before.rows)), count};
  score_all(block.vectors, before.keys, before.rows, K, scores);
  std::fill_n(block.answers, count * V, 0.f);
  add_all_products(before.values, before.rows, V, scores, 0, count, block.answers, scratch.ahead);
  if (slot < 0) return;
  with_state_type(v.states, [&](auto type) {
    using S = decltype(type);
    const State<S> state = state_of<S>(v.states, shape, slot, value_head);
    apply_row_scales(state, shape.K, before.total);
    for (int64_t r = 0; r < K; r += kLanes)
      for (int64_t i = 0; i < count; ++i)
        store(block.vectors.at(i, r), load(before.total + r) * load(block.vectors.at(i, r)));
    add_all_state_products(state, shape.K, V, block.vectors, block.answers, scratch.ahead);
  });
}

// Adds what its ancestors in the block answer to token t, writes its output, and appends what it writes.
template <int NX, class E>
void finish_token(const Verify& v, const Records<E>& records, const Block& block, int64_t t, VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t V = shape.V, pairs = shape.pairs, record = block.before + t;
  float* answers[NX];
  for (int i = 0; i < NX; ++i) answers[i] = block.answers + (t * NX + i) * V;
  add_all_products(block.values, t * pairs, V, block.among, t * NX, (t + 1) * NX, answers[0],
                   scratch.ahead);
  const Tokens::Head token = v.tokens.at(shape, block.first + t, records.value_head);
  float* u = scratch.written.reserve(pairs * V);
  token_write(token, shape, answers, u, v.out + ((block.first + t) * shape.HV + records.value_head) * V);
  append_values(records, record, token, u);
  float* stored = block.values + t * pairs * V;
  for_vectors(records.values(record), pairs * V, [&](int64_t c, Vec e) { store(stored + c, e); });
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
  const int64_t step = v.parents ? end - begin : kChainBlock;
  const int64_t rows = slot < 0 ? v.fill[request] * shape.pairs : shape.K;
  look_ahead<E>(v, task + 1, last, rows, std::min(step, end - begin) * NX, scratch.ahead);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = std::min(step, end - first), vectors = count * NX, keys = count * shape.pairs;
    const Block block{first,
                      count,
                      v.fill[request] + first - begin,
                      v.parents ? v.parents + begin : nullptr,
                      v.tokens.at(shape, first, value_head).g,
                      {scratch.vectors.reserve(vectors * padded(shape.K)), vectors},
                      {scratch.among.reserve(vectors * padded(keys)), vectors},
                      scratch.keys.reserve(keys * padded(shape.K)),
                      scratch.values.reserve(keys * shape.V),
                      scratch.answers.reserve(vectors * shape.V)};
    for (int64_t t = 0; t < count; ++t) set_token<NX, E>(v, block, value_head, t, scratch);
    const Before before = gather(records, block.before, scratch);
    shape.decay_width == 1 ? walk_paths<NX>(v, block, scratch) : walk_vector_paths<NX>(v, block, scratch);
    read_before(v, block, before, slot, value_head, scratch);
    for (int64_t t = 0; t < count; ++t) finish_token<NX>(v, records, block, t, scratch);
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
