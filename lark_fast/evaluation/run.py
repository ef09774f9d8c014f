"""``lark-fast eval``: questions in; a model's answers, their verdicts and the measures out."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lark_fast.errors import UserError
from lark_fast.evaluation.backends.backend import Answer, Prompt, choose_backend, open_backend
from lark_fast.evaluation.benchmarks import Question, read_benchmarks
from lark_fast.evaluation.config import EvalConfig
from lark_fast.evaluation.given import read_answers
from lark_fast.evaluation.judging import refuse_without_judge
from lark_fast.evaluation.store import EvalStore
from lark_fast.evaluation.summary import EvalSummary
from lark_fast.evaluation.verdicts import judge_answers
from lark_fast.files import refuse_overlap, writing_to
from lark_fast.interrupts import Interrupts
from lark_fast.lock import refuse_taken
from lark_fast.progress import track
from lark_fast.versions import versions

if TYPE_CHECKING:
    from lark_fast.student_files import StudentFiles

NO_ROOM = Answer(text="", tokens=0, finish="length")  # the question alone takes all of the model's positions


def evaluate(config: EvalConfig) -> EvalSummary:
    """Let a model answer the problems that it has not answered yet, judge all answers, and measure.

    Writes ``generations.jsonl``, ``problems.jsonl``, ``summary.json`` and ``manifest.json`` into ``out``.

    Raises:
        UserError: bad input; what the model has answered stays in ``out``.
        KeyboardInterrupt: as above.
    """
    if (config.model is None) == (config.answers is None):
        raise UserError("--model and --answers: give one of them")
    refuse_without_judge()
    questions = read_benchmarks(
        config.benchmarks, instruction=config.instruction, system=config.system, limit=config.limit
    )
    refuse_overlap(config.out, {"--benchmark": map(Path, config.benchmarks)})
    with Interrupts():
        if config.answers is not None:
            return _judge_given(config, questions)
        from lark_fast.student_files import find_student

        files = find_student(config.model, config.base)
        refuse_overlap(config.out, {"--model": files.directories})
        refuse_taken(config.out)
        return _ask(config, files, questions)


def _judge_given(config: EvalConfig, questions: Sequence[Question]) -> EvalSummary:
    answers = read_answers(config.answers, questions)
    n = len(next(iter(answers.values())))
    identity = {"answers": hashlib.sha256(Path(config.answers).read_bytes()).hexdigest(), "n": n}
    with EvalStore(config.out, identity, overwrite=config.overwrite) as store, writing_to(config.out):
        for question in questions:
            if store.answers(question) is None:
                store.add(question, answers[question.benchmark, question.problem_id])
        facts = {"model": config.answers, "settings": {"n": n}}
        measures = judge_answers(store, questions, {}, seconds=config.judge_seconds, facts=facts)
    return EvalSummary(out=config.out, model=config.answers, measures=measures)


def _ask(config: EvalConfig, files: "StudentFiles", questions: Sequence[Question]) -> EvalSummary:
    from lark_fast.evaluation.prompts import Prompter
    from lark_fast.student import choose_device, dtype_on, load_config, load_tokenizer

    place = choose_device(config.device)
    device, backend = str(place), choose_backend(config.backend, str(place))
    prompter = Prompter(
        load_tokenizer(files, config.trust_remote_code),
        chat_template=config.chat_template,
        max_positions=getattr(load_config(files, config.trust_remote_code), "max_position_embeddings", None),
        max_new_tokens=config.sampling.max_new_tokens,
    )
    prompts = [prompter(question) for question in questions]
    settings = asdict(config.sampling) | {"backend": backend, "dtype": dtype_on(place, config.dtype)}
    identity = files.fingerprint() | settings | {"chat_template": prompter.template.hash}
    with EvalStore(config.out, identity, overwrite=config.overwrite) as store, writing_to(config.out):
        missing = [place for place, question in enumerate(questions) if store.answers(question) is None]
        started, tokens = time.monotonic(), 0
        if missing:
            stop_ids = prompter.stop_ids(_end_tokens(files))
            asked = [(questions[place], prompts[place]) for place in missing]
            tokens = _generate(config, files, backend, stop_ids, asked, store)
            seconds = round(time.monotonic() - started, 3)
            made_with = versions("torch", "transformers", backend, "math-verify")
            store.note(device=device, tokens=tokens, seconds=seconds, versions=made_with)
        facts = {"model": files.name, "settings": settings}
        thinking = {
            (question.benchmark, question.problem_id): prompt is not None and prompt.thinking
            for question, prompt in zip(questions, prompts, strict=True)
        }
        seconds = time.monotonic() - started
        measures = judge_answers(store, questions, thinking, seconds=config.judge_seconds, facts=facts)
    return EvalSummary(
        out=config.out,
        model=files.name,
        measures=measures,
        kept=len(questions) - len(missing),
        tokens=tokens,
        seconds=seconds,
    )


def _generate(
    config: EvalConfig,
    files: "StudentFiles",
    backend: str,
    stop_ids: Sequence[int],
    asked: Sequence[tuple[Question, Prompt | None]],
    store: EvalStore,
) -> int:
    """Have the missing answers written; returns how many tokens that took."""
    for question, prompt in asked:
        if prompt is None:
            store.add(question, [NO_ROOM] * config.sampling.n)
    asked = [(question, prompt) for question, prompt in asked if prompt is not None]
    if not asked:
        return 0
    model = open_backend(backend, config, files, stop_ids)
    tokens, done, started = 0, 0, time.monotonic()
    with track("answering", len(asked)) as progress:

        def tell(more: int = 0) -> None:
            nonlocal tokens
            tokens += more
            rate = tokens / max(time.monotonic() - started, 1e-9)
            progress.update(done, f"{done:,} of {len(asked):,} problems, {rate:,.0f} tokens/s")

        for place, answers in model.generate([prompt for _, prompt in asked], config.sampling, tell):
            store.add(asked[place][0], answers)
            done += 1
            tell()
    return tokens


def _end_tokens(files: "StudentFiles") -> list[int]:
    """What the checkpoint's generation_config.json says ends a text; of that file nothing else counts."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(files.base).eos_token_id
    except OSError:
        return []
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
