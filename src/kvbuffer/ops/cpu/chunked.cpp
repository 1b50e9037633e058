// Chunked prefill: whole prompts through the recurrence, kChunk tokens at a time as matrix products.
//
//   name        shape         dtype     access
//   tokens      arguments.h   float32   read
//   states      arguments.h             read unless fresh, written
//   slots       [B]           int32     read: row of `states` of each sequence
//   cu_seqlens  [B + 1]       int32     read: borders of the sequences among the tokens
//   fresh       [B]           uint8     read: the sequence starts from a zero state
//   out         [N, HV, V]    float32   written
//
// With the state S before the chunk and the operands of chunk_operands.h, a chunk is
//
//   U = rate (V - read S - read_scores U)    solved forwards; rate is beta under the delta rule
//   O = query S + query_scores U             scores and writes summed over the pairs
//   S = decay S + write^T U
//
// A removal is a pair that has V = 0 and rate 1, and reads what the pair (k, v) beside it has written as well. Without
// a correction U is V.
//
// Columns of S, U and O meet no others, so one panel of them runs through these products after another: a panel of S
// stays in the L1 cache. One task is one sequence and some value heads of one key head, which share what depends on the
// key head alone. A chunk's result depends on its tokens and the state before it, and on nothing else.
#include <omp.h>

#include "chunk_operands.h"
#include "chunk_vector_decay.h"
#include "states.h"

namespace kvb {
namespace {

struct Prefill {
  const Shape& shape;
  const Tokens& tokens;
  const StatePool& states;
  const int32_t *slots, *cu_seqlens;
  const uint8_t* fresh;
  float* out;
  int64_t B;

  bool removes() const { return tokens.removal_read; }
  bool corrects() const { return tokens.beta || tokens.removal_read; }
  // Whether decays are treated one per row of the state: always under a removal, whatever their width.
  bool by_row() const { return removes() || shape.decay_width > 1; }
  int64_t group() const { return shape.HV / shape.HK; }
  int64_t width() const { return ceil_div(shape.K, kPanel) * kPanel; }
  int64_t state_size() const { return Panels::size(width(), shape.V); }
};

struct Chunk {
  int64_t first, tokens;  // the first one's index in the call, and how many
};

// Memory of one thread.
struct Workspace {
  ChunkRows rows = {};
  KeyHead shared = {};
  Operands operands = {};
  BlockDecays blocks = {};
  float *g, *rate;   // [C]
  float* values[2];  // [C, kPanel] of each pair: a panel of V, then of U
  float* states;     // [K, V] panels of each of the task's value heads
  float* row;        // [V]

  // Places everything in `memory` and returns the floats needed; measures only, when it is null.
  int64_t place(float* memory, const Prefill& p, int64_t heads) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      float* start = memory ? memory + used : nullptr;
      used += ceil_div(count, kPanel) * kPanel;
      return start;
    };
    const int64_t width = p.width();
    const auto by_token = [&] { return take(kChunk * width); };
    const auto by_dim = [&] { return Panels{take(Panels::size(width, kChunk)), width}; };
    const auto square = [&] { return take(kChunk * kChunk); };
    rows.query = by_token();
    operands.query = by_dim(), operands.read = by_dim();
    operands.decay = take(width);
    for (int64_t r = 0; r < p.shape.pairs; ++r) {
      rows.key[r] = by_token();
      operands.write[r] = {by_token(), kChunk};
      operands.query_scores[r] = square(), operands.read_scores[r] = square();
      values[r] = take(kChunk * kPanel);
    }
    if (p.by_row()) {
      const auto block = [&] { return take(kBlockTokens * width); };
      rows.g = by_token();
      rows.read = p.removes() ? by_token() : p.corrects() ? rows.key[0] : nullptr;
      blocks.query = block(), blocks.read = block(), blocks.query_t = block(), blocks.read_t = block();
      blocks.tokens = block(), blocks.blocks = take(kChunk / kBlockTokens * width);
      for (int64_t r = 0; r < p.shape.pairs; ++r) blocks.until[r] = by_token(), blocks.earlier[r] = by_dim();
    } else {
      shared = {by_dim(), by_dim(), square(), p.corrects() ? square() : nullptr};
    }
    g = take(kChunk), rate = take(kChunk), row = take(p.shape.V);
    states = take(heads * p.state_size());
    return used;
  }
};

// Copies rows of `columns` floats; null is zeros. Zeroes what lies past them up to kChunk rows of `width`.
void copy_rows(const float* from, int64_t stride, int64_t tokens, int64_t columns, float* to, int64_t width) {
  for (int64_t t = 0; t < kChunk; ++t, to += width) {
    const int64_t valid = from && t < tokens ? columns : 0;
    if (valid) std::memcpy(to, from + t * stride, valid * sizeof(float));
    std::memset(to + valid, 0, (width - valid) * sizeof(float));
  }
}

void copy_key_head(const Prefill& p, const Chunk& chunk, int64_t value_head, const Workspace& w) {
  const Tokens::Head from = p.tokens.at(p.shape, chunk.first, value_head);
  const int64_t K = p.shape.K, removal_stride = p.shape.HK * K;
  const auto copy = [&](const float* x, int64_t stride, float* to) {
    copy_rows(x, stride, chunk.tokens, K, to, p.width());
  };
  copy(from.q, p.tokens.q_stride, w.rows.query);
  copy(from.k, p.tokens.k_stride, w.rows.key[p.shape.pairs - 1]);
  if (p.removes()) {
    copy(from.removal_read, removal_stride, w.rows.read);
    copy(from.removal_write, removal_stride, w.rows.key[0]);
  }
}

void copy_value_head(const Prefill& p, const Chunk& chunk, int64_t value_head, const Workspace& w) {
  const Tokens::Head from = p.tokens.at(p.shape, chunk.first, value_head);
  for (int64_t t = 0; t < kChunk; ++t) {
    const bool valid = t < chunk.tokens;
    w.rate[t] = !valid ? 0.f : from.beta ? from.beta[t * p.shape.HV] : 1.f;
    w.g[t] = valid && from.g ? from.g[t * p.tokens.g_stride] : 0.f;
  }
  if (!p.by_row()) return;
  if (p.shape.decay_width > 1)
    copy_rows(from.g, p.tokens.g_stride, chunk.tokens, p.shape.K, w.rows.g, p.width());
  else
    for (int64_t t = 0; t < kChunk; ++t) std::fill_n(w.rows.g + t * p.width(), p.width(), w.g[t]);
}

// One chunk of one panel of columns.
struct PanelChunk {
  const Operands& op;
  const float* rate;
  int64_t pairs, tokens, K;
  float* state;          // [K, kPanel]
  float* const* values;  // [C, kPanel] of each pair: columns of V, which `solve` makes U

  void solve() const {
    for (int64_t t = 0; t < tokens; t += kTileRows) {
      Tile answer;
      multiply_add<1, kPanel>(answer, op.read.at(t), state, K);
      if (pairs == 2) multiply_add<kChunk, 1>(answer, op.read_scores[1] + t * kChunk, values[1], t + kTileRows);
      multiply_add<kChunk, 1>(answer, op.read_scores[0] + t * kChunk, values[0], t);
      solve_tile(op.read_scores[0] + t * kChunk + t, rate + t, answer, values[0] + t * kPanel);
    }
  }

  // u_t = rate (v_t - answer_t - sum over the tile's tokens j < t of score(t, j) u_j), in place of v.
  static void solve_tile(const float* scores, const float* rate, const Tile& answer, float* v) {
    Tile u;
#pragma GCC unroll 16
    for (int t = 0; t < kTileRows; ++t) {
#pragma GCC unroll 8
      for (int c = 0; c < kPanelVecs; ++c) {
        Vec sum = answer.x[t][c];
#pragma GCC unroll 16
        for (int j = 0; j < t; ++j) sum += scores[t * kChunk + j] * u.x[j][c];
        u.x[t][c] = rate[t] * (load(v + t * kPanel + c * kLanes) - sum);
      }
    }
    u.store_to(v, kPanel);
  }

  void write_outputs(float* out, int64_t stride, int64_t columns) const {
    for (int64_t t = 0; t < tokens; t += kTileRows) {
      Tile tile;
      multiply_add<1, kPanel>(tile, op.query.at(t), state, K);
      for (int64_t r = 0; r < pairs; ++r)
        multiply_add<kChunk, 1>(tile, op.query_scores[r] + t * kChunk, values[r], t + kTileRows);
      for (int i = 0; i < kTileRows && t + i < tokens; ++i)
        for (int c = 0; c < kPanelVecs && c * kLanes < columns; ++c)
          store(out + (t + i) * stride + c * kLanes, tile.x[i][c]);
    }
  }

  void advance_state() const {
    for (int64_t i = 0; i < K; i += kTileRows) {
      float* rows = state + i * kPanel;
      Tile tile;
      for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kPanelVecs; ++c) tile.x[r][c] = op.decay[i + r] * load(rows + r * kPanel + c * kLanes);
      for (int64_t r = 0; r < pairs; ++r) multiply_add<1, kPanel>(tile, op.write[r].at(i), values[r], tokens);
      tile.store_to(rows, kPanel);
    }
  }
};

void run_chunk(const Prefill& p, const Chunk& chunk, int64_t value_head, const Workspace& w, float* state) {
  const int64_t V = p.shape.V, pairs = p.shape.pairs, row = p.shape.HV * V;
  copy_value_head(p, chunk, value_head, w);
  if (p.by_row())
    vector_operands(w.rows, pairs, chunk.tokens, p.shape.K, p.width(), w.blocks, w.operands);
  else
    scalar_operands(w.rows, w.shared, w.g, chunk.tokens, p.width(), w.operands);
  for (int64_t r = 0; r < pairs; ++r) mask_scores(w.operands.query_scores[r]), mask_scores(w.operands.read_scores[r]);
  const float* v = p.tokens.at(p.shape, chunk.first, value_head).v;
  float* out = p.out + chunk.first * row + value_head * V;
  for (int64_t c = 0; c < V; c += kPanel, state += kPanel * p.width()) {
    const int64_t columns = std::min<int64_t>(kPanel, V - c);
    copy_rows(v + c, p.tokens.v_stride, chunk.tokens, columns, w.values[pairs - 1], kPanel);
    if (p.removes()) std::fill_n(w.values[0], kChunk * kPanel, 0.f);
    const PanelChunk panel{w.operands, w.rate, pairs, chunk.tokens, p.shape.K, state, w.values};
    if (p.corrects()) panel.solve();
    panel.write_outputs(out + c, row, columns);
    panel.advance_state();
  }
}

template <class S>
void load_panels(const Prefill& p, const State<S>& state, float* row, Panels panels) {
  for (int64_t r = 0; r < p.shape.K; ++r) {
    load_row(state, r, p.shape.V, row);
    for (int64_t c = 0; c < p.shape.V; c += kLanes) store(panels.at(c) + r * kPanel, load(row + c));
  }
}

template <class S>
void store_panels(const Prefill& p, Panels panels, float* row, const State<S>& state) {
  for (int64_t r = 0; r < p.shape.K; ++r) {
    for (int64_t c = 0; c < p.shape.V; c += kLanes) store(row + c, load(panels.at(c) + r * kPanel));
    store_row(state, r, p.shape.V, row);
  }
}

// Value heads per task: all of a key head's, unless that leaves threads idle.
int64_t heads_per_task(const Prefill& p) {
  int64_t heads = p.group();
  while (heads > 1 && p.B * p.shape.HK * ceil_div(p.group(), heads) < 2 * omp_get_max_threads())
    heads = ceil_div(heads, 2);
  return heads;
}

// Value heads [first, last) of sequence b, all of one key head.
template <class S>
void run_heads(const Prefill& p, int64_t b, int64_t first, int64_t last, const Workspace& w) {
  const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  if (begin == end) return;
  const auto panels = [&](int64_t h) { return Panels{w.states + (h - first) * p.state_size(), p.width()}; };
  const auto state = [&](int64_t h) { return state_of<S>(p.states, p.shape, p.slots[b], h); };
  std::fill_n(w.states, (last - first) * p.state_size(), 0.f);
  for (int64_t h = first; h < last && !p.fresh[b]; ++h) load_panels(p, state(h), w.row, panels(h));
  for (int64_t t = begin; t < end; t += kChunk) {
    const Chunk chunk{t, std::min<int64_t>(kChunk, end - t)};
    copy_key_head(p, chunk, first, w);
    if (!p.by_row()) key_head_products(w.rows, p.shape.K, p.width(), chunk.tokens, w.shared);
    for (int64_t h = first; h < last; ++h) run_chunk(p, chunk, h, w, panels(h).data);
  }
  for (int64_t h = first; h < last; ++h) store_panels(p, panels(h), w.row, state(h));
}

void prefill(const Prefill& p) {
  const int64_t heads = heads_per_task(p), parts = ceil_div(p.group(), heads);
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local Scratch scratch;
    Workspace w;
    w.place(scratch.reserve(w.place(nullptr, p, heads)), p, heads);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.B * p.shape.HK * parts; ++task) {
      const int64_t b = task / parts / p.shape.HK, group = task / parts % p.shape.HK * p.group();
      const int64_t first = group + task % parts * heads, last = std::min(first + heads, group + p.group());
      with_state_type(p.states, [&](auto element) { run_heads<decltype(element)>(p, b, first, last, w); });
    }
  }
}

}  // namespace
}  // namespace kvb

extern "C" void kvb_chunked_prefill(const kvb::Shape* shape, const kvb::Tokens* tokens, const kvb::StatePool* states,
                                    const int32_t* slots, const int32_t* cu_seqlens, const uint8_t* fresh, float* out,
                                    int64_t B) {
  kvb::prefill({*shape, *tokens, *states, slots, cu_seqlens, fresh, out, B});
}
