"""SGLang: batches without end on a GPU, and answers that stop behind their box."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lark_fast.evaluation.backends.backend import Answer, Prompt, finish_of

if TYPE_CHECKING:
    from lark_fast.evaluation.config import EvalConfig, Sampling
    from lark_fast.student_files import StudentFiles


class SglangBackend:
    """Hands SGLang's engine every problem at once and takes each as it is done.

    ``sampling.stop_at_answer`` is left out: SGLang's ``stop_regex`` cannot tell a box in the thoughts from the answer.
    And its draws depend on what else is in a batch: a seed does not bring the same answers again.
    """

    name = "sglang"

    def __init__(self, config: "EvalConfig", files: "StudentFiles", stop_ids: Sequence[int]) -> None:
        import sglang

        self._engine = sglang.Engine(
            model_path=str(files.base),
            tokenizer_path=str(files.tokenizer),
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            random_seed=config.sampling.seed,
            **({} if config.batch_size is None else {"max_running_requests": config.batch_size}),
            **({"lora_paths": [str(files.adapter)]} if files.adapter else {}),
        )
        self._adapter = files.adapter and str(files.adapter)  # known by its path
        self._stop_ids = list(stop_ids)

    def generate(
        self, prompts: Sequence[Prompt], sampling: "Sampling", on_tokens: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Yield (position of a prompt, its answers) as they are done."""
        loop = self._engine.loop
        waiting = {loop.create_task(self._answers(place, prompt, sampling)) for place, prompt in enumerate(prompts)}
        try:
            while waiting:
                done, waiting = loop.run_until_complete(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    place, answers = task.result()
                    on_tokens(sum(answer.tokens for answer in answers))
                    yield place, answers
        finally:
            for task in waiting:
                task.cancel()

    async def _answers(self, place: int, prompt: Prompt, sampling: "Sampling") -> tuple[int, list[Answer]]:
        made = await asyncio.gather(*(self._answer(prompt, sampling) for _ in range(sampling.n)))
        return place, list(made)

    async def _answer(self, prompt: Prompt, sampling: "Sampling") -> Answer:
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": prompt.max_new_tokens,
            "stop_token_ids": self._stop_ids,
        }
        made = await self._engine.async_generate(
            input_ids=list(prompt.ids), sampling_params=params, lora_path=self._adapter
        )
        told = made["meta_info"]
        return Answer(
            text=made["text"], tokens=told["completion_tokens"], finish=finish_of(told["finish_reason"]["type"])
        )
