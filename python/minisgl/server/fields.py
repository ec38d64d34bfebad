"""The fields of requests that are not known by a model of pydantic's: one table for all bodies, and the parts of them.

The names are those of OpenAI, Anthropic, vLLM, SGLang, llama.cpp, Ollama, TGI, text-generation-webui, OpenRouter and
others whose clients are pointed at this server. What is in no table here is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from minisgl.server.strict import Fields

EMPTY: tuple[Any, ...] = ({}, [], 0, "", False)
Refused = dict[str, tuple[Any, ...]]


def _each(names: str, *neutral: Any) -> Refused:
    return dict.fromkeys(names.split(), neutral)


# OpenAI's, without bearing on what is generated.
NO_EFFECT = _each(
    """user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options
    prediction verbosity"""
)
# They would change the answer, and are not supported, with the values that mean the same as leaving them out. A body
# that knows such a field takes it all the same.
_OF_INPUT = """audio audio_data context documents functions image_data images input input_embeds input_ids instructions
    lora lora_path lora_request adapter adapter_id adapters mcp_servers media_io_kwargs messages mm_processor_kwargs
    negative_prompt plugins prompt prompt_embeds safe_prompt session_params suffix system template chat_template
    conversation tool_prompt truncate video_data raw search_options enable_search enable_code_interpreter tools"""
_OF_SAMPLING = """allowed_token_ids bad_words ban_eos_token banned_tokens custom_logit_processor custom_params
    custom_token_bans do_early_stopping dry_multiplier dynamic_temperature dynatemp_range early_stopping
    encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff logit_processors logits_processors min_keep min_length
    max_length max_time mirostat mirostat_mode no_repeat_ngram_size num_beam_groups penalty_alpha sampler_priority
    samplers smoothing_factor stop_regex t_max_predict_ms temperature_last token_healing top_a use_beam_search watermark
    xtc_probability ignore_stop"""
_OF_OUTPUT = """background continue_final_message decoder_input_details deferred details ebnf echo format grammar
    grammar_string guided_json guided_regex guided_choice guided_grammar json_schema max_tool_calls no_stop_trim
    output_config output_format post_sampling_probs regex response_format return_full_text return_hidden_states
    return_logprob return_prompt_token_ids return_routed_experts return_text_in_logprobs return_token_ids
    return_token_strs return_tokens return_tokens_as_token_ids structural_tag structured_outputs thinking_forced_open
    token_ids_logprob top_logprobs top_logprobs_num top_n_tokens n_probs with_pieces"""
UNSUPPORTED: Refused = {
    **_each(f"{_OF_INPUT} {_OF_SAMPLING} {_OF_OUTPUT}", *EMPTY),
    **_each(
        """best_of encoder_repetition_penalty guidance_scale length_penalty n num_beams num_return_sequences tfs tfs_z
        typ_p typical typical_p""",
        1,
    ),
    **_each("n_predict num_predict nsigma top_n_sigma truncate_prompt_tokens logprob_start_len", -1),
    **_each(
        """add_bos_token add_generation_prompt detokenize do_sample include_reasoning parse_tool_calls
        separate_reasoning spaces_between_special_tokens""",
        True,
    ),
    "add_special_tokens": (False,),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prompt_logprobs": (False,),
    "reasoning_format": ("auto", "parsed", "deepseek"),
    "repeat_last_n": (-1, 64),
    "search_parameters": ({"mode": "off"}, *EMPTY),
    "tool_choice": ("none", "auto"),
    "web_search_options": (),
}
# Names that other servers have for fields of ours.
OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "sampling_seed": "seed",
    "stop_sequences": "stop",
}

REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
ANY = Fields(any_name=True)
LEFT_OUT = Fields(left_out=True)
PART = Fields(
    ("type", "text", "refusal", "thinking", "reasoning", "summary", "content"), ignored=("annotations", "logprobs")
)
FUNCTION = Fields(("name", "description", "parameters", "strict"))
TOOL = Fields(("type", "function"), nested={"function": FUNCTION})
_CALLED = Fields(("name", "arguments", "args", "input"), ignored=("parsed_arguments",))
CALL = Fields(
    ("id", "type", "function", "custom", *_CALLED.known),
    ignored=("index",),
    nested={"function": _CALLED, "custom": _CALLED},
)
_SAID = ("role", "content", "name")
_IN_PARTS = {"content": PART}
_NO_IMAGES = {"images": EMPTY}
_RESULT = Fields((*_SAID, "tool_call_id"), _NO_IMAGES, nested=_IN_PARTS)
MESSAGE = Fields(
    _SAID,
    _NO_IMAGES,
    nested=_IN_PARTS,
    by="role",
    kinds={
        "assistant": Fields(
            (*_SAID, "refusal", "tool_calls", "function_call", *REASONING),
            {"prefix": EMPTY},
            # What servers and client libraries put beside a message, and clients send back with it.
            ("annotations", "audio", "parsed", "provider_specific_fields"),
            {**_IN_PARTS, "tool_calls": CALL},
        ),
        "tool": _RESULT,
        "function": _RESULT,
    },
)
_OF_ITEMS = ("type", "id", "status")
_MESSAGE_ITEM = Fields((*_OF_ITEMS, "role", "content"), ignored=("phase",), nested=_IN_PARTS)
_CALL_ITEM = Fields((*_OF_ITEMS, "call_id", "name", "arguments", "input"), ignored=("parsed_arguments",))
_OUTPUT_ITEM = Fields((*_OF_ITEMS, "call_id", "name", "output"), nested={"output": PART})
_OTHER_ITEMS = """apply_patch_call apply_patch_call_output code_interpreter_call compaction computer_call
    computer_call_output file_search_call image_generation_call local_shell_call local_shell_call_output
    mcp_approval_request mcp_approval_response mcp_call mcp_list_tools program program_output shell_call
    shell_call_output tool_search_call tool_search_output web_search_call"""
ITEM = Fields(  # of /v1/responses; one without a type is a message
    _MESSAGE_ITEM.known,
    ignored=_MESSAGE_ITEM.ignored,
    nested=_IN_PARTS,
    by="type",
    kinds={
        "message": _MESSAGE_ITEM,
        "reasoning": Fields((*_OF_ITEMS, "summary", "content"), ignored=("encrypted_content",)),
        "function_call": _CALL_ITEM,
        "function_call_output": _OUTPUT_ITEM,
        "custom_tool_call": _CALL_ITEM,
        "custom_tool_call_output": _OUTPUT_ITEM,
        **dict.fromkeys(_OTHER_ITEMS.split(), LEFT_OUT),
    },
)
JSON_SCHEMA = Fields(("name", "description", "schema", "strict", "whitespace"))
RESPONSE_FORMAT = Fields(("type", "json_schema", *JSON_SCHEMA.known), nested={"json_schema": JSON_SCHEMA})
STRUCTURED = Fields(
    ("json", "regex", "choice", "grammar", "json_object", "whitespace"),
    _each("structural_tag disable_additional_properties whitespace_pattern", *EMPTY),
)
STREAM_OPTIONS = Fields(("include_usage",), ignored=("include_obfuscation",))
_PARTS: Mapping[str, Fields] = {
    "messages": MESSAGE,
    "tools": TOOL,
    "response_format": RESPONSE_FORMAT,
    "structured_outputs": STRUCTURED,
    "stream_options": STREAM_OPTIONS,
    **dict.fromkeys(("chat_template_kwargs", "logit_bias", "metadata"), ANY),
}
# Objects in which other servers and libraries have their sampling fields: here, they stand in the body itself.
_SAMPLING = """temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty repeat_penalty seed
    stop max_tokens max_new_tokens logit_bias min_tokens stop_token_ids"""
_WRAPPERS = dict.fromkeys(
    ("options", "parameters", "extra_body", "generation_config", "sampling_params"),
    Fields((), {**UNSUPPORTED, **_each(_SAMPLING)}),
)


def fields_of(
    model: type[BaseModel],
    refused: Mapping[str, tuple[Any, ...]] | None = None,
    nested: Mapping[str, Fields] | None = None,
    others: Mapping[str, str] | None = None,
) -> Fields:
    """Of a body that says what to generate. refused, nested, others: beside, or instead of, those of all bodies."""
    known = frozenset(model.model_fields)
    merged: Refused = {**UNSUPPORTED, **(refused or {})}
    return Fields(
        known,
        {name: neutral for name, neutral in merged.items() if name not in known},
        NO_EFFECT.keys() - known,
        {**_PARTS, **_WRAPPERS, **(nested or {})},
        {name: meant for name, meant in (OTHER_NAMES | dict(others or {})).items() if name not in known},
    )
