"""The uses of an operator that are timed, each as a cycle of calls after which everything stands as it did before.

A cycle is what makes the numbers honest: a call that is repeated without moving the cursor would time only the cheap
steps, while a cycle of m calls holds exactly one fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from kvbuffer.bench.pools import Pools
from kvbuffer.ops.buffered import buffered_decode, buffered_verify, fold_records, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.cost import RECURRENT, Form, FormKind, LayerShape, Traffic, step_traffic
from kvbuffer.ops.layout import Tokens

#: Runs call n, counted since the requests were new, on one layer: ``step(n, layer, tokens)``.
Step = Callable[[int, int, Tokens], Tensor]


@dataclass(frozen=True)
class TimedForm:
    """One use of an operator.

    Attributes:
        name: what tables call it.
        bind: returns the calls on some pools, with everything prepared that does not depend on the tokens.
        traffic: returns the bytes that a request has to move per call, averaged over the cycle.
        calls: in a cycle.
        tokens: per request and call.
        uses_state: whether there is a state; otherwise requests are new at the start of every cycle.
        uses_records: whether there are records.
        streams: whether memory bandwidth is what bounds it, rather than arithmetic.
        peer: whose it is, "" for ours.
    """

    name: str
    bind: Callable[[Pools], Step]
    traffic: Callable[[LayerShape], Traffic]
    calls: int = 1
    tokens: int = 1
    uses_state: bool = True
    uses_records: bool = True
    streams: bool = True
    peer: str = ""

    @property
    def capacity(self) -> int:
        """Records that a request's buffer must hold."""
        return self.calls * self.tokens if self.uses_records else 0

    def calls_in_pass(self, layers: int) -> int:
        """Return the calls of a pass: whole cycles, as few as reach every layer."""
        return -(-layers // self.calls) * self.calls

    def run_pass(self, step: Step, layers: int, tokens: Tokens) -> None:
        """Run a pass, each call on the layer after the last one's, and one further in the cycle.

        Every layer is found as cold as if the whole cycle went through all of them, in a fraction of the time: which
        records a buffer holds is up to the caller, and any will do.
        """
        for n in range(self.calls_in_pass(layers)):
            step(self.calls + n % self.calls, n % layers, tokens)


@cache
def recurrent() -> TimedForm:
    """Return decoding that reads and rewrites the state with every token."""

    def bind(pools: Pools) -> Step:
        rule = pools.shape.rule
        return lambda n, layer, tokens: recurrent_decode(rule, tokens, pools.states, pools.slots[layer])

    return TimedForm("recurrent", bind, lambda shape: step_traffic(RECURRENT, shape), uses_records=False)


@cache
def buffered(m: int) -> TimedForm:
    """Return decoding that rewrites the state once per m tokens."""

    def bind(pools: Pools) -> Step:
        rule = pools.shape.rule
        fills = [pools.int32(n) for n in range(m + 1)]
        folds = [pools.flags(False), pools.flags(True)]

        def step(n: int, layer: int, tokens: Tokens) -> Tensor:
            fill = (n - 1) % m + 1 if n else 0
            fold = folds[fill == m]
            slots, page_table = pools.slots[layer], pools.page_tables[layer]
            return buffered_decode(rule, tokens, pools.states, slots, pools.records, page_table, fills[fill], fold)

        return step

    return TimedForm(f"buffered m={m}", bind, lambda shape: step_traffic(Form(FormKind.BUFFERED, m), shape), calls=m)


@cache
def kv_only(length: int) -> TimedForm:
    """Return decoding of a request's first tokens, without a state."""

    def bind(pools: Pools) -> Step:
        rule = pools.shape.rule
        fills = [pools.int32(n) for n in range(length)]
        no_fold = pools.flags(False)

        def step(n: int, layer: int, tokens: Tokens) -> Tensor:
            fill, page_table = fills[n % length], pools.page_tables[layer]
            return buffered_decode(rule, tokens, pools.states, pools.no_slots, pools.records, page_table, fill, no_fold)

        return step

    def traffic(shape: LayerShape) -> Traffic:
        return Traffic((length - 1) / 2 * shape.record_bytes, shape.record_bytes)

    return TimedForm(f"KV only, {length} tokens", bind, traffic, calls=length, uses_state=False)


@cache
def verify(drafts: int, m: int) -> TimedForm:
    """Return verification of draft tokens behind the last accepted one, all of them right.

    The buffer is folded, in a call of its own, whenever it holds at least m records.
    """
    tokens_per_call = drafts + 1
    calls = -(-m // tokens_per_call)

    def bind(pools: Pools) -> Step:
        rule, states, records = pools.shape.rule, pools.states, pools.records
        fills = [pools.int32(call * tokens_per_call) for call in range(calls + 1)]
        borders = pools.borders(tokens_per_call)

        def step(n: int, layer: int, tokens: Tokens) -> Tensor:
            slots, page_table = pools.slots[layer], pools.page_tables[layer]
            call = n % calls
            if n and call == 0:
                fold_records(rule, states, slots, records, page_table, fills[calls])
            return buffered_verify(rule, tokens, states, slots, records, page_table, fills[call], borders)

        return step

    def traffic(shape: LayerShape) -> Traffic:
        state, record = shape.state_bytes, shape.record_bytes
        before = (calls - 1) / 2 * tokens_per_call
        folding = state + calls * tokens_per_call * record
        return Traffic(state + before * record + folding / calls, tokens_per_call * record + state / calls)

    return TimedForm(f"verify {drafts} drafts", bind, traffic, calls=calls, tokens=tokens_per_call)


@cache
def prefill(length: int) -> TimedForm:
    """Return whole prompts, which go on from a state."""

    def bind(pools: Pools) -> Step:
        rule, borders, resumed = pools.shape.rule, pools.borders(length), pools.flags(False)
        return lambda n, layer, tokens: chunked_prefill(
            rule, tokens, pools.states, pools.slots[layer], borders, resumed
        )

    def traffic(shape: LayerShape) -> Traffic:
        keys, values = shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim
        return Traffic(4 * length * (2 * keys + values) + shape.state_bytes, 4 * length * values + shape.state_bytes)

    return TimedForm(f"prefill {length}", bind, traffic, tokens=length, uses_records=False, streams=False)
