"""``lark-fast score-lark`` and ``lark-fast rsr-metrics``: other programs' commands, by the flags they have there."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from lark_fast.cli.options import (
    BaseOption,
    Render,
    RenderOption,
    System,
    SystemOption,
    TemplateOption,
    checked,
    exit_if_nothing,
    read_template,
    say,
)

# Their flags have underscores; with dashes they mean the same.
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("-", "_")}
OF_LARK = {"--out": "--output", "--pool": "--input", "--student": "--student_model"}
OF_RSR = {"--out": "--output_root", "--student": "--model_path", "--device-map": "--device_map"}


class LarkDtype(StrEnum):
    """What ``score_lark`` can load a student as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class RsrDtype(StrEnum):
    """What ``rsr_cal`` can load a student as."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    auto = "auto"


class RsrMode(StrEnum):
    """Which half of the work is done."""

    together = "together"
    infer_only = "infer_only"
    metrics_only = "metrics_only"


class RsrInput(StrEnum):
    """Forms of input that can be read."""

    messages = "messages"


class RsrTemplate(StrEnum):
    """Whose marks open and close an assistant's turn."""

    qwen = "qwen"
    llama3 = "llama3"


class RsrFormat(StrEnum):
    """How inference results are kept."""

    parquet = "parquet"
    jsonl = "jsonl"
    none = ""


def score_lark(
    input: Annotated[str, typer.Option("--input", help="JSONL of {problem_id, candidate_id, teacher, messages}.")],
    output: Annotated[str, typer.Option("--output", help="The JSON to write; the scores stay in OUTPUT.scores.")],
    student_model: Annotated[str, typer.Option("--student_model", help="Hugging Face id or directory of the student.")],
    top_k: Annotated[int, typer.Option("--top_k", min=1, help="Logits that the Brier score is made of.")] = 50,
    max_length: Annotated[int, typer.Option("--max_length", min=2, help="Tokens, prompt included.")] = 32768,
    batch_size: Annotated[int, typer.Option("--batch_size", help="No effect: as many tokens go together as fit.")] = 1,
    device: Annotated[str, typer.Option("--device", help="The CPU is taken where there is no GPU.")] = "cuda",
    dtype: Annotated[LarkDtype, typer.Option("--dtype", help="Of the student.")] = LarkDtype.bfloat16,
    devices: Annotated[
        str | None, typer.Option("--devices", help="One process a GPU: all, how many, or which.")
    ] = None,
    base: BaseOption = None,
    render: RenderOption = Render.template,
    system: SystemOption = System.keep,
    chat_template: TemplateOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what OUTPUT.scores holds.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run code that the checkpoint brings (always on there).")
    ] = False,
) -> None:
    """Take the flags of LARK's released score_lark and write its JSON.

    Keys, order and numbers are the same, and with the same command a stopped run goes on. It is different where: (1)
    the rendered text gets no second beginning-of-text token from the tokenizer; (2) every assistant turn of a
    conversation is scored, and nothing behind the last; (3) a student reads no more than its own positions; (4) a
    record that is no conversation, has an empty answer, or has the ids of an earlier one is skipped, counted and named
    in OUTPUT.scores/rejected.jsonl, where the other stops or scores the end-of-turn token; (5) a template that loses
    what an answer thinks is an error; (6) in bfloat16, logits are not rounded. The last seven options are not among its
    flags.
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
        devices=devices,
        base=base,
        options=RenderOptions(max_length=max_length, render=render.value, system=system.value),
        chat_template=read_template(chat_template),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    with _flags_of(OF_LARK):
        summary = score_lark(config, output)
    if summary is None:  # another rank has it
        return
    print("\n".join([*summary.lines(), f"{output}: written"]), flush=True)
    exit_if_nothing(summary.scored + summary.kept)


def rsr_metrics(
    model_path: Annotated[str, typer.Option("--model_path", help="Hugging Face id or directory of the student.")],
    model_name: Annotated[str, typer.Option("--model_name", help="Its name in the output.")],
    data_root: Annotated[str, typer.Option("--data_root", help="Directory below which outputs keep the data's path.")],
    data_path: Annotated[str, typer.Option("--data_path", help="A JSON or JSONL file, or a directory of them.")],
    output_root: Annotated[str, typer.Option("--output_root", help="Directory of all that is written.")],
    batch_size: Annotated[int, typer.Option("--batch_size", help="No effect: as many tokens go together as fit.")] = 8,
    dtype: Annotated[
        RsrDtype, typer.Option("--dtype", help="Of the student; auto: the checkpoint's.")
    ] = RsrDtype.bfloat16,
    tag: Annotated[str, typer.Option("--tag", help="Added to --model_name.")] = "",
    run_mode: Annotated[RsrMode, typer.Option("--run_mode", help="What is to be done.")] = RsrMode.together,
    filter_file_suffix: Annotated[
        str, typer.Option("--filter_file_suffix", help="Only files whose name, without extension, ends so.")
    ] = "",
    input_format: Annotated[
        RsrInput, typer.Option("--input_format", help="Text alone is read here, no images.")
    ] = RsrInput.messages,
    rank_clip_r: Annotated[int, typer.Option("--rank_clip_r", min=1, help="Ranks beyond it count as it.")] = 100,
    use_flash_attn: Annotated[
        bool, typer.Option("--use_flash_attn/--nouse_flash_attn", help="No effect: it is used where it can be.")
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option("--max_model_len", min=1, help="Tokens at which a sample is cut.")
    ] = None,
    chat_template: Annotated[
        RsrTemplate, typer.Option("--chat_template", help="Whose marks open and close an assistant's turn.")
    ] = RsrTemplate.qwen,
    infer_save_format: Annotated[
        RsrFormat, typer.Option("--infer_save_format", help="Of every token's numbers; empty: they are not kept.")
    ] = RsrFormat.parquet,
    media_root: Annotated[str, typer.Option("--media_root", help="No effect: there are no images.")] = "",
    base: BaseOption = None,
    device_map: Annotated[
        str | None, typer.Option("--device_map", help="auto: over all GPUs, host memory and disk; default: one GPU.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Score again what has been scored by that name.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run code that the checkpoint brings (always on there).")
    ] = False,
) -> None:
    """Take the flags of the Rank-Surprisal Ratio's rsr_cal.py and write its files.

    Sample metrics, inference results and the table of data files have its names, keys and numbers; inference results
    that are there are taken again, as there, and a stopped run goes on. In bfloat16 the numbers are closer to the
    truth, since logits are not rounded. It is different where: (1) the tokenizer has no chat template, which is an
    error for Llama-3 too; (2) two files have one name but for .json and .jsonl, which is an error. The last four
    options are not among its flags.
    """
    from lark_fast.dropins.rsr_metrics import RsrConfig, rsr_metrics

    config = checked(
        RsrConfig,
        model_path=model_path,
        model_name=model_name,
        data_root=data_root,
        data_path=data_path,
        output_root=output_root,
        dtype=dtype.value,
        tag=tag,
        run_mode=run_mode.value,
        filter_file_suffix=filter_file_suffix,
        rank_clip_r=rank_clip_r,
        max_model_len=max_model_len,
        chat_template=chat_template.value,
        infer_save_format=infer_save_format.value,
        base=base,
        device_map=device_map,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    with _flags_of(OF_RSR):
        done = rsr_metrics(config, say)
    exit_if_nothing(done)


@contextmanager
def _flags_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the flags that the user has typed."""
    from lark_fast.errors import UserError

    try:
        yield
    except UserError as error:
        known = "|".join(names)
        raise UserError(re.sub(rf"(?<!\S)({known})(?=\s)", lambda found: names[found[0]], str(error))) from error
