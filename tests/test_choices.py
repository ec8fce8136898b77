"""The text stage: whatever convention a server has, each token comes once, and what must be cut never left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import (
    Code,
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
from gaie_codec._choices import Choice
from gaie_codec._logprob_texts import TextLogprob
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import CONVENTIONS, Convention, events_of, scripts

TOKENIZER = load_tokenizer("builtin")
ADAPTER = adapters.get(snapshots.load("vllm.engine"))
EOS, OTHER_EOS = 2, 0


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


HELLO = ids("Hello world")  # H, ell, o, " world"
STOP = ids(" STOP now")  # " ", S, T, O, P, " now"
FOX = ids("\N{SAUROPOD}")  # three tokens for one character
WORDS = ids("one two three four")
assert (len(HELLO), len(STOP), len(FOX), len(WORDS)) == (4, 6, 3, 4)

# Few tokens, so that stop strings and stop tokens come often; some outside the vocabulary.
TOKEN_IDS = st.sampled_from([*HELLO, *STOP, *FOX, *ids("ab")]) | st.sampled_from([EOS, OTHER_EOS, 1, 5000, 2**32 - 1])


def choice_for(*, prompt: str = "", stop_holdback="prefix", **sampling) -> Choice:
    request = InferenceRequest(request_id="r", prompt_token_ids=ids(prompt), sampling=SamplingParams(**sampling))
    return Choice(0, request, TOKENIZER, ADAPTER, eos_token_ids=TOKENIZER.eos_token_ids, stop_holdback=stop_holdback)


def tokens(*token_ids: int, **fields) -> TokensEvent:
    return TokensEvent(token_ids=list(token_ids), **fields)


def finish(*token_ids: int, **fields) -> FinishEvent:
    return FinishEvent(token_ids=list(token_ids), **fields)


def run(choice: Choice, *events):
    """The deltas, the last being the finish."""
    deltas = [choice.receive_tokens(event) if isinstance(event, TokensEvent) else choice.receive_finish(event) for event in events]
    return [delta for delta in deltas if delta is not None]


def text_of(deltas) -> str:
    return "".join(delta.text for delta in deltas)


# What the finish repeats


@pytest.mark.parametrize("counts", ["delta", "cumulative"])
@pytest.mark.parametrize(
    "repeated",
    [HELLO[-1:], HELLO, [], HELLO[-2:]],
    ids=["last delta", "everything", "nothing", "last two"],
)
def test_what_the_finish_repeats_is_not_said_twice(counts, repeated):
    choice = choice_for()
    chunks = [tokens(token, completion_tokens=place if counts == "cumulative" else 1) for place, token in enumerate(HELLO, 1)]
    deltas = run(choice, *chunks, finish(*repeated, completion_tokens=len(HELLO) if counts == "cumulative" else 1))
    assert [delta.text for delta in deltas] == ["H", "ell", "o", " world", ""]
    assert [token for delta in deltas for token in delta.token_ids] == HELLO
    assert choice.completion_tokens == len(HELLO)


def test_a_tail_that_only_the_finish_brings_is_new():
    choice = choice_for()
    deltas = run(choice, tokens(*HELLO[:3]), finish(*HELLO, finish_reason="length"))
    assert [delta.text for delta in deltas] == ["Hello", " world"]
    assert deltas[-1].token_ids == HELLO[3:]
    assert choice.completion_tokens == 4


def test_a_finish_alone_brings_everything():
    choice = choice_for()
    (delta,) = run(choice, finish(*HELLO, EOS))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("Hello world", "stop", None)
    assert delta.token_ids == [*HELLO, EOS]
    assert choice.completion_tokens == 5


def test_a_choice_may_be_empty():
    (delta,) = run(choice_for(), tokens(), finish())
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", [], "stop")


@given(script=scripts(token_ids=TOKEN_IDS, logprobs=True, matched_stops=("STOP", HELLO[0])), data=st.data())
def test_every_convention_tells_the_same(script, data):
    sampling = data.draw(
        st.fixed_dictionaries(
            {"logprobs": st.sampled_from([None, 0, 2])},
            optional={
                "stop": st.sampled_from([("STOP",), ("o", " wor"), ("a", "ab")]),
                "max_tokens": st.integers(1, 8),
                "min_tokens": st.integers(0, 4),
                "ignore_eos": st.booleans(),
                "include_stop_str_in_output": st.booleans(),
                "skip_special_tokens": st.booleans(),
                "stop_token_ids": st.sampled_from([(), (HELLO[2],)]),
            },
        )
    )

    def told(convention):
        choice = choice_for(**sampling)
        deltas = run(choice, *events_of(script, convention))
        last = deltas[-1]
        together = [token for delta in deltas for token in delta.token_ids], [entry for delta in deltas for entry in delta.logprobs]
        return text_of(deltas), together, last.finish_reason, last.stop_reason, choice.completion_tokens

    tellings = [told(convention) for convention in CONVENTIONS]
    assert all(telling == tellings[0] for telling in tellings)
    assert tellings[0][1][0] == script.choices[0].token_ids


# EOS and stop tokens


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_eos_is_no_text_even_when_special_tokens_are_shown(eos):
    choice = choice_for(skip_special_tokens=False)
    deltas = run(choice, tokens(*HELLO), tokens(eos), finish(eos))
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("Hello world", None), ("", "stop")]
    assert deltas[-1].token_ids == [eos]
    assert choice.completion_tokens == 5


def test_eos_that_the_finish_drops_is_still_trimmed_and_counted():
    choice = choice_for(skip_special_tokens=False)
    deltas = run(choice, tokens(*HELLO, EOS), finish(*HELLO))
    assert text_of(deltas) == "Hello world"
    assert choice.completion_tokens == 5


def test_eos_is_shown_when_it_did_not_end_the_choice():
    deltas = run(choice_for(skip_special_tokens=False), tokens(*HELLO, EOS), finish(finish_reason="length"))
    assert text_of(deltas) == "Hello world<|im_end|>"


def test_a_delta_with_eos_waits_for_the_next_message_and_no_longer():
    choice = choice_for(skip_special_tokens=False)
    assert choice.receive_tokens(tokens(*HELLO, EOS)) is None
    delta = choice.receive_tokens(tokens(*ids("!")))
    assert (delta.text, delta.token_ids) == ("Hello world<|im_end|>!", [*HELLO, EOS, *ids("!")])


def test_ignore_eos_holds_nothing():
    choice = choice_for(skip_special_tokens=False, ignore_eos=True)
    assert choice.receive_tokens(tokens(EOS)).text == "<|im_end|>"
    assert run(choice, tokens(*HELLO), finish(finish_reason="length"))[0].text == "Hello world"


def test_eos_in_the_middle_of_a_delta_is_not_an_end():
    assert text_of(run(choice_for(), tokens(HELLO[0], EOS, *HELLO[1:]), finish())) == "Hello world"


@pytest.mark.parametrize("stop_token", [HELLO[3], 1])
@pytest.mark.parametrize("matched", [None, "the token"])
def test_a_stop_token_is_trimmed(stop_token, matched):
    choice = choice_for(stop_token_ids=(stop_token,), skip_special_tokens=False)
    matched = stop_token if matched else None
    deltas = run(choice, tokens(*HELLO[:3]), tokens(stop_token), finish(stop_token, matched_stop=matched))
    assert [delta.text for delta in deltas] == ["Hello", ""]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", matched)
    assert choice.completion_tokens == 4


def test_a_stop_token_that_the_server_alone_knew_of_is_text_whatever_brings_it():
    # In a chunk it has left before the finish says what it was; an answer must not depend on the convention.
    end = finish(*HELLO, matched_stop=HELLO[3])
    assert text_of(run(choice_for(), tokens(*HELLO[:3]), end)) == text_of(run(choice_for(), tokens(*HELLO), end)) == "Hello world"


def test_include_stop_shows_the_stop_token_too():
    choice = choice_for(stop_token_ids=(HELLO[3],), include_stop_str_in_output=True)
    assert text_of(run(choice, tokens(*HELLO), finish(matched_stop=HELLO[3]))) == "Hello world"


# Stop strings


@pytest.mark.parametrize("holdback", ["prefix", "window"])
@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize("matched", ["STOP", None], ids=["server names it", "old snapshot"])
def test_a_stop_string_is_cut_with_what_follows_it(holdback, size, matched):
    choice = choice_for(stop=("STOP",), stop_holdback=holdback)
    everything = HELLO + STOP
    chunks = [tokens(*everything[place : place + size]) for place in range(0, len(everything), size)]
    seen = ""
    for chunk in chunks:
        delta = choice.receive_tokens(chunk)
        seen += delta.text if delta is not None else ""
        assert "Hello world ".startswith(seen), "text that must be cut has left"
    last = choice.receive_finish(finish(matched_stop=matched))
    assert seen + last.text == "Hello world "
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")
    assert choice.completion_tokens == len(everything)


def test_include_stop_keeps_the_stop_string_and_cuts_after_it():
    choice = choice_for(stop=("STOP",), include_stop_str_in_output=True)
    assert text_of(run(choice, tokens(*HELLO, *STOP), finish(matched_stop="STOP"))) == "Hello world STOP"


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_text_that_only_began_like_a_stop_string_is_not_lost(reason):
    choice = choice_for(stop=("STOP IT",))
    delta, last = run(choice, tokens(*HELLO, *STOP[:5]), finish(finish_reason=reason))
    assert (delta.text, last.text) == ("Hello world ", "STOP")
    assert last.stop_reason is None


def test_text_is_kept_when_the_servers_stop_string_is_not_in_ours():
    choice = choice_for(stop=("STOP",))
    deltas = run(choice, tokens(*HELLO), finish(matched_stop="STOP"))
    assert text_of(deltas) == "Hello world"
    assert deltas[-1].stop_reason == "STOP"


def test_a_stop_string_counts_even_where_the_server_passed_over_it():
    choice = choice_for(stop=("STOP",))
    deltas = run(choice, tokens(*STOP[:5]), finish(finish_reason="length"))
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == (" ", "stop", "STOP")


def test_eos_after_text_that_ended_it_wins_over_our_stop_string():
    deltas = run(choice_for(stop=("zzz",)), tokens(*HELLO), tokens(EOS), finish(EOS))
    assert (text_of(deltas), deltas[-1].stop_reason) == ("Hello world", None)


def test_a_stop_string_within_min_tokens_is_no_stop():
    choice = choice_for(stop=("ell",), min_tokens=2)
    deltas = run(choice, tokens(HELLO[0]), tokens(HELLO[1]), tokens(*HELLO[2:]), finish(finish_reason="length"))
    assert text_of(deltas) == "Hello world"
    choice = choice_for(stop=("ell",), min_tokens=1)
    assert text_of(run(choice, *[tokens(token) for token in HELLO[:2]], finish())) == "H"
    choice = choice_for(stop=("ell",), min_tokens=1)
    assert text_of(run(choice, finish(*HELLO[:2]))) == "H", "also within one message"


@pytest.mark.parametrize("holdback", ["prefix", "window"])
def test_the_cut_is_where_the_match_was_and_not_at_an_unchecked_one_before_it(holdback):
    # "ab" within min_tokens does not count. vLLM looks for stop strings in new text only, so the second "ab" is the stop.
    choice = choice_for(stop=("ab", "ababc"), min_tokens=1, stop_holdback=holdback)
    token = ids("ab")
    assert text_of(run(choice, tokens(*token), tokens(*token), finish(matched_stop="ab"))) == "ab"


# max_tokens


def test_the_finish_rides_on_the_last_text_when_max_tokens_is_reached():
    choice = choice_for(max_tokens=4)
    deltas = run(choice, *[tokens(token) for token in HELLO], finish(finish_reason="length"))
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("H", None), ("ell", None), ("o", None), (" world", "length")]
    assert deltas[-1].token_ids == HELLO[3:]


def test_a_server_that_goes_on_beyond_max_tokens_loses_nothing():
    choice = choice_for(max_tokens=2)
    deltas = run(choice, *[tokens(token) for token in HELLO], finish(finish_reason="length"))
    assert text_of(deltas) == "Hello world"
    assert choice.completion_tokens == 4


# Order and failure


def test_tokens_after_the_finish_and_a_second_finish_are_out_of_order():
    choice = choice_for()
    run(choice, tokens(*HELLO), finish())
    assert choice.receive_plain(HELLO) is None
    with pytest.raises(OutOfOrderError, match="tokens for choice 0"):
        choice.receive_tokens(tokens(*HELLO))
    with pytest.raises(OutOfOrderError, match="second finish for choice 0"):
        choice.receive_finish(finish())
    assert choice.abandon() is None


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_server_that_gave_up_is_an_error(reason):
    choice = choice_for()
    with pytest.raises(UpstreamStatusError, match=reason) as caught:
        choice.receive_finish(finish(*HELLO, finish_reason=reason))
    assert caught.value.code is Code.INTERNAL
    assert not choice.finished


def test_an_unknown_finish_reason_is_passed_on():
    assert run(choice_for(), finish(finish_reason="repetition"))[-1].finish_reason == "repetition"


@pytest.mark.parametrize(
    ("sampling", "events", "text"),
    [
        ({}, [tokens(*HELLO)], None),
        ({"max_tokens": 4}, [tokens(*HELLO)], "Hello world"),
        ({"stop": ("STOP",)}, [tokens(*HELLO, *STOP[:3])], "ST"),
        ({"stop": ("STOP",)}, [tokens(*STOP[1:])], None),
        ({"stop": ("STOP",)}, [tokens(*HELLO, *STOP)], "Hello world "),
        ({"skip_special_tokens": False}, [tokens(*HELLO, EOS)], "Hello world"),
    ],
)
def test_what_was_held_back_comes_out_when_the_response_breaks_off(sampling, events, text):
    choice = choice_for(**sampling)
    run(choice, *events)
    delta = choice.abandon()
    assert (delta.text if delta is not None else None) == text


# Characters of several tokens, and the prompt


def test_a_character_waits_for_its_last_token():
    deltas = run(choice_for(), *[tokens(token) for token in FOX], finish())
    assert [delta.text for delta in deltas] == ["", "", "\N{SAUROPOD}", ""]


def test_a_character_that_never_ends_is_dropped():
    assert text_of(run(choice_for(), tokens(*HELLO, *FOX[:2]), finish(finish_reason="length"))) == "Hello world"


def test_the_prompt_may_begin_a_character():
    request = InferenceRequest(request_id="r", prompt_token_ids=[*HELLO, *FOX[:2]])
    choice = Choice(0, request, TOKENIZER, ADAPTER, eos_token_ids=frozenset((EOS,)))
    assert text_of(run(choice, tokens(FOX[2]), finish())) == "\N{SAUROPOD}"


# Log probabilities


def entry(token_id: int, logprob: float = -1.0, top=()) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(top))


def test_logprobs_come_with_their_tokens_and_as_many_alternatives_as_asked():
    top = ((HELLO[0], -0.5), (HELLO[1], -1.5), (HELLO[2], -2.5))
    (delta,) = run(choice_for(logprobs=2), tokens(HELLO[0], logprobs=(entry(HELLO[0], -0.5, top),)))
    assert delta.logprobs == (TextLogprob("H", -0.5, (("H", -0.5), ("ell", -1.5))),)
    (delta,) = run(choice_for(logprobs=0), tokens(HELLO[0], logprobs=(entry(HELLO[0], -0.5, top),)))
    assert delta.logprobs == (TextLogprob("H", -0.5),)


def test_logprobs_nobody_asked_for_are_not_shown():
    (delta,) = run(choice_for(), tokens(HELLO[0], logprobs=(entry(HELLO[0]),)))
    assert delta.logprobs == ()


def test_impossible_tokens_have_a_finite_logprob():
    (delta,) = run(choice_for(logprobs=1), tokens(HELLO[0], logprobs=(entry(HELLO[0], float("-inf"), [(HELLO[1], float("-inf"))]),)))
    assert delta.logprobs == (TextLogprob("H", -9999.0, (("ell", -9999.0),)),)


def test_logprobs_are_aligned_by_token_where_the_server_skips_some():
    given_for = [entry(HELLO[1], -0.1), entry(HELLO[3], -0.3)]
    (delta,) = run(choice_for(logprobs=0), tokens(*HELLO, logprobs=tuple(given_for)))
    assert [(known.token, known.logprob) for known in delta.logprobs] == [("ell", -0.1), (" world", -0.3)]


def test_pieces_of_a_character_have_empty_text_and_the_last_has_all_of_it():
    events = [tokens(token, logprobs=(entry(token, -float(place)),)) for place, token in enumerate(FOX)]
    deltas = run(choice_for(logprobs=0), *events, finish())
    assert [known.token for delta in deltas for known in delta.logprobs] == ["", "", "\N{SAUROPOD}"]


def test_an_alternative_is_shown_as_it_would_continue_and_leaves_no_trace():
    events = [
        tokens(*FOX[:2], logprobs=(entry(FOX[0]), entry(FOX[1]))),
        tokens(HELLO[0], logprobs=(entry(HELLO[0], -1.0, [(FOX[2], -2.0)]),)),
    ]
    deltas = run(choice_for(logprobs=1), *events)
    assert deltas[1].logprobs == (TextLogprob("\ufffdH", -1.0, (("\N{SAUROPOD}", -2.0),)),)


def test_logprobs_wait_with_the_text_they_belong_to():
    choice = choice_for(logprobs=0, stop_token_ids=(HELLO[1],))
    events = [tokens(token, logprobs=(entry(token),)) for token in HELLO[:2]]
    deltas = run(choice, *events, finish(HELLO[1], logprobs=(entry(HELLO[1]),), matched_stop=HELLO[1]))
    assert [[known.token for known in delta.logprobs] for delta in deltas] == [["H"], ["ell"]]
    assert text_of(deltas) == "H"


# The per-token path


@given(
    script=scripts(token_ids=TOKEN_IDS, matched_stops=("STOP", "a")),
    convention=st.sampled_from(CONVENTIONS),
    stop=st.sampled_from([(), ("STOP",), ("o", " wor"), ("a", "ab")]),
    max_tokens=st.none() | st.integers(1, 8),
    min_tokens=st.integers(0, 3),
    holdback=st.sampled_from(["prefix", "window"]),
)
def test_the_plain_path_says_what_the_general_path_says(script, convention: Convention, stop, max_tokens, min_tokens, holdback):
    sampling = {"stop": stop, "max_tokens": max_tokens, "min_tokens": min_tokens, "skip_special_tokens": False}
    plain, general = (choice_for(stop_holdback=holdback, **sampling) for _ in range(2))
    for event in events_of(script, convention):
        expected = [delta.text for delta in run(general, event)]
        text = plain.receive_plain(list(event.token_ids)) if isinstance(event, TokensEvent) and event.token_ids else None
        said = [text] if text is not None else [delta.text for delta in run(plain, event)]
        assert "".join(said) == "".join(expected)
        assert plain.completion_tokens == general.completion_tokens
    assert plain.finished
    assert general.finished


@pytest.mark.parametrize("sampling", [{}, {"stop": ("zzz",)}, {"max_tokens": 50}])
def test_the_plain_path_is_taken_by_ordinary_tokens(sampling):
    assert choice_for(**sampling).receive_plain(HELLO) == "Hello world"


@pytest.mark.parametrize(
    ("sampling", "token_ids"),
    [
        ({}, [EOS]),
        ({"max_tokens": 4}, HELLO),
        ({"logprobs": 0}, HELLO),
        ({"stop": ("z",), "min_tokens": 1}, HELLO),
        ({"stop_token_ids": (HELLO[3],)}, HELLO),
    ],
)
def test_the_plain_path_leaves_what_needs_a_decision(sampling, token_ids):
    choice = choice_for(**sampling)
    assert choice.receive_plain(token_ids) is None
    assert choice.completion_tokens == 0, "it took nothing yet"


@pytest.mark.parametrize("sampling", [{"max_tokens": 3}, {"stop": ("never",)}, {"stop_token_ids": (HELLO[0],)}])
def test_a_server_that_never_ends_is_not_held_for_ever(sampling):
    choice = choice_for(**sampling)
    seen = [choice.receive_tokens(tokens(HELLO[0])) for _ in range(6000)]
    told = [delta for delta in seen if delta is not None]
    assert sum(len(delta.token_ids) for delta in told) > 4000
    text = text_of([*told, choice.receive_finish(finish(finish_reason="length"))])
    assert text == text_of([choice_for().receive_tokens(tokens(HELLO[0]))]) * 6000


def test_nothing_is_kept_of_a_server_that_goes_on_long_after_a_stop_string():
    piece = text_of(run(choice_for(), tokens(HELLO[0])))
    choice = choice_for(stop=(piece * 2,))
    assert [choice.receive_tokens(tokens(HELLO[0])) for _ in range(6000)].count(None) >= 5999
    last = choice.receive_finish(finish(finish_reason="length"))
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", piece * 2)
    assert len(last.token_ids) < 5000
    assert choice.completion_tokens == 6000
