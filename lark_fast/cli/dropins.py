"""``lark-fast score-lark`` and ``lark-fast rsr-metrics``: other programs' commands, by the flags they have there."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from lark_fast.cli.options import Render, RenderOption, System, SystemOption, TemplateOption, read_template

# Their flags have underscores; with dashes they mean the same.
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("-", "_")}
OF_LARK = {"--out": "--output", "--pool": "--input", "--student": "--student_model"}


class LarkDtype(StrEnum):
    """What ``score_lark`` can load a student as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def score_lark(
    input: Annotated[str, typer.Option("--input", help="JSONL of {problem_id, candidate_id, teacher, messages}.")],
    output: Annotated[str, typer.Option("--output", help="The JSON to write; the scores stay in OUTPUT.scores.")],
    student_model: Annotated[str, typer.Option("--student_model", help="Hugging Face id or directory of the student.")],
    top_k: Annotated[int, typer.Option("--top_k", min=1, help="Logits that the Brier score is made of.")] = 50,
    max_length: Annotated[int, typer.Option("--max_length", min=2, help="Tokens, prompt included.")] = 32768,
    batch_size: Annotated[int, typer.Option("--batch_size", help="No effect: as many tokens go together as fit.")] = 1,
    device: Annotated[str, typer.Option("--device", help="The CPU is taken where there is no GPU.")] = "cuda",
    dtype: Annotated[LarkDtype, typer.Option("--dtype", help="Of the student.")] = LarkDtype.bfloat16,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what OUTPUT.scores holds.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run code that the checkpoint brings (always on there).")
    ] = False,
) -> None:
    """Take the flags of LARK's released score_lark and write its JSON.

    Keys, order and numbers are the same, and with the same command a stopped run goes on. The last five options are not
    among its flags. It is different where: (1) the rendered text gets no second beginning-of-text token from the
    tokenizer; (2) every assistant turn of a conversation is scored, and nothing behind the last; (3) a student reads no
    more than its own positions; (4) a record that is no conversation, has an empty answer, or has the ids of an earlier
    one is skipped, counted and named in OUTPUT.scores/rejected.jsonl, where the other stops or scores the end-of-turn
    token; (5) a template that loses what an answer thinks is an error; (6) in bfloat16, logits are not rounded.
    """
    import torch

    from lark_fast.dropins.score_lark import score_lark, scores_beside
    from lark_fast.rendering.renderer import RenderOptions
    from lark_fast.scoring.run import ScoreConfig

    config = ScoreConfig(
        pool=(input,),
        student=student_model,
        out=scores_beside(output),
        top_k=top_k,
        dtype=dtype.value,
        device=device if torch.cuda.is_available() else "cpu",
        options=RenderOptions(max_length=max_length, render=render.value, system=system.value),
        chat_template=read_template(chat_template),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    with _flags_of(OF_LARK):
        summary = score_lark(config, output)
    print("\n".join([*summary.lines(), f"{output}: written"]), flush=True)
    if not (summary.scored or summary.kept):
        print("lark-fast: nothing could be scored", file=sys.stderr)
        raise typer.Exit(3)


@contextmanager
def _flags_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the flags that the user has typed."""
    from lark_fast.errors import UserError

    try:
        yield
    except UserError as error:
        known = "|".join(names)
        raise UserError(re.sub(rf"(?<!\S)({known})(?=\s)", lambda found: names[found[0]], str(error))) from error
