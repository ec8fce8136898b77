"""Facts of SGLang's wire that more than one fake needs. Standard library only."""

SAMPLING_PARAMS = tuple(
    (
        "max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty presence_penalty "
        "repetition_penalty min_new_tokens n beam_width json_schema regex ebnf structural_tag ignore_eos skip_special_tokens "
        "spaces_between_special_tokens no_stop_trim stream_interval logit_bias sampling_seed custom_params watermark stop_strs "
        "stop_regex_strs stop_str_max_len stop_regex_max_len is_normalized ebnf_full_assistant"
    ).split()
)
"""The fields of the positional array of sampling parameters. 0.5.22 has fewer at the end."""
