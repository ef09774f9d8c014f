"""What every sample costs in every pass of somebody's training run: nll, Brier score, entropy and rank.

Nothing passes through the model a second time. Hooks see what the trainer gives the model and the hidden states that
come before its head, and ``token_stats`` makes a second matrix product of these and the head: a twentieth of the
FLOP of a step, for a model of 1.5 billion parameters with 150,000 words. A GPU is waited for once a micro-batch.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lark_fast.files import without_nan
from lark_fast.kernels.token_stats import IGNORE_INDEX, token_stats
from lark_fast.kernels.trajectory_reduce import trajectory_reduce
from lark_fast.scoring.feed import token_hash
from lark_fast.student import Student, refuse_adapted_head
from lark_fast.trainers.head_loss import autocast_is_bfloat16

TRAIN, EVALUATION = "train", "eval"
PROBE_TOKENS = 4


class SampleLog(TrainerCallback):
    """A callback of Transformers' ``Trainer``, and of what is derived from it, that logs every sample in every pass.

    ``out/rank-00000.jsonl`` gets a line a sample and pass as soon as the pass is over (each rank has a file of its
    own)::

        {"sample": "5f0c...", "step": 12, "epoch": 0.3, "split": "train", "n_tokens": 311, "nll": 0.71, "brier": 0.33,
         "entropy": 0.69, "rank_mean": 2.4}

    Means are over the sample's scored tokens, under the weights after ``step`` updates, with whatever dropout there is;
    ranks beyond 100 count as 100. ``sample`` is ``TrajectoryStats.token_hash`` in hexadecimal digits: equal for equal
    token ids and scored positions. Samples that share a row are told apart by position_ids, seq_idx, cu_seq_lens_q or a
    numbered attention_mask. The loss may be any that leaves the labels to the model, as those of Transformers, TRL and
    this package do, and training goes on as it would without. A run that is resumed goes on with its files.

    Several ranks are those of DDP.

    Args:
        out: a directory.
        sample_column: the name of a column that names samples, ``[B]``, or ``[B, T]`` where a row holds several. It
            must get through to the model's call (``remove_unused_columns=False``, and a collator that keeps it), and
            is taken out there.
        evaluation: also log the passes of evaluations, as split "eval".
        overwrite: throw away what an earlier run has left in ``out``; else that is an error.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        sample_column: str | None = None,
        evaluation: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out, self.sample_column, self.evaluation, self.overwrite = Path(out), sample_column, evaluation, overwrite
        self._hooks: list[Any] = []
        self._file: IO[str] | None = None
        self._inputs: dict[str, Any] | None = None  # of the call that is under way, where it is to be logged
        self._split = EVALUATION
        self._labelled = self._logged = 0  # passes of the step

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Hook into the model.

        Raises:
            ValueError: a model or a way of training that is not known, or ``out`` holds another run's log.
        """
        self.close()
        if args.n_gpu > 1:
            raise ValueError("SampleLog does not run under nn.DataParallel: start with torchrun or accelerate launch")
        if args.torch_compile:
            raise ValueError("SampleLog sees nothing of a compiled model: compile its layers (layer.compile()) instead")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._student, backbone = _taken_apart(base)
        self._file = self._opened(args.process_index, state.global_step)
        self._state = state
        self._hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            backbone.register_forward_hook(self._behind_backbone),
        ]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here to the step's end, passes are of training."""
        self._state, self._split = state, TRAIN
        self._labelled = self._logged = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Other passes than training's may follow.

        Raises:
            ValueError: nothing of the step could be logged.
        """
        self._split = EVALUATION
        if not self._labelled:
            raise ValueError(
                "SampleLog has seen no labels: the trainer gives the model none (compute_loss_func or "
                "label_smoothing_factor of Transformers' Trainer) or no input_ids; let the model compute the loss"
            )
        if not self._logged:
            raise ValueError(f"SampleLog: {type(self._student.model).__name__} is trained without a call of its layers")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model as it was."""
        self.close()

    def close(self) -> None:
        """Remove the hooks and close the file; after a run that failed, the caller's to do."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inputs = [], None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, rank: int, step: int) -> IO[str]:
        """This rank's file, without what the updates after ``step`` had left there."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"rank-{rank:05}.jsonl"
        if step == 0 and not self.overwrite and path.exists() and path.stat().st_size:
            raise ValueError(f"{path}: holds another run's log; give SampleLog another directory, or overwrite=True")
        file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open until the run ends
        kept = 0
        for line in _whole_lines(path) if step else ():
            row = json.loads(line)
            if row["step"] > step - (row["split"] == TRAIN):
                break
            kept += len(line)
        file.truncate(kept)
        return file

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names, self._inputs = None, None
        wanted = model.training if self._split == TRAIN else self.evaluation and not model.training
        if self.sample_column is not None:
            kwargs = dict(kwargs)
            names = kwargs.pop(self.sample_column, None)
            if names is None and wanted:
                raise ValueError(
                    f"SampleLog: no column {self.sample_column!r} gets to the model; it needs "
                    "remove_unused_columns=False and a collator that keeps it"
                )
        if wanted and kwargs.get("labels") is not None and kwargs.get("input_ids") is not None:
            self._labelled += 1
            self._inputs = {**kwargs, "names": names}
        return args, kwargs

    def _behind_backbone(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            return
        self._logged += 1
        hidden, labels = output[0].detach(), inputs["labels"]  # [B, T, D], [B, T]
        if hidden.shape[:2] != labels.shape:
            raise ValueError(
                f"SampleLog: hidden states of {tuple(hidden.shape[:2])} tokens do not fit labels of "
                f"{tuple(labels.shape)}; prompt tuning and cut sequences are not known here"
            )
        samples = _samples(inputs, inputs["names"])
        if samples.names:
            self._write(samples, hidden.flatten(0, 1))

    def _write(self, samples: "Samples", hidden: Tensor) -> None:
        head = self._student.head
        weight, hidden = head.weight, hidden.to(head.weight.device)
        if autocast_is_bfloat16(weight.device.type):
            weight, hidden = weight.bfloat16(), hidden.bfloat16()
        rows, targets, ends = (torch.from_numpy(values).to(weight.device) for values in samples[:3])
        more: dict[str, Any] = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
        reduced = trajectory_reduce(token_stats(hidden, weight, targets, rows=rows, **more), ends)
        means = reduced.means
        columns = (reduced.n_tokens, means.nll, means.brier, means.entropy, means.rank)
        pass_ = {"step": self._state.global_step, "epoch": self._state.epoch or 0.0, "split": self._split}
        lines = []
        for name, *numbers in zip(samples.names, *(column.tolist() for column in columns), strict=True):
            own = dict(zip(("n_tokens", "nll", "brier", "entropy", "rank_mean"), numbers, strict=True))
            lines.append(json.dumps(without_nan({"sample": name, **pass_, **own})) + "\n")
        self._file.write("".join(lines))


def read_sample_log(
    out: str | os.PathLike[str], column: str = "nll", *, split: str = TRAIN
) -> dict[str, list[float | None]]:
    """What ``SampleLog`` has written, by sample: its number in each pass, in order of the steps.

    Args:
        out: the directory, with the files of all ranks.
        column: "nll", "brier", "entropy", "rank_mean", ...
        split: "train" or "eval".

    Raises:
        FileNotFoundError: there is no log.
    """
    files = sorted(Path(out).glob("rank-*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{out}: no rank-*.jsonl there")
    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for file in files:
        for row in map(json.loads, _whole_lines(file)):
            if row["split"] == split:
                found[row["sample"]].append((row["step"], row[column]))
    return {name: [value for _, value in sorted(own, key=lambda pair: pair[0])] for name, own in found.items()}


class Samples(NamedTuple):
    """The samples of a micro-batch that have a scored token."""

    rows: np.ndarray  # [N] of the hidden states [B T, D], of what predicts a scored token
    targets: np.ndarray  # [N] the token ids
    ends: np.ndarray  # [S + 1] sample s has the rows ends[s] to ends[s + 1]
    names: list[str]  # [S]


def _samples(inputs: Mapping[str, Any], names: Any) -> Samples:
    """Tell samples apart; the first token of one is scored by nobody, as what predicts it belongs to another."""
    ids, labels = (inputs[name].detach().cpu().numpy() for name in ("input_ids", "labels"))
    first = np.zeros(ids.shape, dtype=bool)  # [B, T]
    first[:, 0] = True
    for name in ("attention_mask", "seq_idx", "position_ids"):
        given = inputs.get(name)
        if isinstance(given, Tensor) and given.shape == ids.shape:
            marks = given.cpu().numpy()
            before, own = marks[:, :-1], marks[:, 1:]
            first[:, 1:] |= own <= before if name == "position_ids" else own != before
    if len(ids) == 1 and isinstance(inputs.get("cu_seq_lens_q"), Tensor):
        starts = inputs["cu_seq_lens_q"].cpu().numpy()
        first[0, starts[starts < ids.shape[1]]] = True
    labels = np.where(first, IGNORE_INDEX, labels).ravel()
    starts, places = np.flatnonzero(first), np.flatnonzero(labels != IGNORE_INDEX)
    counts = np.bincount(np.searchsorted(starts, places, side="right") - 1, minlength=len(starts))
    kept, bounds = np.flatnonzero(counts), [*starts.tolist(), ids.size]
    spans = [(bounds[sample], bounds[sample + 1]) for sample in kept]
    if names is None:
        flat = ids.ravel()
        named = [token_hash(flat[start:end], labels[start:end]).hex() for start, end in spans]
    else:
        named = _named(names, [start for start, _ in spans], ids.shape)
    return Samples(places - 1, labels[places].astype(np.int64), np.cumsum([0, *counts[kept]]), named)


def _named(names: Any, starts: list[int], shape: tuple[int, int]) -> list[str]:
    """The names of samples that begin at ``starts``, out of a column ``[B]`` or ``[B, T]``."""
    of_rows = names.tolist() if isinstance(names, Tensor) else list(names)
    rows = [start // shape[1] for start in starts]
    if isinstance(names, Tensor) and names.shape == shape:
        return [str(of_rows[row][start % shape[1]]) for row, start in zip(rows, starts, strict=True)]
    if len(of_rows) != shape[0] or len(set(rows)) != len(rows):
        raise ValueError(
            f"SampleLog: {len(rows)} samples in {shape[0]} rows, and a sample_column of {len(of_rows)} names; where a "
            "row holds several, it has a name a token [B, T]"
        )
    return [str(of_rows[row]) for row in rows]


def _taken_apart(model: nn.Module) -> tuple[Student, nn.Module]:
    """The model's head, and its layers, whose last hidden state is what the head is given.

    Raises:
        ValueError: they are not, the head is not known, or this rank does not hold all of it.
    """
    output, backbone = model.get_output_embeddings(), model.get_decoder()
    weight = getattr(output, "weight", None)
    if isinstance(weight, DTensor) or (weight is not None and not weight.numel()):
        raise ValueError("SampleLog needs the whole head on every rank: no FSDP, ZeRO-3 or tensor parallelism")
    refuse_adapted_head(output)
    seen: list[Tensor] = []
    hook = backbone.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    was_training = model.training
    try:
        with _without_autocast(model), torch.no_grad():
            student = Student(model)
            model.eval()
            given = student.hidden(torch.arange(PROBE_TOKENS, device=student.device).unsqueeze(0))
    finally:
        hook.remove()
        model.train(was_training)
    if backbone is model or not seen or not torch.equal(seen[-1], given):
        raise ValueError(f"SampleLog: {type(model).__name__} does not give its head what its layers end with")
    return student, backbone


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside the block, ``forward`` is without what accelerate puts around it, which would blur the look at logits."""
    wrapped, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped


def _whole_lines(path: Path) -> Iterator[bytes]:
    """What follows the last whole line was never finished."""
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))
