"""Chat messages -> prompt text, with Jinja templates as the Hugging Face ecosystem writes them.

Templates are data from a model's files: they run in jinja2's immutable sandbox, which stops attribute escapes, changes to the
messages and ranges over 100,000. What a template may use is fixed by transformers' `chat_template_utils.py`: block trimming, the
loopcontrols and `generation` tags, `tojson` without HTML escapes, `raise_exception`, `strftime_now`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .._errors import MalformedRequestError

# transformers' own tag, in place of the end of the final message. The space shows whether the template strips its content.
_CUT_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "
# Names under which reasoning comes; transformers fills the first for the template, and "thinking" for gpt-oss.
_REASONING_NAMES: Final = ("reasoning_content", "thinking", "reasoning")
_ENCODE_JSON: Final = json.JSONEncoder(ensure_ascii=False).encode


class ChatTemplate:
    """One compiled template. It never fails to be made: a template that does not compile says so when it is rendered."""

    def __init__(self, source: str, *, variables: Mapping[str, Any], strftime_now: Callable[[str], str] | None) -> None:
        self.source = source
        self._variables = dict(variables)
        self._template: jinja2.Template | None = None
        self.accepts_content_parts = False
        # OpenAI's newer name for system. Most templates have never heard of it and would leave the message out without a word.
        self._knows_developer = "developer" in source
        environment = _environment(strftime_now)
        try:
            syntax = environment.parse(source)
            self._template = environment.from_string(syntax)
        except (jinja2.TemplateError, RecursionError, SyntaxError):
            return
        self.accepts_content_parts = _loops_over_content(syntax)

    @property
    def is_valid(self) -> bool:
        """Whether it compiled."""
        return self._template is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """The prompt text. Raises MalformedRequestError, with the template's own words when it has some."""
        if self._template is None:
            raise MalformedRequestError("The model's chat template does not compile")
        chat = [_with_reasoning_names(message) for message in messages]
        if not self._knows_developer:
            for message in chat:
                if message.get("role") == "developer":
                    message["role"] = "system"
        final_text = _tag_final_message(chat) if continue_final_message else None
        variables = {
            **self._variables,
            **template_kwargs,
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(variables)
        except _RaisedByTemplate as error:
            raise MalformedRequestError(f"The chat template refused the messages: {error.message}", param="messages") from None
        except Exception as error:  # whatever Python raises in the template's expressions; its words may hold prompt text
            raise MalformedRequestError(
                f"The chat template cannot render these messages ({type(error).__name__})", param="messages"
            ) from None
        return text if final_text is None else _cut_final_message(text, final_text)


class _RaisedByTemplate(jinja2.TemplateError):
    """A template called `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}` marks what training learns from; for a prompt it is its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """`namespace()` without underscore names, through which a template could reach Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # jinja2's own signature: `namespace(self=...)` is legal
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("namespace attributes cannot begin with an underscore")


def _environment(strftime_now: Callable[[str], str] | None) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _Namespace
    if strftime_now is not None:  # else undefined: templates ask `strftime_now is defined`
        environment.globals["strftime_now"] = strftime_now
    return environment


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplate(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if not ensure_ascii and indent is None and separators is None and not sort_keys:
        return _ENCODE_JSON(value)  # json.dumps makes an encoder per call for anything but its defaults
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning_names(message: Mapping[str, Any]) -> dict[str, Any]:
    for name in _REASONING_NAMES:
        reasoning = message.get(name)
        if reasoning is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return dict(message)


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """Append the cut tag to the last text of the last message of `chat`, in place; that text as it was."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CUT_TAG
        return content
    if isinstance(content, (list, tuple)):
        parts = list(content)
        for place in range(len(parts) - 1, -1, -1):
            part = parts[place]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts[place] = {**part, "text": part["text"] + _CUT_TAG}
                chat[-1]["content"] = parts
                return str(part["text"])
    raise MalformedRequestError("continue_final_message needs a final message with text", param="continue_final_message")


def _cut_final_message(text: str, final_text: str) -> str:
    place = text.rfind(_CUT_TAG.strip())
    if place < 0 or final_text.strip() not in text:
        raise MalformedRequestError(
            "continue_final_message is set, but the chat template does not show the final message as it is",
            param="continue_final_message",
        )
    return text[:place] if text.startswith(_CUT_TAG, place) else text[:place].rstrip()


def _loops_over_content(template: nodes.Template) -> bool:
    """Does any `for` go over the content of a message? vLLM's rule (`_detect_content_format`), scopes ignored as there."""
    try:
        messages = list(_names_for(template, "messages"))
        items = {
            _assigned_name(loop.target) for loop in template.find_all(nodes.For) if any(_reads(loop.iter, name, None) for name in messages)
        }
        return any(_reads(loop.iter, item, "content") for loop in template.find_all(nodes.For) for item in items)
    except _NotAName:
        return False


class _NotAName(Exception):
    """A loop over messages that unpacks them: vLLM then takes content for a string."""


def _names_for(template: nodes.Template, name: str) -> Iterator[str]:
    """`name`, and every variable set to it, to a slice of it or to it filtered; through any number of assignments."""
    known = [name]
    for known_name in known:  # grows
        yield known_name
        for assignment in template.find_all(nodes.Assign):
            if _reads(assignment.node, known_name, None):
                target = _assigned_name(assignment.target)
                if target not in known:
                    known.append(target)


def _assigned_name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _NotAName
    return target.name


def _reads(node: nodes.Node | None, name: str, key: str | None) -> bool:
    """Is this expression the variable (or its item `key`), maybe behind filters, tests and slices?"""
    while isinstance(node, (nodes.Filter, nodes.Test)) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        node = node.node
    if key is not None:
        if isinstance(node, nodes.Getattr):
            found = node.attr == key
        else:
            found = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == key
        if not found:
            return False
        assert isinstance(node, (nodes.Getattr, nodes.Getitem))
        node = node.node
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
