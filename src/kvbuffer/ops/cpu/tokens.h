// What one value head does with one token: the vectors that it reads state and records with, then, once they have
// answered, what it writes and its output. See kvbuffer/ops/rule.py for the families' formulas.
#pragma once
#include "records.h"

namespace kvb {

// Calls f with the number of vectors that a token reads with, as a constant: its query and, if the family corrects what
// is written by what the state holds, the vector that this is read with.
template <class F>
inline void with_reads(const Tokens& tokens, F&& f) {
  if (tokens.beta || tokens.removal_read)
    f(std::integral_constant<int, 2>());
  else
    f(std::integral_constant<int, 1>());
}

// What a value head reads and writes of a token, to be worked on by the next task. The rows of different tokens and heads
// lie too far apart for the processor to find them.
static inline void expect_token(const Tokens::Head& token, const Shape& shape, const float* out, Ahead& ahead) {
  for (const float* row : {token.q, token.k, token.removal_read, token.removal_write})
    if (row) ahead.expect(row, shape.K * sizeof(float));
  for (const float* row : {token.v, out}) ahead.expect(row, shape.V * sizeof(float));
  if (token.g && shape.decay_width > 1) ahead.expect(token.g, shape.K * sizeof(float));
}

// decay[r] = exp(g[r]): [padded(K)] for every kind of decay.
static inline void token_decay(const Tokens::Head& token, const Shape& shape, float* decay) {
  if (token.g && shape.decay_width > 1)
    for_vectors(token.g, shape.K, [&](int64_t r, Vec g) { store(decay + r, vexp(g)); });
  else
    std::fill_n(decay, padded(shape.K), token.g ? vexp(splat(*token.g))[0] : 1.f);
}

// The vectors that a token reads with, as they meet what was there before it: decayed by the token's own decay. The
// query comes last. Each is [padded(K)], filled up with zeros, its vectors of kLanes elements `stride` apart.
template <int NX>
inline void token_reads(const Tokens::Head& token, const Shape& shape, const float* decay, float* const (&x)[NX],
                        int64_t stride = kLanes) {
  const auto decayed = [&](const float* from, float* to) {
    for_vectors(from, shape.K, [&](int64_t r, Vec e) { store(to + r / kLanes * stride, load(decay + r) * e); });
  };
  decayed(token.q, x[NX - 1]);
  if constexpr (NX == 2) {
    if (token.beta)
      decayed(token.k, x[0]);
    else  // a removal reads the state before the token's decay
      for_vectors(token.removal_read, shape.K, [&](int64_t r, Vec e) { store(x[0] + r / kLanes * stride, e); });
  }
}

// What a token's query reads of what the token itself writes.
struct OwnScores {
  float removal, key;
};
static inline OwnScores own_scores(const Tokens::Head& token, const Shape& shape) {
  return {token.removal_write ? dot(token.removal_write, token.q, shape.K) : 0.f, dot(token.k, token.q, shape.K)};
}

// What a token writes to kLanes columns, and its output there: u under its own key, and what a removal takes out.
struct Written {
  Vec u, removed, output;
};
// Of columns c to c + kLanes, given the answers to what it read with.
template <int NX>
inline Written written(const Tokens::Head& token, const OwnScores& own, int64_t c, const Vec (&answers)[NX]) {
  const Vec v = load(token.v + c);
  if (token.removal_write) {
    const Vec removed = -answers[0];
    return {v, removed, answers[NX - 1] + own.removal * removed + own.key * v};
  }
  const Vec u = token.beta ? *token.beta * (v - answers[0]) : v;
  return {u, Vec{}, answers[NX - 1] + own.key * u};
}

// The token's written values u [pairs, V] and its output [V], given the answers [V] to what it read with.
template <int NX>
inline void token_write(const Tokens::Head& token, const Shape& shape, const float* const (&answers)[NX], float* u,
                        float* out) {
  const OwnScores own = own_scores(token, shape);
  for (int64_t c = 0; c < shape.V; c += kLanes) {
    Vec columns[NX];
    for (int i = 0; i < NX; ++i) columns[i] = load(answers[i] + c);
    const Written write = written(token, own, c, columns);
    store(out + c, write.output);
    store(u + (shape.pairs - 1) * shape.V + c, write.u);
    if (shape.pairs > 1) store(u + c, write.removed);
  }
}

// f(pair, key [K]) for the keys that u is written to.
template <class F>
inline void for_token_keys(const Tokens::Head& token, F&& f) {
  int64_t pair = 0;
  if (token.removal_write) f(pair++, token.removal_write);
  f(pair, token.k);
}

// Writes the token's keys as record i, rounded.
template <class E>
inline void append_keys(const Records<E>& records, int64_t i, const Tokens::Head& token) {
  const int64_t K = records.shape.K;
  for_token_keys(token, [&](int64_t pair, const float* key) {
    for (int64_t r = 0; r < K; ++r) from_float(key[r], records.keys(i) + pair * K + r);
  });
}

// Writes the token's decays as record i.
template <class E>
inline void append_decay(const Records<E>& records, int64_t i, const Tokens::Head& token) {
  if (token.g)
    std::copy_n(token.g, records.shape.decay_width, records.decays(i));
  else
    *records.decays(i) = 0.f;
}

// Writes the token's u [pairs, V] and decays as record i, rounded.
template <class E>
inline void append_values(const Records<E>& records, int64_t i, const Tokens::Head& token, const float* u) {
  const Shape& shape = records.shape;
  E* values = records.values(i);
  for (int64_t c = 0; c < shape.pairs * shape.V; c += kLanes) store(values + c, load(u + c));
  append_decay(records, i, token);
}

}  // namespace kvb
