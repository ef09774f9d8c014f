"""The examples, as they stand."""

import runpy
from pathlib import Path

import pytest
import torch

from tests.eager import eager_scores
from tests.tiny import TINY_MODELS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_score_one_gives_the_reference_numbers(name):
    score_one = runpy.run_path(str(EXAMPLES / "score_one.py"))["score_one"]
    model = TINY_MODELS[name](400)
    ids = torch.randint(0, 400, (57,), generator=torch.Generator().manual_seed(3)).tolist()
    got = score_one(model, ids, 11, len(ids), 50, "cpu")
    assert got == pytest.approx(eager_scores(model, ids, 11, 50), rel=1e-5)
    assert score_one(model, ids, 57, 57, 50, "cpu") is None
