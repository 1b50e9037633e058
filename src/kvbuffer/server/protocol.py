"""Bodies of the requests: OpenAI's fields, and vLLM's beyond them.

Types are strict and unknown fields are refused, so that nothing a client asks for is silently ignored. A
documented field that this server does not implement is accepted only at the values that ask for nothing
(``NEUTRAL_VALUES``).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

#: Names of fields, and the values at which each changes nothing.
NeutralValues = dict[str, tuple[JsonValue, ...]]


def invalid(message: str, param: str | None = None) -> PydanticCustomError:
    """Return the error for a validator to raise; ``param`` names the field where the location does not."""
    # Braces in the message would be read as a template.
    context = {"message": message} if param is None else {"message": message, "param": param}
    return PydanticCustomError("invalid", "{message}", context)


class StrictModel(BaseModel):
    """A JSON object whose fields are all checked."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    #: Documented fields that are not implemented, with the values at which they change nothing.
    NEUTRAL_VALUES: ClassVar[NeutralValues] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict) or cls.NEUTRAL_VALUES.keys().isdisjoint(data):
            return data
        for name, neutral in cls.NEUTRAL_VALUES.items():
            if name in data and data[name] not in neutral:
                instead = "use structured_outputs" if name.startswith("guided_") else "leave it out"
                raise invalid(f"{name} is not supported by this server; {instead}", name)
        return {name: value for name, value in data.items() if name not in cls.NEUTRAL_VALUES}


class RequestBody(StrictModel):
    """What all bodies share."""

    model: str | None = None


class StreamOptions(StrictModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    #: vLLM: usage so far in every chunk.
    continuous_usage_stats: bool | None = None
    #: OpenAI pads its chunks against traffic analysis; this server never does.
    include_obfuscation: Literal[False] | None = None


class JsonSchema(StrictModel):
    """OpenAI's wrapping of a JSON schema. It is always kept to, strict or not."""

    name: str
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, JsonValue] | bool, Field(alias="schema")]


class ResponseFormat(StrictModel):
    """OpenAI's way to ask for a form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise invalid("json_schema belongs to the type 'json_schema', which needs it", "response_format")
        return self


class StructuredOutputs(StrictModel):
    """vLLM's way to ask for a form of the answer, by one of these."""

    json_: Annotated[str | dict[str, JsonValue] | bool | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


def _stop_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | None):
        return value
    raise invalid("must be a string or a list of strings")


def _token_biases(value: Any) -> Any:
    """JSON has string keys only; token ids are integers."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(token_id): bias for token_id, bias in value.items()}
    except ValueError:
        raise invalid("the keys must be token ids written as decimal strings") from None


class SamplingBody(RequestBody):
    """Fields that both kinds of completion share; None means the model's default."""

    NEUTRAL_VALUES: ClassVar[NeutralValues] = {
        "allowed_token_ids": (None,),
        "bad_words": (None, []),
        "best_of": (None, 1),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "guided_json": (None,),
        "guided_regex": (None,),
        "kv_transfer_params": (None,),
        "length_penalty": (None, 1.0),
        "logits_processors": (None,),
        "repetition_detection": (None,),
        "return_tokens_as_token_ids": (None, False),
        "spaces_between_special_tokens": (None, True),
        "truncate_prompt_tokens": (None,),
        "use_beam_search": (None, False),
        "vllm_xargs": (None,),
    }

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_token_biases)] = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop_list)] = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int | None = None
    #: vLLM: log-probabilities of the prompt's tokens, each with as many of the most likely ones.
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    #: vLLM: the ids of the tokens beside their text.
    return_token_ids: bool | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    #: Seconds for which the conversation's cache is kept after the answer.
    cache_ttl: float | None = None
    #: Clients of the same name share their part of the service.
    user: str | None = None
    # Accepted because it changes nothing that the client receives.
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is allowed only when stream is true", "stream_options")
        if self.structured_outputs is not None and self.response_format not in (None, ResponseFormat(type="text")):
            raise invalid(
                "response_format and structured_outputs both give the form of the answer; leave out one",
                "response_format",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("prompt_logprobs cannot be streamed; leave out stream", "prompt_logprobs")
        return self


def _prompt_list(value: Any) -> Any:
    """Bring the four forms of a prompt to one, a list, and say what the forms are when it is none of them."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token_ids(value)):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) or _is_token_ids(item) for item in value):
        return value
    raise invalid("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


class CompletionRequest(SamplingBody):
    """``POST /v1/completions``."""

    NEUTRAL_VALUES: ClassVar[NeutralValues] = SamplingBody.NEUTRAL_VALUES | {
        "prompt_embeds": (None,),
        "suffix": (None, ""),
    }

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt_list)]
    add_special_tokens: bool = True
    echo: bool = False
    logprobs: int | None = None


class TokenizeTextRequest(RequestBody):
    """``POST /tokenize`` with a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    tokens: list[int]
