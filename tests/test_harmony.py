"""gpt-oss: what it writes is told apart as oss-harmony and vLLM 0.33 do, whole or in pieces, and its prompts are those of vLLM.

The goldens are what vLLM's own `HarmonyParser` (streaming, a token a step) and `harmony_utils` made of these texts and chats.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import openai_harmony
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import MalformedRequestError, UsageError
from gaie_codec.text import BrokenToolCall, Content, Reasoning, ToolCall
from gaie_codec.text.formats import TOOL_FORMATS, choose_reasoning_format, choose_tool_format, constrain, constrain_answer, make_parser
from gaie_codec.text.formats._harmony import answer_tag, call_tag
from gaie_codec.text.formats._tag_formats import json_of
from gaie_codec.text.harmony import END, START, STOP_TOKEN_IDS, HarmonyParser, harmony_encoding
from gaie_codec.text.harmony_prompts import HarmonyTokenizer

GOLDEN = Path(__file__).parent / "golden" / "harmony"
OUTPUTS = json.loads((GOLDEN / "outputs.json").read_text())
TAGS = json.loads((GOLDEN / "tags.json").read_text())
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'


def ids_of(text):
    return harmony_encoding().encode(text, allowed_special="all")


def joined(parts):
    """Parts as a client has them in the end. A call is its name, its arguments and, of a broken one, its text."""
    reasoning, content, calls = "", "", []
    for part in parts:
        if isinstance(part, Reasoning):
            reasoning += part.text
        elif isinstance(part, Content):
            content += part.text
        elif isinstance(part, ToolCall):
            if part.index == len(calls):
                calls.append([part.name, part.arguments])
            else:
                assert not part.name
                assert part.index == len(calls) - 1
                calls[part.index][1] += part.arguments
        else:
            calls[part.index].append(part.text)
    return reasoning, content, calls


def read_ids(token_ids, cuts=()):
    parser = HarmonyParser()
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, len(token_ids)], strict=True):
        parts += parser.feed_ids(token_ids[begin:end])
    return parts + parser.finish()


def read_text(text, cuts=()):
    parser = HarmonyParser()
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += parser.feed(text[begin:end])
    return parts + parser.finish()


def cuts(value):
    return st.lists(st.integers(0, len(value)), max_size=12).map(sorted)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)
names = st.sampled_from(["f", "get_weather", "a.b-c"])
ANSWERS = st.sampled_from(
    [("analysis", None, None), ("final", None, None), ("commentary", None, None), ("final", None, "<|constrain|>json")]
)
CALLS = st.tuples(
    st.sampled_from(["commentary", "analysis"]),
    names.map("functions.{}".format),
    st.sampled_from(["json", "code", None, "<|constrain|>json"]),
)


@st.composite
def conversations(draw, texts=words):
    """Messages of an answer, as the library writes them, and the tokens: as after a prompt, whole or cut off in the last message."""
    messages = []
    for channel, recipient, content_type in draw(st.lists(ANSWERS | CALLS, min_size=1, max_size=4)):
        text = '{"x": [1, "é"]}' if recipient else draw(texts)
        message = openai_harmony.Message.from_role_and_content(openai_harmony.Role.ASSISTANT, text).with_channel(channel)
        if recipient:
            message = message.with_recipient(recipient)
        messages.append(message.with_content_type(content_type) if content_type else message)
    token_ids = [token_id for message in messages for token_id in harmony_encoding().render(message)]
    return messages, token_ids[2:]  # without <|start|>assistant, which is the end of the prompt


@given(st.data(), conversations(st.text(st.characters(exclude_categories=["Cs"]), max_size=12)))
def test_the_parts_are_the_messages_of_the_library(data, conversation):
    messages, token_ids = conversation
    inner = openai_harmony.StreamableParser(harmony_encoding(), openai_harmony.Role.ASSISTANT)
    for token_id in token_ids:
        inner.process(token_id)
    found = [(message.channel, message.recipient, message.content[0].text) for message in inner.messages]
    assert [text for *_, text in found] == [message.content[0].text for message in messages]
    calls = [[to.removeprefix("functions."), text] for _, to, text in found if to and to.startswith("functions.")]
    plain = [(channel, text) for channel, to, text in found if not (to and to.startswith("functions."))]
    assert joined(read_ids(token_ids, data.draw(cuts(token_ids)))) == (
        "".join(text for channel, text in plain if channel == "analysis"),
        "".join(text for channel, text in plain if channel != "analysis"),
        calls,
    )


@given(st.data(), conversations())
def test_text_cut_anywhere_gives_the_parts_of_the_ids_and_no_marker_leaks(data, conversation):
    _, token_ids = conversation
    token_ids = token_ids[: data.draw(st.integers(0, len(token_ids)))]
    text = harmony_encoding().decode(token_ids)
    whole = joined(read_ids(token_ids))
    if "�" not in text:
        assert joined(read_text(text, data.draw(cuts(text)))) == whole
    reasoning, content, calls = whole
    if not calls and " to=functions." not in content:
        assert "<|" not in reasoning + content


SPECIAL = "<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|return|> <|call|> <|endoftext|> <|startoftext|>".split()
PIECES = st.sampled_from(
    [*SPECIAL, "assistant", "user", "final", "analysis", "commentary", " to=functions.f", " to=python", " json", "a", " ", "{}"]
)


@given(st.data(), st.lists(PIECES, max_size=16).map("".join))
@example(None, "<|start|><|start|>assistant<|channel|>final<|message|>x")
@example(None, "<|end|> <|end|> x <|start|>")
def test_whatever_is_written_the_pieces_do_not_matter(data, text):
    token_ids = ids_of(text)
    whole = joined(read_ids(token_ids))
    assert joined(read_ids(token_ids, range(1, len(token_ids)))) == whole
    assert joined(read_text(text)) == whole
    assert joined(read_text(text, data.draw(cuts(text)) if data else range(1, len(text)))) == whole
    for parts in (HarmonyParser().feed_ids(token_ids), HarmonyParser().feed(text)):
        kinds = [(type(part), getattr(part, "index", None)) for part in parts]
        assert all(before != after for before, after in pairwise(kinds))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "<|start|>assistant<|channel|>final<|message|>", "<|channel|>commentary<|message|>"]),
            st.sampled_from("abc"),
        )
    )
)
def test_no_text_is_lost_and_text_between_messages_is_content(messages):
    text = "".join(f"{header}{place}{word};<|end|>" for place, (header, word) in enumerate(messages))
    assert joined(read_text(text))[1] == "".join(f"{place}{word};" for place, (_, word) in enumerate(messages))


@pytest.mark.parametrize("case", OUTPUTS, ids=lambda case: case["text"][:60])
def test_streams_are_those_of_vllm(case):
    parser = HarmonyParser()
    parts = [part for token_id in ids_of(case["text"]) for part in parser.feed_ids([token_id])]
    reasoning, content, calls = joined([part for part in parts + parser.finish() if not isinstance(part, BrokenToolCall)])
    told = {"reasoning": reasoning, "content": content, "tool_calls": [{"name": name, "arguments": text} for name, text in calls]}
    assert told | {"reasoning_tokens": parser.reasoning_tokens} == case["stream"]


def test_without_parallel_calls_only_the_first_is_told():
    text = f"{CALL}<|start|>assistant{CALL}<|start|>assistant<|channel|>final<|message|>x"
    parser = HarmonyParser(parallel=False)
    assert [*parser.feed(text), *parser.finish()] == [ToolCall(0, "f", '{"a": 1}'), Content("x")]


def test_a_call_is_told_as_it_comes():
    parser = HarmonyParser()
    told = [parser.feed_ids([token_id]) for token_id in ids_of(CALL)]
    assert [part for parts in told for part in parts][:3] == [ToolCall(0, "f"), ToolCall(0, arguments='{"'), ToolCall(0, arguments="a")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("arguments", "header", "is_broken"),
    [
        ('{"a": 1}<|call|>', " <|constrain|>json", False),
        ('{"a": 1}', " <|constrain|>json", False),  # servers cut what ends an answer
        ('{"a": <|call|>', " <|constrain|>json", True),
        ('{"a": ', " <|constrain|>json", True),
        ('{"a": ', " code", True),
        ("print(1)<|call|>", " code", False),
        ("print(1)<|call|>", "", True),
        ("<|call|>", "", True),
    ],
)
def test_a_call_that_is_cut_or_no_json_is_broken(arguments, header, is_broken):
    text = f"<|channel|>commentary to=functions.f{header}<|message|>"
    raw = arguments.removesuffix("<|call|>")
    expected = [ToolCall(0, "f", raw), *([BrokenToolCall(0, text + raw)] if is_broken else [])]
    assert read_ids(ids_of(text + arguments)) == read_text(text + arguments) == expected
    second = "<|channel|>analysis<|message|>x<|end|><|start|>assistant"
    assert read_text(second + text + arguments) == [Reasoning("x"), *expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<|channel|>",
        "<|channel|>comm",
        "<|channel|>final <|constrain|>js",
        "<|start|>assist",
        "<|channel|>commentary to=func",
        " to=",
        "<|channel|>final<|return|>",
        "<|end|>",
        "<|call|><|call|>",
    ],
)
def test_a_header_that_says_nothing_yet_is_nothing(text):
    assert read_ids(ids_of(text)) == read_text(text) == []


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Hi<|return|>", "Hi"),
        ("Hi<|endoftext|>", "Hi"),
        ("<|channel|>final Hi<|return|>", "<|channel|>final Hi"),
        ("<|channel|>commentary to=functions.f", "<|channel|>commentary to=functions.f"),
        ("<|channel|> final<|message|>Hi<|return|>", "<|channel|> final<|message|>Hi"),
        ("<|channel|>commentary code to=functions.f<|message|>{}<|call|>", "<|channel|>commentary code to=functions.f<|message|>{}"),
        ("<|message|>Hi", "Hi"),
        ("<|channel|>other<|message|>Hi", "Hi"),
        ("<|channel|>final json<|message|>{}<|return|>", "{}"),  # to vLLM a call of the function json
        ("<|channel|>commentary to=user<|message|>Hi", "Hi"),
        ("<|channel|>final<|message|>Hi<|end|> \n<|start|>assistant<|channel|>final<|message|>!", "Hi!"),
        ("<|channel|>final<|message|>Hi<|end|><|channel|>final<|message|>!", "Hi!"),
        ("<|channel|>final<|message|>Hi<|endoftext|>", "Hi"),
        ("<|channel|>final<|message|>a < b <| c <|end", "a < b <| c <|end"),
    ],
)
def test_what_the_library_refuses_is_content(text, content):
    assert joined(read_ids(ids_of(text))) == joined(read_text(text)) == ("", content, [])


def test_tools_of_other_apis_are_reasoning():
    for channel in ("analysis", "commentary"):
        assert read_text(f"<|channel|>{channel} to=browser.search code<|message|>x<|call|>") == [Reasoning("x")]


def test_a_header_that_the_prompt_has_not_begun_may_come_too():
    assert read_text("<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>") == [ToolCall(0, "f", "{}")]


@pytest.mark.parametrize("header", ["", "<|channel|>final<|message|>"])
def test_ids_that_are_no_text(header):
    first, second = harmony_encoding().encode("ཀ")
    word = ids_of("abc")
    begin = ids_of(header)
    after = [END, *ids_of("<|start|>assistant<|channel|>final<|message|>!")]
    if header:
        assert joined(read_ids([*begin, first, *word, *after]))[1] == "�abc!"  # of which the library shows the first in time
        assert joined(read_ids([*begin, first, first, *after]))[1] == "�!"
        assert joined(read_ids([*begin, *word, second, *word]))[1] == "abc�abc"
    assert joined(read_ids([*begin, *word, first]))[1] == "abc"
    assert joined(read_ids([*begin, *word, 10**6, -1, 201_089, *word]))[1] == "abcabc"


def test_a_long_word_without_a_header_takes_no_time():
    assert read_text("é" * 200_000) == [Content("é" * 200_000)]


def test_the_vocabulary_is_in_the_package(tmp_path):
    code = "import gaie_codec.text.harmony as h; print(h.harmony_encoding().decode([h.START]))"
    unreachable = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "http_proxy"), "http://127.0.0.1:9")
    env = os.environ | unreachable | {"TIKTOKEN_RS_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "<|start|>"
    assert not list(tmp_path.iterdir())


def test_stop_token_ids_are_those_of_the_library():
    assert sorted(STOP_TOKEN_IDS) == sorted(harmony_encoding().stop_tokens_for_assistant_actions())


ARGUMENTS = [("f", json_of({"type": "object"})), ("g", json_of(True))]
STRUCTURES = {"structures": [{"begin": "<a>", "schema": {"type": "object"}, "end": "</a>"}], "triggers": ["<a"]}
CONSTRAINTS = {"json_object": "", "regex": "a", "choice": ("a", "b"), "grammar": 'root ::= "a"', "structural_tag": json.dumps(STRUCTURES)}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_are_forced_as_by_vllm(choice):
    assert call_tag(ARGUMENTS, choice) == json.dumps(TAGS["calls"][choice])


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_answers_are_held_to_their_constraints_in_the_final_message_as_by_vllm(kind):
    assert answer_tag(kind, CONSTRAINTS[kind]) == json.dumps(TAGS["answers"][kind])


def test_a_schema_and_a_tag_are_held_to_as_they_are():
    assert answer_tag("json_schema", '{"type": "object"}') == json.dumps(TAGS["answers"]["json_object"])
    tag = json.dumps({"type": "structural_tag", "format": {"type": "regex", "pattern": "a"}})
    assert answer_tag("structural_tag", tag) == json.dumps(TAGS["answers"]["regex"])


GPT_OSS = "{{ '<|start|>assistant<|channel|>analysis<|message|>' }}"


@pytest.mark.parametrize(
    ("option", "told", "template"),
    [("openai", "", ""), ("gpt-oss", "", ""), ("harmony", "", ""), ("auto", "openai", ""), ("auto", "", GPT_OSS)],
)
def test_the_format_is_chosen_by_name_or_by_what_the_template_writes(option, told, template):
    tools = choose_tool_format(option, told, template, bool)
    assert tools.name == "harmony"
    assert isinstance(make_parser(tools=tools, reasoning=None), HarmonyParser)
    reasoning = choose_reasoning_format(option.replace("openai", "openai_gptoss"), told.replace("openai", "openai_gptoss"), template, bool)
    assert reasoning.name == "harmony"
    assert not reasoning.begins_inside("<|start|>assistant", {})
    parser = make_parser(tools=None, reasoning=reasoning, parallel=False)
    assert [*parser.feed(f"<|channel|>analysis<|message|>x<|end|><|start|>assistant{CALL}"), *parser.finish()] == [
        Reasoning("x"),
        ToolCall(0, "f", '{"a": 1}'),
    ]
    assert constrain_answer(tools, None, "regex", "a") == ("structural_tag", json.dumps(TAGS["answers"]["regex"]))
    assert constrain_answer(None, reasoning, "regex", "a") is not None
    assert constrain_answer(None, None, "regex", "a") is None


def test_calls_are_forced_with_the_tools_of_the_request():
    tools = [
        {"type": "function", "function": {"name": name, "strict": True, "parameters": schema}}
        for name, schema in [("f", {"type": "object"}), ("g", None)]
    ]
    row = TOOL_FORMATS["openai"]
    assert constrain(row, tools, "required") == ("structural_tag", json.dumps(TAGS["calls"]["required"]))
    assert constrain(row, tools, "auto") == ("structural_tag", json.dumps(TAGS["calls"]["auto"]))
    assert json.loads(constrain(row, tools, "named", "g")[1])["format"]["elements"][2]["elements"][0]["begin"].startswith(
        " to=functions.g<"
    )


def test_what_a_structural_tag_allows_is_read_as_calls():
    function = {"name": "f", "strict": True, "parameters": {"type": "object"}}
    tag = json.loads(constrain(TOOL_FORMATS["harmony"], [{"type": "function", "function": function}], "required")[1])
    *before, calls = tag["format"]["elements"]
    thought = "".join(element["content"]["elements"][0]["begin"] + "x<|end|><|start|>assistant" for element in before)
    for call in calls["elements"]:
        for end in call["end"]:
            assert read_text(f"{thought}{call['begin']}{{}}{end}") == [Reasoning("x"), Content("x"), ToolCall(0, "f", "{}")]


def test_without_the_library_a_gateway_says_so_when_it_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    monkeypatch.delitem(sys.modules, "gaie_codec.text.harmony")
    with pytest.raises(UsageError, match=r"gpt-oss.*pip install gaie-codec\[harmony\]"):
        choose_tool_format("auto", "openai", "", bool)


class Vocabulary:
    """The tokenizer that comes with a gpt-oss model, as far as prompts need it: special tokens spelled out become special."""

    vocab_size = 201_088
    eos_token_ids = frozenset({199_999})
    max_model_len = 131_072

    def __init__(self):
        self.encoded = []

    def encode(self, text, *, add_special_tokens):
        self.encoded.append(text)
        return ids_of("x") if len(text) > 5000 else ids_of(text)


def tokenizer(date="2026-01-02"):
    return HarmonyTokenizer(Vocabulary(), strftime_now=(lambda pattern: date) if date else None)


def as_decoded(message):
    """As `decode_messages` leaves it for a tokenizer that accepts content parts."""
    content = message.get("content")
    parts = [] if content is None else [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": parts}


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["messages"][-1]["role"])
def test_prompts_are_those_of_vllm(case):
    kwargs = {"reasoning_effort": case["reasoning_effort"]} if case["reasoning_effort"] else {}
    messages = [as_decoded(message) for message in case["messages"]]
    assert tokenizer().encode_chat(messages, tools=case["tools"], template_kwargs=kwargs) == case["token_ids"]
    text = tokenizer().render_chat(case["messages"], tools=case["tools"], template_kwargs=kwargs)
    assert text == harmony_encoding().decode(case["token_ids"])


def test_arguments_may_be_objects_and_names_may_be_anything():
    call = {"id": "1", "function": {"name": "f<|end|>", "arguments": {"a": "é"}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    token_ids = tokenizer().encode_chat(messages, add_generation_prompt=False)
    assert (
        harmony_encoding()
        .decode(token_ids)
        .endswith('<|start|>assistant to=functions.f<|end|><|channel|>commentary json<|message|>{"a": "é"}<|call|>')
    )
    assert token_ids.count(END) == 2


def test_ids_and_names_of_calls_may_be_missing_or_wrong():
    calls = [{"id": ["x"], "function": {"name": None, "arguments": ""}}, {"function": {}}]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "y"}]
    assert tokenizer().render_chat(messages).count("functions.<|channel|>commentary") == 3


def test_without_a_clock_there_is_no_date():
    assert "Current date" not in tokenizer(date=None).render_chat([{"role": "user", "content": "x"}])


def test_the_words_that_would_take_the_library_long_are_encoded_by_the_tokenizer():
    made = tokenizer()
    text = "é" * 4000
    token_ids = made.encode_chat([{"role": "user", "content": f"{text}<|end|>{text}"}])
    assert token_ids.count(END) == 2  # of the system message and of this
    assert made._tokenizer.encoded[1:] == [text, text]
    made.encode_chat([{"role": "user", "content": "many words " * 4000}])
    assert len(made._tokenizer.encoded) == 3
    calls = [{"id": "1", "function": {"name": text, "arguments": "{}"}}]
    made.encode_chat([{"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "1", "content": "x"}])
    assert made._tokenizer.encoded[3:] == [f"assistant to=functions.{text}", f"functions.{text}"]


@pytest.mark.parametrize(
    ("messages", "kwargs", "message", "param"),
    [
        ([{"role": "user", "content": "\ud800"}], {}, "surrogate", None),
        ([{"role": "system", "content": "\ud800"}], {}, "cannot be rendered", "messages"),
        ([{"role": "system", "content": "é" * 200_000}], {}, "too long", "messages"),
        ([], {"tools": [{"function": {"name": "f", "description": ["x"]}}]}, "cannot be rendered", "messages"),
        ([{"role": "user", "content": "x"}, {"role": "function", "content": "x"}], {}, "role", "messages.1.role"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "text only", "messages"),
        ([{"role": "user", "content": "x"}], {"template_kwargs": {"reasoning_effort": "none"}}, "does not support", "reasoning_effort"),
        ([{"role": "user", "content": "x"}], {"template_kwargs": {"reasoning_effort": "max"}}, "high, medium, low", "reasoning_effort"),
        (
            [{"role": "user", "content": "x"}],
            {"continue_final_message": True, "add_generation_prompt": False},
            "continue",
            "continue_final_message",
        ),
        ([{"role": "user", "content": "x"}], {"documents": [{"text": "x"}]}, "documents", "documents"),
        (
            [{"role": "user", "content": "x"}],
            {"tools": [{"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"description": float("nan")}}}}}]},
            "rendered",
            "messages",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused(messages, kwargs, message, param):
    with pytest.raises(MalformedRequestError, match=message) as caught:
        tokenizer().encode_chat(messages, **kwargs)
    assert caught.value.param == param


def test_another_tokenizer_is_refused():
    class Bytes(Vocabulary):
        def encode(self, text, *, add_special_tokens):
            return list(text.encode())

    with pytest.raises(UsageError, match="gpt-oss"):
        HarmonyTokenizer(Bytes())


def test_the_rest_is_that_of_the_tokenizer():
    made = tokenizer()
    assert made.eos_token_ids == {199_999, *STOP_TOKEN_IDS}
    assert (made.vocab_size, made.max_model_len) == (201_088, 131_072)
    assert getattr(made, "max_token_chars", 0) == 0
    assert made.encode("<|start|>", add_special_tokens=False) == [START]
