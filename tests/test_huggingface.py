"""The Hugging Face tokenizer: text against tokenizers' own DecodeStream, chat templates against what transformers does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.decoders import DecodeStream
from tokenizers.processors import TemplateProcessing

from gaie_codec import text
from gaie_codec._errors import MalformedMessageError, MalformedRequestError
from gaie_codec.text.huggingface import HuggingFaceTokenizer

BYTE_CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
# "é" and "Ġ" stand for bytes in the decoder's table even as added tokens; U+FF5C and a space do not.
ADDED = (
    AddedToken("<|end|>", special=True),
    AddedToken("<|\uff5c|>", special=True),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("\uff5c x", special=False, normalized=False),
    AddedToken("é", special=False, normalized=False),
)
HELLO = [{"role": "user", "content": "Hello"}]


def files(tokenizer: Tokenizer, **more: object) -> dict[str, bytes]:
    return {"tokenizer.json": tokenizer.to_str().encode()} | {
        name.replace("__", "."): value.encode() if isinstance(value, str) else json.dumps(value).encode() for name, value in more.items()
    }


def byte_level(**more: object) -> dict[str, bytes]:
    """All bytes, and tokens that begin, continue, end and are characters of several bytes, the replacement character included."""
    tokens = BYTE_CHARS + [
        "".join(token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(part))
        for part in ("\ufffd", "é€", " hello", "\ufffdx", "x\ufffd", "😀")
    ]
    tokens += [tokens[-1][:1], tokens[-1][:2], tokens[-1][1:3], tokens[-1][2:], "a" + tokens[-1][:3]]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(dict.fromkeys(tokens))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(ADDED))
    return files(tokenizer, **more)


@cache
def byte_level_tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.from_files(byte_level())


@cache
def sentencepiece_tokenizer() -> HuggingFaceTokenizer:
    """As Llama 2's: spaces as U+2581, the first one stripped; bytes as <0xNN>."""
    pieces = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "▁Hello", "▁world", "lo", "▁\ufffd", "é", "▁▁"]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: n for n, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return HuggingFaceTokenizer.from_files(files(tokenizer))


@cache
def wordpiece_tokenizer() -> HuggingFaceTokenizer:
    """As BERT's: a space before every token, so that neighbouring added tokens show it."""
    words = ["[UNK]", "hello", "##lo", "world", ",", "[A]", "[B]"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_tokens(["[A]", "[B]"])
    return HuggingFaceTokenizer.from_files(files(tokenizer))


def reference(tokenizer: HuggingFaceTokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> list[str]:
    """The pieces that a DecodeStream gives."""
    stream = DecodeStream([], skip_special_tokens)
    return [stream.step(tokenizer._tokenizer, token_id) or "" for token_id in token_ids]


# --- detokenizers


TOKEN_IDS = st.lists(st.integers(0, byte_level_tokenizer().vocab_size + 3), max_size=40)


@given(TOKEN_IDS, st.booleans())
@example([256], True)  # a replacement character that is really meant
@example([256, 0, 256], True)
def test_byte_level_is_a_decode_stream(token_ids: list[int], skip: bool) -> None:
    tokenizer = byte_level_tokenizer()
    fast = tokenizer.detokenizer([], skip_special_tokens=skip)
    stream = tokenizer._stream_detokenizer([], skip_special_tokens=skip, spaces_between_special_tokens=True)
    for token_id, piece in zip(token_ids, reference(tokenizer, token_ids, skip_special_tokens=skip), strict=True):
        assert (fast.peek(token_id), stream.peek(token_id)) == (piece, piece)
        assert (fast.decode([token_id]), stream.decode([token_id])) == (piece, piece)


@given(TOKEN_IDS, st.lists(st.integers(0, 40), max_size=5), st.booleans())
def test_byte_level_any_partition(token_ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = byte_level_tokenizer()
    whole = tokenizer.detokenizer([], skip_special_tokens=skip).decode(token_ids)
    places = [0, *sorted(cuts), len(token_ids)]
    split = tokenizer.detokenizer([], skip_special_tokens=skip)
    assert "".join([split.decode(token_ids[a:b]) for a, b in pairwise(places) if a <= b]) == whole
    assert whole == "".join(reference(tokenizer, token_ids, skip_special_tokens=skip))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="é"), max_size=30)  # see ADDED


@given(TEXT, TEXT)
def test_byte_level_round_trip(text: str, prompt: str) -> None:
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode(text + ".", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(tokenizer.encode(prompt, add_special_tokens=False), skip_special_tokens=False)
    assert detokenizer.decode(token_ids) == text + "."


def test_what_is_incomplete_at_the_end_never_comes_out() -> None:
    tokenizer = byte_level_tokenizer()
    *begun, last = tokenizer.encode("€", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer([])
    assert detokenizer.decode(begun) == ""
    assert detokenizer.peek(last) == detokenizer.peek(last) == "€"
    assert detokenizer.decode([last]) == "€"


@pytest.mark.parametrize("path", ["byte level", "stream"])
def test_a_character_begun_in_the_prompt(path: str) -> None:
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("Hello, 😁!", add_special_tokens=False)
    for cut in range(1, len(token_ids)):
        if path == "stream":
            detokenizer: text.Detokenizer = tokenizer._stream_detokenizer(
                token_ids[:cut], skip_special_tokens=True, spaces_between_special_tokens=True
            )
        else:
            detokenizer = tokenizer.detokenizer(token_ids[:cut])
        assert detokenizer.decode(token_ids[cut:]) == "Hello, 😁!"[min(cut, 7) :] if cut < 11 else "!"


SENTENCEPIECE_IDS = st.lists(st.integers(0, sentencepiece_tokenizer().vocab_size + 1), max_size=30)


@given(SENTENCEPIECE_IDS)
def test_sentencepiece_is_a_decode_stream(token_ids: list[int]) -> None:
    tokenizer = sentencepiece_tokenizer()
    detokenizer = tokenizer.detokenizer([])
    stream = DecodeStream([], True)
    for token_id in token_ids:
        try:
            piece = stream.step(tokenizer._tokenizer, token_id) or ""
        except Exception:  # the decoder changed earlier text: start again, as vLLM does
            stream = DecodeStream([], True)
            piece = stream.step(tokenizer._tokenizer, token_id) or ""
        assert detokenizer.peek(token_id) == piece
        assert detokenizer.decode([token_id]) == piece


def test_the_space_of_the_first_token_stays_after_a_prompt() -> None:
    tokenizer = sentencepiece_tokenizer()
    hello, world, end = (tokenizer._tokenizer.token_to_id(token) for token in ("▁Hello", "▁world", "</s>"))
    assert tokenizer.detokenizer([]).decode([hello, world]) == "Hello world"
    assert tokenizer.detokenizer([hello]).decode([world]) == " world"
    assert tokenizer.detokenizer([hello, *[end] * 100]).decode([world]) == " world"
    assert tokenizer.detokenizer([hello, -1, 1 << 40]).decode([world]) == " world"
    assert tokenizer.detokenizer([end] * 100).decode([world]) == "world"


def test_invalid_prefix_starts_again() -> None:
    """A byte after text that ends in bytes: the decoder replaces them all, and DecodeStream gives up."""
    tokenizer = sentencepiece_tokenizer()
    byte = {value: tokenizer._tokenizer.token_to_id(f"<0x{value:02X}>") for value in (0x41, 0xFF)}
    world = tokenizer._tokenizer.token_to_id("▁world")
    stream = DecodeStream([], True)
    assert stream.step(tokenizer._tokenizer, byte[0x41]) == "A"
    assert stream.step(tokenizer._tokenizer, byte[0xFF]) is None
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(tokenizer._tokenizer, world)
    detokenizer = tokenizer.detokenizer([])
    assert detokenizer.decode([byte[0x41], byte[0xFF]]) == "A"
    assert detokenizer.peek(world) == "world"
    assert detokenizer.decode([world, world]) == "world world"


def test_held_tokens_are_bounded() -> None:
    tokenizer = sentencepiece_tokenizer()
    bad = tokenizer._tokenizer.token_to_id("<0xFF>")
    detokenizer = tokenizer.detokenizer([])
    assert detokenizer.decode([bad] * 10_000) == ""
    assert detokenizer.decode([tokenizer._tokenizer.token_to_id("é")]).endswith("\ufffdé")


def test_spaces_between_special_tokens() -> None:
    """Only between added tokens, and only when special tokens are shown at all."""
    tokenizer = wordpiece_tokenizer()
    hello, a, b = (tokenizer._tokenizer.token_to_id(token) for token in ("hello", "[A]", "[B]"))
    token_ids = [hello, a, b, hello]
    assert tokenizer.detokenizer([], skip_special_tokens=False).decode(token_ids) == "hello [A] [B] hello"
    without = tokenizer.detokenizer([], skip_special_tokens=False, spaces_between_special_tokens=False)
    assert [without.decode([hello]), without.decode([a]), without.peek(b), without.decode([b])] == ["hello", " [A]", "[B]", "[B]"]
    assert without.decode([hello]) == " hello"
    assert tokenizer.detokenizer([], spaces_between_special_tokens=False).decode(token_ids) == "hello [A] [B] hello"


@pytest.mark.parametrize("token_id", [-1, 1 << 31, 1 << 32, 1 << 70, 10**6])
@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_ids_outside_the_vocabulary_add_nothing(make: Any, token_id: int) -> None:
    tokenizer: HuggingFaceTokenizer = make()
    detokenizer = tokenizer.detokenizer([token_id])
    assert detokenizer.decode([token_id]) == detokenizer.peek(token_id) == ""
    assert len(tokenizer._pieces[True]) <= tokenizer.vocab_size


def test_special_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("a<|end|><think>b", add_special_tokens=False)
    assert len(token_ids) == 4
    assert tokenizer.detokenizer([]).decode(token_ids) == "a<think>b"
    assert tokenizer.detokenizer([], skip_special_tokens=False).decode(token_ids) == "a<|end|><think>b"


# --- files


def test_eos_token_ids_come_from_three_files() -> None:
    end = byte_level_tokenizer()._tokenizer.token_to_id("<|end|>")

    def eos(**more: object) -> frozenset[int]:
        return HuggingFaceTokenizer.from_files(byte_level(**more)).eos_token_ids

    assert eos() == frozenset()
    assert eos(generation_config__json={"eos_token_id": [3, 4]}, config__json={"eos_token_id": 5}) == {3, 4, 5}
    assert eos(tokenizer_config__json={"eos_token": "<|end|>"}, config__json={"eos_token_id": None}) == {end}
    assert eos(tokenizer_config__json={"eos_token": {"content": "<|end|>"}}) == {end}
    assert eos(special_tokens_map__json={"eos_token": "<|end|>"}, tokenizer_config__json={"eos_token": None}) == {end}
    assert eos(tokenizer_config__json={"eos_token": "no such token"}) == frozenset()


def test_sizes() -> None:
    tokenizer = HuggingFaceTokenizer.from_files(byte_level(config__json={"max_position_embeddings": 4096}))
    assert tokenizer.max_model_len == 4096
    assert tokenizer.vocab_size == tokenizer._tokenizer.get_vocab_size()
    nested = HuggingFaceTokenizer.from_files(byte_level(config__json={"text_config": {"max_position_embeddings": 7}}))
    assert (nested.max_model_len, byte_level_tokenizer().max_model_len) == (7, None)


def test_whether_embeddings_may_be_shortened() -> None:
    def told(**config: object) -> tuple[bool, tuple[int, ...]]:
        tokenizer = HuggingFaceTokenizer.from_files(byte_level(config__json=config))
        return tokenizer.is_matryoshka, tokenizer.matryoshka_dimensions

    assert told() == told(is_matryoshka="yes", matryoshka_dimensions=5) == (False, ())
    assert told(is_matryoshka=True) == (True, ())
    assert told(matryoshka_dimensions=[512, 256, None]) == (False, (256, 512))


def test_whole_texts_and_the_spelling_of_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("🌍 b<|end|>", add_special_tokens=False)
    assert tokenizer.decode(token_ids) == "🌍 b<|end|>"
    assert tokenizer.decode(token_ids[:1]) == "\N{REPLACEMENT CHARACTER}"
    texts = tokenizer.token_texts([*token_ids, 10**6])
    assert (texts[-2:], len(texts)) == (["<|end|>", ""], len(token_ids) + 1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json is not"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json is not"),
        (byte_level() | {"config.json": b"[]"}, "config.json is not"),
        (byte_level() | {"tokenizer_config.json": b"{"}, "tokenizer_config.json is not"),
        (byte_level() | {"generation_config.json": b"[" * 100_000}, "generation_config.json is not"),
        (byte_level() | {"chat_template.jinja": b"\xff"}, "chat_template.jinja is not"),
    ],
)
def test_broken_files_are_named(broken: Mapping[str, bytes], message: str) -> None:
    with pytest.raises(MalformedMessageError, match=message):
        HuggingFaceTokenizer.from_files(broken)


def test_truncation_and_padding_of_the_training_are_off() -> None:
    raw = Tokenizer.from_buffer(byte_level()["tokenizer.json"])
    raw.enable_truncation(2)
    raw.enable_padding(length=9)
    assert len(HuggingFaceTokenizer.from_files(files(raw)).encode("abcd", add_special_tokens=False)) == 4


def test_qwen2_splits_as_transformers_loads_it() -> None:
    """Line ends join, whatever the tokenizer.json says: transformers 5 gives model type qwen2 its own pre-tokenizer."""
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*BYTE_CHARS, newline * 2])}, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    def count(**more: object) -> int:
        return len(HuggingFaceTokenizer.from_files(files(tokenizer, **more)).encode("a\n\nb", add_special_tokens=False))

    assert count() == count(config__json={"model_type": "llama"}) == 4
    assert count(config__json={"model_type": "qwen2"}) == count(tokenizer_config__json={"tokenizer_class": "Qwen2TokenizerFast"}) == 3


def test_encode_adds_special_tokens_when_asked() -> None:
    raw = Tokenizer.from_buffer(byte_level()["tokenizer.json"])
    end = raw.token_to_id("<|end|>")
    raw.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", end)])
    tokenizer = HuggingFaceTokenizer.from_files(files(raw))
    plain = tokenizer.encode("ab", add_special_tokens=False)
    assert (len(plain), tokenizer.encode("ab", add_special_tokens=True)) == (2, [end, *plain])


@pytest.mark.parametrize("bad", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_the_clients_fault(bad: str) -> None:
    with pytest.raises(MalformedRequestError, match="surrogate"):
        byte_level_tokenizer().encode(bad, add_special_tokens=False)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("gaie_codec.text._chat", "gaie_codec.text._detok", "gaie_codec.text.hugging")) or name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install gaie-codec\[tokenizers\]"):
        importlib.import_module("gaie_codec.text.huggingface")


# --- chat templates


def render(template: str, messages: Sequence[Mapping[str, Any]] = HELLO, *, config: object = None, **arguments: Any) -> str:
    more = byte_level(tokenizer_config__json=config or {})
    tokenizer = HuggingFaceTokenizer.from_files(more, chat_template=template, strftime_now=lambda pattern: f"now:{pattern}")
    return tokenizer.render_chat(messages, **arguments)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n    {% if m.role == 'user' %}\nU:{{ m.content }}\n    {% endif %}\n{% endfor %}", "U:Hello\n"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aHellob"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": "<é>"\n}'),
        ("{{ {'b': '<é>'} | tojson(ensure_ascii=true, separators=(',', ':')) }}", '{"b":"<\\u00e9>"}'),
        ("{{ strftime_now('%Y') if strftime_now is defined }}", "now:%Y"),
        ("{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ add_bos_token }}|{{ unk_token }}", "|<|end|>|<img>||"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ enable_thinking }}", "TrueTrueTrueFalse"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ messages[0].thinking }}{{ messages[0]['reasoning_content'] }}", ""),
    ],
)
def test_template_dialect(template: str, expected: str) -> None:
    config = {"eos_token": {"content": "<|end|>"}, "image_token": "<img>", "bos_token": None, "add_bos_token": True}
    assert render(template, config=config, template_kwargs={"enable_thinking": False}) == expected


def test_reasoning_comes_under_every_name() -> None:
    template = "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}"
    for name in ("reasoning", "reasoning_content", "thinking"):
        assert render(template, [{"role": "assistant", name: "r"}]) == "rr"


def test_without_a_clock_strftime_now_is_undefined() -> None:
    tokenizer = HuggingFaceTokenizer.from_files(byte_level(), chat_template="{{ strftime_now is defined }}")
    assert tokenizer.render_chat(HELLO) == "False"


def test_a_template_may_refuse() -> None:
    with pytest.raises(MalformedRequestError, match="refused the messages: roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[5].content }}{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace(__init__=1) }}",
        "{% set ns = namespace() %}{% set ns['_Namespace__attrs'] = 1 %}{% set ns.__class__ = 1 %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ nothing | tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        "{% include 'x' %}",
        "{{" + "(" * 10_000,
    ],
)
def test_template_failures_say_nothing_of_the_prompt(template: str) -> None:
    with pytest.raises(MalformedRequestError, match=r"chat template (cannot|does not)") as caught:
        render(template, [{"role": "user", "content": "SECRET"}])
    assert "SECRET" not in str(caught.value)


def test_no_template() -> None:
    assert not byte_level_tokenizer().accepts_content_parts
    with pytest.raises(MalformedRequestError, match="no chat template"):
        byte_level_tokenizer().render_chat(HELLO)


def test_where_templates_come_from() -> None:
    def source(*, chat_template: str | None = None, **more: object) -> str:
        return HuggingFaceTokenizer.from_files(byte_level(**more), chat_template=chat_template).render_chat(HELLO)

    everywhere: dict[str, object] = {
        "chat_template__jinja": "jinja",
        "chat_template__json": {"chat_template": "json"},
        "tokenizer_config__json": {"chat_template": "config"},
    }
    assert source(chat_template="argument", **everywhere) == "argument"
    for name in ("jinja", "json", "config"):
        assert source(**everywhere) == name
        del everywhere[next(iter(everywhere))]


def test_named_templates() -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r"}]
    tokenizer = HuggingFaceTokenizer.from_files(byte_level(tokenizer_config__json={"chat_template": named}))
    assert (tokenizer.render_chat(HELLO), tokenizer.render_chat(HELLO, tools=[{}])) == ("d", "t")
    only = HuggingFaceTokenizer.from_files(byte_level(tokenizer_config__json={"chat_template": named[:1]}))
    assert only.render_chat(HELLO, tools=[{}]) == "d"


CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
STRIPPED = CHATML.replace("m.content", "m.content | trim")
PARTS = CHATML.replace("{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (CHATML, "Once", "[assistant]Once"),
        (CHATML, " Once ", "[assistant] Once "),
        (CHATML, "", "[assistant]"),
        (STRIPPED, " Once ", "[assistant]Once"),
        (PARTS, [{"type": "text", "text": "On"}, {"type": "text", "text": "ce"}, {"type": "image"}], None),
        (PARTS, [{"type": "text", "text": "On"}, {"type": "text", "text": "ce"}], "[assistant]Once"),
    ],
)
def test_continue_final_message(template: str, content: Any, expected: str | None) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    before = json.dumps(messages)
    rendered = render(template, messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered.endswith(expected or "[assistant]Once")
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, []),
        (CHATML, [{"role": "assistant", "content": None}]),
        (CHATML, [{"role": "assistant", "content": [{"type": "image"}]}]),
        ("{{ messages[0].role }}", [{"role": "assistant", "content": "SECRET"}]),
        ("{{ messages[0].content | upper }}", [{"role": "assistant", "content": "secret"}]),
    ],
)
def test_no_final_message_to_continue(template: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(MalformedRequestError) as caught:
        render(template, messages, continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    assert "secret" not in str(caught.value).lower()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, False),
        (PARTS, True),
        (PARTS.replace("m.content", "m['content'] | reverse"), True),
        (
            "{% set rest = messages[1:] %}{% set all = rest | list %}{% for m in all %}{% for c in m.content %}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}", False),
        ("{% for c in other.content %}{% endfor %}", False),
        ("{% for a, b in messages %}{% for c in a.content %}{% endfor %}{% endfor %}", False),
        ("{% set messages = messages[1:] %}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% if %}", False),
    ],
)
def test_accepts_content_parts(template: str, expected: bool) -> None:
    assert HuggingFaceTokenizer.from_files(byte_level(), chat_template=template).accepts_content_parts is expected
