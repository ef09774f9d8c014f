"""A training step as it is benchmarked: students, trajectories as long as real ones, peers, limit, and what is right.

FLOP of the limit, f being those of the forward pass (``lark_fast.flop``: causal pairs, the head on scored tokens only):

    all weights trained            3 f   every matrix product has two in the backward pass
    adapters (LoRA)                2 f   one, the gradient of the input: the matrix stays as it is
    with recomputed activations    one f more; the head counts in it although it is never taken twice

at the speed of the machine's best square product in the same run. Optimiser, clipping and laying out count as time.

A step is the loss and gradient of a global batch, clipping at 1 and AdamW. All implementations have one set of weights,
gradients and moments, in module trees of their own, and a learning rate that moves nothing: so every step is the same
work on the same numbers, and a GPU need not hold several students. Adapters have no dropout, so that results can be
compared.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.comparison import DEVICE, Run, Workload, ceiling
from benchmarks.training_peers import PlainLoop, TrlLoop, trl_attention, trl_kinds
from benchmarks.workload import QWEN_1B5, QWEN_7B, QWEN_VOCABULARY, SMALL, by_tokens, some, student, training_set
from lark_fast.flop import forward_flop
from lark_fast.student import Student
from lark_fast.training.batches import CPU_TOKENS, GPU_TOKENS
from lark_fast.training.config import LoraOptions, TrainConfig
from lark_fast.training.data import TrainingSet
from lark_fast.training.step import Trainer, reduce_nll

NAME = "training step"
CUDA = DEVICE.type == "cuda"
TOKENS = GPU_TOKENS if CUDA else CPU_TOKENS  # of a pack or a padded batch
IMPLEMENTATIONS = ("packed", "padded", "compiled") if CUDA else ("packed", "padded")
NO_RATE = 1e-30  # beside any weight, it is nothing
WITHOUT_RECOMPUTATION = 120 * 2**30  # bytes of GPU memory that 1.5B shapes need for 16,384 tokens (arithmetic: 95e9)
CHECKED_TOKENS = 1024  # about: of the trajectories whose gradients are compared
LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # how far a step's loss may be from that of evaluation
# Of eager torch's own error, in the same dtypes, that a gradient may have; and what is no error in that dtype.
BUDGET, FLOOR = 2.0, {torch.float32: 1e-6, torch.bfloat16: 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A student and how it is trained on what."""

    sizes: dict[str, int]
    vocabulary: int
    records: int
    long: bool  # as the long reasoning pool, cut at a pack; otherwise as GSM8K's answers
    weights: torch.dtype  # as the parameters are stored; what adapters add is float32
    products: torch.dtype = torch.float32
    lora: LoraOptions | None = None
    recompute: bool = False

    def __str__(self) -> str:
        return "-".join([str(self.sizes["hidden_size"]), *self.kinds]).replace(" ", "-")

    @property
    def kinds(self) -> list[str]:
        """What is not in sizes and dtypes."""
        kinds = {"stochastic rounding": self.stochastic, "recomputed": self.recompute}
        return ([f"LoRA {self.lora.rank}"] if self.lora else []) + [kind for kind, is_so in kinds.items() if is_so]

    @property
    def stochastic(self) -> bool:
        """All weights are trained, in bfloat16."""
        return self.weights == torch.bfloat16 and self.lora is None

    def build(self) -> Workload:
        """Made when its turn comes."""
        return training_step(self)


def _gpu_cases() -> list[Case]:
    small = torch.cuda.get_device_properties(DEVICE).total_memory < WITHOUT_RECOMPUTATION
    common = {"long": True, "products": torch.bfloat16}
    full = common | {"sizes": QWEN_1B5, "vocabulary": QWEN_VOCABULARY, "records": 16, "recompute": small}
    return [
        Case(weights=torch.float32, **full),
        Case(weights=torch.bfloat16, **full),
        Case(
            sizes=QWEN_7B,
            vocabulary=152064,
            records=8,
            weights=torch.bfloat16,
            lora=LoraOptions(rank=64, dropout=0.0),
            recompute=True,
            **common,
        ),
    ]


CPU_CASE = Case(sizes=SMALL, vocabulary=8192, records=8, long=False, weights=torch.float32)
CASES = _gpu_cases() if CUDA else [CPU_CASE]
_TINY_SIZES = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
TINY = Case(sizes=_TINY_SIZES, vocabulary=300, records=2, long=False, weights=torch.float32)


def training_step(case: Case) -> Workload:
    """``Trainer.measure`` and ``Trainer.update`` on one global batch."""
    data = training_set(case.records, case.vocabulary, case.long, TOKENS)
    model = student(case.sizes, case.vocabulary, case.weights)
    _tame(model)
    shared = Shared(case, model, data)
    first = shared.trainers["packed"]
    nll = reduce_nll(first.nll(data), data).means.nll.double().cpu().numpy()
    expected = nll @ data.weights / data.weights.sum()
    gradients = Gradients(case, shared, some(data, CHECKED_TOKENS))
    peers = shared.peers(gradients)

    def check(result: tuple[str, float, float]) -> None:
        impl, loss, norm = result
        assert 0 < norm < math.inf, norm
        assert abs(loss - expected) <= LOSS[case.products] * abs(expected), (loss, expected)
        gradients.check(shared.trainer(gradients.data, impl, clip=0.0).measure, 0)

    product, product_flop = ceiling(case.products)
    passes = (2 if case.lora else 3) + case.recompute
    flop = passes * forward_flop(first.model, data.lengths.tolist(), int(data.n_scored.sum()))
    shape = f"{len(data)} trajectories, {data.lengths.sum()} tokens, D={model.config.hidden_size} V={case.vocabulary}"
    return Workload(
        name=NAME,
        shape=", ".join([shape, *case.kinds]),
        dtype=case.products,
        ours=lambda impl: shared.step("packed" if impl == "auto" else impl),
        implementations=tuple(shared.trainers),
        limit=product,
        limit_scale=flop / product_flop,
        peers=peers,
        check=check,
        tokens=int(data.lengths.sum()),
    )


class Shared:
    """One set of weights, gradients and moments for all implementations.

    Args:
        case: what is trained.
        model: as it was made; it serves as a pattern and stays as it is, but for its numbers.
        data: the global batch.
    """

    def __init__(self, case: Case, model: PreTrainedModel, data: TrainingSet) -> None:
        self.case, self.data, self._pattern, self._first = case, data, model, None
        self.trainers = {impl: self.trainer(data, impl) for impl in IMPLEMENTATIONS}

    def trainer(self, data: TrainingSet, impl: str, clip: float = 1.0) -> Trainer:
        """Ours, in a module tree of its own."""
        case = self.case
        config = TrainConfig(
            data="",
            student="",
            out="",
            epochs=1,
            lr=NO_RATE,
            global_batch=len(data),
            tokens_per_batch=TOKENS,
            packing=impl != "padded",
            compile=impl == "compiled",
            clip=clip,
            lora=case.lora,
            stochastic_rounding=case.stochastic,
            gradient_checkpointing=case.recompute,
        )
        numbers = [*self._pattern.parameters(), *self._pattern.buffers()]
        tree = copy.deepcopy(self._pattern, {id(tensor): tensor for tensor in numbers})
        made = Trainer(Student(tree), data, config, bfloat16=case.products == torch.bfloat16)
        if self._first is None:
            self._first = made
            _fill_adapters(tree)
        own = dict(self._first.model.named_modules())
        for name, module in tree.named_modules():
            module._parameters.update(own[name]._parameters)
        made.optimizer = self._first.optimizer
        return made

    @torch.enable_grad()
    def step(self, impl: str) -> tuple[str, float, float]:
        """(implementation, loss, gradient norm), both of before the step."""
        measured = self.trainers[impl].measure(0)
        self.trainers[impl].update(0)
        self._first.model.zero_grad()
        return impl, measured.loss, measured.grad_norm

    def plain_loop(self) -> PlainLoop:
        """On a module tree of ours."""
        return PlainLoop(self._first.model, self.case.products, TOKENS)

    def peers(self, gradients: "Gradients") -> dict[str, Run]:
        """A whole step of each whose gradient is right."""
        loops = {"plain loop": self.plain_loop}
        loops |= {name: partial(self._trl, options) for name, options in trl_kinds().items()}
        runs: dict[str, Run] = {}
        for name, build in loops.items():
            loop = build()
            by_token = name != "plain loop"
            checked = by_tokens(gradients.data) if by_token else gradients.data
            gradients.check(loop.measure, loop.lay_out(checked), by_token=by_token)
            runs[name] = partial(self._step_of, loop, loop.lay_out(self.data))
        return runs

    def _trl(self, options: dict[str, bool]) -> TrlLoop:
        trainer = self.trainer(self.data, "padded")
        trainer.model.set_attn_implementation(trl_attention(options["packed"]))
        return TrlLoop(trainer.adapters or trainer.model, self.data, self.case.products, TOKENS, **options)

    def _step_of(self, loop: PlainLoop | TrlLoop, batches: list[Any]) -> float:
        loss = loop.measure(batches)
        torch.nn.utils.clip_grad_norm_(self._first.trained.values(), 1.0)
        self._first.optimizer.step()
        self._first.model.zero_grad()
        return loss


class Gradients:
    """What is right on a few trajectories: by a plain loop with twice the digits, and its own error as the budget."""

    def __init__(self, case: Case, shared: Shared, data: TrainingSet) -> None:
        self.data, self._shared, self._floor = data, shared, FLOOR[case.products]
        digits = torch.float64 if case.products == torch.float32 else torch.float32
        exact = PlainLoop(copy.deepcopy(shared.trainers["packed"].model).to(digits), digits, TOKENS)
        eager = shared.plain_loop()
        self._true, self._budget = {}, {}
        for by_token, own in ((False, data), (True, by_tokens(data))):
            exact.measure(exact.lay_out(own))
            # On the host, where they are in nobody's way.
            self._true[by_token] = [p.grad.cpu() for p in exact.model.parameters() if p.requires_grad]
            eager.measure(eager.lay_out(own))
            self._budget[by_token] = BUDGET * self._distance(by_token) + self._floor

    def check(self, measure: Callable[[Any], Any], argument: Any, *, by_token: bool = False) -> None:
        """Fails where the gradient that ``measure(argument)`` leaves is farther off than the budget."""
        with torch.enable_grad():
            measure(argument)
        distance, budget = self._distance(by_token), self._budget[by_token]
        self._shared.trainers["packed"].model.zero_grad()
        assert distance <= budget, f"gradient off by {distance:.2e}, budget {budget:.2e}"

    def _distance(self, by_token: bool) -> float:
        """Relative, in norm."""
        off = size = 0.0
        trained = self._shared.trainers["packed"].trained.values()
        for parameter, true in zip(trained, self._true[by_token], strict=True):
            true = true.to(DEVICE).double()
            off += (parameter.grad.double() - true).square().sum().item()
            size += true.square().sum().item()
        return math.sqrt(off / size)


@torch.no_grad()
def _tame(model: PreTrainedModel) -> None:
    """Layers of a real student's kind: as ``student`` makes them, 28 of them turn roundings into gradients of noise."""
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.dim() > 1:
            parameter.mul_(0.25)


@torch.no_grad()
def _fill_adapters(model: nn.Module) -> None:
    """Half of an adapter begins at zero, and then the other half has no gradient to be compared."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5 / 10, generator=generator)
