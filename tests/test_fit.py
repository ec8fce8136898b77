"""A request held against an adapter: refused by name, dropped and reported, or as it was."""

from __future__ import annotations

import msgspec
import pytest

from gaie_codec import (
    Constraint,
    InferenceRequest,
    MalformedRequestError,
    Media,
    SamplingParams,
    UnsupportedFieldError,
    adapters,
    snapshots,
)
from gaie_codec._fit import asked_for, fit

SCHEDULER = adapters.get(snapshots.load("sglang.scheduler"))
RUNTIME = adapters.get(snapshots.load("sglang.runtime"))
API = adapters.get(snapshots.load("sglang.api"))
PLAIN = InferenceRequest(request_id="r")


def asking(sampling=None, **fields):
    return InferenceRequest(request_id="r", sampling=SamplingParams(**(sampling or {})), **fields)


def test_defaults_ask_for_nothing():
    assert asked_for(PLAIN) == ["request_id"]
    assert fit(SCHEDULER, PLAIN, drops=False) == (PLAIN, ())
    everything = asking({"top_k": 5, "constraint": Constraint(kind="regex")}, priority=1, prompt_token_ids=[1])
    assert asked_for(everything) == ["request_id", "prompt_token_ids", "priority", "top_k", "constraint.regex"]


@pytest.mark.parametrize(
    ("request_", "public"),
    [
        (asking(priority=1), "priority"),
        (asking(prompt_text="p"), "prompt"),
        (asking(media=(Media(kind="image", url="u"),)), "messages"),
        (asking({"seed": 0}), "seed"),
        (asking({"bad_words": ("x",)}), "bad_words"),
    ],
)
def test_what_cannot_be_said_is_refused_by_its_public_name_or_dropped(request_, public):
    with pytest.raises(UnsupportedFieldError) as caught:
        fit(SCHEDULER, request_, drops=False)
    assert caught.value.param == public
    assert caught.value.message == (
        f"`{public}` cannot be sent to this model server (sglang.scheduler, snapshot {SCHEDULER.snapshot.name})"
    )
    assert fit(SCHEDULER, request_, drops=True) == (PLAIN, (public,))


def test_a_kind_of_constraint_goes_by_response_format():
    without = msgspec.structs.replace(SCHEDULER, carries=SCHEDULER.carries - {"constraint.regex"})
    with pytest.raises(UnsupportedFieldError) as caught:
        fit(without, asking({"constraint": Constraint(kind="regex", value="a")}), drops=False)
    assert caught.value.param == "response_format"
    other = asking({"constraint": Constraint(kind="grammar", value="a"), "seed": 1})
    kept, dropped = fit(without, other, drops=True)
    assert (kept.sampling.constraint, dropped) == (other.sampling.constraint, ("seed",))


def test_everything_that_is_lost_is_named():
    kept, dropped = fit(SCHEDULER, asking({"seed": 1, "bad_words": ("x",), "top_k": 5}, priority=1, session_id="s"), drops=True)
    assert dropped == ("priority", "session_id", "seed", "bad_words")
    assert kept == asking({"top_k": 5})


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (asking({"top_p": 1e-40}), "top_p"),
        (asking({"max_tokens": 2**31}), "max_tokens"),
        (asking(data_parallel_rank=2**31), "x-data-parallel-rank"),
    ],
)
@pytest.mark.parametrize("drops", [True, False])
def test_a_value_that_the_wire_has_no_room_for_is_never_sent(request_, param, drops):
    with pytest.raises(MalformedRequestError, match=param) as caught:
        fit(SCHEDULER, request_, drops=drops)
    assert (caught.value.param, caught.value.http_status) == (param, 400)


def test_the_number_of_choices_is_left_to_the_calls():
    assert "n" not in API.carries
    several = asking({"n": 3, "max_tokens": 5})
    assert fit(API, several, drops=False) == (several, ())


def test_a_server_that_would_stop_early_has_to_be_told_when():
    for adapter in (RUNTIME, API):
        with pytest.raises(MalformedRequestError, match="128") as caught:
            fit(adapter, PLAIN, drops=True)
        assert caught.value.param == "max_tokens"
        assert fit(adapter, asking({"max_tokens": 128}), drops=False)[1] == ()


@pytest.mark.parametrize("name", ["skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"])
def test_what_the_gateway_does_to_its_own_text_it_cannot_do_to_the_servers(name):
    value = name == "include_stop_str_in_output"
    from_ids = asking({name: value, "max_tokens": 5}, prompt_token_ids=[1])
    assert fit(RUNTIME, from_ids, drops=False) == (from_ids, ())
    with pytest.raises(UnsupportedFieldError) as caught:
        fit(RUNTIME, asking({name: value, "max_tokens": 5}, prompt_text="p"), drops=False)
    assert caught.value.param == name


def test_no_watermark_is_what_a_wire_without_them_means():
    request = asking(watermarking=False)
    assert fit(SCHEDULER, request, drops=False) == (PLAIN, ())
    with pytest.raises(UnsupportedFieldError) as caught:
        fit(SCHEDULER, asking(watermarking=True), drops=False)
    assert caught.value.param == "watermarking"


def test_a_hint_is_dropped_and_reported():
    assert fit(SCHEDULER, asking(session_id="s"), drops=False) == (PLAIN, ("session_id",))


def test_more_of_the_likeliest_than_a_wire_can_count_cut_off_nothing():
    kept, dropped = fit(SCHEDULER, asking({"top_k": 2**31}), drops=False)
    assert (kept.sampling.top_k, dropped) == (2**31 - 1, ())
