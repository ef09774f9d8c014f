"""The demo's student: a tokenizer and a small Llama, made from scratch in a directory that Transformers can load."""

from collections.abc import Iterable
from pathlib import Path

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_student(directory: Path, texts: Iterable[str], *, seed: int) -> int:
    """Write a student that has learnt nothing yet: a byte-level BPE of ``texts`` and a small Llama.

    Args:
        directory: where to.
        texts: what the tokenizer's words come from; it can write any other text too, byte by byte.
        seed: of the weights.

    Returns:
        The number of its parameters.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[PAD, IM_START, IM_END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    # The roles stand in every prompt: as words of their own they are two tokens there, not thirteen.
    words.train_from_iterator([*texts, "user", "assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=IM_END, pad_token=PAD, chat_template=CHATML, model_max_length=512
    )
    # Three layers of width 128 learn to copy and to add in a minute; two layers, or width 96, did not in the same time.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()
