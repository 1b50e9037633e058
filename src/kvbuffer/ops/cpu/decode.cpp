// Buffered decode: one token per request against its state and its records, appending one record.
//
//   shape, tokens, states, records  see arguments.h
//   slots  [B]         int32    read: row of the states of each request; -1 for none
//   fill   [B]         int32    read: records in the buffer before this step
//   fold   [B]         uint8    read: fold those records into the state first
//   out    [B, HV, V]  float32  written
//
// The state is read once, for all vectors that the token reads with together; a fold rewrites it first, and the token
// then reads what was just rounded and stored, from the cache. One task is one (request, value head), in a fixed order
// of operations: neither the batch nor the threads show in the result. V is a multiple of the vector width.
#include "fold.h"
#include "shares.h"
#include "tokens.h"

namespace kvb {
namespace {

struct Decode {
  const Shape& shape;
  const Tokens& tokens;
  const StatePool& states;
  const RecordPages& records;
  const int32_t *slots, *fill;
  const uint8_t* fold;
  float* out;
  int64_t requests;
};

struct DecodeScratch {
  Scratch decay, reads[2], weights, total, scores[2], answers[2], written;
  FoldScratch fold;
  Ahead ahead;
};

// scores[x][row] = what is left of a record's key . x
template <int NX, class E>
void score_records(const Records<E>& records, int64_t n, const float* weights, const float* const (&x)[NX],
                   float* const (&scores)[NX], Ahead& ahead) {
  records.for_keys(n, [&](int64_t record, int64_t row, const E* key) {
    ahead.step();
    Vec acc[NX] = {};
    for_weighted_key(records.shape, key, record, weights, [&](int64_t r, Vec e) {
      for (int i = 0; i < NX; ++i) acc[i] += e * load(x[i] + r);
    });
    for (int i = 0; i < NX; ++i) scores[i][row] = hsum(acc[i]);
  });
}

// Prepares to fetch, with the K rows of a state, what the task after this one reads.
template <class S, class E>
void look_ahead(const Decode& d, int64_t task, bool folding, Ahead& ahead) {
  const Shape& shape = d.shape;
  ahead.clear();
  if (++task < d.requests * shape.HV) {
    const int64_t request = task / shape.HV, value_head = task % shape.HV;
    expect_token(d.tokens.at(shape, request, value_head), shape, d.out + task * shape.V, ahead);
    // The one to be appended is expected as well; behind a fold it is the first.
    Records<E>(d.records, shape, request, value_head).expect(d.fill[request] + !d.fold[request], ahead);
    if (d.slots[request] >= 0)
      expect_state(state_of<S>(d.states, shape, d.slots[request], value_head), shape.K, shape.V, folding, ahead);
  }
  ahead.spread(shape.K);
}

template <int NX, class S, class E>
void decode_head(const Decode& d, int64_t request, int64_t value_head, DecodeScratch& scratch) {
  const Shape& shape = d.shape;
  const int64_t K = padded(shape.K), V = shape.V, pairs = shape.pairs;
  const Tokens::Head token = d.tokens.at(shape, request, value_head);
  const Records<E> records(d.records, shape, request, value_head);
  const State<S> state = state_of<S>(d.states, shape, d.slots[request], value_head);
  int64_t n = d.fill[request];
  if (d.fold[request]) {
    look_ahead<S, E>(d, request * shape.HV + value_head, true, scratch.ahead);
    fold_records(state, records, n, scratch.fold, scratch.ahead);
    n = 0;
  }
  float *decay = scratch.decay.reserve(K), *weights = scratch.weights.reserve(n * K), *total = scratch.total.reserve(K);
  float *x[NX], *scores[NX], *answers[NX];
  for (int i = 0; i < NX; ++i) {
    x[i] = scratch.reads[i].reserve(K);
    scores[i] = scratch.scores[i].reserve(n * pairs);
    answers[i] = scratch.answers[i].reserve(V);
    std::fill_n(answers[i], V, 0.f);
  }
  token_decay(token, shape, decay);
  token_reads(token, shape, decay, x);
  record_weights(records, n, weights, total);
  scratch.ahead.clear();
  if (n && d.slots[request] >= 0) expect_state(state, shape.K, V, false, scratch.ahead);
  scratch.ahead.spread(n * pairs);
  score_records(records, n, weights, x, scores, scratch.ahead);
  if (!d.fold[request]) look_ahead<S, E>(d, request * shape.HV + value_head, false, scratch.ahead);
  if (d.slots[request] >= 0) {
    for (int i = 0; i < NX; ++i) {
      multiply(x[i], total, K);
      apply_row_scales(state, shape.K, x[i]);
    }
    add_state_products(state, shape.K, V, x, answers, scratch.ahead);
  }
  records.for_pages(0, n, [&](int64_t first, int64_t count) {
    const float* coefficients[NX];
    for (int i = 0; i < NX; ++i) coefficients[i] = scores[i] + first * pairs;
    add_products(records.values(first), count * pairs, V, coefficients, answers, scratch.ahead);
  });
  float* u = scratch.written.reserve(pairs * V);
  token_write(token, shape, answers, u, d.out + (request * shape.HV + value_head) * V);
  append_values(records, n, token, u);
}

template <int NX, class S, class E>
void decode(const Decode& d) {
  const Shape& shape = d.shape;
  Shares shares;
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local DecodeScratch scratch;
    shares.take(d.requests * shape.HV,
                [&](int64_t task) { decode_head<NX, S, E>(d, task / shape.HV, task % shape.HV, scratch); });
#pragma omp barrier
    // Keys are shared by the value heads of a group: appended when no head can still be reading old records.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < d.requests * shape.HK; ++task) {
      const int64_t request = task / shape.HK, value_head = task % shape.HK * (shape.HV / shape.HK);
      append_keys(Records<E>(d.records, shape, request, value_head), d.fold[request] ? 0 : d.fill[request],
                  d.tokens.at(shape, request, value_head));
    }
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" int64_t kvb_vector_width() { return kLanes; }

extern "C" void kvb_buffered_decode(const Shape* shape, const Tokens* tokens, const StatePool* states,
                                    const RecordPages* records, const int32_t* slots, const int32_t* fill,
                                    const uint8_t* fold, float* out, int64_t requests) {
  const Decode d{*shape, *tokens, *states, *records, slots, fill, fold, out, requests};
  with_reads(*tokens, [&](auto reads) {
    with_state_type(*states, [&](auto s) {
      with_record_type(*records, [&](auto e) { decode<decltype(reads)::value, decltype(s), decltype(e)>(d); });
    });
  });
}
