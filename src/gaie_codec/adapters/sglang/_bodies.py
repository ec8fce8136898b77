"""What SGLang's OpenAI handlers read of a body, by kind and release. They pass over any other field without a word.

Names as of the request models in SGLang 0.5.16, with those that were seen to be new in 0.5.21 and 0.5.23. Releases between are taken for
the older.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...snapshots import SNAPSHOTS

_SAMPLING: Final = (
    "model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options temperature top_p user"
    " return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details top_k min_p min_tokens regex ebnf"
    " repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos skip_special_tokens lora_path session_id session_params"
    " response_format custom_params custom_logit_processor images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank"
    " disagg_prefill_dp_rank data_parallel_rank rid extra_key cache_salt priority"
)
_FIELDS: Final = {
    "chat": (
        f"{_SAMPLING} messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls return_prompt_token_ids"
        " return_meta_info reasoning_effort task continue_final_message separate_reasoning stream_reasoning chat_template_kwargs"
        " max_dynamic_patch min_dynamic_patch use_audio_in_video input_ids"
    ),
    "completions": f"{_SAMPLING} prompt best_of echo suffix json_schema custom_labels",
    "embeddings": "input model encoding_format dimensions user rid priority lora_path embed_override_token_id embed_overrides",
    "classify": "model input user rid priority",
    "score": (
        "query items embed_override_token_id query_embed_overrides item_embed_overrides label_token_ids apply_softmax item_first"
        " return_pooled_hidden_states model"
    ),
    "rerank": "query documents instruct top_n return_documents",
}
_NEW: Final = (
    (
        "0.5.21",
        {
            "chat": (
                "return_spec_tokens_details return_token_ids return_input_ids_in_sglext return_output_ids_in_sglext return_sampling_mask"
                " sampling_logprobs_mode video_config"
            ),
            "completions": "return_spec_tokens_details return_token_ids",
            "score": "temperature return_token_logprobs score_extraction_token",
        },
    ),
    (
        "0.5.23",
        {
            "chat": "return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 thinking mm_processor_kwargs watermark",
            "completions": "watermark mm_processor_kwargs",
        },
    ),
)


def body_fields(snapshot: str) -> Mapping[str, frozenset[str]]:
    """The fields by kind of body, for the oldest release that needs this snapshot of the schema."""
    order = SNAPSHOTS["sglang.runtime"]
    # A snapshot that is not ours is a candidate for what comes next.
    age = order.index(snapshot) if snapshot in order else len(order)
    known = {kind: set(names.split()) for kind, names in _FIELDS.items()}
    for since, added in _NEW:
        if age >= order.index(since):
            for kind, names in added.items():
                known[kind].update(names.split())
    return {kind: frozenset(names) for kind, names in known.items()}
