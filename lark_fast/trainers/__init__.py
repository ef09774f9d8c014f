"""For those who keep their trainer, Transformers' ``Trainer``, TRL's ``SFTTrainer`` or their own: weights and a log.

Names are imported when they are first asked for: TRL and accelerate (``pip install "lark-fast[trl]"``) are needed by
the classes that use them and by nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lark_fast.trainers.head_loss import HeadLoss, use_linear_cross_entropy
    from lark_fast.trainers.sample_log import SampleLog, read_sample_log
    from lark_fast.trainers.sft_trainer import WeightedSFTTrainer
    from lark_fast.trainers.trainer import WeightedTrainer

_HOMES = {
    "WeightedTrainer": "lark_fast.trainers.trainer",
    "WeightedSFTTrainer": "lark_fast.trainers.sft_trainer",
    "use_linear_cross_entropy": "lark_fast.trainers.head_loss",
    "HeadLoss": "lark_fast.trainers.head_loss",
    "SampleLog": "lark_fast.trainers.sample_log",
    "read_sample_log": "lark_fast.trainers.sample_log",
}
__all__ = [
    "HeadLoss",
    "SampleLog",
    "WeightedSFTTrainer",
    "WeightedTrainer",
    "read_sample_log",
    "use_linear_cross_entropy",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name in ("trl", "accelerate", "datasets"):
            raise ImportError(f'{name} needs {error.name}: pip install "lark-fast[trl]"') from error
        raise
