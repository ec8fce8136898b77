"""A simulated model server: real gRPC of one dialect and snapshot, a real tokenizer, and an engine that says what it is told to.

    server = SimServer("vllm.engine", snapshot="smg-0.4.28", model=ModelInfo(served_model_name="demo"))
    port = await server.start("127.0.0.1:0")
    ...
    await server.stop()

Without a script it answers with the last words of the prompt, one token per chunk, and then the end token. It obeys max_tokens,
min_tokens, stop, stop_token_ids, ignore_eos, n, logprobs, prompt_logprobs, stream and Abort as the real server of the dialect and
release does, and refuses what that refuses; the other sampling parameters change nothing. A prompt to embed gets a made-up vector of 8
numbers, after `delay_ms`, or the script's `error`.

A script is a JSON object: `[[sim {"text": "Hi", "delay_ms": 50}]]` anywhere in the prompt (the last one counts), else the server's own.
Unknown keys, wrong types and JSON that is none are answered with INVALID_ARGUMENT.

| key              | meaning                                                                                                    |
|------------------|------------------------------------------------------------------------------------------------------------|
| `text`           | what to answer; a list has one for each choice, from the start again if there are more choices              |
| `tokens`         | instead of `text`: `[[ids], [ids], ...]`, one list per step, verbatim; no end token is added                 |
| `step`           | tokens per step of `text`; 1. The end token is a step of its own                                            |
| `delay_ms`       | wait before each step; 0. Choices advance together, so n choices wait once                                  |
| `first_delay_ms` | wait before the first step, instead of `delay_ms`                                                           |
| `finish`         | finish_reason after the last step: "stop" adds the end token to `text`, others ("length", "abort", ...) do not |
| `counts`         | for servers that come in two kinds. `vllm.engine`, `sglang.scheduler`: "delta", the default, for the Python   |
|                  | servicer, whose Complete repeats the last step; "cumulative" for the Rust one, which counts and repeats       |
|                  | everything. `sglang.runtime`: "cumulative", the default, or "delta" for `--incremental-streaming-output`      |
| `complete`       | false: no finish, but status OK                                                                             |
| `empty_chunks`   | so many chunks without tokens for each choice first, when streaming                                         |
| `holds_stops`    | false: SGLang's scheduler does not keep back the tokens of what may become a stop string                    |
| `cached_tokens`  | cached prompt tokens to report                                                                              |
| `logprob`        | the log probability of every token, instead of one that depends on its id                                   |
| `error`          | `{"code": "UNAVAILABLE", "message": "...", "after": 2}`: the failure after so many messages, or at the end if |
|                  | there are fewer; 0 is before the first, and before any wait. It comes as the server would tell it: by the    |
|                  | status, by another status that hides it, as an item or a body of the stream, or as an aborted choice         |
| `waiting`        | only in the server's own: requests in its queue, as GetLoads tells; 0, for it answers all at once            |
| `kv_cache_usage` | likewise: the share of the KV cache in use, instead of what the prompts of the running requests take         |
"""

from ._script import Failure, Script, decode_script
from ._server import SimServer, run

__all__ = ["Failure", "Script", "SimServer", "decode_script", "run"]
