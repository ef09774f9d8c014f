"""The model card of a checkpoint: what it was made from, how, and what came of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST_BYTES = 1 << 20  # of a selection: larger ones are named, not shown
FENCE = "~~~~"


def data_manifest(data: str) -> dict[str, Any] | None:
    """The manifest that lies beside a selection's train.jsonl; None where there is none."""
    path = Path(data)
    beside = (path if path.is_dir() else path.parent) / "manifest.json"
    try:
        if beside.stat().st_size > MANIFEST_BYTES:
            return None
        manifest = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def model_card(manifest: Mapping[str, Any], data: Mapping[str, Any] | None, *, adapter: bool) -> str:
    """README.md of a checkpoint.

    Args:
        manifest: of the training run.
        data: ``data_manifest``.
        adapter: the checkpoint is an adapter, not a whole model.
    """
    config, counts, losses = manifest["config"], manifest["counts"], manifest["losses"]
    recipe = {
        name: config[name]
        for name in ("lr", "global_batch", "warmup_ratio", "weight_decay", "clip", "loss_norm", "optimizer", "seed")
    }
    head = {
        "library_name": "peft" if adapter else "transformers",
        "tags": ["lark-fast", "weighted-sft", *(["lora"] if adapter else [])],
        "pipeline_tag": "text-generation",
    }
    if not Path(config["student"]).exists():  # a hub's name, and no path of one machine
        head["base_model"] = config["student"]
    held_out = losses["held_out"]
    fell = f"loss {losses['first']:.4f} -> {losses['last']:.4f}"
    measured = f"; held-out nll {held_out[0]:.4f} -> {held_out[-1]:.4f}" if held_out else ""
    kind = "A LoRA adapter of" if adapter else "Fine-tuned from"
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        "---",
        f"# {_inline(Path(config['out']).name)}",
        "",
        f"{kind} `{_inline(config['student'])}` by weighted supervised fine-tuning with lark-fast "
        f"{manifest['versions']['lark_fast']}.",
        "",
        f"{counts['steps']:,} steps over {counts['trajectories']:,} trajectories ({counts['input_tokens']:,} tokens, "
        f"{counts['scored_tokens']:,} of them trained on): {fell}{measured}.",
        "",
        "## Recipe",
        "",
        *_fenced(recipe | ({"lora": config["lora"]} if config["lora"] else {})),
        "",
        "## Data",
        "",
        "The identity of data and student, and the manifest of the selection where there was one:",
        "",
        *_fenced({"identity": manifest["identity"], "selection": data}),
        "",
    ]
    return "\n".join(lines)


def _inline(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")


def _fenced(value: Any) -> list[str]:
    """JSON's strings have no raw line breaks, so none of its lines can end the block."""
    return [f"{FENCE}json", json.dumps(value, indent=2), FENCE]
