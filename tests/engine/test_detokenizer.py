"""Text as it streams: the deltas add up to the decoded whole, cut at the stop string that is complete first.

Two tokenizers are made here: a byte-level one, whose tokens may hold parts of characters, and one in the
manner of sentencepiece, which marks spaces with ▁, drops the first and falls back to single bytes.
"""

import time
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.tokenizer import whole_texts

TEXT = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps. \n\n",
    "naïve café déjà vu, e\u0301 combining, Ελληνικά, Русский язык, 漢字かな交じり文, 한국어",
    "😀😃👩‍👩‍👧‍👦🏳️‍🌈 “quotes” ‘‘nested’’ — dashes… €€€",
] * 4
SPECIAL = "<|end|>"


class Wrapped:
    """A tokenizer as the engine knows it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        self.special = tokenizer.token_to_id(SPECIAL)
        self.num_decoded = 0
        self.whole_text = whole_texts(tokenizer)

    def encode(self, text):
        return self._tokenizer.encode(text).ids

    def decode(self, ids, skip_special_tokens):
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_of(self, token):
        return self._tokenizer.token_to_id(token)


@cache
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    # Without a regular expression merges may cross words and characters.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[SPECIAL])
    tokenizer.train_from_iterator(TEXT, trainer)
    return Wrapped(tokenizer)


@cache
def sentencepiece_like():
    pieces = ["▁", "▁the", "▁dog", "a", "b", "é", "ing", "▁▁", "�"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return Wrapped(tokenizer)


def stream(tokenizer, ids, chunk=1, **kwargs):
    """Return the concatenated text and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(max_tokens=None, **kwargs))
    parts, stop = [], None
    for start in range(0, len(ids), chunk):
        delta, stop = detokenizer.append(ids[start : start + chunk])
        parts.append(delta)
        if stop is not None:
            break
    parts.append(detokenizer.flush())
    return "".join(parts), stop


def cut(text, stops, include):
    """The text up to the stop string that is complete first, the longest of those complete at once."""
    matches = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, None
    end, negative_length, stop = min(matches)
    return text[: end if include else end + negative_length], stop


byte_level_ids = st.lists(st.integers(0, byte_level().size - 1), max_size=150)
# Few tokens, many repetitions: what a looping model produces.
looping_ids = st.builds(
    lambda head, loop, n: head + loop * n,
    st.lists(st.integers(0, byte_level().size - 1), max_size=4),
    st.lists(st.integers(0, byte_level().size - 1), min_size=1, max_size=4),
    st.integers(0, 80),
)
stop_strings = st.lists(st.text("abcdeothe gk😀€é", min_size=1, max_size=5), max_size=4)


@settings(max_examples=400, deadline=None)
@given(ids=byte_level_ids | looping_ids, skip=st.booleans(), chunk=st.integers(1, 5))
def test_deltas_add_up_to_the_decoded_whole(ids, skip, chunk):
    text, stop = stream(byte_level(), ids, chunk, skip_special_tokens=skip)
    assert text == byte_level().decode(ids, skip_special_tokens=skip)
    assert stop is None


@settings(max_examples=400, deadline=None)
@given(ids=byte_level_ids | looping_ids, stops=stop_strings, include=st.booleans(), chunk=st.integers(1, 5))
def test_deltas_add_up_to_the_text_before_the_first_stop_string(ids, stops, include, chunk):
    whole = byte_level().decode(ids, skip_special_tokens=True)
    text, stop = stream(byte_level(), ids, chunk, stop=stops, include_stop_str_in_output=include)
    assert (text, stop) == cut(whole, stops, include)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=120), stops=stop_strings, include=st.booleans())
@example(text="the dog " * 40, stops=["dog the dog t"], include=False)
@example(text="😀" * 60 + "ab", stops=["😀a"], include=False)
@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece_like])
def test_any_text_survives_encoding_and_streaming(tokenizer, text, stops, include):
    ids = tokenizer().encode(text)
    whole = tokenizer().decode(ids, skip_special_tokens=True)
    streamed, _ = stream(tokenizer(), ids, stop=stops, include_stop_str_in_output=include)
    assert streamed == cut(whole, stops, include)[0]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, sentencepiece_like().special]), max_size=100))
def test_spaces_survive_where_the_tokenizer_drops_the_first(ids):
    assert stream(sentencepiece_like(), ids)[0] == sentencepiece_like().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("character", ["é", "€", "漢", "😀"])
def test_half_a_character_is_never_shown(tokenizer, character):
    encode = tokenizer().encode
    ids = [i for c in f"a{character}b" * 30 for i in encode(c)]
    detokenizer = IncrementalDetokenizer(tokenizer(), SamplingParams())
    deltas = [detokenizer.append([token_id])[0] for token_id in ids]
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == tokenizer().decode(ids, skip_special_tokens=True)


def test_a_character_is_shown_with_the_token_that_completes_it():
    # € is the bytes â Ĥ ¬. Each token ends one € and begins the next: none ever ends with a whole character.
    tokenizer = Tokenizer(models.BPE(vocab={"â": 0, "Ĥ¬â": 1}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    detokenizer = IncrementalDetokenizer(Wrapped(tokenizer), SamplingParams())
    deltas = [detokenizer.append([token_id])[0] for token_id in [0] + [1] * 500]
    assert deltas == ["", *["€"] * 500]
    assert detokenizer.flush() == "\ufffd"


def test_an_invalid_sequence_comes_out_with_what_follows_it_or_at_the_end():
    tokenizer = byte_level()
    broken = tokenizer.id_of("ÿ")  # byte 0xFF
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    assert detokenizer.append([broken, broken]) == ("", None)
    assert detokenizer.append(tokenizer.encode("a")) == ("\ufffd\ufffda", None)
    assert detokenizer.append([broken]) == ("", None)
    assert detokenizer.flush() == "\ufffd"


def test_a_stop_string_among_invalid_bytes_held_to_the_end_still_cuts_the_text():
    ids = [*byte_level().encode("a"), byte_level().id_of("ÿ")]
    assert stream(byte_level(), ids, stop="\ufffd")[0] == "a"


def test_endless_invalid_bytes_come_out_as_they_go():
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(max_tokens=None))
    delta, _ = detokenizer.append([tokenizer.id_of("ÿ")] * 1000)
    assert len(delta) > 900
    assert delta + detokenizer.flush() == "\ufffd" * 1000


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_shown_only_when_asked(skip):
    tokenizer = byte_level()
    ids = [*tokenizer.encode("a"), tokenizer.special, *tokenizer.encode("b")]
    assert stream(tokenizer, ids, skip_special_tokens=skip)[0] == ("ab" if skip else f"a{SPECIAL}b")


def test_many_skipped_special_tokens_do_not_hide_what_came_before():
    tokenizer = sentencepiece_like()
    dog, the = tokenizer.id_of("▁dog"), tokenizer.id_of("▁the")
    assert stream(tokenizer, [dog, *[tokenizer.special] * 200, the])[0] == "dog the"
    assert stream(tokenizer, [*[tokenizer.special] * 200, dog, the])[0] == "dog the"
    tokenizer = byte_level()
    first, *rest = (tokenizer.id_of(token) for token in "âĤ¬")
    assert stream(tokenizer, [first, *[tokenizer.special] * 200, *rest])[0] == "€"


@settings(deadline=None)
@given(ids=byte_level_ids, token_id=st.integers(0, byte_level().size), skip=st.booleans())
def test_a_token_with_a_text_of_its_own_adds_that_to_any_whole_text(ids, token_id, skip):
    before = byte_level().decode(ids, skip_special_tokens=skip)
    own = byte_level().whole_text(token_id, skip)
    if own is not None and "\ufffd" not in before:
        assert byte_level().decode([*ids, token_id], skip_special_tokens=skip) == before + own


def test_text_of_whole_characters_is_looked_up_and_not_decoded_again():
    tokenizer = byte_level()
    ids = tokenizer.encode("the quick brown fox")
    tokenizer.num_decoded = 0
    assert stream(tokenizer, ids)[0] == "the quick brown fox"
    assert tokenizer.num_decoded == 0


def test_ids_unknown_to_the_tokenizer_have_no_text():
    tokenizer = byte_level()
    ids = [tokenizer.size + 5, *tokenizer.encode("a"), tokenizer.size, *tokenizer.encode("b")]
    assert stream(tokenizer, ids)[0] == "ab"


@pytest.mark.parametrize(
    ("tokenizer", "loop"),
    [
        (byte_level, "the quick brown fox "),
        (byte_level, "😀€"),
        (sentencepiece_like, "the dog 😀漢"),
        (byte_level, SPECIAL),
        (byte_level, "ÿ"),
    ],
)
def test_the_cost_per_token_does_not_grow(tokenizer, loop):
    tokenizer = tokenizer()
    token_id = tokenizer.id_of(loop)
    ids = [token_id] if token_id is not None else tokenizer.encode(loop)
    ids = (ids * 4000)[:4000]
    tokenizer.num_decoded = 0
    IncrementalDetokenizer(tokenizer, SamplingParams(max_tokens=None)).append(ids)
    assert tokenizer.num_decoded < 100 * len(ids)


def letters(text):
    """One token per character."""
    return [byte_level().id_of(c.replace(" ", "Ġ")) for c in text]


def feed(text, **kwargs):
    """Return the delta of each character of ``text``, the stop string, and the rest."""
    detokenizer = IncrementalDetokenizer(byte_level(), SamplingParams(max_tokens=None, **kwargs))
    results = [detokenizer.append([token_id]) for token_id in letters(text)]
    return [delta for delta, _ in results], results[-1][1], detokenizer.flush()


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot():
    assert feed("xabay", stop="abc") == (["x", "", "", "ab", "ay"], None, "")
    assert feed("xab", stop="abc") == (["x", "", ""], None, "ab")
    assert feed("xabc", stop="abc") == (["x", "", "", ""], "abc", "")


def test_the_stop_string_is_shown_when_asked():
    assert feed("xabc", stop="abc", include_stop_str_in_output=True) == (["x", "", "", "abc"], "abc", "")


def test_the_stop_string_complete_first_wins_whatever_the_chunks():
    assert feed("abc", stop=["abc", "b"])[1] == "b"
    detokenizer = IncrementalDetokenizer(byte_level(), SamplingParams(stop=["abc", "b"]))
    assert detokenizer.append(letters("abc")) == ("a", "b")
    assert feed("xabc", stop=["bc", "abc", "c"]) == (["x", "", "", ""], "abc", "")


def test_nothing_comes_after_a_stop_string_and_the_tokens_up_to_it_are_counted():
    detokenizer = IncrementalDetokenizer(byte_level(), SamplingParams(stop="b"))
    assert detokenizer.append(letters("aabcc")) == ("aa", "b")
    assert detokenizer.num_tokens == 3
    assert detokenizer.append(letters("d")) == ("", "b")
    assert detokenizer.num_tokens == 3
    assert detokenizer.flush() == ""


def test_a_stop_string_counts_only_when_complete_after_min_tokens():
    assert feed("abab", stop="ab", min_tokens=2) == (["", "ab", "", ""], "ab", "")
    assert feed("xabb", stop="ab", min_tokens=2) == (["x", "", "", ""], "ab", "")
    # "b" ends within the first two tokens, while "xbz" is still possible.
    assert feed("xby", stop=["xbz", "b"], min_tokens=2) == (["", "", "xby"], None, "")


def test_streaming_is_quick():
    tokenizer = byte_level()
    ids = (tokenizer.encode(TEXT[0]) * 200)[:2000]
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["###", "\n\nUser:"], max_tokens=None))
    start = time.process_time()
    for token_id in ids:
        detokenizer.append([token_id])
    assert (time.process_time() - start) / len(ids) < 500e-6
