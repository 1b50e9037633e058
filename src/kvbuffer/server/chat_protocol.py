"""Bodies of the requests that hold a conversation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, model_validator

from kvbuffer.engine.sampling_params import MAX_LOGPROBS
from kvbuffer.server.protocol import (
    NeutralValues,
    RequestBody,
    SamplingBody,
    StrictModel,
    TokenizeTextRequest,
    invalid,
)


def _text_parts(value: Any) -> Any:
    """Bring content to one form, a list of text parts, and name other kinds of parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list | None):
        raise invalid("must be a string or a list of text parts")
    if value is not None:
        for part in value:
            if isinstance(part, dict) and part.get("type") not in ("text", None):
                raise invalid(f"parts of type {part['type']!r} are not supported: the models served read text only")
    return value


class TextPart(StrictModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(StrictModel):
    """A call that the model made earlier; ``arguments`` is JSON."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    """An earlier call of a tool, part of an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(StrictModel):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool that the conversation offers; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(StrictModel):
    """Which function is meant."""

    name: str


class ToolChoice(StrictModel):
    """The function that is to be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatMessage(StrictModel):
    """One message of the conversation."""

    # What the openai client sends back of a reply that held none of these.
    NEUTRAL_VALUES: ClassVar[NeutralValues] = {
        "annotations": (None, []),
        "audio": (None,),
        "function_call": (None,),
        "refusal": (None,),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart] | None, BeforeValidator(_text_parts)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Conversation(RequestBody):
    """The fields that a chat template turns into a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, JsonValue] | None = None
    tools: list[Tool] | None = None

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return self.tools or []

    @model_validator(mode="after")
    def _check_continuation(self) -> Conversation:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise invalid(
                    "continue_final_message needs add_generation_prompt set to false",
                    "continue_final_message",
                )
            if self.messages[-1].role != "assistant":
                raise invalid(
                    "continue_final_message needs the last message to be the assistant's",
                    "continue_final_message",
                )
        for message in self.messages:
            if message.content is None and not message.tool_calls:
                raise invalid("every message needs content", "messages")
        return self


class ChatCompletionRequest(SamplingBody, Conversation):
    """``POST /v1/chat/completions``."""

    NEUTRAL_VALUES: ClassVar[NeutralValues] = SamplingBody.NEUTRAL_VALUES | {
        "add_special_tokens": (None, False),
        "audio": (None,),
        "chat_template": (None,),
        "documents": (None, []),
        "echo": (None, False),
        "function_call": (None, "none", "auto"),
        "functions": (None, []),
        "mm_processor_kwargs": (None,),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "prompt_cache_retention": (None,),
        "reasoning_effort": (None,),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: int | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    #: vLLM: whether the answer has the model's thoughts, if it has any.
    include_reasoning: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of and may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _check_tools_and_logprobs(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.offered]
        if len(set(names)) < len(names):
            raise invalid("two tools have the same name", "tools")
        if self.tool_choice == "required" and not names:
            raise invalid("'required' needs tools", "tool_choice")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise invalid(f"there is no tool {self.tool_choice.function.name!r} among those given", "tool_choice")
        form = self.structured_outputs or (self.response_format and self.response_format.type != "text")
        if names and form:
            raise invalid("tools cannot be had with a form of the answer; leave out one", "tools")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is allowed only when logprobs is true", "top_logprobs")
        return self


class TokenizeChatRequest(Conversation):
    """``POST /tokenize`` with a conversation."""

    NEUTRAL_VALUES: ClassVar[NeutralValues] = {
        "add_special_tokens": (None, False),
        "chat_template": (None,),
    }

    return_token_strs: bool | None = None


def _tokenize_form(value: Any) -> str:
    return "chat-form" if isinstance(value, dict) and "messages" in value else "text-form"


#: ``POST /tokenize``: the field ``messages`` tells a conversation from a text.
TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("text-form")] | Annotated[TokenizeChatRequest, Tag("chat-form")],
    Discriminator(_tokenize_form),
]
