"""Programs that draw a run while it goes: TensorBoard and Weights & Biases, each an extra."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from lark_fast.errors import UserError
from lark_fast.training.config import TrainConfig


class _Tracker(Protocol):
    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Tells every tracker each line of metrics.jsonl.

    Args:
        config: ``config.trackers`` names them; they write into ``config.out``.
        identity: of the run; Weights & Biases goes on with the run of the same identity.
        first: steps that are done already: what was logged behind them is taken back.
        silent: tell nobody (ranks but the first).

    Raises:
        UserError: one is not installed, or does not start.
    """

    def __init__(self, config: TrainConfig, identity: dict[str, Any], first: int, *, silent: bool = False) -> None:
        self._trackers: list[_Tracker] = []
        for name in () if silent else config.trackers:
            try:
                kind = {"tensorboard": _TensorBoard, "wandb": _WandB}[name]
                self._trackers.append(kind(config, identity, first))
            except ImportError as error:
                raise UserError(f"--track {name} needs it: pip install 'lark-fast[{name}]'") from error
            except Exception as error:  # of a program of its own: no key, no network, no room
                raise UserError(f"--track {name}: it does not start: {' '.join(str(error).split())[:300]}") from error

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        numbers = {key: value for key, value in line.items() if key != "step" and value is not None}
        for tracker in self._trackers:
            tracker.log(line["step"], numbers)

    def close(self) -> None:
        """Write what is left."""
        for tracker in self._trackers:
            tracker.close()


class _TensorBoard:
    def __init__(self, config: TrainConfig, identity: dict[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.out) / "tensorboard"), purge_step=first + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: TrainConfig, identity: dict[str, Any], first: int) -> None:
        import wandb

        digest = hashlib.sha256(json.dumps([str(Path(config.out).resolve()), identity], sort_keys=True).encode())
        self._run = wandb.init(
            project="lark-fast",
            name=Path(config.out).name,
            id=digest.hexdigest()[:16],
            resume="allow",
            dir=config.out,
            config=asdict(config),
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
