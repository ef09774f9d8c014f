"""The ``lark-fast`` command."""

import sys


def main() -> None:
    """Run the command line and end the process with the documented exit codes."""
    try:
        from lark_fast.cli import app
        from lark_fast.errors import UserError
    except KeyboardInterrupt:  # nobody to answer it is there yet
        sys.exit(130)
    try:
        app()
    except UserError as error:
        from lark_fast.rendering.inspection import visible

        # It may quote a pool: nothing in it acts on the terminal.
        print(f"lark-fast: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:
            message = "interrupted; what is on disk is kept, and the same command goes on from there"
            print(f"lark-fast: {message}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
