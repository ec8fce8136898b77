"""Reasoning and tool calls in text: any partition tells the same, nothing is lost, nothing leaks, and vLLM tells it so too."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import MalformedRequestError, UsageError
from gaie_codec.text import BrokenToolCall, Content, Reasoning, ToolCall
from gaie_codec.text.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    choose_reasoning_format,
    choose_tool_format,
    constrain,
    make_parser,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "parsers" / "vllm.json").read_text())
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string"},
                "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "tags": {"type": ["array", "null"]},
            },
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {"tz": {"type": "string"}}}}}
DEFINITIONS = [WEATHER, TIME]
TOOLS = sorted({row.name for row in TOOL_FORMATS.values()} - {"harmony"})  # which tests/test_harmony.py is for

# Cases in which our chunks, joined the same, are cut elsewhere or better; docs/parsers.md says how.
BETTER = {"mistral_t_mistral", "mistral_t_mistral_stream"}  # a space after the marker makes vLLM take "[" for the function's name
SOONER = {"llama3_json_t_llama2_stream", "llama3_json_t_llama_stream"}


def parse(pieces, *, tools=None, reasoning=None, begins_inside=False, definitions=DEFINITIONS, **options):
    parser = make_parser(
        tools=TOOL_FORMATS[tools] if tools else None,
        reasoning=REASONING_FORMATS[reasoning] if reasoning else None,
        begins_inside=begins_inside,
        definitions=definitions,
        **options,
    )
    return [part for piece in pieces for part in parser.feed(piece)] + list(parser.finish())


def cut(text, places):
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def joined(parts):
    """What a whole body shows: reasoning, content with broken calls in it, calls; and all parts, adjacent ones joined."""
    calls, broken, reasoning, content = {}, set(), "", ""
    for part in parts:
        match part:
            case ToolCall(index, name, arguments, _):
                assert index not in broken, "nothing of a call after it is broken"
                assert bool(name) == (index not in calls), "the first piece has the name, and no other"
                calls[index] = (calls.get(index, (name, ""))[0], calls.get(index, ("", ""))[1] + arguments)
            case BrokenToolCall(index, text):
                broken.add(index)
                content += text
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
    assert list(calls) == list(range(len(calls)))
    for index in calls.keys() - broken:
        assert isinstance(json.loads(calls[index][1]), dict)
    return {
        "reasoning": reasoning or None,
        "content": content or None,
        "calls": [list(call) for index, call in calls.items() if index not in broken],
        "told": calls,
    }


@pytest.mark.parametrize("name", sorted(name for name, case in GOLDEN.items() if not case["tools"] or case["tools"] in TOOL_FORMATS))
def test_told_as_by_vllm(name):
    case = GOLDEN[name]
    reasoning = REASONING_FORMATS[case["reasoning"]] if case["reasoning"] else None
    begins_inside = reasoning is not None and reasoning.begins_inside("<|im_start|>assistant\n", case.get("template_kwargs", {}))
    parts = parse(case["texts"], tools=case["tools"], reasoning=case["reasoning"], begins_inside=begins_inside)
    if name.startswith("reason_hidden"):  # include_reasoning false, which is for the encoder to leave out
        parts = [part for part in parts if not isinstance(part, Reasoning)]
    if case["tools"]:
        assert TOOL_FORMATS[case["tools"]].keeps_special_tokens or case["skip_special_tokens"] or case["reasoning"]
    ours = joined(parts)
    if name in BETTER:
        assert ours["calls"] == [["get_weather", '{"city": "Paris"}'], ["get_time", '{"tz": "UTC"}']]
    elif "message" in case:
        assert {key: ours[key] for key in case["message"]} == {
            key: value or None if key != "calls" else value for key, value in case["message"].items()
        }
    elif name in SOONER:
        theirs = joined([part_of(chunk) for chunk in case["chunks"]])
        assert {**ours, "told": None} == {**theirs, "told": None}
    else:
        told = [part for part in parts if not isinstance(part, BrokenToolCall)]
        assert told == [part_of(chunk) for chunk in case["chunks"]]


def part_of(chunk):
    kind, *rest = chunk
    return ToolCall(*rest) if kind == "call" else {"content": Content, "reasoning": Reasoning}[kind](*rest)


# What models write, well formed and not, by format.
DS, DE, DC, DX, SEP = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
KS, KE, KC, KA, KX = (f"<|tool_call{name}|>" for name in ("s_section_begin", "s_section_end", "_begin", "_argument_begin", "_end"))
CALLS = {
    "hermes": [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Z\u00fcrich \\"x}\\\\"}}\n</tool_call>',
        '<tool_call>{"arguments":{"a":[1,{"b":null}]},"name":"f"}</tool_call>',
        '<tool_call>\n[{"name": "f", "arguments": {}}, {"name": "g"}]\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}", "id": 7}',
        '<tool_call>{"name": "f", "arguments": null}}</tool_call>',
    ],
    "llama3_json": [
        '<|python_tag|>{"name": "f", "parameters": {"a":"\\u00e9\\ud83c\\udde8\\n\\/"}}; {"name": "g", "parameters": {}}',
        ' {"type": "function", "name": "f", "parameters": {"a" : [ 1.0,2 ]}}',
        '{"parameters": {"a": 1}, "name": "f"};',
    ],
    "mistral": [
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "n": [1, 2]}[TOOL_CALLS]get_time[ARGS]{}',
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}',
        '[TOOL_CALLS]f{"a": "\\""}',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
    ],
    "deepseek_v3": [
        f'{DS}{DC}function{SEP}get_weather\n```json\n{{"city": "Paris"}}\n```{DX}\n{DC}function{SEP}f\n```json\n{{}}\n```{DX}{DE}',
        f"{DC}function{SEP}f\n```json\n{{}}\n```{DX}",
    ],
    "deepseek_v31": [f'{DS}{DC}get_weather{SEP}{{"city": "Paris"}}{DX}{DC}f{SEP}{{}}{DX}{DE}', f"{DS}{DC}f{SEP}{{}}"],
    "deepseek_v32": [
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">7 "'
        "</｜DSML｜parameter>\n"
        '<｜DSML｜parameter name="n" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    ],
    "kimi_k2": [
        f'{KS}{KC}functions.get_weather:0{KA}{{"city": "Paris"}}{KX}{KC}functions.f:1{KA}{{}}{KX}{KE}',
        f"{KC}f{KA}{{}}{KX}",
    ],
    "qwen3_coder": [
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar\nis "\\\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
        '<parameter=tags>\n["a", 1]\n</parameter>\n</function>\n</tool_call>',
        "<function=f>\n</function>\n<function=g>\n<parameter=x>1</parameter>\n</function>",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nDallas\n<parameter=unit>\n\nC\n\n</function>\n</tool_call>",
    ],
    "glm45": [
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par is</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "<tool_call>f</tool_call><tool_call>get_weather<arg_key>city</arg_key><arg_value></arg_value></tool_call>",
    ],
    "minimax_m2": [
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n<parameter name="days">x</parameter>\n'
        '</invoke>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>',
    ],
    "seed_oss": ["<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>"],
    "pythonic": [
        "[get_weather(city=\"Pa'r\\\"i\\u00e9s\\q\", days=-3), f(a=[1, 2.5, (True, None)], b={'x': {}}, c=1.), g(),]",
        "\n[f(a='')]",
    ],
    "llama4_pythonic": ["<|python_start|>[f(a='b')]<|python_end|>", "[f(a=1)]"],
    "olmo3": ['<function_calls>\nget_weather(city="Paris")\nf(a=1)\n</function_calls>'],
    "lfm2": ["<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|>"],
    "granite": ['<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]'],
    "internlm": ['<|action_start|><|plugin|>\n{"name": "f", "parameters": {"city": "Paris"}}<|action_end|>\n'],
    "jamba": ['<tool_calls>[\n{"name": "f", "arguments": {"city": "Paris"}}\n]</tool_calls>'],
    "longcat": ['<longcat_tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</longcat_tool_call>'],
    "phi4_mini_json": ['functools[{"name": "f", "arguments": {"city": "Paris"}}]'],
}
CALLS["deepseek_v4"] = [text.replace("function_calls", "tool_calls") for text in CALLS["deepseek_v32"]]
BROKEN = {
    "hermes": [
        "<tool_call>",
        "<tool_call> no JSON </tool_call>",
        '<tool_call>{"name": "f", "arguments": {bad}}\n</tool_call> on',
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        '<tool_call>{"name": "f", "arguments": {"a": "<tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
    ],
    "llama3_json": ['{"answer": 42}', '{"name": "Bob"}', '{"name": "f", "parameters": {x}}; more', "[1, 2]", "{", "<|python_tag|>print(1)"],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS]get_weather",
        '[TOOL_CALLS]f[ARGS]{"a',
        "[TOOL_CALLS]f[ARGS]none",
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS]{x",
    ],
    "deepseek_v3": [DS, f"{DS}text", f"{DS}{DC}f", f"{DS}{DC}function{SEP}f\n```json\n{{x}}\n```{DX}{DE} on", f"{DC}{SEP}\n```json\n{{}}"],
    "deepseek_v31": [f'{DS}{DC}f{SEP}{{"a": "', f"{DS}{DE}", f"{DC}{DX}"],
    "deepseek_v32": [
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">x</｜DSML｜parameter>\n'
    ],
    "kimi_k2": [f"{KS}{KC}functions.f:0{KA}{{", f"{KS}{KE}", f"{KC}{KA}{{}}{KX}"],
    "qwen3_coder": [
        "<tool_call>\n</tool_call>",
        "<tool_call>\n<function=>\n</function>",
        "<tool_call>\n<function=f>\n<parameter=a>\nb",
        "<tool_call>\n<function=f>\nno tag</function>\n</tool_call>",
        "<function=a b>",
    ],
    "glm45": ["<tool_call>", "<tool_call>f<arg_key>a</arg_key>b", '<tool_call>{"name": "f"}</tool_call>', "<tool_call></tool_call>"],
    "minimax_m2": ['<minimax:tool_call>\n<invoke name="f">\n<parameter name="a', "<minimax:tool_call>\n</minimax:tool_call>"],
    "seed_oss": ["<seed:tool_call><function=f><parameter=a>1</parameter"],
    "pythonic": [
        "[1] says so",
        "[a link](there)",
        "[f(x)]",
        "[f(a=b)]",
        "[f(a='b\nc')]",
        "[f(a='\\ud800')]",
        "[f(a=007)]",
        "[f(a={1: 2})]",
        "[f(a=" + "[" * 100,
        "{",
    ],
    "llama4_pythonic": ["<|python_start|>print<|python_end|>", "<|python_start|>[f(a=1"],
    "olmo3": ["<function_calls>", "<function_calls>\nf(a=1"],
    "phi4_mini_json": ["import functools", "functools[x]"],
}
TEXTS = [
    "",
    "Sure.\n",
    "a < b <tool",
    " \n",
    "\u00e9{[<|",
    "</tool_call>",
    "}",
    "[TOOL",
    "<think>",
    "</think>",
    "\t;",
    "[",
    "[THINK]",
    "[/THINK]",
]


def texts_of(tools):
    piece = st.sampled_from([*TEXTS, *CALLS.get(tools, []), *BROKEN.get(tools, [])])
    whole = st.lists(piece, max_size=5).map("".join)
    return whole | st.tuples(whole, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])


@st.composite
def cases(draw):
    tools = draw(st.sampled_from(sorted(CALLS)))
    reasoning = draw(st.sampled_from([None, "qwen3", "deepseek_v3", "mistral", "kimi_k2"]))
    text = draw(texts_of(tools))
    options = {
        "begins_inside": draw(st.booleans()),
        "parallel": draw(st.booleans()),
        **draw(st.sampled_from([{}, {}, {"required": True}, {"forced": "get_weather"}])),
    }
    return tools, reasoning, text, options


@given(cases(), st.lists(st.integers(0, 300), max_size=12) | st.just(list(range(1000))))
def test_any_partition_tells_the_same(case, places):
    tools, reasoning, text, options = case
    whole = joined(parse([text], tools=tools, reasoning=reasoning, **options))
    pieces = cut(text, places)
    parts = parse(pieces, tools=tools, reasoning=reasoning, **options)
    assert joined(parts) == whole
    assert all(part.text for part in parts if not isinstance(part, ToolCall)), "no part is empty"


@given(st.lists(st.sampled_from(["Sure.", "\n", " a < b", "<t", "{"]), max_size=8).map("".join), st.lists(st.integers(0, 30)))
def test_text_without_calls_is_told_as_it_is(text, places):
    for tools in TOOLS:
        parts = parse(cut("so " + text, places), tools=tools)
        assert "".join(part.text for part in parts) == "so " + text
        assert {type(part) for part in parts} == {Content}


@pytest.mark.parametrize(("tools", "text"), [(tools, text) for tools in sorted(CALLS) for text in CALLS[tools]])
def test_calls_are_told_and_no_markup(tools, text):
    for size in (1, 3, len(text)):
        parts = parse(cut(text, range(0, len(text), size)), tools=tools)
        assert (joined(parts)["content"] or "").strip() in ("", "}")
        assert joined(parts)["calls"]


@pytest.mark.parametrize(("tools", "text"), [(tools, text) for tools in sorted(BROKEN) for text in BROKEN[tools]])
def test_what_is_no_call_is_content_as_it_was_written(tools, text):
    for size in (1, 3, len(text)):
        whole = joined(parse(cut(text, range(0, len(text), size)), tools=tools))
        assert whole["content"] == text
        assert not whole["calls"]


@pytest.mark.parametrize("tools", sorted(CALLS))
def test_only_what_may_be_a_marker_is_held(tools):
    """So that a feed costs its own length, whatever came before."""
    call = CALLS[tools][0]
    name = call.replace("get_weather", "f" * 9_000, 1).replace('"f"', f'"{"f" * 9_000}"', 1)
    argument = next(call.replace(part, "x" * 9_000, 1) for part in ("Par", "rich", "00e9", "Pa'r", "'b'", "7 ") if part in call)
    for text in (name, argument, " " * 9_000 + call, "x" + call * 30):
        parser = make_parser(tools=TOOL_FORMATS[tools], reasoning=None, definitions=DEFINITIONS)
        for char in text:
            parser.feed(char)
            assert len(parser._reader.text) - parser._reader.position < 40


def test_cost_is_linear():
    """60,000 single characters take a second, and a hundred times that a hundred times as long."""
    start = time.process_time()
    for tools, before, after in (("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', '"}}'), ("pythonic", "[f(a='", "')]")):
        parts = parse([before, *"<\\n" * 10_000, after], tools=tools)
        assert joined(parts)["calls"]
    assert time.process_time() - start < 30


TAGS = json.loads((Path(__file__).parent / "golden" / "parsers" / "structural_tags.json").read_text())


@pytest.mark.parametrize("case", TAGS)
def test_structural_tags_are_those_of_vllm_to_the_byte(case):
    case = TAGS[case]
    kind, _, name = case["choice"].replace("function:", "named:").partition(":")
    tag = case["structural_tag"]
    assert constrain(TOOL_FORMATS["hermes"], case["tools"], kind, name) == (("structural_tag", tag) if tag else None)


WRITTEN = {
    "json": '{"city": "Paris"}',
    "qwen_xml": "<parameter=city>\nParis\n</parameter>",
    "glm_xml": "\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n",
    "minimax_xml": '<parameter name="city">Paris</parameter>\n',
    "deepseek_xml": '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n',
}


def written(node):
    """A text that this part of a structural tag allows: the last of several tags, twice where it may."""
    match node["type"]:
        case "tag":
            end = node["end"]
            return node["begin"] + written(node["content"]) + (end if isinstance(end, str) else end[0])
        case "json_schema":
            return WRITTEN[node["style"]]
        case "regex":
            return "7"
        case "any_text":
            return "Hm."
        case "const_string":
            return node["value"]
        case "sequence":
            return "".join(map(written, node["elements"]))
        case "tags_with_separator":
            return node["separator"].join([written(node["tags"][-1])] * (1 if node["stop_after_first"] else 2))
        case "triggered_tags":
            assert all(any(tag["begin"].startswith(trigger) for trigger in node["triggers"]) for tag in node["tags"])
            return written(node["tags"][0]) + written(node["tags"][-1])


STYLED = sorted(row.name for row in set(TOOL_FORMATS.values()) if row.tag_style and row.name != "harmony")


@pytest.mark.parametrize("kind", ["auto", "required", "named"])
@pytest.mark.parametrize("tools", STYLED)
def test_what_a_structural_tag_allows_is_read_as_calls(tools, kind):
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in DEFINITIONS]
    how, text = constrain(TOOL_FORMATS[tools], strict, kind, "get_weather" if kind == "named" else "")
    parts = joined(parse([written(json.loads(text)["format"])], tools=tools, **({"required": True} if kind == "required" else {})))
    assert how == "structural_tag"
    assert (parts["content"] or "").strip() == ""
    assert 1 <= len(parts["calls"]) <= 4
    assert all(name in ("get_weather", "get_time") and json.loads(text) == {"city": "Paris"} for name, text in parts["calls"])
    assert constrain(TOOL_FORMATS[tools], DEFINITIONS, "auto") is None


@pytest.mark.parametrize("tools", ["pythonic", None])
def test_a_format_without_a_structural_tag_is_forced_by_a_schema_and_its_calls_are_that_json(tools):
    tool_format = tools and TOOL_FORMATS[tools]
    kind, text = constrain(tool_format, DEFINITIONS, "required")
    schema = json.loads(text)
    assert kind == "json_schema"
    assert [call["properties"]["name"]["enum"] for call in schema["items"]["anyOf"]] == [["get_weather"], ["get_time"]]
    assert json.loads(constrain(tool_format, DEFINITIONS, "named", "get_time")[1]) == TIME["function"]["parameters"]
    assert (
        constrain(tool_format, DEFINITIONS, "auto")
        is constrain(tool_format, [], "required")
        is constrain(tool_format, DEFINITIONS, "named", "x")
        is None
    )
    text = '[{"name": "get_time", "parameters": {"tz": "UTC"}}, {"name": "f", "parameters": {}}]'
    assert joined(parse(text, tools=tools, required=True))["calls"] == [["get_time", '{"tz": "UTC"}'], ["f", "{}"]]
    parts = joined(parse('{"tz": "UTC"} {"tz": 1}', tools=tools, forced="get_time"))
    assert (parts["calls"], parts["content"]) == ([["get_time", '{"tz": "UTC"}']], ' {"tz": 1}')


def test_shared_definitions_of_schemas_go_to_the_root():
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string"}}}
    schema = json.loads(constrain(None, [{"function": {"name": "f", "parameters": parameters}}], "required")[1])
    assert schema["$defs"] == {"A": {"type": "string"}}
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["parameters"]


def never(_: str) -> bool:
    return False


def test_what_a_template_shows_is_a_guess():
    shown = choose_tool_format("auto", "", "<tool_call>", {"<tool_call>"}.__contains__)
    assert (shown.is_guess, shown.keeps_special_tokens) == (True, True)
    assert not choose_tool_format("auto", "", "<tool_call>", never).keeps_special_tokens
    assert not choose_tool_format("auto", "hermes", "", never).is_guess
    guessed = choose_reasoning_format("auto", "", "{% if enable_thinking %}<think>", never)
    assert guessed.is_guess
    assert not guessed.begins_inside("assistant\n", {"enable_thinking": True})
    assert guessed.begins_inside("assistant\n<think>\n", {})
    for text, expected in [("plain", [Content("plain")]), ("<think>a</think>b", [Reasoning("a"), Content("b")])]:
        parser = make_parser(tools=None, reasoning=guessed)
        assert [*parser.feed(text), *parser.finish()] == expected


def test_a_format_is_chosen_by_option_then_by_what_the_server_says_then_by_the_template():
    assert choose_tool_format("hermes", "llama3_json", "", never).name == "hermes"
    assert choose_tool_format("auto", "llama3", "<tool_call>", never).name == "llama3_json"
    assert choose_tool_format("auto", "a name of tomorrow", "... <tool_call> ...", never).name == "hermes"
    assert choose_tool_format("auto", "", "no tools here", never) is None
    assert choose_tool_format("none", "hermes", "<tool_call>", never) is None
    assert choose_reasoning_format("auto", "qwen3", "", never).name == "qwen3"
    assert choose_reasoning_format("auto", "", "{% if enable_thinking %}<think>", never).name == "qwen3"
    with pytest.raises(UsageError, match=r"tool_call_parser is 'x', not auto, none, or one of .*hermes"):
        choose_tool_format("x", "hermes", "", never)
    with pytest.raises(UsageError, match="reasoning_parser"):
        choose_reasoning_format("", "", "", never)


def test_where_an_answer_begins():
    qwen, deepseek, r1 = (REASONING_FORMATS[name] for name in ("qwen3", "deepseek_v3", "deepseek_r1"))
    assert qwen.begins_inside("<|im_start|>assistant\n", {})
    assert not qwen.begins_inside("<|im_start|>assistant\n", {"enable_thinking": False})
    assert not qwen.begins_inside("<|im_start|>assistant\n<think>\n\n</think>\n\n", {"enable_thinking": True})
    assert qwen.begins_inside("assistant\n<think>\n", {"enable_thinking": False}), "the prompt is what the model saw"
    assert not deepseek.begins_inside("<｜Assistant｜>", {})
    assert deepseek.begins_inside("<｜Assistant｜>", {"thinking": True})
    assert r1.begins_inside("<｜Assistant｜>", {"enable_thinking": False})
    assert r1.begins_inside("a turn before: </think> text<｜end▁of▁sentence｜><｜User｜>and now?<｜Assistant｜>", {})
    assert not qwen.begins_inside("<|im_start|>assistant\n<think>\nhm\n</think>\n\nThe answer that goes on is", {})
    assert qwen.begins_inside("<|im_start|>assistant\n<think>\nA thought that goes on", {"enable_thinking": False})


def test_the_tables_in_the_docs_are_current():
    subprocess.run([sys.executable, str(Path(__file__).parents[1] / "tools" / "formats_table.py"), "--check"], check=True)


@pytest.mark.parametrize("name", sorted({row.name for row in REASONING_FORMATS.values()} - {"harmony"}))
def test_reasoning_is_told_from_the_answer(name):
    row = REASONING_FORMATS[name]

    def told(text, *, inside, **options):
        whole = [
            joined(parse(cut(text, range(0, len(text), size)), reasoning=name, begins_inside=inside, **options)) for size in (1, 5, 99)
        ]
        assert whole[0] == whole[1] == whole[2]
        return whole[0]["reasoning"], whole[0]["content"]

    assert told(f"{row.start}\nHm.\n{row.end}\n\n42", inside=True) == ("\nHm.\n", "\n\n42")
    assert told(f"\nHm.\n{row.end}42{row.end}", inside=True) == ("\nHm.\n", f"42{row.end}")
    assert told("Hm. <thi", inside=True) == ("Hm. <thi", None)
    assert told(f"\n {row.start}Hm.{row.end}42", inside=False) == (("Hm.", "42") if row.opens else (None, f"\n {row.start}Hm.{row.end}42"))
    assert told(f" 4 {row.start}2", inside=False) == (None, f" 4 {row.start}2")
    for interrupt in row.interrupts:
        assert told(f"Hm.{interrupt}x", inside=True) == ("Hm.", f"{interrupt}x")


def test_names_are_unique_and_markers_can_be_told_apart():
    for formats in (TOOL_FORMATS, REASONING_FORMATS):
        rows = list(dict.fromkeys(formats.values()))
        assert len(formats) == sum(1 + len(row.aliases) for row in rows), "an alias names two rows"
        for row in rows:
            markers = [*row.layout.begins, row.layout.end] if formats is TOOL_FORMATS else [row.start, row.end, *row.interrupts]
            assert not any(a != b and b.startswith(a) for a in filter(None, markers) for b in markers)


@given(st.sampled_from(sorted(CALLS)).flatmap(lambda tools: st.tuples(st.just(tools), texts_of(tools))), st.booleans())
def test_without_a_whole_call_all_text_is_content(case, required):
    tools, text = case
    whole = joined(parse([text], tools=tools, required=required))
    if not whole["calls"]:
        assert (whole["content"] or "") == text


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_a_schema_that_cannot_be_written_is_refused(name):
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    for schema in (deep, {"const": float("nan")}):
        tools = [{"function": {"name": "f", "strict": True, "parameters": schema}}]
        with pytest.raises(MalformedRequestError, match="nested too deeply"):
            constrain(TOOL_FORMATS[name], tools, "required")


def tagged(value):
    return f"<tool_call><function=f><parameter=a>{value}</parameter></function></tool_call>"


def of_type(schema):
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}}]


@pytest.mark.parametrize(
    ("value", "arguments"),
    [
        (f"[{'1' * 5000}]", f'{{"a": [{"1" * 5000}]}}'),  # more digits than Python makes an int of
        ("[1e999,1.10]", '{"a": [1e999, 1.10]}'),
        ('["\\ud800", "\\u00e9"]', '{"a": ["\\ud800", "é"]}'),
        ("[" * 3000 + "]" * 3000, f'{{"a": "{"[" * 3000}{"]" * 3000}"}}'),
    ],
)
def test_an_array_is_passed_on_whatever_python_would_make_of_it(value, arguments):
    (call,) = parse([tagged(value)], tools="qwen3_coder", definitions=of_type({"type": "array"}))
    assert call.arguments == arguments


def test_schemas_in_schemas_are_followed_so_far_and_no_further():
    schema = {"type": "integer"}
    for _ in range(20):
        schema = {"anyOf": [schema]}
    (call,) = parse([tagged("1")], tools="qwen3_coder", definitions=of_type(schema))
    assert call.arguments == '{"a": 1}'
    for _ in range(3000):
        schema = {"anyOf": [schema]}
    (call,) = parse([tagged("1")], tools="qwen3_coder", definitions=of_type(schema))
    assert call.arguments == '{"a": "1"}'


def test_half_of_a_surrogate_pair_is_no_text():
    text = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
    assert parse([text], tools="hermes") == [Content(text)]
    (call,) = parse(['<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'], tools="hermes")
    assert call.arguments == '{"a": "\\ud800"}'
