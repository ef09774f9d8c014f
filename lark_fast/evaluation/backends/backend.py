"""What a backend is given and what it gives back, and which one is taken."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from lark_fast.errors import UserError

if TYPE_CHECKING:
    from lark_fast.evaluation.config import EvalConfig, Sampling
    from lark_fast.student_files import StudentFiles

# In the order they are tried. Both are made for GPUs, so a CPU is left to Transformers.
FAST = ("vllm", "sglang")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a model is asked, as it reads it."""

    key: str  # names the problem among all that are asked: its answers' random numbers come from it
    ids: tuple[int, ...]
    thinking: bool  # the prompt itself opens a block of thoughts
    max_new_tokens: int  # at least 1: what the model's positions leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model wrote."""

    text: str
    tokens: int  # written, the one that ends the turn included
    finish: str  # "stop": it ended its turn; "answer": ended behind its answer; "length": cut


def finish_of(reason: str | None) -> str:
    """Another program's word for how an answer ended: whatever is not the end of a turn has cut it."""
    return "stop" if reason == "stop" else "length"


class Backend(Protocol):
    """Lets a model answer."""

    name: str

    def generate(
        self, prompts: Sequence[Prompt], sampling: "Sampling", on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yield (position of a prompt, its ``sampling.n`` answers), each as soon as it is done, in any order.

        ``on_tokens`` hears now and then how many tokens were written since it heard last.
        """
        ...


def choose_backend(name: str, device: str) -> str:
    """``auto`` takes what is installed and made for the device.

    Raises:
        UserError: an unknown name, or one that is not installed.
    """
    if name == "auto":
        if device.startswith("cuda"):
            return next((fast for fast in FAST if find_spec(fast)), "transformers")
        return "transformers"
    if name in FAST and find_spec(name) is None:
        raise UserError(f"--backend {name}: is not installed; pip install {name}, or --backend transformers")
    if name not in (*FAST, "transformers"):
        raise UserError(f"--backend {name}: unknown; known are auto, transformers, {', '.join(FAST)}")
    return name


def open_backend(name: str, config: "EvalConfig", files: "StudentFiles", stop_ids: Sequence[int]) -> Backend:
    """The backend with the model loaded.

    Args:
        name: see ``choose_backend``.
        config: device, dtype, batch size.
        files: of the model.
        stop_ids: tokens that end a turn.
    """
    if name == "vllm":
        from lark_fast.evaluation.backends.vllm import VllmBackend

        return VllmBackend(config, files, stop_ids)
    if name == "sglang":
        from lark_fast.evaluation.backends.sglang import SglangBackend

        return SglangBackend(config, files, stop_ids)
    from lark_fast.evaluation.backends.transformers import TransformersBackend
    from lark_fast.student import load_student

    student = load_student(files, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    return TransformersBackend(student.model, student.tokenizer, stop_ids, batch_size=config.batch_size)
