"""Tokenizers and models small enough to be made inside a test: nothing is downloaded, nothing is random twice."""

from collections.abc import Sequence
from typing import Any

import torch
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


def _model(kind: type[PreTrainedConfig], vocab_size: int, seed: int, settings: dict[str, Any]) -> PreTrainedModel:
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
