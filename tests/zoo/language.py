"""Language, speech and image-text models of Hugging Face transformers.

In the small size no two dimensions that could be mistaken for one another are equal: heads, head dimension, hidden
width, feed-forward width, vocabulary and sequence length all differ. The native size is the smallest published model
of the family, with the exceptions that say so: it is scaled down where that has billions of parameters.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .model import Arguments, ZooModel

__all__ = ["MODELS", "transformers_model"]

Options = dict[str, Any]


def transformers_model(model: str, config: str, small: Options, native_options: Options, native: bool) -> nn.Module:
    """Construct a model of transformers from its configuration."""
    library = import_module("transformers")
    module: nn.Module = getattr(library, model)(getattr(library, config)(**(native_options if native else small)))
    return module


def _ids(vocabulary: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw token ids (n, length), past the first few, which the tokenizers reserve."""
    return torch.randint(4, vocabulary, (batch, length), generator=generator)


def _mask(batch: int, length: int) -> Tensor:
    """Make a padding mask (n, length): each sequence but the first lacks some of its last tokens."""
    lengths = length - torch.arange(batch) % 3 * 2
    return (torch.arange(length) < lengths[:, None]).long()


def _tokens(
    small: tuple[int, int], native_size: tuple[int, int], padded: bool, native: bool, batch: int, rng: torch.Generator
) -> Arguments:
    """Make the inputs of a language model; the sizes are (vocabulary, length)."""
    vocabulary, length = native_size if native else small
    kwargs: dict[str, Any] = {"input_ids": _ids(vocabulary, batch, length, rng)}
    if padded:
        kwargs["attention_mask"] = _mask(batch, length)
    return Arguments((), kwargs)


def _t5(native: bool, batch: int, rng: torch.Generator) -> Arguments:
    vocabulary, source, target = (32128, 128, 64) if native else (173, 15, 7)
    return Arguments(
        (),
        {
            "input_ids": _ids(vocabulary, batch, source, rng),
            "attention_mask": _mask(batch, source),
            "decoder_input_ids": _ids(vocabulary, batch, target, rng),
        },
    )


def _whisper(native: bool, batch: int, rng: torch.Generator) -> Arguments:
    vocabulary, bins, frames, target = (51865, 80, 3000, 32) if native else (181, 20, 38, 9)
    return Arguments(
        (),
        {
            "input_features": torch.randn(batch, bins, frames, generator=rng),
            "decoder_input_ids": _ids(vocabulary, batch, target, rng),
        },
    )


def _clip(native: bool, batch: int, rng: torch.Generator) -> Arguments:
    vocabulary, length, size = (49408, 77, 224) if native else (193, 11, 40)
    mask = _mask(batch, length)
    ids = _ids(vocabulary - 1, batch, length, rng)
    ids[torch.arange(batch), mask.sum(1) - 1] = vocabulary - 1  # ends the text; the tower is pooled there
    return Arguments(
        (),
        {
            "input_ids": ids,
            "pixel_values": torch.randn(batch, 3, size, size, generator=rng),
            "attention_mask": mask,
        },
    )


_BERT: tuple[Options, Options] = (
    {
        "vocab_size": 151,
        "hidden_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 140,
        "max_position_embeddings": 33,
    },
    {},
)
_GPT2: tuple[Options, Options] = (
    {"vocab_size": 157, "n_positions": 37, "n_embd": 80, "n_layer": 3, "n_head": 5, "n_inner": 180, "use_cache": False},
    {"use_cache": False},
)
_LLAMA: tuple[Options, Options] = (
    {
        "vocab_size": 211,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 64,
        "use_cache": False,
    },
    {  # TinyLlama's shape at a third of its depth
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "use_cache": False,
    },
)
_QWEN2: tuple[Options, Options] = (
    {
        "vocab_size": 199,
        "hidden_size": 84,
        "intermediate_size": 170,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "use_cache": False,
    },
    {  # Qwen2-0.5B
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_cache": False,
    },
)
_QWEN3: tuple[Options, Options] = (
    {
        "vocab_size": 197,
        "hidden_size": 88,
        "intermediate_size": 152,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 18,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "use_cache": False,
    },
    {  # Qwen3-0.6B
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "use_cache": False,
    },
)
_OPT: tuple[Options, Options] = (
    {
        "vocab_size": 163,
        "hidden_size": 90,
        "word_embed_proj_dim": 90,
        "num_hidden_layers": 3,
        "ffn_dim": 168,
        "max_position_embeddings": 40,
        "num_attention_heads": 5,
        "use_cache": False,
    },
    {"use_cache": False},
)
_T5: tuple[Options, Options] = (
    {
        "vocab_size": 173,
        "d_model": 72,
        "d_kv": 12,
        "d_ff": 130,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 5,
        "relative_attention_num_buckets": 10,
        "relative_attention_max_distance": 14,
        "decoder_start_token_id": 0,
        "use_cache": False,
    },
    {"decoder_start_token_id": 0, "use_cache": False},
)
_CLIP: tuple[Options, Options] = (
    {
        "projection_dim": 44,
        "text_config": {
            "vocab_size": 193,
            "hidden_size": 60,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "max_position_embeddings": 17,
            "eos_token_id": 192,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 136,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 40,
            "patch_size": 8,
        },
    },
    {},
)
_MIXTRAL: tuple[Options, Options] = (
    {
        "vocab_size": 191,
        "hidden_size": 76,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "use_cache": False,
    },
    {  # an eighth of the original's width and depth
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "use_cache": False,
    },
)
_WHISPER: tuple[Options, Options] = (
    {
        "vocab_size": 181,
        "num_mel_bins": 20,
        "encoder_layers": 2,
        "encoder_attention_heads": 6,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 132,
        "encoder_ffn_dim": 116,
        "d_model": 72,
        "max_source_positions": 19,
        "max_target_positions": 24,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "use_cache": False,
    },
    {"use_cache": False},
)
_PHI3: tuple[Options, Options] = (
    {
        "vocab_size": 167,
        "hidden_size": 96,
        "intermediate_size": 154,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "use_cache": False,
    },
    {  # a third of the width and a quarter of the depth of Phi-3-mini
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "use_cache": False,
    },
)
_MAMBA: tuple[Options, Options] = (
    {
        "vocab_size": 149,
        "hidden_size": 54,
        "state_size": 10,
        "num_hidden_layers": 3,
        "conv_kernel": 4,
        "time_step_rank": 6,
        "use_associative_scan": False,
        "use_cache": False,
    },
    {"num_hidden_layers": 24, "use_associative_scan": False, "use_cache": False},  # Mamba-130m
)


def _language(
    name: str,
    model: str,
    config: str,
    options: tuple[Options, Options],
    small: tuple[int, int],
    native: tuple[int, int],
    *,
    padded: bool = False,
) -> ZooModel:
    return ZooModel(
        name,
        "language",
        partial(transformers_model, model, config, *options),
        partial(_tokens, small, native, padded),
    )


MODELS = [
    _language("bert", "BertForMaskedLM", "BertConfig", _BERT, (151, 14), (30522, 128), padded=True),
    _language("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, (157, 13), (50257, 128)),
    _language("llama_gqa", "LlamaForCausalLM", "LlamaConfig", _LLAMA, (211, 11), (32000, 128)),
    _language("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _QWEN2, (199, 13), (151936, 128), padded=True),
    _language("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _QWEN3, (197, 15), (151936, 128)),
    _language("opt", "OPTForCausalLM", "OPTConfig", _OPT, (163, 12), (50272, 128), padded=True),
    ZooModel("t5", "language", partial(transformers_model, "T5ForConditionalGeneration", "T5Config", *_T5), _t5),
    ZooModel("clip", "multimodal", partial(transformers_model, "CLIPModel", "CLIPConfig", *_CLIP), _clip),
    _language("mixtral", "MixtralForCausalLM", "MixtralConfig", _MIXTRAL, (191, 11), (32000, 128)),
    ZooModel(
        "whisper_tiny",
        "multimodal",
        partial(transformers_model, "WhisperForConditionalGeneration", "WhisperConfig", *_WHISPER),
        _whisper,
    ),
    _language("phi3", "Phi3ForCausalLM", "Phi3Config", _PHI3, (167, 13), (32064, 128), padded=True),
    _language("mamba", "MambaForCausalLM", "MambaConfig", _MAMBA, (149, 7), (50280, 64)),
]
