// What new tokens read with, and its scores with the records before them and with one another's (verify.cpp).
#pragma once
#include "states.h"
#include "tokens.h"
#include "verify_tiles.h"

namespace kvb {
namespace {

struct Verify {
  const Shape& shape;
  const Tokens& tokens;
  const StatePool& states;
  const RecordPages& records;
  const int32_t *slots, *fill, *cu_seqlens, *parents;
  float* out;
  int64_t requests;
};

constexpr int64_t kNoGroup = -1;

struct VerifyScratch {
  Scratch reads, vectors, left, keys, values, undecayed, scores, from_state, from_records;  // of a block
  Scratch scales, weights, total, decay, path, sums;
  int64_t group;  // whose reads, keys and undecayed scores are there, or kNoGroup
  Ahead ahead;
};

// New tokens of one request that one value head works on together, behind the records that all of them see. Keys and
// values are those of the records and, from row `start`, of the tokens as others see them: rounded to the records'
// type. Vector t * NX + i is vector i of token t.
struct Block {
  int64_t first, count;    // tokens of the call
  int64_t records;         // before them
  int64_t old, start;      // rows of the records, and with those that fill up the last tile of scores
  const int32_t* parents;  // null for a chain
  const float* g;          // of token `first`; null without decay
  Vectors reads;           // count * NX of K elements: what the tokens read with
  Vectors vectors;         // the same, with what is due to the state's rows
  float* left;             // [count * NX] what else is left of the state's answers
  Vectors scores;          // of the reads with each row's key, 0 if it is no ancestor's
  float* keys;             // [start + count * pairs, padded(K)]
  float* values;           // [start + count * pairs, V]
  float *from_state, *from_records;  // [count * NX, V] answers

  int64_t parent(int64_t t) const { return parents ? parents[t] : t - 1; }
};

template <class E>
inline Vec as_stored(Vec x) {
  E lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

// Sets keys and reads of token t.
template <int NX, class E>
void set_token(const Tokens::Head& token, const Shape& shape, const Block& block, int64_t t, const float* decay) {
  for_token_keys(token, [&](int64_t pair, const float* key) {
    float* stored = block.keys + (block.start + t * shape.pairs + pair) * padded(shape.K);
    for_vectors(key, shape.K, [&](int64_t r, Vec e) { store(stored + r, as_stored<E>(e)); });
  });
  float* x[NX];
  for (int i = 0; i < NX; ++i) x[i] = block.reads.at(t * NX + i, 0);
  token_reads(token, shape, decay, x, block.reads.piece());
}

// Both of these set all but the values and the answers. Decays are sums of logarithms <= 0, back through the records
// and up a path: nothing overflows, and no small one is lost in a difference. `scales` are those of the state's rows.

// One decay for all of a key is a factor of its score; without it, the value heads of a group have the same scores.
template <int NX, class E>
void decay_scores(const Verify& v, const Records<E>& records, const Block& block, const float* scales,
                  VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t pairs = shape.pairs, K = padded(shape.K), rows = block.start + block.count * pairs;
  const Vectors undecayed{scratch.undecayed.reserve(block.reads.count * padded(rows)), block.reads.count};
  if (const int64_t group = block.first * shape.HK + records.key_head; group != scratch.group) {
    scratch.group = group;
    records.for_keys(block.records, [&](int64_t, int64_t row, const E* key) {
      for_vectors(key, shape.K, [&](int64_t r, Vec e) { store(block.keys + row * K + r, e); });
    });
    float* ones = scratch.decay.reserve(K);
    std::fill_n(ones, K, 1.f);
    for (int64_t t = 0; t < block.count; ++t)
      set_token<NX, E>(v.tokens.at(shape, block.first + t, records.value_head), shape, block, t, ones);
    score_all(block.reads, block.keys, rows, K, undecayed);
  }
  constexpr float kNoAncestor = 1.f;
  float *after = scratch.weights.reserve(padded(block.old)), *left = scratch.sums.reserve(padded(rows)), total = 0.f;
  for (int64_t i = block.records - 1; i >= 0; --i) {
    std::fill_n(after + i * pairs, pairs, total);
    total += *records.decays(i);
  }
  for (int64_t t = 0; t < block.count; ++t) {
    std::fill_n(left + block.start, t * pairs, kNoAncestor);
    float path = 0.f;
    for (int64_t j = block.parent(t); j >= 0; j = block.parent(j)) {
      std::fill_n(left + block.start + j * pairs, pairs, path);
      if (block.g) path += block.g[j * v.tokens.g_stride];
    }
    for (int64_t r = 0; r < block.old; ++r) left[r] = after[r] + path;
    // A removal reads the state before the token's decay.
    const Vec own = vexp(splat(block.g ? block.g[t * v.tokens.g_stride] : 0.f));
    const auto by = [&](int i) { return i < NX - 1 && v.tokens.removal_read ? splat(1.f) : own; };
    for (int64_t r = 0; r < block.start + t * pairs; r += kLanes) {
      const Vec sum = load(left + r), factor = sum == kNoAncestor ? Vec{} : vexp(sum);
      for (int i = 0; i < NX; ++i)
        store(block.scores.at(t * NX + i, r), factor * by(i) * load(undecayed.at(t * NX + i, r)));
    }
    const Vec state = vexp(splat(total + path));
    for (int i = 0; i < NX; ++i) block.left[t * NX + i] = (state * by(i))[0];
  }
  if (block.vectors.data == block.reads.data) return;
  for (int64_t r = 0; r < K; r += kLanes)
    for (int64_t x = 0; x < block.reads.count; ++x)
      store(block.vectors.at(x, r), load(scales + r) * load(block.reads.at(x, r)));
}

// One decay per element of a key.
template <int NX, class E>
void decay_vectors(const Verify& v, const Records<E>& records, const Block& block, const float* scales,
                   VerifyScratch& scratch) {
  const Shape& shape = v.shape;
  const int64_t pairs = shape.pairs, K = padded(shape.K), count = block.reads.count;
  float *path = scratch.path.reserve(K), *left = scratch.sums.reserve(K), *decay = scratch.decay.reserve(K);
  float *weights = scratch.weights.reserve(block.records * K), *total = scratch.total.reserve(K);
  record_weights(records, block.records, weights, total);
  for_weighted_keys(records, block.records, weights,
                    [&](int64_t row, int64_t r, Vec e) { store(block.keys + row * K + r, e); });
  for (int64_t t = 0; t < block.count; ++t) {
    const Tokens::Head token = v.tokens.at(shape, block.first + t, records.value_head);
    token_decay(token, shape, decay);
    set_token<NX, E>(token, shape, block, t, decay);
    for (int64_t r = block.start / kLanes * kLanes; r < block.start + t * pairs; r += kLanes)
      for (int64_t x = t * NX; x < (t + 1) * NX; ++x) store(block.scores.at(x, r), Vec{});
    std::fill_n(path, K, 0.f);
    std::fill_n(left, K, 1.f);
    for (int64_t j = block.parent(t); j >= 0; j = block.parent(j)) {
      for (int64_t row = block.start + j * pairs; row < block.start + (j + 1) * pairs; ++row)
        for (int64_t x = t * NX; x < (t + 1) * NX; ++x) {
          Vec score{};
          for (int64_t r = 0; r < K; r += kLanes)
            score += load(block.reads.at(x, r)) * load(left + r) * load(block.keys + row * K + r);
          *block.scores.element(x, row) = hsum(score);
        }
      for_vectors(block.g + j * v.tokens.g_stride, shape.K, [&](int64_t r, Vec g) {
        const Vec sum = load(path + r) + g;
        store(path + r, sum);
        store(left + r, vexp(sum));
      });
    }
    for (int64_t x = t * NX; x < (t + 1) * NX; ++x)
      for (int64_t r = 0; r < K; r += kLanes)
        store(block.vectors.at(x, r), load(left + r) * load(block.reads.at(x, r)));
  }
  score_all(block.vectors, block.keys, block.old, K, block.scores);
  for (int64_t r = 0; r < K; r += kLanes)
    for (int64_t x = 0; x < count; ++x)
      store(block.vectors.at(x, r), load(total + r) * load(scales + r) * load(block.vectors.at(x, r)));
  std::fill_n(block.left, count, 1.f);
}

}  // namespace
}  // namespace kvb
