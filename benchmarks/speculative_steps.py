"""Where the time of a step with drafts goes, by operator, for drafts that all have the same length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from operators import Clock, install
from speculative_script import OUTPUT_LEN, PROMPT_LEN, Oracle, Run, make_engine
from speculative_texts import scripts

BATCH, ACCEPTANCE, LENGTHS = 32, 0.7, (0, 1, 2, 3)
#: What an operator's label begins with, by what the table calls it. Folds before verification are memory's work.
_LABELS = {
    "dense_layers": ("linear", "mlp"),
    "experts": ("norm and routing", "shared expert", "experts", "sum of experts"),
    "linear_attention": ("recurrent_decode", "buffered", "copies and folds"),
    "convolutions": ("causal_conv",),
    "full_attention": ("paged_attention", "attention_inputs"),
    "everything_else": ("",),
}
GROUPS = tuple(_LABELS)


def measure(model: str, rounds: int) -> Iterator[dict]:
    """Yield a row per length of drafts: milliseconds of a step by kind of operator, and tokens that it brings.

    Args:
        model: which benchmark checkpoint.
        rounds: of all lengths in turn, after one that does not count.
    """
    engine = make_engine(model, {"method": "ngram", "num_speculative_tokens": max(LENGTHS), "adaptive": False})
    texts = scripts("prose", BATCH, engine.tokenizer, PROMPT_LEN, OUTPUT_LEN)
    install(clock := Clock())
    seconds: dict[int, Counter[str]] = {length: Counter() for length in LENGTHS}
    steps: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for round_ in range(rounds + 1):
        for length in LENGTHS:
            engine._speculator.drafter = Oracle(ACCEPTANCE, length)
            run = Run(engine, texts)
            clock.take()
            count = 0
            while not run.ended:
                run.step()
                count += 1
            run.end()
            times, _ = clock.take()
            if round_:
                seconds[length].update(_grouped(times))
                steps[length] += count
                tokens[length] += run.tokens
    for length in LENGTHS:
        row = {name: round(1e3 * seconds[length][name] / steps[length], 1) for name in GROUPS}
        row["step"] = round(1e3 * seconds[length].total() / steps[length], 1)
        row["tokens"] = round(tokens[length] / steps[length], 1)
        yield {"model": model, "batch": BATCH, "drafts": length} | row


def _grouped(times: dict[str, float]) -> Counter[str]:
    groups: Counter[str] = Counter()
    for label, taken in times.items():
        groups[next(name for name, begins in _LABELS.items() if label.startswith(begins))] += taken
    return groups
