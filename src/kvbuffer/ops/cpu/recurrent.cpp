// Decode without a buffer: each token reads its request's state and rewrites it. The baseline.
//
//   shape, tokens, states  see arguments.h
//   slots  [B]         int32    read: row of the states of each request
//   out    [B, HV, V]  float32  written
//
// The update is a fold of one record by the same code as a buffer's, hence with the same bits as a buffer of one token.
#include "states.h"
#include "shares.h"
#include "tokens.h"

namespace kvb {
namespace {

struct RecurrentScratch {
  Scratch decay, reads[2], answers[2], keys, written, rows;
  Ahead ahead;
};

template <int NX, class S>
void decode_head(const Shape& shape, const Tokens::Head& token, const State<S>& state, float* out,
                 RecurrentScratch& scratch) {
  const int64_t K = padded(shape.K), V = shape.V;
  float *decay = scratch.decay.reserve(K), *keys = scratch.keys.reserve(shape.pairs * K);
  float *x[NX], *answers[NX], *u = scratch.written.reserve(shape.pairs * V);
  for (int i = 0; i < NX; ++i) {
    x[i] = scratch.reads[i].reserve(K);
    answers[i] = scratch.answers[i].reserve(V);
    std::fill_n(answers[i], V, 0.f);
  }
  token_decay(token, shape, decay);
  token_reads(token, shape, decay, x);
  for (int i = 0; i < NX; ++i) apply_row_scales(state, shape.K, x[i]);
  add_state_products(state, shape.K, V, x, answers, scratch.ahead);
  token_write(token, shape, answers, u, out);
  for_token_keys(token, [&](int64_t pair, const float* key) { std::copy_n(key, shape.K, keys + pair * K); });
  fold_state(state, shape.K, V, decay, keys, u, shape.pairs, scratch.rows.reserve(kRoundRows * V), scratch.ahead);
}

template <int NX, class S>
void decode(const Shape& shape, const Tokens& tokens, const StatePool& states, const int32_t* slots, float* out,
            int64_t requests) {
  const auto state = [&](int64_t task) { return state_of<S>(states, shape, slots[task / shape.HV], task % shape.HV); };
  const auto token = [&](int64_t task) { return tokens.at(shape, task / shape.HV, task % shape.HV); };
  const int64_t tasks = requests * shape.HV;
  Shares shares;
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local RecurrentScratch scratch;
    shares.take(tasks, [&](int64_t task) {
      scratch.ahead.clear();
      if (task + 1 < tasks) {
        expect_token(token(task + 1), shape, out + (task + 1) * shape.V, scratch.ahead);
        expect_state(state(task + 1), shape.K, shape.V, false, scratch.ahead);
      }
      scratch.ahead.spread(2 * shape.K);
      decode_head<NX>(shape, token(task), state(task), out + task * shape.V, scratch);
    });
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_recurrent_decode(const Shape* shape, const Tokens* tokens, const StatePool* states,
                                     const int32_t* slots, float* out, int64_t requests) {
  with_reads(*tokens, [&](auto reads) {
    with_state_type(*states, [&](auto s) {
      decode<decltype(reads)::value, decltype(s)>(*shape, *tokens, *states, slots, out, requests);
    });
  });
}
