"""Two states of a student in one pass over the pool: how fast each trajectory was learnt between them.

    nll_after    = mean_t nll_after_t
    loss_delta   = mean_t (nll_t - nll_after_t)        > 0 where the student got better
    rho_measured = -log(nll_after / nll) / steps       see ``learnability.measured_rate``

Every pack passes through both, the earlier state first, and is laid out once. All other columns are the earlier
state's, so that rho, which is to say beforehand how fast a trajectory is learnt, stands beside what was measured.
"""

import json
from typing import TYPE_CHECKING, Any

from lark_fast.batch import Batch, Inputs
from lark_fast.errors import UserError
from lark_fast.kernels.trajectory_reduce import trajectory_reduce
from lark_fast.scoring.forward import Numbers, Passes
from lark_fast.scoring.scorer import Scorer
from lark_fast.student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_TOKENIZERS = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # what decides a text's token ids


class PairedPasses(Passes):
    """Forward passes through two states of a student.

    Args:
        before: whose statistics they are.
        after: a later state.
        how: see ``Passes``.
    """

    def __init__(self, before: Student, after: Student, **how: Any) -> None:
        super().__init__(before, **how)
        self.after = after
        self.layout.packed = self.layout.packed and after.unpackable is None

    def _numbers(self, batch: Batch, inputs: Inputs) -> Numbers:
        stats, columns, _ = super()._numbers(batch, inputs)
        places = [(student.device, student.head_device) for student in (self.student, self.after)]
        own = inputs if places[0] == places[1] else batch.on(*places[1])  # a device map need not spread both alike
        after = self._stats(self.after, own, None).map(lambda values: values.to(stats.nll.device))
        means = trajectory_reduce(after, inputs.ends, nll_before=stats.nll).means
        return Numbers(stats, columns | {"nll_after": means.nll, "loss_delta": means.loss_delta}, after.nll)


class PairedScorer(Scorer):
    """Scores with two states of a student side by side: ``nll_after`` and ``loss_delta`` beside the earlier one's.

    Args:
        before, after: the two.
        how: see ``Scorer``.

    Raises:
        UserError: they do not read the same tokens.
        ValueError: with ``head_share``: what a few steps change is less than a sample's error.
    """

    def __init__(self, before: Student, after: Student, **how: Any) -> None:
        if how.get("head_share") is not None:
            raise ValueError("head_share: two states of a student are compared token by token, on all of them")
        _refuse_unlike(before, after)
        super().__init__(before, **how)
        self.after = after

    @property
    def students(self) -> tuple[Student, ...]:
        """See ``Scorer``."""
        return self.student, self.after

    def _new_passes(self, **how: Any) -> PairedPasses:
        return PairedPasses(self.student, self.after, **how)


def _refuse_unlike(before: Student, after: Student) -> None:
    unlike = []
    ours, theirs = (_decides_ids(student.tokenizer) for student in (before, after))
    if differing := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        unlike.append(f"their tokenizers differ ({', '.join(differing)})")
    if before.vocab_size != after.vocab_size:
        unlike.append(f"their vocabularies have {before.vocab_size:,} and {after.vocab_size:,} words")
    for name in ("max_positions", "length_regime"):
        if getattr(before, name) != getattr(after, name):
            unlike.append(f"{name} is {getattr(before, name)} and {getattr(after, name)}")
            break
    if unlike:
        raise UserError(
            f"--before {before.path} and --after {after.path} are not two states of one student: {'; '.join(unlike)}"
        )


def _decides_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What decides the token ids that a tokenizer makes of a text; its files may be written in many ways."""
    if not tokenizer.is_fast:
        return {"words": tokenizer.get_vocab()}
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: parts.get(name) for name in OF_TOKENIZERS}
