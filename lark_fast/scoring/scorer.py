"""The scorer: records or token ids in, one set of statistics a trajectory out."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lark_fast.batch import Sequences, Targets
from lark_fast.errors import RejectError
from lark_fast.flop import ForwardCost
from lark_fast.kernels.token_stats import IGNORE_INDEX, STATISTICS, TokenStats
from lark_fast.packing import window_tokens
from lark_fast.pool.records import Record, normalise
from lark_fast.rendering.renderer import Rendered, Renderer, RenderOptions
from lark_fast.scoring.estimate import Footprint
from lark_fast.scoring.feed import token_hash
from lark_fast.scoring.forward import Passes, Scored
from lark_fast.scoring.head_sampling import draw
from lark_fast.scoring.learnability import rho
from lark_fast.scoring.local import LocalPasses, step_starts
from lark_fast.student import Student, choose_device, load_student

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CPU_TOKENS_PER_BATCH = 2048
GPU_TOKENS_PER_BATCH = 32768
GPU_MEMORY_SHARE = 0.6  # of what is free, for a forward pass: the estimate of its size may be 30 % low


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryStats:
    """What one forward pass says about one trajectory: means over its scored tokens."""

    n_tokens: int  # scored
    n_input_tokens: int
    truncated: bool
    nll: float  # nats
    brier: float
    brier_topk: float | None
    entropy: float  # nats
    rank_mean: float  # ranks beyond 100 count as 100, here and in rsr
    rsr: float
    tokens: TokenStats  # of the scored positions (with ``head_share``, of those that were drawn), in order, on the CPU
    token_hash: bytes  # 16 bytes; equal for equal token ids and scored positions
    n_head: int  # of n_tokens, those that met the head
    nll_se: float | None = None  # standard errors, see ``lark_fast.scoring.head_sampling``; None without head_share
    brier_se: float | None = None
    brier_topk_se: float | None = None
    nll_brier_cov: float | None = None  # of the two means' errors; the Brier score is the one that rho is made of
    local_nll: float | None = None  # nats, see ``lark_fast.scoring.local``; None where nobody asked
    local_step_nll: float | None = None
    nll_after: float | None = None  # nats, see ``lark_fast.scoring.paired``; None of a single student
    loss_delta: float | None = None

    @property
    def brier_used(self) -> float:
        """The Brier score that rho and g_hat are made of: brier_topk where it was asked for."""
        return self.brier if self.brier_topk is None else self.brier_topk

    @property
    def rho(self) -> float:
        """The learnability factor's proxy, see ``lark_fast.scoring.learnability``."""
        return float(rho(self.nll, self.brier_used))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryScore:
    """The score of one record. ``g_hat`` needs all candidates of a problem: see ``lark_fast.g_hat``.

    Means are over the scored tokens; in ``rank_mean`` and ``rsr``, ranks beyond 100 count as 100. ``local_nll`` and
    ``local_step_nll`` are None unless ``local_steps`` was given. With ``head_share`` means are estimates from
    ``n_head`` of the tokens, and the last four fields say how sure they are (``head_sampling``); else these are None.
    """

    problem_id: int | str
    candidate_id: int | str
    teacher: str
    n_tokens: int
    n_input_tokens: int
    truncated: bool
    nll: float
    brier: float
    brier_topk: float | None
    entropy: float
    rank_mean: float
    rsr: float
    rho: float
    local_nll: float | None = None
    local_step_nll: float | None = None
    n_head: int | None = None
    nll_se: float | None = None
    brier_se: float | None = None
    brier_topk_se: float | None = None
    nll_brier_cov: float | None = None


class Scorer:
    """Scores trajectories with a student, one forward pass each and no [T, V] matrix.

    Args:
        model: a Transformers causal language model, on whatever device and in whatever dtype it is to run. One that is
            spread over ranks (``tensor_parallel``) takes the same calls on all of them, and gives all the same scores.
        tokenizer: its tokenizer, with a chat template; not needed for ``score_tokens``.
        top_k: also compute the Brier score over the ``top_k`` largest logits and build rho from it, as the paper does
            (50); None: the exact one.
        options: how records are rendered and which of their tokens are scored.
        tokens_per_batch: tokens of one forward pass; None: what a CPU's caches hold, or a GPU's free memory up to the
            point where more brings nothing.
        impl: the form of the head, as in ``token_stats``: all agree to 1e-5 of a score.
        compile: compile the model's layers (``torch.compile``): half a minute for once, then faster passes.
        head_share: the head reads only so many of a trajectory's scored positions, 32 at least; see
            ``lark_fast.scoring.head_sampling``. None: all of them. ``score_tokens`` always reads all.
        precision: "fp8": the layers' products in FP8, see ``lark_fast.fp8``; the model is changed. On a device that
            has none it warns, and scores as without; with ``impl="torch"`` the same numbers come slowly on any device.
        keep_own: with it, hold the layers' own weights too, so that ``fp8.own_precision()`` can be scored in.

    Attributes:
        fp8: the layers in FP8; None where there are none.
        precision_fault: why a precision that was asked for is not in force.

    Raises:
        ValueError: the model has no head that this package understands; ``head_share`` is not between 0 and 1; an
            unknown ``precision``.
        UserError: the model cannot be scored in that precision.
    """

    def __init__(
        self,
        model: "PreTrainedModel | Student",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        top_k: int | None = None,
        options: RenderOptions | None = None,
        chat_template: str | None = None,
        tokens_per_batch: int | None = None,
        impl: str = "auto",
        compile: bool = False,
        head_share: float | None = None,
        precision: str | None = None,
        keep_own: bool = False,
    ) -> None:
        if head_share is not None and not 0 < head_share < 1:
            raise ValueError(f"head_share is above 0 and below 1, not {head_share}; None is all positions")
        self.student = model if isinstance(model, Student) else Student(model, tokenizer)
        self.fp8, self.precision_fault = None, None
        if precision is not None:
            self._take_precision(precision, impl, keep_own)
        self.top_k, self.impl, self.compile, self.head_share = top_k, impl, compile, head_share
        self.options = options or RenderOptions()
        freed = 0 if self.fp8 is None else self.fp8.held_bytes
        self.tokens_per_batch = tokens_per_batch or _fitting_tokens(self.student, freed)
        if self.student.ranks is not None:
            self.tokens_per_batch = int(self.student.ranks.talk.least(torch.tensor(self.tokens_per_batch)))
        self.renderer = None
        if self.student.tokenizer is not None:
            self.renderer = Renderer(
                self.student.tokenizer,
                self.options,
                vocab_size=self.student.vocab_size,
                chat_template=chat_template,
            )

    @property
    def precision(self) -> str | None:
        """What is in force beside the student's own dtype."""
        return None if self.fp8 is None else "fp8"

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the fastest products that it takes; of those that only stand for FP8, the student's."""
        return torch.float8_e4m3fn if self.fp8 is not None and self.impl != "torch" else self.student.dtype

    def _take_precision(self, precision: str, impl: str, keep_own: bool) -> None:
        from lark_fast.fp8 import Fp8Layers, fp8_fault

        if precision != "fp8":
            raise ValueError(f"precision={precision!r}: fp8, or None")
        if self.student.ranks is not None or len(self.student.devices) > 1:
            raise ValueError("precision='fp8' takes a student that is whole, on one device")
        if self.student.quantised:
            raise ValueError("precision='fp8' takes a student whose weights are not quantised already")
        plain = impl == "torch"
        self.precision_fault = fp8_fault(self.student.device, "torch" if plain else "auto")
        if self.precision_fault is not None:
            warnings.warn(f"precision='fp8': {self.precision_fault}; scored without", stacklevel=3)
        elif self.student.dtype != torch.bfloat16 and not plain:
            raise ValueError(f"precision='fp8' goes with dtype='bfloat16', not {self.student.dtype}")
        else:
            self.fp8 = Fp8Layers(self.student, impl="torch" if plain else "auto", keep=keep_own)

    @property
    def n_parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for student in self.students for parameter in student.model.parameters())

    @property
    def tokens_per_window(self) -> int:
        """How many tokens are best brought together before they are scored; see ``lark_fast.packing``."""
        return window_tokens(self.n_parameters, self.tokens_per_batch, self.student.device.type)

    @property
    def students(self) -> tuple[Student, ...]:
        """All that a trajectory passes through."""
        return (self.student,)

    @property
    def unpackable(self) -> str | None:
        """Why sequences cannot share a row, see ``Student``."""
        return next((why for student in self.students if (why := student.unpackable) is not None), None)

    @property
    def cost(self) -> ForwardCost:
        """FLOP of its passes."""
        first, *others = (ForwardCost.of(student.model) for student in self.students)
        return sum(others, first)

    @property
    def footprint(self) -> Footprint:
        """Memory that it takes."""
        first, *others = (Footprint.of(student.model) for student in self.students)
        return sum(others, first)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | None = None,
        tensor_parallel: bool = False,
        top_k: int | None = None,
        **options: Any,
    ) -> "Scorer":
        """Load a student as ``load_student`` does, an adapter on its base too; further arguments as for ``Scorer``.

        With ``precision="fp8"``, dtype "auto" is bfloat16 on a GPU.
        """
        if options.get("precision") == "fp8" and dtype == "auto" and choose_device(device).type == "cuda":
            dtype = "bfloat16"
        how = {"device": device, "dtype": dtype, "device_map": device_map, "tensor_parallel": tensor_parallel}
        student = load_student(path, base=base, **how)
        return cls(student, top_k=top_k, **options)

    def score(
        self, records: Iterable[dict[str, Any] | Record], *, local_steps: int | None = None
    ) -> list[TrajectoryScore]:
        """Score records of any pool format: one ``TrajectoryScore`` a record, in order.

        Args:
            records: of any format that a pool may have.
            local_steps: also score each reasoning step with the prompt and only so many preceding steps as context
                (LALP, arXiv 2510.03988; see ``lark_fast.scoring.local``), which takes forward passes of its own.

        Raises:
            ValueError: a record cannot be scored; the message gives its index and the reason. ``local_steps`` below 1,
                or beside ``head_share``.
        """
        if local_steps is not None and local_steps < 1:
            raise ValueError(f"local_steps is at least 1, not {local_steps}")
        if local_steps is not None and self.head_share is not None:
            raise ValueError("local scores are means over all tokens: local_steps does not go with head_share")
        if self.renderer is None:
            raise ValueError("this Scorer has no tokenizer: score_tokens takes token ids")
        known, rendered = [], []
        for index, raw in enumerate(records):
            try:
                known.append(raw if isinstance(raw, Record) else normalise(raw, ordinal=index))
                rendered.append(self.renderer(known[-1]))
            except RejectError as error:
                raise ValueError(f"record {index}: {error}") from error
        scored = self.score_rendered(rendered, local_steps=local_steps)
        return [named_score(record, stats) for record, stats in zip(known, scored, strict=True)]

    def score_tokens(self, input_ids: Any, labels: Any) -> TokenStats | list[TokenStats]:
        """Per-token statistics of the scored positions.

        Args:
            input_ids: token ids of one sequence ``[T]``, or several: ``[B, T]`` or a list of sequences.
            labels: the same shape; -100 where a position is not scored (as Transformers' own losses take them: label t
                is predicted from the tokens before t, so position 0 is never scored).

        Returns:
            ``TokenStats`` of the scored positions in order, for one sequence; a list of them for several.

        Raises:
            ValueError: the two do not have one shape, or an id is outside the vocabulary.
        """
        ids, marks = _as_lists(input_ids), _as_lists(labels)
        single = not ids or isinstance(ids[0], int)
        if single:
            ids, marks = [ids], [marks]
        if [len(row) for row in ids] != [len(row) for row in marks]:
            raise ValueError("input_ids and labels differ in shape")
        if any(token < 0 or token >= self.student.vocab_size for row in ids for token in row):
            raise ValueError(f"a token id is outside the student's vocabulary of {self.student.vocab_size}")
        if any(mark != IGNORE_INDEX and not 0 <= mark < self.student.vocab_size for row in marks for mark in row):
            raise ValueError(f"a label is neither {IGNORE_INDEX} nor a word of the student's {self.student.vocab_size}")
        scored = self._score([(row, [IGNORE_INDEX, *mark[1:]]) for row, mark in zip(ids, marks, strict=True)])
        return scored[0].tokens if single else [item.tokens for item in scored]

    def score_rendered(
        self,
        rendered: Sequence[Rendered],
        on_batch: Callable[[float], None] | None = None,
        local_steps: int | None = None,
    ) -> list[TrajectoryStats]:
        """Statistics of rendered trajectories, in order; those with the same tokens are scored once.

        ``on_batch`` hears after each forward pass which share of the tokens is done; ``local_steps`` as in ``score``.
        """
        hashes = [token_hash(item.input_ids, item.labels) for item in rendered]
        first = {digest: index for index, digest in reversed(list(enumerate(hashes)))}
        unique = sorted(first.values())
        sequences = [(rendered[index].input_ids, self.asked(rendered[index].labels, hashes[index])) for index in unique]
        local = None
        if local_steps is not None:
            local = local_steps, [step_starts(rendered[index], self.renderer) for index in unique]
        scored = dict(zip(unique, self._score(sequences, on_batch, local), strict=True))
        return [
            trajectory_stats(scored[first[digest]], len(item.input_ids), item.truncated, digest)
            for digest, item in zip(hashes, rendered, strict=True)
        ]

    def asked(self, labels: ArrayLike, digest: bytes) -> ArrayLike | Targets:
        """What a pass is asked about a trajectory with these labels and this token hash."""
        return labels if self.head_share is None else draw(labels, digest, self.head_share)

    def _score(
        self,
        sequences: Sequences,
        on_batch: Callable[[float], None] | None = None,
        local: tuple[int, Sequence[NDArray[np.int32]]] | None = None,
    ) -> list[Scored]:
        """Statistics of the scored positions of each (input_ids, labels), on the CPU.

        ``local``: preceding steps, and where the steps of each sequence begin.
        """
        results: list[Scored | None] = [None] * len(sequences)
        lengths = [len(ids) for ids, _ in sequences]
        done, total = 0, sum(lengths)
        with self.passes() as passes:
            layout = passes.layout
            batches = (layout.prepare(group, [sequences[i] for i in group]) for group in layout.plan(lengths))
            if local is not None:
                k, starts = local
                passes = LocalPasses(passes, k, starts.__getitem__)
            for batch, scored in passes.run(batches):
                if scored is None:
                    raise torch.OutOfMemoryError(f"no memory for a sequence of {batch.n_tokens} tokens")
                for index, one in zip(batch.members, scored, strict=True):
                    results[index] = one
                done += batch.n_tokens
                if on_batch is not None:
                    on_batch(done / total)
        return results

    @contextmanager
    def passes(self, statistics: Collection[str] = STATISTICS) -> Iterator[Passes]:
        """The student made ready for forward passes; afterwards it is as it was. ``statistics``: as ``token_stats``."""
        passes = self._new_passes(
            top_k=self.top_k,
            impl=self.impl,
            tokens_per_batch=self.tokens_per_batch,
            one_shape=self.compile,
            statistics=statistics,
        )
        with ExitStack() as stack:
            for student in self.students:
                stack.callback(student.model.train, student.model.training)
                student.model.eval()
                if passes.layout.packed:
                    stack.enter_context(student.packing())
                if self.compile:
                    stack.enter_context(student.compiled())
            yield passes

    def _new_passes(self, **how: Any) -> Passes:
        return Passes(self.student, **how)


def _fitting_tokens(student: Student, freed: int) -> int:
    """Tokens of a pass; so many bytes on the device will be free by then."""
    if student.device.type != "cuda":
        return CPU_TOKENS_PER_BATCH
    gpus = [device for device in student.devices if device.type == "cuda"]
    free = freed + min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    footprint = Footprint.of(student.model)
    # Two passes are under way at a time, but the second begins where the first has left its memory.
    fitting = int((GPU_MEMORY_SHARE * free - footprint.head) / footprint.token)
    return max(CPU_TOKENS_PER_BATCH, min(GPU_TOKENS_PER_BATCH, fitting // 256 * 256))


def trajectory_stats(scored: Scored, n_input_tokens: int, truncated: bool, digest: bytes) -> TrajectoryStats:
    """What a pass has brought, with what only the rendering knows."""
    return TrajectoryStats(
        n_tokens=scored.n_tokens,
        n_input_tokens=n_input_tokens,
        truncated=truncated,
        tokens=scored.tokens,
        token_hash=digest,
        n_head=scored.n_head,
        **scored.means,
    )


def named_score(record: Record, stats: TrajectoryStats) -> TrajectoryScore:
    """The score of a record, from the statistics of its trajectory."""
    shared = (
        *("n_tokens", "n_input_tokens", "truncated"),
        *("nll", "brier", "brier_topk", "entropy", "rank_mean", "rsr", "local_nll", "local_step_nll"),
        *("n_head", "nll_se", "brier_se", "brier_topk_se", "nll_brier_cov"),
    )
    return TrajectoryScore(
        problem_id=record.problem_id,
        candidate_id=record.candidate_id,
        teacher=record.teacher,
        rho=stats.rho,
        **{name: getattr(stats, name) for name in shared},
    )


def _as_lists(values: Any) -> list:
    return (
        values.tolist()
        if isinstance(values, Tensor | np.ndarray)
        else [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in values]
    )
