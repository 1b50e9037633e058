// The operands of a chunk whose decay differs between the rows of the state (chunk_operands.h).
//
// Tokens go in blocks of kBlockTokens. Against the keys of earlier blocks the decay between two tokens factors at the
// border of the later one's block into the decay since the border and the decay up to it. Neither is above 1, and both
// are exponentials of sums of decays of one sign, which need no more than float32. Inside a block the keys decay from
// one token to the next.
#pragma once
#include "chunk_operands.h"

namespace kvb {
namespace {

// Memory for the current block and the keys of earlier ones; B is kBlockTokens.
struct BlockDecays {
  float *query, *read;      // [B, K] decayed since the block's border
  float *query_t, *read_t;  // [K, B] the same
  float* until[2];          // [C, K] keys decayed to the end of their block
  Panels earlier[2];        // [K, C] keys of earlier blocks decayed to the current block's border
  float* tokens;            // [B, K] decay of each token
  float* blocks;            // [C / B, K] decay over each block
};

// Decays of the block of tokens from `t` on, and its readers and keys under them. A removal reads before its token's
// own decay.
inline void decay_block(const ChunkRows& rows, int pairs, int64_t t, int64_t width, const BlockDecays& b) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t at = t * width + c;
    Vec sum{}, decay = splat(1.f);
    for (int64_t i = 0; i < kBlockTokens; ++i) {
      const Vec g = load(rows.g + at + i * width), before = decay;
      sum += g;
      decay = decay_exp(sum);
      store(b.tokens + c + i * width, decay_exp(g));
      store(b.query + c + i * width, decay * load(rows.query + at + i * width));
      if (rows.read) store(b.read + c + i * width, (pairs == 2 ? before : decay) * load(rows.read + at + i * width));
    }
    store(b.blocks + t / kBlockTokens * width + c, decay);
    sum = Vec{}, decay = splat(1.f);
    for (int64_t i = kBlockTokens - 1; i >= 0; --i) {
      for (int r = 0; r < pairs; ++r) store(b.until[r] + at + i * width, decay * load(rows.key[r] + at + i * width));
      sum += load(rows.g + at + i * width);
      decay = decay_exp(sum);
    }
  }
}

// out[:, t] = rows[t, :] for the tokens of a block.
inline void transpose_block(const float* rows, int64_t width, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < kBlockTokens; t += kLanes)
    transpose_rows(rows + t * width, width, width, out + t, out_stride);
}

// out[i, t] = weights[i] x[i, t] for the tokens of a block.
inline void scale_block(const float* x, int64_t stride, const float* weights, int64_t width, float* out) {
  for (int64_t i = 0; i < width; ++i)
    for (int64_t t = 0; t < kBlockTokens; t += kLanes)
      store(out + i * kPanel + t, weights[i] * load(x + i * stride + t));
}

// scores[t, j] = reader[:, t] . keys[:, j] of a block against the `count` tokens before it.
inline void scores_before(const float* reader, Panels keys, int64_t count, int64_t K, float* scores) {
  for (int64_t t = 0; t < kBlockTokens; t += kTileRows)
    for (int64_t j = 0; j < count; j += kPanel) {
      Tile tile;
      multiply_add<1, kBlockTokens>(tile, reader + t, keys.at(j), K);
      tile.store_to(scores + t * kChunk + j, kChunk);
    }
}

// Scores of a block's tokens among themselves: key j decays from one token to the next, and each reads it on its way.
// Rows of [C, K], decays [B, K], scores [C, C], all from the block's first token on.
template <bool kReadsBefore>
void scores_within(const float* reader, const float* key, const float* decays, int64_t width, float* scores) {
  for (int64_t j = 0; j < kBlockTokens; ++j) {
    Vec sums[kBlockTokens] = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec decayed = load(key + j * width + c);
      if (!kReadsBefore) sums[j] += decayed * load(reader + j * width + c);
      for (int64_t t = j + 1; t < kBlockTokens; ++t) {
        const Vec before = decayed;
        decayed *= load(decays + t * width + c);
        sums[t] += (kReadsBefore ? before : decayed) * load(reader + t * width + c);
      }
    }
    for (int64_t t = j; t < kBlockTokens; ++t) scores[t * kChunk + j] = hsum(sums[t]);
  }
}

// Operands under decays of their own for each row of the state; pairs is 2 under a removal.
inline void vector_operands(const ChunkRows& rows, int pairs, int64_t tokens, int64_t K, int64_t width,
                            const BlockDecays& b, const Operands& out) {
  std::fill_n(out.decay, width, 1.f);
  for (int64_t t = 0; t < tokens; t += kBlockTokens) {
    decay_block(rows, pairs, t, width, b);
    transpose_block(b.query, width, b.query_t, kBlockTokens);
    scale_block(b.query_t, kBlockTokens, out.decay, width, out.query.at(t));
    if (rows.read) {
      transpose_block(b.read, width, b.read_t, kBlockTokens);
      scale_block(b.read_t, kBlockTokens, out.decay, width, out.read.at(t));
    }
    const float* decay = b.blocks + t / kBlockTokens * width;
    for (int r = 0; r < pairs; ++r) {
      const float* key = rows.key[r] + t * width;
      float *query_scores = out.query_scores[r] + t * kChunk, *read_scores = out.read_scores[r] + t * kChunk;
      scores_before(b.query_t, b.earlier[r], t, K, query_scores);
      scores_within<false>(rows.query + t * width, key, b.tokens, width, query_scores + t);
      if (rows.read) {
        scores_before(b.read_t, b.earlier[r], t, K, read_scores);
        (pairs == 2 ? scores_within<true> : scores_within<false>)(rows.read + t * width, key, b.tokens, width,
                                                                  read_scores + t);
      }
      for (int64_t j = 0; j < t; j += kBlockTokens)
        scale_block(b.earlier[r].at(j), kPanel, decay, width, b.earlier[r].at(j));
      transpose_block(b.until[r] + t * width, width, b.earlier[r].at(t), kPanel);
    }
    for (int64_t i = 0; i < width; ++i) out.decay[i] *= decay[i];
  }
  // From the last block to the first: what is left of its keys behind the blocks after it.
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec left = splat(1.f);
    for (int64_t t = tokens - 1; t >= 0; --t) {
      for (int r = 0; r < pairs; ++r) store(out.write[r].at(c) + t * kPanel, left * load(b.until[r] + t * width + c));
      if (t % kBlockTokens == 0) left *= load(b.blocks + t / kBlockTokens * width + c);
    }
  }
}

}  // namespace
}  // namespace kvb
