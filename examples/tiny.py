"""A student and answers to try the examples on, made here in a second: nothing is downloaded, and nothing is learnt.

``student(folder)`` is a byte-level Llama of 100,000 random weights, ``answers()`` four answers each to some sums.
"""

import json
from pathlib import Path

FOLDER = "example-run"  # where the examples write when they are not told
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def student(folder: str = FOLDER) -> str:
    """The student's directory; made when it is not there."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = Path(folder, "student")
    if not (directory / "config.json").exists():
        vocabulary = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        bytewise = Tokenizer(models.BPE(vocabulary, merges=[]))
        bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        bytewise.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
        )
        tokenizer.save_pretrained(directory)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(directory)
    return str(directory)


def answers(problems: int = 12) -> list[dict[str, str]]:
    """Rows of question, teacher and answer, as a table of one's own might have them."""
    rows = []
    for a in range(problems):
        b = 3 * a + 1
        by_teacher = {
            "terse": f"{a + b}",
            "plain": f"{a} + {b} = {a + b}, so the answer is {a + b}.",
            "careful": f"<think>\n{b} + {a} is {a + b}. Backwards: {a + b} - {a} = {b}.\n</think>\nIt is {a + b}.",
            "wordy": f"Let me think. We have {a}. We add {b} to it. " * 3 + f"Thus we have {a + b}.",
        }
        rows += [{"question": f"What is {a} + {b}?", "teacher": t, "answer": said} for t, said in by_teacher.items()]
    return rows


def pool(folder: str = FOLDER) -> str:
    """The answers as a pool: a record a line."""
    path = Path(folder, "pool.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in answers():
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"teacher": row["teacher"], "messages": messages}) + "\n")
    return str(path)
