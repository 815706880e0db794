"""A small random model of any family, from the family's own config class: its defaults, with every size made small."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

MOST_PARAMETERS = 10**7
WIDTH, HEADS, HEAD = 32, 4, 8
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# By the names that configs use for them. A family takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "model_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "input_embedding_size", "embedding_dim"), WIDTH),
    **dict.fromkeys(("output_embedding_size", "attention_hidden_size", "hidden_size_per_layer_input"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "dff", "d_inner", "dim_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "feed_forward_size", "ffn_hidden_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size"), 16),
    **dict.fromkeys((*LAYERS, "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_key_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "swa_head_dim"), HEAD),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "attention_head_size", "d_kv", "global_head_dim"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim"), 16),
    "index_n_heads": 4,
    "index_topk": 256,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 5),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD),
    "mamba_expand": 2,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "rotary_dim": 4,
    # Of towers.
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), WIDTH),
    **dict.fromkeys(("depth", "num_global_layers"), 2),
    "base_channels": 32,
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size"), None),  # the vocabulary's
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), None),
    "laurel_rank": 8,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}
# Lists with what each layer is, and what a family may have in their place.
KINDS = ("layer_types", "mlp_layer_types")
OWN_KINDS = ("layers_block_type", "block_types", "num_hidden_layers")
DROPOUTS = ("dropout", "dropout_p", "resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_dropout", "emb_pdrop")
LINEAR_AND_FULL = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
MULTIMODAL_ROPE = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "glm4v_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# What sizes alone do not make small, or what a family wants beside them.
MORE: dict[str, dict[str, Any]] = {
    "emu3": {"vocabulary_map": {"<image>": 2, "<|extra_200|>": 3}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon": {"new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1]},
    **{name: {"layer_types": ["linear_attention", "full_attention"]} for name in LINEAR_AND_FULL},
    **{name: {"rope_parameters": MROPE} for name in MULTIMODAL_ROPE},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 0]}},  # of half a head
    "dots3_note_text": {
        "per_layer_config": {
            "1": {
                **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), HEADS),
                **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), HEAD),
                **{"q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 2 * HEAD},
            }
        }
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD},
        **{"indexer_budget": 256, "indexer_compress_ratio": 4},
    },
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Every model type that transformers holds a causal language model for, or a model of text with images or sound."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def tiny_config(family: str, vocab_size: int) -> Any:
    """The family's config with small sizes, and nothing of its own at random."""
    return _small(type(AutoConfig.for_model(family)), vocab_size, MORE.get(family, {}))


def _small(config_class: Any, vocab_size: int, more: dict[str, Any]) -> Any:
    named = {n for base in config_class.__mro__ for n in getattr(base, "__annotations__", {})}
    named |= set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    given = {name: value for name, value in (SIZES | {"vocab_size": vocab_size}).items() if name in named}
    given |= {name: vocab_size for name, value in given.items() if value is None}
    for name in named:
        is_off = getattr(config_class, name, None) == 0  # by default; then perhaps as an int
        if not is_off and (name in DROPOUTS or name.endswith(("_dropout", "_dropout_prob", "layerdrop"))):
            given[name] = 0.0
        if name.endswith("jitter_noise"):
            given[name] = 0.0  # of routers, in training
    if "is_decoder" in named:
        given["is_decoder"] = True
    if "kv_lora_rank" in named and "num_key_value_heads" in named:
        given["num_key_value_heads"] = HEADS  # all heads share what is compressed
    given |= _a_layer_of_each_kind(config_class, named, more)
    for name in config_class.sub_configs:
        default = getattr(config_class(), name)  # where any family's would do
        part = config_class.sub_configs[name] if default is None else type(default)
        if part is not AutoConfig:
            given[name] = _small(part, vocab_size, MORE.get(part.model_type, {}))
    return config_class(**given | more)


def _a_layer_of_each_kind(config_class: Any, named: set[str], more: dict[str, Any]) -> dict[str, Any]:
    """Layers of each kind that the family has by default, where the first two are not all of them."""
    if any(name in more for name in OWN_KINDS):
        return {}
    default = config_class()
    lists = {name: getattr(default, name, None) for name in KINDS if name in named and name not in more}
    kinds = {name: [*dict.fromkeys(given)] for name, given in lists.items() if isinstance(given, (list, tuple))}
    number = max([2, *map(len, kinds.values())])
    if all(set(lists[name][:2]) == set(found) for name, found in kinds.items()):
        return {}
    layers = {name: number for name in LAYERS if name in named}
    return layers | {name: (found * number)[:number] for name, found in kinds.items()}


def tiny_model(family: str, vocab_size: int, seed: int = 0) -> Any:
    """On the CPU, float32.

    Raises:
        ValueError: it did not get small; nothing was made.
    """
    config = tiny_config(family, vocab_size)
    model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)  # that sees or hears, with its towers
    build = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    with torch.device("meta"):
        whole = build(copy.deepcopy(config))
    number = sum(parameter.numel() for parameter in whole.parameters())
    if number > MOST_PARAMETERS:
        raise ValueError("its parts do not get small by the names of sizes")
    torch.manual_seed(seed)
    model = build(config, dtype=torch.float32)
    for parameter in model.parameters():  # a zero, as a mask's or a bias's, hides what is multiplied with it
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model
