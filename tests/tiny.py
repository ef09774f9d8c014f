"""Tokenizers and models small enough to be made inside a test: nothing is downloaded, nothing is random twice."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SENTENCES = [
    "system user assistant model You are a helpful assistant.\n\n",
    "How many apples does she have? She has 16 - 3 - 4 = 9 apples, so the answer is 9.\nA: 9\n",
    "<think>\nLet me think about it. First, the sum of the two numbers is 12; I divide by 3.\n</think>\n\nIt is 4.",
    "The answer is 42. The answer is 7. the answer, and then another answer for the user\n",
    "What is two and two? Two and two is four. Let me check that the answer is right.\n",
    "  indented text   with    runs of blanks\n\n\nand empty lines\n",
]
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PAD = "<|pad|>"


def byte_level_tokenizer(
    chat_template: str | None = None,
    *,
    special: Sequence[str] = CHATML_TOKENS,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    trim_offsets: bool = False,
    split_words: bool = True,
    add_bos: bool = False,
    vocab_size: int = 400,
    sentences: Sequence[str] = SENTENCES,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama-3 and Qwen have it: any text, and it comes back whole.

    ``special`` are added tokens, ``bos`` and ``eos`` are added to them where missing. ``trim_offsets`` leaves the blank
    of " word" out of the token's offsets. Without ``split_words`` tokens reach over several words and end in blanks.
    ``add_bos`` puts bos in front unless add_special_tokens=False.
    """
    names = list(dict.fromkeys([PAD, *special, *filter(None, (bos, eos))]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        bos_id = tokenizer.token_to_id(bos)
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return _wrap(tokenizer, chat_template, bos, eos)


def sentencepiece_tokenizer(
    chat_template: str | None = None,
    *,
    special: Sequence[str] = (),
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    vocab_size: int = 500,
) -> PreTrainedTokenizerFast:
    """BPE as Llama-2's: "▁" for a blank, one of them put in front of the text, bytes for what it does not know."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    names = list(dict.fromkeys(["<unk>", PAD, *special, *filter(None, (bos, eos))]))
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*names, *byte_tokens], limit_alphabet=80, show_progress=False
    )
    # Split at blanks for training alone, so that no piece holds two words.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(SENTENCES, trainer)
    trained.pre_tokenizer = None
    trained.model.byte_fallback = True
    trained.model.fuse_unk = True
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(trained, chat_template, bos, eos)


def word_tokenizer(
    chat_template: str | None = None,
    *,
    special: Sequence[str] = CHATML_TOKENS,
    eos: str | None = "<|im_end|>",
) -> PreTrainedTokenizerFast:
    """A token a word, and no token for blanks: they are lost, and stand in nobody's offsets."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<unk>", PAD, *special]))
    return _wrap(tokenizer, chat_template, None, eos)


class SlowTokenizer(PreTrainedTokenizer):
    """Written in Python, so without offsets: always the longest entry of ``words`` that fits, else a character."""

    def __init__(self, words: Sequence[str] = (), **kwargs: Any):
        self._words = sorted(words, key=len, reverse=True)
        self._names = [*self._words, *(chr(code) for code in range(256))]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._names)

    def get_vocab(self) -> dict[str, int]:
        return {**self._numbers, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens = []
        while text:
            token = next((word for word in self._words if text.startswith(word)), text[0])
            tokens.append(token)
            text = text[len(token) :]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._numbers[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def slow_tokenizer(chat_template: str | None = None, words: Sequence[str] = ()) -> SlowTokenizer:
    """A tokenizer without offsets that knows ChatML's special tokens."""
    return SlowTokenizer(
        words, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"], chat_template=chat_template
    )


def _wrap(tokenizer: Tokenizer, chat_template: str | None, bos: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        bos_token=bos,
        eos_token=eos,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(vocab_size: int = 400, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Llama with grouped key-value heads and a head of its own."""
    return _model(LlamaConfig, vocab_size, seed, {"num_key_value_heads": 2, "tie_word_embeddings": False} | changes)


def tiny_qwen2(vocab_size: int = 400, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Qwen2: biases in the attention, head tied to the embedding."""
    return _model(Qwen2Config, vocab_size, seed, {"num_key_value_heads": 2, "tie_word_embeddings": True} | changes)


def tiny_gemma2(vocab_size: int = 400, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Gemma-2: its logits pass through a soft cap, low enough here to bend them."""
    own = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    return _model(Gemma2Config, vocab_size, seed, own | {"final_logit_softcapping": 3.0} | changes)


def tiny_cohere(vocab_size: int = 400, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Cohere: logits are multiplied by logit_scale."""
    return _model(CohereConfig, vocab_size, seed, {"num_key_value_heads": 2, "logit_scale": 0.25} | changes)


def tiny_granite(vocab_size: int = 400, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Granite: logits are divided by logits_scaling."""
    return _model(GraniteConfig, vocab_size, seed, {"num_key_value_heads": 2, "logits_scaling": 4.0} | changes)


def tiny_phi(vocab_size: int = 400, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Phi: the head has a bias."""
    return _model(PhiConfig, vocab_size, seed, changes)


TINY_MODELS = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gemma2": tiny_gemma2,
    "cohere": tiny_cohere,
    "granite": tiny_granite,
    "phi": tiny_phi,
}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 32,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPED, WINDOW = {"num_key_value_heads": 2}, {"sliding_window": 5}
# Decoders that leave all mixing of tokens to their attention function: configuration and settings. The windows are
# shorter than most sequences, and the value width of DeepSeek-V3 is not its key width.
PACKABLE = {
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2_sliding": ("Qwen2Config", GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | WINDOW),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | WINDOW
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", GROUPED | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", GROUPED | WINDOW | {"pad_token_id": 0}),
    "phi3_longrope": (
        "Phi3Config",
        GROUPED | {"pad_token_id": 0, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "olmo2": ("Olmo2Config", GROUPED),
    "mixtral": ("MixtralConfig", GROUPED | WINDOW | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", GROUPED | MOE | {"head_dim": 8}),
    "deepseek3": (
        "DeepseekV3Config",
        MLA
        | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 4,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}
LINEAR_HEADS = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
# Decoders that carry something from token to token in another way, or whose window only a mask knows.
UNPACKABLE = {
    "mamba": ("MambaConfig", {"state_size": 8}),
    "falcon_h1": (
        "FalconH1Config",
        GROUPED
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        GROUPED
        | MOE
        | LINEAR_HEADS
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "gpt_oss": ("GptOssConfig", GROUPED | WINDOW | {"num_local_experts": 4, "head_dim": 8, "pad_token_id": 0}),
    "llama4": (
        "Llama4TextConfig",
        GROUPED | {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "qwen2_moe_sliding": (
        "Qwen2MoeConfig",
        GROUPED
        | MOE
        | {
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": 25,
            "max_window_layers": 1,
        },
    ),
    "phimoe": ("PhimoeConfig", GROUPED | {"num_local_experts": 4, "sliding_window": 25}),
}


def tiny_decoder(name: str, vocab_size: int = 101, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """One of ``PACKABLE`` or ``UNPACKABLE``."""
    kind, settings = (PACKABLE | UNPACKABLE)[name]
    return _model(getattr(transformers, kind), vocab_size, seed, settings | changes)


def _model(kind: type[PreTrainedConfig], vocab_size: int, seed: int, settings: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # Mamba's biases come at random
        model = AutoModelForCausalLM.from_config(kind(**(SMALL | {"vocab_size": vocab_size} | settings)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Norm weights (ones, or Gemma's zeros) and biases: near where they are, and none is zero.
                parameter.add_(0.2 * noise)
            else:
                # Logits with a standard deviation near 2: as made, a model's are so flat that nothing can go wrong.
                parameter.copy_(2.0 * noise / parameter.shape[1] ** 0.5)
    return model.float().eval()
