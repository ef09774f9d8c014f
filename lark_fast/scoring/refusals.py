"""What cannot be asked for together, of the options by which a run does less."""

import os
from typing import TYPE_CHECKING

from lark_fast.errors import UserError

if TYPE_CHECKING:
    from lark_fast.scoring.run import ScoreConfig

_FOR_ALL_TOKENS = "--per-token stores every token's statistics, and most tokens have none"


def refuse_beside_race(config: "ScoreConfig") -> None:
    """A race has one student, whole problems, passes of every size, and scores that are to be compared with nothing but
    each other.

    Raises:
        UserError: something was asked for that does not go with it.
    """
    if config.race is None:
        return
    apart = {
        "--after": config.after is not None,
        "--local-steps": config.local_steps is not None,
        "--shard": config.shard is not None,
        "--export": config.export is not None,
        "head_share of the run, but of its RaceRules": config.head_share is not None,
        "--compile": config.compile,  # its passes are filled up to one shape, and pieces are small
        "torchrun": "TORCHELASTIC_RUN_ID" in os.environ,
    }
    for name, asked in apart.items():
        if asked:
            raise UserError(f"--race does not go with {name}")
    if config.race.head_share is None:
        return
    wanted = _checked(config.race.head_share)
    if config.race.risk == 0:
        raise UserError(f"{wanted}: does not go with --race-risk 0, whose bounds hold once all positions are read")
    if config.per_token:
        raise UserError(f"{wanted}: {_FOR_ALL_TOKENS}; leave one of the two away")


def refuse_with_a_sample(config: "ScoreConfig") -> None:
    """What ``--head-share`` does not go with.

    Raises:
        UserError: it was asked for.
    """
    if config.head_share is None:
        return
    wanted = _checked(config.head_share)
    for asked, fault in (
        (config.per_token, _FOR_ALL_TOKENS),
        (config.local_steps is not None, "--local-steps takes means over all tokens of a step"),
        (
            config.after is not None,
            "--before and --after are compared on all tokens: a sample errs by more",
        ),
        (config.export is not None, f"--export {config.export} has no place for standard errors"),
    ):
        if asked:
            raise UserError(f"{wanted}: {fault}; leave one of the two away")


def _checked(head_share: float) -> str:
    """The option as it was given.

    Raises:
        UserError: it is no share.
    """
    wanted = f"--head-share {head_share:g}"
    if not 0 < head_share < 1:
        raise UserError(f"{wanted}: a share of the scored positions, above 0 and below 1; without it all are read")
    return wanted
