"""What a server told of itself, and what the host chose -> its `Transcoder`. Servers that are alike share one, and its tokenizer.

Tokenizers are loaded in a thread, one at a time: to build one takes a second or more, in which the event loop has answers to pass on.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import msgspec

from .. import CodecError, Limits, ModelInfo, Transcoder, UsageError
from ..text.huggingface import check_chat_template
from ..tokenizer_sources import AnyTokenizer, load_tokenizer, make_tokenizer
from .questions import fetch_tokenizer

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from .connection import Upstream

_log = logging.getLogger("gaie_codec.upstream")


class TranscoderOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the host chooses for all of its model servers, as `Transcoder` takes it, and where tokenizers come from."""

    tokenizer: str = "server"
    """"server" (each model server's own, by GetTokenizer), "builtin", a directory, or a model of the hub."""

    chat_template: str | None = None
    """The text of one to use instead of the model's."""

    unsupported: Literal["reject", "drop"] = "reject"
    stop_holdback: Literal["prefix", "window"] = "prefix"
    prompt_tokens_details: bool = False
    return_tokens_as_token_ids: bool = False
    passthrough: bool = True
    """False sends token ids also to a server that takes OpenAI JSON as it is."""

    generation_config: Literal["auto", "none"] = "auto"
    """"auto" takes the sampling defaults of a tokenizer's model where the server cannot tell its own."""

    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    flavor: Literal["vllm", "sglang"] = "vllm"
    limits: Limits = Limits()


class Transcoders:
    """Makes them. Belongs to one event loop."""

    def __init__(self, options: TranscoderOptions) -> None:
        self.options = options
        self._made: weakref.WeakSet[Transcoder] = weakref.WeakSet()
        self._tokenizers: weakref.WeakValueDictionary[str, AnyTokenizer] = weakref.WeakValueDictionary()
        self._own: AnyTokenizer | None = None
        self._loading = asyncio.Lock()

    @property
    def asks_for_tokenizers(self) -> bool:
        """Whether they are the model servers' own."""
        return self.options.tokenizer == "server"

    async def load(self) -> None:
        """Load the tokenizer, where it is not the servers' own, so that a wrong one is known at the start. Raises UsageError, for a chat
        template too."""
        if self.options.chat_template is not None:
            check_chat_template(self.options.chat_template)
        async with self._loading:
            if self._own is None and not self.asks_for_tokenizers:
                self._own = await asyncio.to_thread(load_tokenizer, self.options.tokenizer, chat_template=self.options.chat_template)

    async def make(self, upstream: Upstream, adapter: Adapter, model: ModelInfo) -> Transcoder:
        """The transcoder for a server that told `model` of itself. Raises UsageError with one line that says what is in the way."""
        passes_through = self.options.passthrough and adapter.passthrough is not None
        tokenizer = None
        if not self.asks_for_tokenizers:
            await self.load()
            tokenizer = self._own
        elif adapter.tokenizer_path is not None or not passes_through:
            tokenizer = await self._fetch(upstream, adapter, model)
        return self._share(adapter, tokenizer, model)

    def make_unasked(self, adapter: Adapter) -> Transcoder | None:
        """One for a server of which only is known what it speaks; None where the tokenizer is to be the server's, or is not loaded yet."""
        return self._share(adapter, self._own, ModelInfo()) if self._own is not None else None

    def _share(self, adapter: Adapter, tokenizer: AnyTokenizer | None, model: ModelInfo) -> Transcoder:
        options = self.options
        if tokenizer is not None:
            passes_through = options.passthrough and adapter.passthrough is not None
            model = complete_model_info(
                model, tokenizer, adapter, takes_defaults=options.generation_config == "auto" and not passes_through
            )
        for known in self._made:
            if known.adapter is adapter and known.tokenizer is tokenizer and known.model == model:
                return known
        made = Transcoder(
            adapter,
            tokenizer=tokenizer,
            model=model,
            limits=options.limits,
            unsupported=options.unsupported,
            stop_holdback=options.stop_holdback,
            prompt_tokens_details=options.prompt_tokens_details,
            return_tokens_as_token_ids=options.return_tokens_as_token_ids,
            passthrough=options.passthrough,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            flavor=options.flavor,
        )
        self._made.add(made)
        if tokenizer is not None:
            kinds = [kind.name if kind is not None else "none" for kind in (made.tool_format, made.reasoning_format)]
            _log.info("%s: tool-call parser %s, reasoning parser %s", ", ".join(model.names) or adapter.dialect, *kinds)
        return made

    async def _fetch(self, upstream: Upstream, adapter: Adapter, model: ModelInfo) -> AnyTokenizer:
        try:
            files = await fetch_tokenizer(upstream, adapter)
            digest = hashlib.sha256(msgspec.msgpack.encode(sorted(files.items()))).hexdigest()
            async with self._loading:
                known = self._tokenizers.get(digest)
                if known is None:
                    known = self._tokenizers[digest] = await asyncio.to_thread(self._from_files(files))
                return known
        except (CodecError, UsageError) as error:
            # A server that was started with a hub id has no files to send, but it tells the id.
            source = model.tokenizer_path or model.model_path
            hint = f", such as --tokenizer {source}" if source not in ("", "builtin") else ", as --tokenizer DIR or HUB_ID"
            raise UsageError(
                f"upstream {upstream.target}: no tokenizer from the model server: {error}; name another source{hint}"
            ) from error

    def _from_files(self, files: dict[str, bytes]) -> Callable[[], AnyTokenizer]:
        return lambda: make_tokenizer(files, chat_template=self.options.chat_template)


def complete_model_info(model: ModelInfo, tokenizer: AnyTokenizer, adapter: Adapter, *, takes_defaults: bool) -> ModelInfo:
    """What the model's files tell where the server does not: the server knows best what it was started with.

    `takes_defaults` allows the sampling defaults of the files.
    """
    defaults = model.default_sampling_params
    if not defaults and takes_defaults and not adapter.advertises_defaults:
        defaults = tokenizer.default_sampling_params
    return msgspec.structs.replace(
        model,
        max_model_len=model.max_model_len or tokenizer.max_model_len or 0,
        default_sampling_params=defaults,
        is_matryoshka=model.is_matryoshka or tokenizer.is_matryoshka,
        matryoshka_dimensions=model.matryoshka_dimensions or tokenizer.matryoshka_dimensions,
    )
