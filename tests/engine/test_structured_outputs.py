"""Structured outputs: random models keep to every kind of form, however sampled; errors name what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvbuffer import SamplingParams, StructuredOutputsParams
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import FinishReason
from kvbuffer.errors import InvalidRequestError
from tests.support.caching import text
from tests.support.plans import Outputs, drain, sized_engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "[a-z]{1,8}"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def run(engine: Engine, structure: StructuredOutputsParams, count: int = 6, **options) -> Outputs:
    """Sample from random models, whose tokens are anything."""
    for i in range(count):
        params = SamplingParams(**{"seed": i, "max_tokens": 90, "structured_outputs": structure, **options})
        engine.add_request(str(i), text(i, 5 + i), params)
    return drain(engine)


def is_person(answer: str) -> bool:
    value = json.loads(answer)
    return (
        list(value) == ["name", "age", "kind"]
        and re.fullmatch("[a-z]{1,8}", value["name"]) is not None
        and 0 <= value["age"] <= 150
        and value["kind"] in ("a", "b")
    )


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 3}, {"top_p": 0.5, "repetition_penalty": 1.5}])
def test_a_json_schema_is_kept_to(engine: Engine, options: dict) -> None:
    # Space between tokens has no end in a random model; a compact form comes from an expression that leaves it out.
    outputs = run(engine, StructuredOutputsParams(json=PERSON), logit_bias=no_space(engine), **options)
    for name, answer in outputs.text.items():
        assert outputs.last[name].finish_reason is FinishReason.STOP
        assert is_person(answer), answer


def no_space(engine: Engine) -> dict[int, float]:
    decode = engine.tokenizer.decode
    return {i: -100.0 for i in range(engine.tokenizer.vocab_size) if not decode([i]).strip()}


def test_a_schema_may_be_text(engine: Engine) -> None:
    structure = StructuredOutputsParams(json=json.dumps(PERSON))
    assert all(map(is_person, run(engine, structure, logit_bias=no_space(engine)).text.values()))


def test_a_regular_expression_is_kept_to(engine: Engine) -> None:
    for answer in run(engine, StructuredOutputsParams(regex=r"[0-9]{4}-[0-9]{2} (ü|x)+y")).text.values():
        assert re.fullmatch(r"[0-9]{4}-[0-9]{2} (ü|x)+y?", answer), answer


def test_one_of_several_is_chosen(engine: Engine) -> None:
    choice = ['say "no"', "süß", "a\\b\n"]
    outputs = run(engine, StructuredOutputsParams(choice=choice), count=20)
    assert set(outputs.text.values()) <= set(choice)
    assert len(set(outputs.text.values())) > 1


def test_a_grammar_is_kept_to(engine: Engine) -> None:
    structure = StructuredOutputsParams(grammar='root ::= "(" root ")" | "x"')
    for answer in run(engine, structure, max_tokens=60).text.values():
        assert re.fullmatch(r"\(*x?\)*", answer), answer
        assert answer.count("(") >= answer.count(")")


def test_any_object(engine: Engine) -> None:
    outputs = run(engine, StructuredOutputsParams(json_object=True), logit_bias=no_space(engine))
    assert all(answer.startswith("{") for answer in outputs.text.values())


def test_an_output_that_has_its_form_ends_though_endings_are_ignored(engine: Engine) -> None:
    outputs = run(engine, StructuredOutputsParams(choice=["yes"]), ignore_eos=True)
    assert set(outputs.text.values()) == {"yes"}
    assert {last.finish_reason for last in outputs.last.values()} == {FinishReason.STOP}


def test_speculation_changes_nothing(tiny: Path) -> None:
    structure = StructuredOutputsParams(regex="(abc ){6,9}")
    plain = run(sized_engine(tiny), structure)
    engine = sized_engine(tiny, speculative_config={"method": "ngram", "num_speculative_tokens": 3, "adaptive": False})
    drafted = run(engine, structure)
    assert drafted.text == plain.text
    assert sum(last.num_accepted_tokens for last in drafted.last.values()) > 0


def test_preemption_changes_nothing(tiny: Path) -> None:
    structure = StructuredOutputsParams(regex="[0-9]{50}")
    few = sized_engine(tiny, pages=12)
    assert run(few, structure).text == run(sized_engine(tiny), structure).text
    assert few.stats.num_preemptions > 0


def test_other_requests_of_the_batch_are_free(engine: Engine) -> None:
    free = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    engine.add_request("alone", text(1, 20), free)
    alone = drain(engine).tokens["alone"]
    engine.add_request("free", text(1, 20), free)
    outputs = run(engine, StructuredOutputsParams(choice=["yes", "no"]))
    assert outputs.tokens["free"] == alone


def test_a_model_thinks_before_the_form_begins(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = 300, 301
    monkeypatch.setattr(engine.tokenizer, "_thinking", begin)
    monkeypatch.setattr(engine.tokenizer, "end_of_thinking", end)
    params = SamplingParams(
        temperature=0,
        max_tokens=30,
        logit_bias={end: 100.0},
        structured_outputs=StructuredOutputsParams(choice=["yes"]),
    )
    for name, tail in (("thinks", [begin, 10]), ("has thought", [begin, end])):
        engine.add_request(name, [5, 6, *tail], params)
    outputs = drain(engine)
    assert outputs.tokens["thinks"] == [end, *outputs.tokens["has thought"]]
    assert outputs.text["has thought"] == "yes"


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"json": {"type": "bogus"}}, 'Unsupported type "bogus"'),
        ({"json": "{bad"}, "not JSON"),
        ({"json": {"$ref": "#/nope"}}, "nope"),
        ({"json": {"type": "array", "items": {"not": {}}}}, "'not', which cannot be enforced"),
        ({"json": {"properties": {"a": {"uniqueItems": True}}}}, "'uniqueItems', which cannot be enforced"),
        ({"json": {"allOf": [{"type": "string"}, {"minLength": 3}]}}, "'allOf', which cannot be enforced"),
        ({"regex": "(open"}, "parenthesis is not closed"),
        ({"grammar": "nothing"}, 'root rule with name "root" is not found'),
        ({}, "exactly one of json, regex, choice, grammar, json_object, structural_tag, got none"),
        ({"structural_tag": "{bad"}, "cannot be used"),
        ({"structural_tag": "{}"}, "cannot be used"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"choice": []}, "choice as a list"),
        ({"choice": "ab"}, "choice as a list"),
        ({"choice": ["a", ""]}, "none empty"),
        ({"regex": 5}, "regex as a string, got int"),
    ],
)
def test_what_cannot_be_used_is_refused(engine: Engine, structure: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as caught:
        engine.add_request("r", [5], SamplingParams(structured_outputs=StructuredOutputsParams(**structure)))
    assert caught.value.param == "structured_outputs"
    assert not engine.has_work()


def test_a_property_may_have_the_name_of_a_keyword(engine: Engine) -> None:
    schema = {"type": "object", "properties": {"not": {"const": 1}}, "required": ["not"]}
    structure = StructuredOutputsParams(json=schema)
    answers = run(engine, structure, logit_bias=no_space(engine)).text.values()
    assert {json.dumps(json.loads(answer)) for answer in answers} == {'{"not": 1}'}


def test_the_form_alone_says_when_the_output_ends() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens must be 0 with structured outputs"):
        SamplingParams(min_tokens=2, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(InvalidRequestError, match="structured_outputs must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
