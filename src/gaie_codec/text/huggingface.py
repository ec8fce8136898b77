"""A Tokenizer made of a Hugging Face model's files: `tokenizer.json`, its configs and its chat template.

The files come as bytes, from a directory, the hub or the model server's GetTokenizer stream; nothing here touches a disk. Encoding
is the tokenizers package, chat templates are jinja2 (`_chat_templates`), text comes from `_detokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

from .._errors import MalformedMessageError, MalformedRequestError, UsageError
from . import NO_TEMPLATE_KWARGS, Detokenizer

try:
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    from ._chat_templates import ChatTemplate
    from ._detokenizers import ByteLevelDetokenizer, Pieces, StreamDetokenizer
except ModuleNotFoundError as error:
    if error.name not in ("tokenizers", "jinja2"):
        raise
    raise ImportError(
        f"gaie_codec.text.huggingface needs the package {error.name}: pip install gaie-codec[tokenizers]", name=error.name
    ) from error

# Words with at most one mark before them, single digits, runs of marks with the line ends after them, line ends, spaces.
_QWEN2_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_LONG_TEXT: Final = 8192  # characters
# What vLLM takes of a generation_config.json, and its name in a request.
_DEFAULTS: Final = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}


def check_chat_template(source: str) -> None:
    """Raise UsageError for a template that does not compile."""
    if not ChatTemplate(source, variables={}, strftime_now=None).is_valid:
        raise UsageError("the chat template does not compile")


class HuggingFaceTokenizer:
    """Tokenizer and chat template of one model. Immutable once made, and safe to share between threads.

    `max_model_len` is the model's own `max_position_embeddings`, if its config has one; `default_sampling_params` are those of its
    `generation_config.json`, by the names of requests. `max_token_chars` is how many characters a token stands for at most.
    `chat_template` is the source of the template, or of all of several.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        templates: Mapping[str, ChatTemplate],
        is_byte_level: bool,
        max_model_len: int | None = None,
        default_sampling_params: Mapping[str, Any] = NO_TEMPLATE_KWARGS,
        is_matryoshka: bool = False,
        matryoshka_dimensions: Sequence[int] = (),
    ) -> None:
        """`templates` by their Hugging Face names: "default", and maybe "tool_use" for requests with tools."""
        # Settings of the training run: the one would cut prompts in silence, the other lengthen them.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._templates = dict(templates)
        self._is_byte_level = is_byte_level
        self._added_tokens = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self.default_sampling_params = dict(default_sampling_params)
        self.is_matryoshka = is_matryoshka
        self.matryoshka_dimensions = tuple(matryoshka_dimensions)
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.max_token_chars = max(map(len, vocab), default=0)
        default = self._templates.get("default") or self._templates.get("tool_use")
        self.chat_template = "\n".join(template.source for template in self._templates.values())
        self.accepts_content_parts = default is not None and default.accepts_content_parts
        # By `skip_special_tokens`.
        self._pieces = {
            True: Pieces(tokenizer, vocab_size=self.vocab_size, skipped=self._special_ids),
            False: Pieces(tokenizer, vocab_size=self.vocab_size, skipped=frozenset()),
        }

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        *,
        chat_template: str | None = None,
        strftime_now: Callable[[str], str] | None = None,
    ) -> Self:
        """Make it from a model's files by their base names; only `tokenizer.json` must be there.

        `chat_template` goes before the model's own. `strftime_now` is the clock that templates may ask for the date; without it
        they find it undefined. Raises MalformedMessageError, naming the file.
        """
        data = files.get("tokenizer.json")
        if data is None:
            raise MalformedMessageError("the model's files have no tokenizer.json, and other tokenizer formats are not supported")
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception:  # tokenizers raises nothing narrower; its message may quote the file
            raise MalformedMessageError("tokenizer.json is not a tokenizer of the tokenizers package") from None
        tokenizer_config = _json_object(files, "tokenizer_config.json")
        config = _json_object(files, "config.json")
        special_tokens = _special_tokens(_json_object(files, "special_tokens_map.json"), tokenizer_config)
        generation_config = _json_object(files, "generation_config.json")
        eos_token_ids = _ids(generation_config.get("eos_token_id")) | _ids(config.get("eos_token_id"))
        if "eos_token" in special_tokens:
            eos_token_ids |= _ids(tokenizer.token_to_id(special_tokens["eos_token"]))
        dimensions = config.get("matryoshka_dimensions")
        is_byte_level = _is_byte_level(json.loads(data).get("decoder"))
        if is_byte_level and _is_loaded_as_qwen2(config, tokenizer_config):
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = _qwen2_pre_tokenizer()
        sources = {"default": chat_template} if chat_template is not None else _template_sources(files, tokenizer_config)
        return cls(
            tokenizer,
            eos_token_ids=eos_token_ids,
            templates={name: ChatTemplate(source, variables=special_tokens, strftime_now=strftime_now) for name, source in sources.items()},
            is_byte_level=is_byte_level,
            max_model_len=_max_model_len(config),
            is_matryoshka=config.get("is_matryoshka") is True,
            matryoshka_dimensions=sorted(_ids(dimensions)) if isinstance(dimensions, list) else (),
            default_sampling_params={
                name: generation_config[key] for key, name in _DEFAULTS.items() if isinstance(generation_config.get(key), int | float)
            },
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Special tokens written out in the text become their ids, as in vLLM and SGLang."""
        try:
            if len(text) < _LONG_TEXT:
                return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            # encode keeps the interpreter lock, a second per MB; encode_batch lets other threads run.
            return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise MalformedRequestError("text with a lone surrogate is not Unicode and cannot be tokenized") from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a vocabulary without an unknown token; or a panic, which is no Exception (11 MB of spaces)
            raise MalformedRequestError(f"the model's tokenizer cannot encode this text of {len(text)} characters") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all of them at once, special tokens included; what is no character is U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Each as the vocabulary spells it, which is not text: byte-level vocabularies write a space as \u0120."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = NO_TEMPLATE_KWARGS,
    ) -> str:
        """The prompt text of a chat, to be encoded without special tokens. Tools and documents are passed on as they are.

        Raises MalformedRequestError: no chat template, one that refuses these messages, or no final message to continue.
        """
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            raise MalformedRequestError("The model has no chat template, so it cannot answer chat requests")
        return template.render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh Detokenizer for one choice that follows this prompt."""
        if self._is_byte_level:  # puts no spaces between tokens in any case
            return ByteLevelDetokenizer(self._pieces[skip_special_tokens], prompt_token_ids)
        return self._stream_detokenizer(
            prompt_token_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def _stream_detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> StreamDetokenizer:
        return StreamDetokenizer(
            self._tokenizer,
            prompt_token_ids,
            vocab_size=self.vocab_size,
            skip_special_tokens=skip_special_tokens,
            skipped=self._special_ids if skip_special_tokens else frozenset(),
            raw_tokens={} if skip_special_tokens or spaces_between_special_tokens else self._added_tokens,
        )


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise MalformedMessageError(f"{name} is not a JSON object")
    return value


def _special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """The `*_token` entries, the later config before the earlier: a string, or an object with its content."""
    tokens = {}
    for config in configs:
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
    return tokens


def _ids(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(token_id for token_id in values if isinstance(token_id, int) and not isinstance(token_id, bool))


def _max_model_len(config: Mapping[str, Any]) -> int | None:
    text_config = config.get("text_config")  # multimodal models keep the language model's part there
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        length = part.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return length
    return None


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        decoders = decoder.get("decoders")
        return isinstance(decoders, list) and len(decoders) == 1 and _is_byte_level(decoders[0])
    return decoder.get("type") == "ByteLevel"


def _is_loaded_as_qwen2(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool:
    """Does transformers 5, and so the model server, load this as Qwen2Tokenizer, whatever splitting tokenizer.json asks for?

    It does for the class of that name, and for model type "qwen2" with any class (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` in
    `tokenization_auto.py`). Only retrained vocabularies notice: Qwen's own files ask for the same splitting.
    """
    declared = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    return config.get("model_type") == "qwen2" or declared in ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def _qwen2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _template_sources(files: Mapping[str, bytes], tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, from the first place that has any; transformers reads them in this order."""
    if "chat_template.jinja" in files:
        try:
            return {"default": files["chat_template.jinja"].decode()}
        except UnicodeDecodeError:
            raise MalformedMessageError("chat_template.jinja is not UTF-8") from None
    for config in (_json_object(files, "chat_template.json"), tokenizer_config):
        value = config.get("chat_template")
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list):
            return {
                entry["name"]: entry["template"]
                for entry in value
                if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
            }
    return {}
