"""The ``lark-fast`` command."""

import sys


def main() -> None:
    """Run the command line and end the process with the documented exit codes."""
    from lark_fast.cli import app
    from lark_fast.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"lark-fast: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:
            message = "interrupted; what was finished is kept, and the same command goes on from there"
            print(f"lark-fast: {message}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
