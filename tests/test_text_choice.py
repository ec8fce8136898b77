"""The text stage for servers that send text: nothing is said twice, and what may become a stop string waits where the server does not."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import (
    FinishEvent,
    InferenceRequest,
    OutOfOrderError,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    UpstreamStatusError,
    adapters,
    snapshots,
)
from gaie_codec._text_choice import TextChoice
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
FINAL = adapters.get(snapshots.load("vllm.inference"))  # pieces of text that stay
BLIND = adapters.get(snapshots.load("vllm.inference", "0.25.1"))  # pieces of a server that is told no stop strings
CUMULATIVE = adapters.get(snapshots.load("sglang.api"))  # all text so far, which may be shortened
EOS = 2


def choice_for(adapter, *, stop_holdback="prefix", **sampling):
    request = InferenceRequest(request_id="r", sampling=SamplingParams(**sampling))
    return TextChoice(0, request, TOKENIZER, adapter, eos_token_ids=frozenset((EOS,)), stop_holdback=stop_holdback)


def pieces(*texts):
    return [TokensEvent(text=text, completion_tokens=1) for text in texts]


def so_far(*texts):
    return [TokensEvent(text=text, completion_tokens=place, is_cumulative=True) for place, text in enumerate(texts, 1)]


def run(choice, events, finish):
    deltas = [choice.receive_tokens(event) for event in events] + [choice.receive_finish(finish)]
    return [delta for delta in deltas if delta is not None]


def text_of(deltas):
    return "".join(delta.text for delta in deltas)


def test_pieces_go_out_as_they_are():
    deltas = run(choice_for(FINAL, stop=("STOP",)), pieces("a STO", "", "P b"), FinishEvent(text="!", is_delta=True))
    assert [delta.text for delta in deltas] == ["a STO", "P b", "!"]
    assert deltas[-1].finish_reason == "stop"


def test_what_is_repeated_is_said_once():
    choice = choice_for(CUMULATIVE)
    deltas = run(choice, so_far("a", "ab", "ab", "abc"), FinishEvent(text="abcd", completion_tokens=5))
    assert [delta.text for delta in deltas] == ["a", "b", "c", "d"]
    assert choice.completion_tokens == 5


@example(text="SSTOP", cuts=[], trimmed=True, include=False)
@example(text="a STSTOP", cuts=[1, 2], trimmed=True, include=False)
@given(text=st.text("STOP ab", max_size=12), cuts=st.lists(st.integers(0, 12), max_size=5), trimmed=st.booleans(), include=st.booleans())
@pytest.mark.parametrize("holdback", ["prefix", "window"])
def test_a_stop_string_is_cut_wherever_the_server_cut_its_frames(text, cuts, trimmed, include, holdback):
    """The server ends with the token that completes the stop string, and trims it or not."""
    stop = "STOP"
    place = text.find(stop)
    whole = text if place < 0 else text[: place + len(stop)]
    shown = whole if place < 0 or include else text[:place]
    final = shown if trimmed else whole
    choice = choice_for(CUMULATIVE, stop=(stop,), include_stop_str_in_output=include, stop_holdback=holdback)
    matched = stop if place >= 0 else None
    # A server that trims sends no frame that ends like a stop string begins: what it holds back itself comes with the finish.
    seen = [whole[:cut] for cut in sorted(cuts) if cut < len(whole)]
    events = so_far(*(one for one in seen if not (trimmed and any(one.endswith(stop[:size]) for size in range(1, len(stop))))))
    sent = ""
    for event in events:
        delta = choice.receive_tokens(event)
        sent += delta.text if delta is not None else ""
        assert shown.startswith(sent), "text that must be cut has left"
    last = choice.receive_finish(FinishEvent(text=final, completion_tokens=9, matched_stop=matched))
    assert sent + last.text == shown
    assert last.stop_reason == matched


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stop_string_counts_even_where_the_server_passed_over_it(reason):
    deltas = run(choice_for(CUMULATIVE, stop=("S",)), so_far("a", "aSb"), FinishEvent(text="aSbc", finish_reason=reason))
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("a", "stop", "S")


def test_a_server_that_knows_no_stop_strings_is_ended_here():
    choice = choice_for(BLIND, stop=("STOP",))
    first, second = (choice.receive_tokens(event) for event in pieces("a ST", "OP b"))
    assert (first.text, second.text, second.finish_reason, second.stop_reason) == ("a ", "", "stop", "STOP")
    assert choice.ended_here
    assert choice.completion_tokens == 2
    assert choice.receive_tokens(pieces("more")[0]) is None
    assert choice.receive_finish(FinishEvent(text="", is_delta=True)) is None
    late = choice_for(BLIND, stop=("a",), min_tokens=1)
    deltas = run(late, pieces("a", "ba"), FinishEvent(text="", is_delta=True))
    assert (text_of(deltas), late.ended_here) == ("ab", True), "a stop string within min_tokens is no stop"


def test_the_per_token_path_gives_what_the_general_one_gives():
    texts = ["a", "ab", "ab S", "ab ST", "ab STx", "ab STxy"]
    for stop in ((), ("STOP",), ("zz",)):
        plain, general = choice_for(CUMULATIVE, stop=stop), choice_for(CUMULATIVE, stop=stop)
        fast = [plain.receive_plain(text, tokens) for tokens, text in enumerate(texts, 1)]
        slow = [delta.text if delta is not None else "" for delta in map(general.receive_tokens, so_far(*texts))]
        assert fast == slow
        assert plain.completion_tokens == general.completion_tokens == 6
        end = FinishEvent(text="ab STxyz", completion_tokens=7)
        assert plain.receive_finish(end) == general.receive_finish(end)
    assert plain.receive_plain("more", 1) is None, "not after the finish"
    assert choice_for(CUMULATIVE, logprobs=0).receive_plain("a", 1) is None
    assert choice_for(BLIND, stop=("a",)).receive_plain("a", 1) is None


def test_eos_that_the_server_names_is_no_stop_reason():
    for stop_token_ids, expected in (((), None), ((EOS,), EOS)):
        (last,) = run(choice_for(CUMULATIVE, stop_token_ids=stop_token_ids), [], FinishEvent(text="a", matched_stop=EOS))
        assert last.stop_reason == expected


def test_the_first_releases_echo_the_prompt_where_the_answer_is_empty():
    echoed = FinishEvent(text="the prompt", is_delta=True, completion_tokens=1)
    (last,) = run(choice_for(BLIND), [], echoed)
    assert last.text == ""
    (kept,) = run(choice_for(FINAL), [], echoed)
    assert kept.text == "the prompt"


def test_log_probabilities_are_made_text_by_the_ids():
    ids = TOKENIZER.encode("Hello", add_special_tokens=False)
    event = TokensEvent(
        text="Hello", token_ids=ids, logprobs=tuple(TokenLogprob(token_id=token, logprob=-1.0) for token in ids), completion_tokens=3
    )
    delta = choice_for(FINAL, logprobs=0).receive_tokens(event)
    assert (delta.text, [entry.token for entry in delta.logprobs]) == ("Hello", ["H", "ell", "o"])


def test_order_and_failure():
    choice = choice_for(FINAL)
    run(choice, pieces("a"), FinishEvent(text="", is_delta=True))
    with pytest.raises(OutOfOrderError, match="tokens for choice 0"):
        choice.receive_tokens(pieces("b")[0])
    with pytest.raises(OutOfOrderError, match="second finish for choice 0"):
        choice.receive_finish(FinishEvent(text="", is_delta=True))
    for reason in ("abort", "error"):
        with pytest.raises(UpstreamStatusError, match=reason):
            choice_for(FINAL).receive_finish(FinishEvent(text="", finish_reason=reason))


def test_what_was_held_back_comes_out_when_the_response_breaks_off():
    choice = choice_for(CUMULATIVE, stop=("STOP",))
    choice.receive_tokens(so_far("a ST")[0])
    assert choice.abandon().text == "ST"
    assert choice_for(CUMULATIVE, stop=("STOP",)).abandon() is None
    assert choice_for(FINAL, stop=("STOP",)).abandon() is None
    ended = choice_for(CUMULATIVE, stop=("STOP",))
    ended.receive_tokens(so_far("a STOP b")[0])
    assert ended.abandon() is None, "what follows a stop string never leaves"
