"""Other ways to a training step's loss and gradient: a loop written by hand, and TRL's trainer.

Each lays out a training set once, and ``measure`` then leaves the gradient of what it laid out in the parameters. What
is timed of TRL is its ``training_step`` on batches that are on the device already (and then clipping and the
optimiser, the same as ours): its data loader, logging and callbacks cost it nothing here, while ours lays its batches
out in the time that is taken. TRL's objective is a mean over tokens; equal weights by token make ours the same.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

from benchmarks.comparison import DEVICE, note_missing, optional_peer
from lark_fast.pool.records import NOT_SCORED
from lark_fast.training.batches import micro_batches
from lark_fast.training.data import TrainingSet

CUDA = DEVICE.type == "cuda"


def rows_of(data: TrainingSet) -> list[dict[str, list[int]]]:
    """Token ids and labels of every trajectory."""
    bounds = zip(data.starts, data.starts[1:], strict=False)
    return [
        {"input_ids": data.ids[start:end].tolist(), "labels": data.labels(row).tolist()}
        for row, (start, end) in enumerate(bounds)
    ]


class PlainLoop:
    """The weighted objective as one writes it by hand: padded batches, Transformers' logits, cross entropy.

    Args:
        model: with its gradients, and recomputing what it is to.
        products: the dtype that is multiplied in.
        tokens: of a padded batch.
    """

    def __init__(self, model: nn.Module, products: torch.dtype, tokens: int) -> None:
        self.model, self.products, self.tokens = model, products, tokens

    def lay_out(self, data: TrainingSet) -> list[list[Tensor]]:
        """Ids, labels and each label's weight, ``[B, T]`` of every batch."""
        shares = data.weights / data.n_scored / data.weights.sum()
        rows, batches = rows_of(data), []
        for members in micro_batches(np.arange(len(data)), data.lengths, size=None, tokens=self.tokens, packed=False):
            ids = [torch.tensor(rows[row]["input_ids"]) for row in members]
            labels = [torch.tensor(rows[row]["labels"])[1:] for row in members]
            weights = [
                torch.full(label.shape, shares[row], dtype=torch.float64)
                for row, label in zip(members, labels, strict=True)
            ]
            columns = pad_sequence(ids, True), pad_sequence(labels, True, NOT_SCORED), pad_sequence(weights, True)
            batches.append([column.to(DEVICE) for column in columns])
        return batches

    @torch.enable_grad()
    def measure(self, batches: list[list[Tensor]]) -> float:
        """The loss."""
        self.model.train()
        self.model.zero_grad()
        total = torch.zeros((), device=DEVICE, dtype=torch.float64)
        sums = max(self.products, torch.float32, key=lambda dtype: dtype.itemsize)
        for ids, labels, weights in batches:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=self.products == torch.bfloat16):
                logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(
                logits.flatten(0, 1).to(sums), labels.flatten(), reduction="none", ignore_index=NOT_SCORED
            )
            loss = nll @ weights.flatten().to(sums)
            loss.backward()
            total += loss.detach()
        return total.item()


class TrlLoop:
    """``trl.SFTTrainer`` on the same token ids.

    Args:
        model: with its gradients, in a module tree of its own, for TRL and Liger change its modules.
        products: the dtype that is multiplied in; parameters of another one run under autocast.
        tokens: of a pack or a padded batch.
        packed: by TRL's own packing; else padded, in the batches of the other implementations.
        liger: its kernels for norms, rotary embedding and MLP; the loss stays TRL's own, which takes no other.
    """

    def __init__(
        self, model: nn.Module, data: TrainingSet, products: torch.dtype, tokens: int, **options: bool
    ) -> None:
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar
        from trl import SFTConfig, SFTTrainer

        disable_progress_bar()
        self.packed, self.tokens = options["packed"], tokens
        low = products == torch.bfloat16 and next(model.parameters()).dtype != products
        if hasattr(model, "peft_config"):
            low = products == torch.bfloat16  # its adapters are float32
        plain = dict(vars(modeling_llama))
        with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = SFTConfig(
                output_dir=out,
                use_cpu=not CUDA,
                bf16=low,
                packing=self.packed,
                max_length=tokens,
                per_device_train_batch_size=1,
                gradient_checkpointing=False,  # on already where it is to be
                use_liger_kernel=options["liger"],
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            )
            rows = Dataset.from_list(rows_of(data)[:1])
            self.trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=_tokenizer())
        if options["liger"]:  # what train() begins with
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.trainer.model, config.liger_kernel_config)
        # Liger also changes functions that all models of the kind share.
        self._patches = {name: value for name, value in vars(modeling_llama).items() if plain.get(name) is not value}
        self._plain = {name: plain[name] for name in self._patches if name in plain}
        vars(modeling_llama).update(self._plain)
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)

    def lay_out(self, data: TrainingSet) -> list[dict[str, Any]]:
        """What TRL's collator makes of every batch."""
        from datasets import Dataset
        from trl.data_utils import pack_dataset

        rows = rows_of(data)
        if self.packed:
            columns = Dataset.from_list(rows)
            groups = [[row] for row in pack_dataset(columns, self.tokens, "bfd")]
        else:
            cut = micro_batches(np.arange(len(data)), data.lengths, size=None, tokens=self.tokens, packed=False)
            groups = [[rows[row] for row in members] for members in cut]
        batches = [self.trainer.data_collator(group) for group in groups]
        return [{k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]

    @torch.enable_grad()
    def measure(self, batches: list[dict[str, Any]]) -> float:
        """The mean nll of the scored tokens."""
        self.model.zero_grad()
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(batches)
        with self._patched():
            n_scored = trainer._get_num_items_in_batch(batches, DEVICE)
            losses = [trainer.training_step(self.model, dict(batch), n_scored) for batch in batches]
        trainer._metrics["train"].clear()
        return torch.stack(losses).sum().item()

    @contextmanager
    def _patched(self) -> Iterator[None]:
        vars(modeling_llama).update(self._patches)
        try:
            yield
        finally:
            vars(modeling_llama).update(self._plain)


def trl_kinds() -> dict[str, dict[str, bool]]:
    """Names and options of the ``TrlLoop``s that run here."""
    if optional_peer("trl") is None:
        return {}
    if CUDA and optional_peer("liger_kernel"):
        return {"TRL + Liger, packed": {"packed": True, "liger": True}}
    if not CUDA:
        note_missing("Liger (needs CUDA)")
    return {"TRL, packed": {"packed": True, "liger": False}, "TRL, padded": {"packed": False, "liger": False}}


def trl_attention(packed: bool) -> str:
    """The fastest attention of Transformers that is installed: with none for packs, a mask of all pairs is made."""
    for module, name in (("flash_attn_interface", "flash_attention_3"), ("flash_attn", "flash_attention_2")):
        if CUDA and packed and find_spec(module):
            return name
    return "sdpa"


def _tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one, for padding."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
