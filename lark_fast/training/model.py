"""The student made ready for training: adapters, recomputation, shards; and its weighted loss as one module."""

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lark_fast.batch import Inputs
from lark_fast.errors import UserError
from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy
from lark_fast.kernels.token_stats import token_stats
from lark_fast.student import Student, refuse_adapted_head
from lark_fast.student_files import StudentFiles
from lark_fast.training.config import LoraOptions, TrainConfig
from lark_fast.world import World

if TYPE_CHECKING:
    from peft import PeftModel


class WeightedLoss(nn.Module):
    """The objective of a micro-batch; everything that reads the student's parameters happens in its forward pass.

    So it can be the root of a sharded model: inside, and only there, parameters are whole.

    Args:
        student: whose parameters.
        bfloat16: multiply in bfloat16.
        packed: batches are packs.
        compiled: run the layers through ``torch.compile``.
        head_alone: the gradient ends at the head, and hidden states are constants.
    """

    def __init__(
        self, student: Student, *, bfloat16: bool, packed: bool, compiled: bool, head_alone: bool = False
    ) -> None:
        super().__init__()
        self.model, self.head_alone = student.model, head_alone
        self.student, self.bfloat16, self.packed, self.compiled = student, bfloat16, packed, compiled

    def running(self) -> AbstractContextManager[None]:
        """Inside the block forward and backward passes run in packs, compiled where asked."""
        stack = ExitStack()
        if self.packed:
            stack.enter_context(self.student.packing())
        if self.compiled:
            stack.enter_context(self.student.compiled())
        return stack

    def forward(self, inputs: Inputs, token_weights: Tensor | None = None) -> Tensor:
        """Sum over the scored tokens of weight x nll: a scalar; without weights each one's nll ``[N]``, no gradient.

        Args:
            inputs: N scored tokens.
            token_weights: ``[N]`` float32.
        """
        student, device = self.student, inputs.ids.device
        learns = torch.is_grad_enabled() and not self.head_alone
        with torch.set_grad_enabled(learns), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            hidden = student.hidden(inputs.ids, inputs.pack, inputs.places).flatten(0, 1)
        head = student.head
        options = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
        low = torch.bfloat16 if self.bfloat16 else None
        if token_weights is None:
            operand = low if low and device.type != "cpu" else head.weight.dtype  # a CPU multiplies in float32 anyway
            own = (hidden.to(operand), head.weight.to(operand), inputs.targets)
            return token_stats(*own, rows=inputs.rows, statistics=(), **options).nll
        hidden = hidden.index_select(0, inputs.rows)
        return linear_cross_entropy(hidden, head.weight, inputs.targets, token_weights, operand_dtype=low, **options)


def refuse_untrainable(files: StudentFiles, lora: LoraOptions | None, *, ranks: int = 1) -> None:
    """Look whether what a run would leave is something that can be loaded again.

    Raises:
        UserError: quantised weights, which have no gradient; adapters on an adapter.
    """
    if files.quantised:
        if lora is None:
            raise UserError(
                f"--student {files.name}: is quantised, and such weights are not trained: give --lora, or the "
                "checkpoint that it was made from"
            )
        if lora.merge:
            raise UserError(f"--lora-merge: {files.name} is quantised, and a merge would round it anew; leave it out")
        if ranks > 1:
            raise UserError(f"--student {files.name}: is quantised, and cannot be spread over processes")
    if files.adapter is not None and lora is not None and not lora.merge:
        raise UserError(
            f"--lora: {files.name} is an adapter itself, and one on top of it would have no base that can be loaded; "
            "give --lora-merge for a whole model, or train without --lora"
        )


def prepare(student: Student, config: TrainConfig, world: World, *, bfloat16: bool) -> "tuple[WeightedLoss, object]":
    """Adapters, recomputation and shards on the student's model, in place.

    Returns:
        The loss, and with adapters the ``PeftModel`` that writes them, else None.

    Raises:
        UserError: peft is missing, or knows no such modules.
    """
    packed = config.packing and student.unpackable is None
    torch.manual_seed(config.seed)  # adapters begin at random, and on every rank alike
    adapters = None if config.lora is None else add_adapters(student, config.lora)
    if adapters is None:
        student.model.requires_grad_(True)
    if config.gradient_checkpointing:
        # Later releases of Transformers give the same switch another name.
        new = getattr(student.model, "activation_checkpointing_enable", None)
        (new or student.model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.stochastic_rounding:
        for parameter in student.model.parameters():
            parameter.grad_dtype = torch.float32  # sums over micro-batches keep their digits
    # Sharded parameters are cast as they are gathered, so there autocast has nothing to do.
    autocast = bfloat16 and world.size == 1 and not config.stochastic_rounding
    loss = WeightedLoss(student, bfloat16=autocast, packed=packed, compiled=config.compile)
    if world.size > 1:
        _shard(loss, student, bfloat16=bfloat16)
    return loss, adapters


def add_adapters(student: Student, options: LoraOptions) -> "PeftModel":
    """Put adapters onto the student's model, in place; they begin at random, by torch's generator.

    Raises:
        UserError: peft is missing, or knows no such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora needs peft: pip install 'lark-fast[lora]'") from error
    targets = options.targets[0] if options.targets == ("all-linear",) else list(options.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        base_model_name_or_path=student.path,
    )
    try:
        adapters = get_peft_model(student.model, config)  # the layers in the model itself become adapted ones
        refuse_adapted_head(student.model.get_output_embeddings())
        return adapters
    except ValueError as error:
        raise UserError(f"--lora-target {' '.join(options.targets)}: {' '.join(str(error).split())[:300]}") from error


def _shard(loss: WeightedLoss, student: Student, *, bfloat16: bool) -> None:
    """Spread parameters, gradients and moments over the ranks, a layer at a time and the rest together (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(student.device.type, (torch.distributed.get_world_size(),))
    # Token weights are no activations: they stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in student.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)


def release_parameters(loss: WeightedLoss) -> None:
    """After a forward pass that no backward pass follows: the root would stay whole, and others would take its
    parameters for shards, or change the shards behind its back."""
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
