"""The ``lark-fast`` command."""

import os
import sys


def main() -> None:
    """Run the command line and end the process with the documented exit codes."""
    try:
        from lark_fast.cli.app import app
        from lark_fast.errors import UserError
    except KeyboardInterrupt:  # nobody to answer it is there yet
        sys.exit(130)
    try:
        app()
    except UserError as error:
        from lark_fast.rendering.inspection import visible

        # It may quote a pool: nothing in it acts on the terminal.
        print(f"lark-fast: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        _leave_ranks(2)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:
            print(f"lark-fast: interrupted; {_what_goes_on(sys.argv)}", file=sys.stderr)
        _leave_ranks(end.code)
        raise


def _what_goes_on(words: list[str]) -> str:
    if words[1:2] == ["demo"]:
        return "the same command begins anew"
    again = "the same command, but for --overwrite," if "--overwrite" in words else "the same command"
    return f"what is on disk is kept, and {again} goes on from there"


def _leave_ranks(code: str | int | None) -> None:
    """End a rank at once. Gloo's threads outlive their group; one that lets go of a tensor while Python winds up aborts
    the process, and torchrun takes a run that is done for a failed one."""
    distributed = sys.modules.get("torch.distributed")
    if isinstance(code, int | None) and distributed and distributed.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    main()
