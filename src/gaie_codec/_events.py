"""What flows: the neutral vocabulary between the OpenAI side and every model-server dialect.

One `InferenceRequest` goes in; events come out, each about one choice. The names are OpenAI's, with vLLM's for what OpenAI does not
have, so that a field's name is also the `param` of an error about it. A value equal to its default means "nothing was asked".
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from ._errors import Code


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must match. `value` is JSON text for json_schema and structural_tag, the pattern for regex and grammar, a
    tuple of texts for choice, and empty for json_object."""

    kind: Literal["json_schema", "regex", "grammar", "structural_tag", "json_object", "choice"]
    value: str | tuple[str, ...] = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample. Defaults are OpenAI's: temperature 1, nothing cut off, nothing penalized.

    `temperature` None means that the sender set none and that its server takes that as 1.0; the OpenAI side always sets it.
    `max_tokens` None means as many as the context holds. `top_k` 0 means off. `logprobs` 0 asks for the sampled token only,
    and for those of `logprob_token_ids` where there are any.
    """

    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = {}
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # the same, for a server that has no tokenizer
    allowed_token_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    grammar_from_first_token: bool = False  # the constraint holds in the reasoning too
    thinking_token_budget: int | None = None
    stream_interval: int | None = None  # tokens in a message of the stream


class Media(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image, video or sound of the prompt, whose placeholder tokens are in the prompt in the same order.

    `url` is an http(s) or a data URL. `detail` is OpenAI's "low", "high" or "auto", "" where the client gave none.
    """

    kind: Literal["image", "video", "audio"]
    url: str
    detail: str = ""
    uuid: str = ""  # the client's name for the content, by which servers cache it


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One generation, as a scheduler wants to see it: the prompt, how to sample, and how to route. One prompt to embed is the same without
    sampling."""

    request_id: str
    model: str = ""
    prompt_token_ids: list[int] = []
    prompt_text: str | None = None  # set instead of prompt_token_ids when the model server is to tokenize
    sampling: SamplingParams = SamplingParams()
    stream: bool = False
    priority: int = 0
    cache_salt: str = ""
    lora_name: str = ""  # as the model server knows the adapter: its name, or an id where the wire takes ids
    data_parallel_rank: int | None = None
    kv_transfer_params: str = ""  # JSON text
    ec_transfer_params: str = ""  # JSON text, of an encoder's cache
    watermarking: bool | None = None
    session_id: str = ""
    media: tuple[Media, ...] = ()
    trace_headers: dict[str, str] = {}  # trace context and what else goes along as metadata
    thinks: bool = False  # the answer begins with reasoning, which a constraint does not hold for
    return_token_ids: bool = False  # whether the ids of the output are wanted where a server can leave them out


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """The log probability of one token, of the likeliest at its place as (token id, log probability), and of those that were selected by
    their ids where the server tells them apart."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    selected: tuple[tuple[int, float], ...] = ()


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """The log probability of one token of the prompt, None for the first, and of the likeliest at its place as (token id, log
    probability). `rank` is its place among all tokens, 1 for the likeliest, 0 where the server does not tell."""

    token_id: int
    logprob: float | None = None
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


class PromptEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The server has taken the prompt in. Nothing is generated yet."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


class TokensEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that one choice gained.

    `text` is None from servers that send ids only. With `is_cumulative` ids, text and logprobs are those of the choice so far.
    `completion_tokens` is as reported: some servers count this message, some the choice so far (`Adapter.counts`). `prompt_logprobs`, of
    all tokens of the prompt, come once or in every message.
    """

    index: int = 0
    choice_id: str = ""  # the server's name for the choice, where its messages have no index
    token_ids: list[int] = []
    text: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    is_cumulative: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()


class FinishEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One choice ended. `token_ids` may repeat what TokensEvents already brought: the last of it, or all; `text` is all of it, or None.
    With `is_delta` ids, text and logprobs are new, as in a TokensEvent.

    `finish_reason` is the server's word: "stop", "length", "abort", "error", or another that is passed on. `matched_stop` is the stop
    string or the stop token's id that ended it, None for EOS and where the server does not say.
    """

    index: int = 0
    choice_id: str = ""
    token_ids: list[int] = []
    text: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    is_delta: bool = False
    finish_reason: str = "stop"
    matched_stop: str | int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    kv_transfer_params: str = ""  # JSON text


class ErrorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The server reports a failure inside the stream instead of by its status. `index` is the choice, None for the whole request."""

    code: Code
    message: str = ""
    index: int | None = None


class BodyEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer that is OpenAI JSON already: one chunk of a stream, or a whole body.

    `http_status` is None where the server does not tell it. `is_last` says that nothing follows; `data` may then be empty.
    """

    data: bytes
    http_status: int | None = None
    is_last: bool = False


class EmbeddingEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of one prompt, which is all that there is to say of it. `dimensions` is how long the server says that it is, 0 for
    unsaid."""

    values: list[float]
    dimensions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


Event: TypeAlias = PromptEvent | TokensEvent | FinishEvent | ErrorEvent | BodyEvent | EmbeddingEvent


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a server tells of its model. 0 and empty stand for unknown.

    `default_sampling_params` are the model's own (`generation_config.json`); servers only advertise them, so the codec lays them under
    what the client left open. `lora_adapters` maps the names of loaded adapters to what `InferenceRequest.lora_name` has to be for them.
    `is_matryoshka` says that embeddings may be shortened, to `matryoshka_dimensions` where these are given; no server tells it,
    but the model's `config.json` does.
    """

    model_path: str = ""
    served_model_name: str = ""
    aliases: tuple[str, ...] = ()
    tokenizer_path: str = ""
    max_model_len: int = 0
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    default_sampling_params: dict[str, Any] = {}
    is_generation: bool = True
    is_multimodal: bool | None = None  # None where the server does not tell
    lora_adapters: dict[str, str] = {}
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    """Which formats the server was told that its model writes, by its own names for them."""
    server_version: str = ""
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model, the main name first; its path where it has no served name."""
        name = self.served_model_name or self.model_path
        return (name, *self.aliases) if name else ()

    def serves(self, model: str) -> bool:
        """Whether `model` names this model. Where nothing is known, or the client named none, it does."""
        return not model or not self.names or model in self.names or model in self.lora_adapters


class RankLoads(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one data-parallel rank of a server has to do right now. Servers write 0 for what they do not know.

    `kv_cache_usage` is a share, 0 to 1; so is `cache_hit_rate`, of prompt tokens. `total_tokens` are what its KV cache holds.
    """

    rank: int = 0
    running: int = 0  # requests
    waiting: int = 0  # requests
    kv_cache_usage: float = 0.0
    used_tokens: int = 0
    total_tokens: int = 0
    waiting_tokens: int = 0  # of waiting prompts, without what the cache has
    max_running: int = 0  # requests
    tokens_per_s: float = 0.0  # generated
    cache_hit_rate: float = 0.0


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    """What a server has to do right now, by rank; without any, it told nothing."""

    ranks: tuple[RankLoads, ...] = ()

    @property
    def running(self) -> int:
        """Requests being answered, on all ranks."""
        return sum(one.running for one in self.ranks)

    @property
    def waiting(self) -> int:
        """Requests in the queues of all ranks."""
        return sum(one.waiting for one in self.ranks)

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV cache in use, 0 to 1: the mean over the ranks, whose caches are of one size."""
        return sum(one.kv_cache_usage for one in self.ranks) / len(self.ranks) if self.ranks else 0.0


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What one data-parallel rank of a server has room for, as it was started. 0 stands for unknown.

    `num_blocks` blocks (SGLang: pages) of `block_size` tokens make the KV cache.
    """

    block_size: int = 0
    num_blocks: int = 0
    max_running: int = 0  # requests
    max_loras: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request: the prompt once, however many choices there are; completion tokens of all choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens
