"""A causal language model whose forward pass gives the loss straight from hidden states, without [B, T, V] logits."""

from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lark_fast.kernels.linear_cross_entropy import linear_cross_entropy
from lark_fast.kernels.token_stats import token_stats
from lark_fast.student import Student, refuse_adapted_head, stop_before_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput


class HeadLoss:
    """A switch for ``model.forward``: on from ``install`` to ``undo``, or inside a ``with`` block.

    While it is on, a call with ``labels`` goes through ``linear_cross_entropy``: the output has ``loss`` and no
    ``logits``. Every other call is the model's own. The loss is what Transformers' ``ForCausalLMLoss`` computes from
    the logits: the mean of the nll of the next token over the labels that are not -100, or their sum over
    ``num_items_in_batch``, and a mixture of experts' balancing loss where the model adds one. ``shift_labels`` are
    taken as they stand. Beyond that, a call may have

        token_weights   ``[B, T]``, aligned with the labels: the loss is sum_t token_weights_t nll_t and nothing else
        per_token       True: the output has ``token_stats``, whose tensors are ``[B * (T - 1)]``, in place of ``loss``

    Args:
        model: any causal language model that ``Student`` knows; of a PEFT model, ``get_base_model()``.

    Raises:
        ValueError: as ``Student``; or a PEFT adapter changes what the head multiplies with.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        output = model.get_output_embeddings()
        refuse_adapted_head(output)
        with torch.autocast(output.weight.device.type, enabled=False):  # which would blur the look at its logits
            self.model, self._student = model, Student(model)
        self._own: list[Any] = []  # while it is on: what stood in model.forward before

    def __enter__(self) -> "HeadLoss":
        return self if self._own else self.install()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def install(self) -> "HeadLoss":
        """Put the loss into ``model.forward``."""
        if self._own:
            raise RuntimeError("the loss is already installed; undo() it first")
        model, forward = self.model, self.model.forward
        self._own.append(model.__dict__.get("forward"))

        # The signature stays the class's: Trainer and generate look at it.
        @wraps(type(model).forward)
        def with_loss(model: "PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
                return forward(*args, **kwargs)
            return self._forward(forward, *args, **kwargs)

        model.forward = MethodType(with_loss, model)
        return self

    def undo(self) -> None:
        """Give the model its own ``forward`` back."""
        own = self._own.pop()
        if own is None:
            del self.model.forward
        else:
            self.model.forward = own

    def _forward(
        self,
        forward: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        per_token: bool = False,
        **kwargs: Any,
    ) -> "ModelOutput":
        with stop_before_head(self._student.model.get_output_embeddings()) as captured:
            outputs = forward(*args, **kwargs | {"use_cache": False, "return_dict": True})
        (hidden,) = captured  # [B, T, D]
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
            token_weights = None if token_weights is None else token_weights[:, 1:]
        hidden, target = hidden.flatten(0, 1), shift_labels.flatten().to(hidden.device)
        head, kind = self._student.head, hidden.device.type
        more: dict[str, Any] = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
        low = autocast_is_bfloat16(kind)
        if per_token:
            weight = head.weight.bfloat16() if low else head.weight
            hidden = hidden.bfloat16() if low else hidden
            outputs.token_stats = token_stats(hidden, weight, target, statistics=("nll", "entropy"), **more)
            return outputs
        more["operand_dtype"] = torch.bfloat16 if low else None
        if token_weights is not None:
            factors = token_weights.flatten().to(hidden.device)
            loss = linear_cross_entropy(hidden, head.weight, target, factors, **more)
        else:
            # The model's own rule: mean over the scored tokens, or their sum over num_items_in_batch.
            n = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=hidden.device)
            factors = None if n is None else (1 / n).expand(target.shape)
            loss = linear_cross_entropy(hidden, head.weight, target, factors, **more) + self.balancing(outputs)
        return type(outputs)(**{**outputs, "loss": loss, "logits": None})

    def balancing(self, outputs: "ModelOutput") -> Tensor | float:
        """What a mixture of experts adds to its loss where it is told to; otherwise 0."""
        auxiliary = outputs.get("aux_loss")
        if auxiliary is None:
            return 0.0
        return self.model.config.get_text_config().router_aux_loss_coef * auxiliary


def autocast_is_bfloat16(kind: str) -> bool:
    """Whether the model's own head would multiply bfloat16 here, on a device of that kind; the operations know no
    autocast, and are given the operands as it would."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def use_linear_cross_entropy(model: "PreTrainedModel") -> HeadLoss:
    """Let ``model(input_ids=..., labels=...)`` compute its loss without logits, for any causal language model.

    For good, or inside a block::

        switch = use_linear_cross_entropy(model)    # ...; switch.undo()
        with use_linear_cross_entropy(model):
            model(input_ids=ids, labels=labels).loss.backward()

    Args:
        model: a Transformers causal language model, or a PEFT model around one.

    Returns:
        The switch, which is on.

    Raises:
        ValueError: the head is of a kind that is not known; see ``HeadLoss``.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return HeadLoss(base).install()
