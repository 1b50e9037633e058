"""Fills a store: the model answers every instruction offline, in batches as large as the engine takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import lmdb

from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import FinishReason
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import StoreError
from kvbuffer.instcache.defaults import MAX_ANSWER_TOKENS
from kvbuffer.instcache.entry import Answer, Codec, decode, encode, train_dictionary
from kvbuffer.instcache.identity import Identity, Keys, conversation, normalise, template_options
from kvbuffer.instcache.progress import Report, no_report
from kvbuffer.instcache.store import Store, write_batch, write_store

#: Answers that are written in one transaction: what a crash loses at most.
_BATCH = 256
# Entries that a dictionary is trained on; more change it little.
_SAMPLES = 10_000


@dataclass(frozen=True)
class Filler:
    """What fills a store.

    Attributes:
        engine: answers the instructions; made without a limit of its queue.
        identity: of its model and of what follows.
        model: name of the model, for people.
        system_prompt: system message before every instruction.
        chat_template: Jinja source that replaces the model's own template.
        max_tokens: most tokens of an answer.
    """

    engine: Engine
    identity: Identity
    model: str
    system_prompt: str | None = None
    chat_template: str | None = None
    max_tokens: int = MAX_ANSWER_TOKENS

    def fill(self, path: Path, instructions: Iterable[str], report: Report = no_report) -> int:
        """Write a store with the answers to ``instructions``.

        What an earlier call had answered when it was stopped is taken from the file beside ``path`` that it left, and
        what the store at ``path`` holds already is taken from there, as long as model, template, system prompt and
        sampling are still the same: the keys say so. The store is replaced when the new one is complete.

        Args:
            path: where the store is to be.
            instructions: texts; a normal form counts once.
            report: told how many are done, of how many.

        Returns:
            The number of answers; instructions too long for the context have none.

        Raises:
            StoreError: there is something else than a store at ``path``.
        """
        work = _WorkFile(path.with_name(path.name + ".filling"), Store(path) if path.exists() else None)
        try:
            key = Keys(self.identity)
            wanted = {key(text.encode()): text for text in map(normalise, instructions) if text}
            missing = {k: text for k, text in wanted.items() if not self._is_answered(work.get(k))}
            self._answer(missing, work, report, len(wanted))
            keys = sorted(wanted)
            samples = [entry for _, entry in work.entries(keys[:: max(1, len(keys) // _SAMPLES)])]
            codec = Codec(train_dictionary(samples))
            count = write_store(path, self.identity, self.model, work.entries(keys), codec)
        finally:
            work.close()
        work.remove()
        return count

    def _is_answered(self, entry: bytes | None) -> bool:
        """Return whether an answer is as long as it should be."""
        if entry is None:
            return False
        _, answer = decode(entry)
        return answer.ended or len(answer.token_ids) >= self.max_tokens

    def _answer(self, missing: Mapping[bytes, str], work: _WorkFile, report: Report, total: int) -> None:
        engine, running, done = self.engine, dict[str, _Running](), total - len(missing)
        report(done, total)
        # Texts with the same beginning together: it is computed once.
        waiting: Iterator[tuple[bytes, str]] = iter(sorted(missing.items(), key=lambda item: item[1]))
        finished: list[tuple[bytes, bytes]] = []
        try:
            while True:
                while len(running) < 2 * engine.config.max_num_seqs and (item := next(waiting, None)) is not None:
                    if not self._add(*item, running):
                        done += 1
                if not running:
                    break
                for delta in engine.step():
                    request = running[delta.request_id]
                    request.token_ids += delta.token_ids
                    if delta.finish_reason is None:
                        continue
                    del running[delta.request_id]
                    done += 1
                    if delta.finish_reason is not FinishReason.ABORT:
                        ended = delta.finish_reason is FinishReason.STOP
                        answer = Answer(request.token_ids, ended, delta.num_prompt_tokens)
                        finished.append((request.key, encode(request.text.encode(), answer)))
                if len(finished) >= _BATCH:
                    work.put(finished)
                    finished = []
                report(done, total)
        finally:
            for request_id in running:
                engine.abort_request(request_id)
            work.put(finished)
        report(done, total)

    def _add(self, key: bytes, text: str, running: dict[str, _Running]) -> bool:
        """Start a request; return whether it fits the context."""
        messages = conversation(text, self.system_prompt)
        prompt = self.engine.tokenizer.apply_chat_template(messages, **template_options(self.chat_template))
        room = self.engine.max_model_len - len(prompt)
        if room < 1:
            return False
        params = SamplingParams(temperature=0.0, max_tokens=min(self.max_tokens, room))
        request_id = key.hex()
        self.engine.add_request(request_id, prompt, params)
        running[request_id] = _Running(key, text)
        return True


@dataclass(slots=True)
class _Running:
    key: bytes
    text: str
    token_ids: list[int] = field(default_factory=list)


class _WorkFile:
    """Answers that are not in a store yet, and those of the store that is about to be replaced."""

    def __init__(self, path: Path, replaced: Store | None) -> None:
        self._path, self._codec, self._replaced = path, Codec(), replaced
        try:
            self._env = lmdb.open(str(path), subdir=False)
        except lmdb.Error as error:
            raise StoreError(f"cannot go on with {path}: {error}; remove it to start again") from None

    def get(self, key: bytes) -> bytes | None:
        """Return an entry."""
        with self._env.begin() as transaction:
            data = transaction.get(key)
        if data is not None:
            return self._codec.decompress(data)
        return None if self._replaced is None else self._replaced.entry(key)

    def entries(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Go through those of ``keys`` that there are, with their entries."""
        for key in keys:
            if (entry := self.get(key)) is not None:
                yield key, entry

    def put(self, entries: list[tuple[bytes, bytes]]) -> None:
        """Write entries, all or none."""
        write_batch(self._env, [(key, self._codec.compress(entry)) for key, entry in entries])

    def close(self) -> None:
        """Close the files."""
        self._env.close()
        if self._replaced is not None:
            self._replaced.close()

    def remove(self) -> None:
        """Delete the file."""
        for path in (self._path, self._path.with_name(self._path.name + "-lock")):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
