"""Addresses on the wire of the Endpoint Picker Protocol, and who is picked."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import CodecError, InferenceRequest, Media, UsageError
from gaie_codec.ext_proc.messages import ProcessingRequest
from gaie_codec.ext_proc.picking import (
    PICKERS,
    Candidate,
    MalformedDestinationError,
    NoEndpointError,
    RequestShedError,
    decode_destinations,
    decode_subset,
    encode_address,
    encode_destination,
    is_in_subset,
    least_inflight,
    prefix_affinity,
    round_robin,
    served_endpoint,
)


def candidate(number, **fields):
    return Candidate(address=f"10.0.0.{number}:8000", dialect="vllm.engine", **fields)


def request(token_ids=(), **fields):
    return InferenceRequest(request_id="r", prompt_token_ids=list(token_ids), **fields)


def context(namespace="envoy.lb.subset_hint", **fields):
    metadata = ProcessingRequest().metadata_context
    metadata.filter_metadata[namespace].update({name.replace("_", "-"): value for name, value in fields.items()})
    return metadata


def hint(value):
    return decode_subset(context(x_gateway_destination_endpoint_subset=value))


# Destinations

ADDRESSES = st.builds(lambda host, port: encode_address(str(host), port), st.ip_addresses(), st.integers(min_value=1, max_value=65535))


@given(st.lists(ADDRESSES, min_size=1, max_size=4))
def test_what_is_encoded_decodes_to_the_same(addresses):
    candidates = [Candidate(address=address, dialect="http") for address in addresses]
    assert decode_destinations(encode_destination(candidates)) == tuple(addresses)


def test_a_destination_has_one_spelling():
    assert decode_destinations("[0:0::0:1]:80,[FD00::A]:8000,1.2.3.4:65535") == ("[::1]:80", "[fd00::a]:8000", "1.2.3.4:65535")


NO_DESTINATION = """
1.2.3.4 1.2.3.4: 1.2.3.4:0 1.2.3.4:65536 1.2.3.4:080 1.2.3:80 1.2.3.4.5:80 01.2.3.4:80 host:80 ::1:80 [::1] [::1]:x [1.2.3.4]:80
[fe80::1%eth0]:80 1.2.3.4:80, 1.2.3.4:\N{ARABIC-INDIC DIGIT EIGHT}
"""


@pytest.mark.parametrize("text", [*NO_DESTINATION.split(), "", "1.2.3.4:80, 1.2.3.5:80", " 1.2.3.4:80"])
def test_what_is_no_destination_is_refused_and_repeated_only_in_the_log(text):
    with pytest.raises(MalformedDestinationError, match=r"destination \d .*is not IP:PORT") as caught:
        decode_destinations(text)
    assert not text or text not in caught.value.message


@given(st.text())
def test_any_text_is_destinations_or_a_codec_error(text):
    with contextlib.suppress(CodecError):
        assert decode_destinations(text)


def test_no_destination_cannot_be_told():
    with pytest.raises(UsageError, match="no candidate"):
        encode_destination([])
    with pytest.raises(UsageError, match="'localhost' is not an IP address"):
        encode_address("localhost", 80)
    with pytest.raises(UsageError, match="'fe80::1%lo'"):
        encode_address("fe80::1%lo", 80)


# The subset


def test_a_subset_that_is_not_set_restricts_nothing():
    bare = ProcessingRequest().metadata_context
    for metadata in (bare, context(), context(another_key="1.2.3.4:80"), context(x_gateway_destination_endpoint_subset=None)):
        before = metadata.SerializeToString()
        assert decode_subset(metadata) is None
        assert metadata.SerializeToString() == before, "asking must not write"
    assert is_in_subset("1.2.3.4:80", None)


@pytest.mark.parametrize("value", [[], "", [""], ["host:80"], [7.0], 7.0, True, {"a": "1.2.3.4:80"}, ["1.2.3.4:99999"]])
def test_a_subset_that_says_nothing_readable_is_empty(value):
    assert hint(value) == frozenset()


@pytest.mark.parametrize("value", [["1.2.3.4:80", "1.2.3.5"], "1.2.3.4:80,1.2.3.5", "1.2.3.4:80, 1.2.3.5 ", ["1.2.3.4:80,1.2.3.5"]])
def test_a_subset_is_a_list_or_text_with_commas(value):
    subset = hint(value)
    assert subset == {"1.2.3.4:80", "1.2.3.5"}
    asked = ["1.2.3.4:80", "1.2.3.4:81", "1.2.3.5:80", "1.2.3.5:81", "1.2.3.6:80"]
    assert [is_in_subset(address, subset) for address in asked] == [True, False, True, True, False]


@pytest.mark.parametrize("text", ["[fd00::1]:8000", "[FD00:0::1]:8000", "[fd00:0:0:0:0:0:0:1]:8000", "fd00:0:0:0:0:0:0:1:8000"])
def test_an_ipv6_address_of_a_subset_matches_its_port(text):
    assert is_in_subset("[fd00::1]:8000", hint([text]))
    assert not is_in_subset("[fd00::1]:8001", hint([text]))


@pytest.mark.parametrize("text", ["fd00::1", "[fd00::1]", "FD00:0::0:1"])
def test_an_ipv6_address_of_a_subset_without_a_port_matches_all_ports(text):
    assert is_in_subset("[fd00::1]:8000", hint([text]))
    assert is_in_subset("[fd00::1]:8001", hint([text]))
    assert not is_in_subset("[fd00::2]:8000", hint([text]))


@given(st.text())
def test_any_text_is_a_subset(text):
    assert isinstance(hint(text), frozenset)


def test_the_served_endpoint_is_read_where_it_is_told():
    def served(value):
        return served_endpoint(context("envoy.lb", x_gateway_destination_endpoint_served=value))

    assert served("1.2.3.4:80") == "1.2.3.4:80"
    assert served("[FD00::1]:80") == "[fd00::1]:80"
    assert [served("nonsense"), served(7.0), served(None), served_endpoint(ProcessingRequest().metadata_context)] == [None] * 4


# Pickers


@pytest.mark.parametrize("name", PICKERS)
def test_every_picker_puts_all_candidates_in_an_order_and_none_where_there_are_none(name):
    pick = PICKERS[name]()
    given_ones = [candidate(number) for number in (1, 2, 3)]
    assert Counter(pick(request(range(200)), given_ones)) == Counter(given_ones)
    assert list(pick(request(), [])) == []


@pytest.mark.parametrize("name", PICKERS)
def test_idle_servers_share_requests_that_have_nothing_in_common(name):
    pick = PICKERS[name]()
    idle = [candidate(number) for number in (1, 2, 3)]
    firsts = Counter(pick(request(range(place, place + 64)), idle)[0].address for place in range(30))
    assert set(firsts.values()) == {10}


def test_round_robin_starves_nobody_where_subsets_take_turns():
    pick = round_robin()
    one, two, three, four = (candidate(number) for number in (1, 2, 3, 4))
    firsts = Counter()
    for _ in range(20):
        for subset in ([one, two], [three, four]):
            firsts[pick(request(), subset)[0].address] += 1
    assert set(firsts.values()) == {10}


def test_the_least_loaded_comes_first():
    loaded = [candidate(1, in_flight=2), candidate(2, in_flight=1, waiting=3), candidate(3, in_flight=1), candidate(4, running=9)]
    assert [one.address[7] for one in least_inflight()(request(), loaded)] == ["4", "3", "1", "2"]


def test_a_prompt_goes_where_its_start_went():
    pick = prefix_affinity(block_tokens=4)
    servers = [candidate(number) for number in (1, 2, 3)]
    first, second = pick(request(range(20)), servers)[0], pick(request(range(100, 120)), servers)[0]
    assert first != second
    for _ in range(5):
        assert pick(request([*range(20), *range(50)]), servers)[0] == first
        assert pick(request(range(100, 109)), servers)[0] == second
    assert pick(request(range(3)), servers)[0] not in (first, second), "less than a block says nothing"


def test_the_longest_start_wins():
    pick = prefix_affinity(block_tokens=4)
    pair = [candidate(1), candidate(2)]
    assert pick(request(range(8)), pair[:1])[0] == pair[0]
    assert pick(request(range(16)), pair[1:])[0] == pair[1]
    assert [pick(request(range(length)), pair)[0] for length in (40, 16)] == [pair[1]] * 2
    assert pick(request([*range(8), *range(70, 90)]), [candidate(1), candidate(2, in_flight=1)])[0] == pair[0], "both have this start"


@pytest.mark.parametrize(
    "fields", [{"model": "b"}, {"lora_name": "b"}, {"cache_salt": "b"}, {"media": (Media(kind="image", url="data:,b"),)}]
)
def test_what_a_kv_cache_keeps_apart_is_kept_apart(fields):
    pick = prefix_affinity(block_tokens=4)
    pair = [candidate(1), candidate(2)]
    plain = pick(request(range(40)), pair)[0]
    assert pick(request(range(40)), pair)[0] == plain
    other = pick(request(range(40), **fields), pair)[0]
    assert other != plain, "nothing is known of it, so that it is the other's turn"
    assert pick(request(range(40), **fields), pair)[0] == other


def test_text_has_affinity_too():
    pick = prefix_affinity(block_tokens=4)
    pair = [candidate(1), candidate(2)]
    first = pick(request(prompt_text="You are a h\N{LATIN SMALL LETTER E WITH ACUTE}lpful assistant."), pair)[0]
    for _ in range(3):
        assert pick(request(prompt_text="You are a h\N{LATIN SMALL LETTER E WITH ACUTE}lpful assistant. Go \ud800 on."), pair)[0] == first


def test_an_overloaded_server_gives_up_its_prefixes():
    pick = prefix_affinity(block_tokens=4, max_lead=3)
    first, second = candidate(1), candidate(2)
    assert pick(request(range(40)), [first])[0] == first
    assert pick(request(range(40)), [candidate(1, in_flight=2, waiting=1), second])[0].address == first.address
    assert pick(request(range(40)), [candidate(1, in_flight=2, waiting=2), second])[0] == second
    assert pick(request(range(40)), [candidate(1, in_flight=1), second])[0] == second, "which has the prefix now as well"


def test_old_prefixes_are_forgotten_and_their_ends_first():
    pick = prefix_affinity(block_tokens=4, max_blocks=10)
    one, two = candidate(1), candidate(2)
    pick(request(range(24)), [one])  # 6 blocks
    pick(request(range(1000, 1024)), [two])
    pick(request(range(24)), [two])  # the 4 blocks that were kept belong to both, the last 2 to the second alone
    assert pick(request(range(24)), [one, candidate(2, in_flight=1)])[0].address == two.address
    assert pick(request(range(16)), [one, candidate(2, in_flight=1)])[0] == one


def test_ids_that_no_server_takes_are_no_reason_to_fail():
    pick = prefix_affinity(block_tokens=1)
    for token_ids in ([-1], [2**32], [2**70]):
        assert pick(request(token_ids), [candidate(1)])


def test_a_long_prompt_is_picked_for_in_milliseconds():
    pick = prefix_affinity()
    servers = [candidate(number) for number in range(1, 17)]
    long = request(range(100_000))
    taken_s = []
    for _ in range(5):
        started = time.perf_counter()
        pick(long, servers)
        taken_s.append(time.perf_counter() - started)
    assert min(taken_s) < 0.03  # 3 ms where nobody else works


@pytest.mark.parametrize("name", ["block_tokens", "max_blocks", "max_prompt_blocks"])
def test_a_bound_of_nothing_is_refused_by_name(name):
    with pytest.raises(UsageError, match=name):
        prefix_affinity(**{name: 0})


def test_errors_have_the_status_of_the_protocol():
    assert (NoEndpointError("x").http_status, RequestShedError("x").http_status) == (503, 429)
