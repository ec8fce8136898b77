"""The ways to speak to a model server that the targets try: every dialect, and OpenAI JSON passed through."""

from __future__ import annotations

from gaie_codec import (
    BodyEvent,
    Event,
    FinishEvent,
    Limits,
    ModelInfo,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    UpstreamCall,
    encode_frame,
)
from gaie_codec._conventions import Teller
from gaie_codec.adapters import DIALECTS
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
MODEL = ModelInfo(max_model_len=4096)
LIMITS = Limits(max_message_bytes=4096, max_calls=8)
OLDEST = {"vllm.engine": "intree-0.14.0", "vllm.inference": "0.25.1", "sglang.scheduler": "intree-0.5.8", "sglang.runtime": "0.5.16"}


def transcoders() -> dict[str, Transcoder]:
    """By name: the newest snapshot of every dialect, and the oldest of those whose oldest has habits of its own."""

    def made(dialect: str, snapshot: str | None = None, **how: bool) -> Transcoder:
        return Transcoder(dialect, snapshot=snapshot, tokenizer=TOKENIZER, model=MODEL, limits=LIMITS, **how)  # type: ignore[arg-type]

    found = {dialect: made(dialect, passthrough=False) for dialect in DIALECTS}
    found |= {f"{dialect} {snapshot}": made(dialect, snapshot, passthrough=False) for dialect, snapshot in OLDEST.items()}
    return found | {"passed through": made("sglang.runtime"), "passed through 0.5.16": made("sglang.runtime", "0.5.16")}


def answer(transcoder: Transcoder, call: UpstreamCall, token_ids: list[int], *, finish: FinishEvent | None = None) -> list[Event]:
    """What a server says that generates these tokens for every choice of the call, one at a time."""
    adapter, request = transcoder.adapter, call.inference
    way = transcoder.passthrough
    if way is not None and call.path in way.paths.values():
        choices = ",".join(f'{{"index":{index},"delta":{{"content":"a"}},"finish_reason":"stop"}}' for index in range(request.sampling.n))
        body = f'{{"choices":[{choices}],"usage":{{"prompt_tokens":3}}}}'.encode()
        return [BodyEvent(data=body), BodyEvent(data=b"", is_last=True)] if request.stream else [BodyEvent(data=body, is_last=True)]
    teller = Teller(adapter.convention, request, sends_text=adapter.sends_text)
    events: list[Event] = []
    for index in range(call.choices):
        detokenizer = TOKENIZER.detokenizer(request.prompt_token_ids)
        for token_id in token_ids:
            entries = (TokenLogprob(token_id=token_id, logprob=-0.5, top=((token_id, -0.5), (5, -2.0))),)
            logprobs = entries if request.sampling.logprobs is not None else ()
            text = detokenizer.decode((token_id,))
            events += teller.gain(TokensEvent(index=index, token_ids=[token_id], text=text, logprobs=logprobs, prompt_tokens=9))
        ending = finish if finish is not None else FinishEvent()
        events += teller.finish(FinishEvent(index=index, finish_reason=ending.finish_reason, matched_stop=ending.matched_stop))
    return events


def message(transcoder: Transcoder, path: str, event: Event) -> bytes:
    """The event on the wire."""
    if isinstance(event, BodyEvent):
        assert transcoder.passthrough is not None
        return bytes(transcoder.passthrough.encode_response(event, path).SerializeToString())
    return bytes(transcoder.adapter.encode_response(event).SerializeToString())


def frames(transcoder: Transcoder, path: str, events: list[Event], *, encoding: str = "identity") -> bytes:
    """All of them, each in its frame."""
    return b"".join(encode_frame(message(transcoder, path, event), encoding=encoding) for event in events)


__all__ = ["MODEL", "TOKENIZER", "answer", "frames", "message", "transcoders"]
