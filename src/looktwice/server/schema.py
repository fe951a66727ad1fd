"""What requests may hold, field by field: OpenAI's chat completions and responses, and our own fields beside them.

A field that is not here is refused by name, so that a slip of the pen is not passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from looktwice.config import NonNegative, NonNegativeInt, Number, Positive, Seed, Share, Whole

IGNORED = "accepted, without effect"


def whole_letters(text: str) -> str:
    """A text that UTF-8 can write. Raises PydanticCustomError for half a letter, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("letters", "the text holds half a letter (a lone surrogate); write it anew") from None
    return text


Text = Annotated[str, AfterValidator(whole_letters)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    """Refuses fields that it does not have."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(Strict):
    """Where a picture is: a data: URL; a web address or a file of the served folder, where these are allowed."""

    url: Text
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description=IGNORED)


class TextContent(Strict):
    """A text among other parts; `input_text` and `output_text` are its names in /v1/responses."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = Field(None, description=IGNORED)
    logprobs: list[Any] | None = Field(None, description=IGNORED)


class ImageContent(Strict):
    """A picture among other parts, as chat completions write it."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputImage(Strict):
    """A picture among other parts, as responses write it."""

    type: Literal["input_image"]
    image_url: Text
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description=IGNORED)


Content = Annotated[TextContent | ImageContent | InputImage, Field(discriminator="type")]


class ChatMessage(Strict):
    """One turn. The reasoning of earlier answers may be sent back: the model reads its answers without it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Content] | None = None
    name: Text | None = Field(None, description=IGNORED)
    reasoning: Text | None = Field(None, description="of an earlier answer; not read again")
    reasoning_content: Text | None = Field(None, description="of an earlier answer; not read again")
    refusal: Text | None = Field(None, description=IGNORED)
    annotations: list[Any] | None = Field(None, description=IGNORED)
    audio: None = Field(None, description=IGNORED)
    function_call: None = Field(None, description=IGNORED)
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="of crops: not needed again")
    looktwice: dict[str, Any] | None = Field(None, description="of an earlier answer; not read again")


class JsonSchema(Strict):
    """A schema that the answer is to keep to."""

    name: Text | None = None
    description: Text | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the answer keeps to the schema in any case")


class ResponseFormat(Strict):
    """The form of the answer, after its thinking: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class TextFormat(JsonSchema):
    """The same as responses write it."""

    type: Literal["text", "json_object", "json_schema"]


class TextSettings(Strict):
    """What responses say of their text."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description=IGNORED)


class StreamOptions(Strict):
    """What a stream is to tell besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description=IGNORED)


class Looking(Strict):
    """Fields of both endpoints; those that OpenAI does not have are crops, thinking, pixels, sampling, ids."""

    model: Text | None = Field(None, description="the served model or one of its adapters; default: the served model")
    temperature: Annotated[NonNegative, Field(le=100)] | None = None
    top_p: Annotated[Share, Field(gt=0)] | None = None
    stream: bool | None = False

    crops: bool | None = Field(None, description="whether the model may crop")
    max_crops: Annotated[NonNegativeInt, Field(le=64)] | None = Field(None, description="crops of an answer")
    crop_images: bool | None = Field(None, description="send each crop as a small picture too, as a data: URL")
    thinking: bool | None = Field(None, description="whether the model thinks before it answers")
    thinking_budget: Positive | None = Field(None, description="tokens of thinking before it is closed")
    min_pixels: Positive | None = Field(None, description="fewest pixels at which a picture is seen")
    max_pixels: Positive | None = Field(None, description="most pixels at which a picture is seen")
    return_token_ids: bool | None = Field(None, description="send the ids of prompt and answer too")
    max_seconds: Annotated[Number, Field(gt=0)] | None = Field(None, description="seconds before an answer is cut")
    top_k: NonNegativeInt | None = Field(None, description="sample from this many ids; 0 is off")
    min_p: Share | None = Field(None, description="leave out ids below this share of the likeliest")
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | Seed | None = None

    user: Text | None = Field(None, description=IGNORED)
    metadata: dict[str, Any] | None = Field(None, description=IGNORED)
    store: bool | None = Field(None, description="nothing is ever stored")
    service_tier: Text | None = Field(None, description=IGNORED)
    safety_identifier: Text | None = Field(None, description=IGNORED)
    prompt_cache_key: Text | None = Field(None, description=IGNORED)
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="none: the one tool is the crop")
    tool_choice: Literal["none", "auto"] | None = Field(None, description=IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=IGNORED)


class ChatRequest(Looking):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = Field(None, description="0: there is none")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(None, description="empty: there is none")
    logprobs: bool | None = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(
        None, description="none: no thinking; the others think"
    )


class ReasoningItem(Strict):
    """The thinking of an earlier answer; it is not read again."""

    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: Text | None = None
    status: Text | None = None


class InputMessage(Strict):
    """One turn of /v1/responses."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Content]
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = Field(None, description=IGNORED)


class Reasoning(Strict):
    """How much thinking responses ask for."""

    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(None, description=IGNORED)


class ResponsesRequest(Looking):
    """A request of /v1/responses. Nothing is stored, so a conversation is sent whole each time."""

    input: Text | Annotated[list[InputMessage | ReasoningItem], Field(min_length=1, max_length=1000)]
    instructions: Text | None = None
    max_output_tokens: Positive | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    include: list[Text] | None = Field(None, description=IGNORED)
    truncation: Literal["disabled"] | None = Field(None, description="a prompt that is too long is refused")
    background: Literal[False] | None = None
    previous_response_id: None = Field(None, description="nothing is stored: send the conversation whole")
    top_logprobs: Annotated[Whole, Field(ge=0, le=0)] | None = None


class AdapterRequest(Strict):
    """A request of /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    lora_name: Annotated[Text, Field(min_length=1, max_length=200, pattern=r"^[\w.:/+-]+$")]
    lora_path: Text | None = Field(None, description="folder of the adapter below --adapter_folder; needed to load")
