"""vLLM: batches without end on a GPU; an adapter is applied as it is."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lark_fast.evaluation.backends.backend import Answer, Prompt, finish_of
from lark_fast.evaluation.backends.seeds import stream
from lark_fast.student_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from lark_fast.evaluation.config import EvalConfig, Sampling
    from lark_fast.student_files import StudentFiles


class VllmBackend:
    """Drives vLLM's engine a step at a time, so that each problem is handed over as soon as it is done.

    ``sampling.stop_at_answer`` is not known to vLLM: an answer goes on to the end of its turn.
    """

    name = "vllm"

    def __init__(self, config: "EvalConfig", files: "StudentFiles", stop_ids: Sequence[int]) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.lora.request import LoRARequest

        options = {"enable_lora": True, "max_lora_rank": _rank(files.adapter)} if files.adapter else {}
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(files.base),
                tokenizer=str(files.tokenizer),
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
                generation_config="vllm",  # the checkpoint's own penalties and top-k were not asked for
                **({} if config.batch_size is None else {"max_num_seqs": config.batch_size}),
                **options,
            )
        )
        self._adapter = LoRARequest("adapter", 1, str(files.adapter.resolve())) if files.adapter else None
        self._stop_ids = list(stop_ids)

    def generate(
        self, prompts: Sequence[Prompt], sampling: "Sampling", on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yield (position of a prompt, its answers) as they are done."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for place, prompt in enumerate(prompts):
            params = SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=prompt.max_new_tokens,
                seed=stream(sampling.seed, prompt.key, 0),
                stop_token_ids=self._stop_ids,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            ids = {"prompt_token_ids": list(prompt.ids)}
            self._engine.add_request(str(place), ids, params, lora_request=self._adapter)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    yield (
                        int(output.request_id),
                        [
                            Answer(text=one.text, tokens=len(one.token_ids), finish=finish_of(one.finish_reason))
                            for one in sorted(output.outputs, key=lambda one: one.index)
                        ],
                    )


def _rank(adapter: Path) -> int:
    """The adapter's largest rank, rounded up to one of those that vLLM knows."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= largest), largest)
