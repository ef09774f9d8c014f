"""What can go wrong through no fault of the program."""


class UserError(Exception):
    """Bad usage or input. The command line prints the message as one line and exits with 2."""


class DivergedError(UserError):
    """Training blows up: a loss or a gradient is not finite, or jumps. What was finished is kept.

    Attributes:
        what: what is wrong, without the remedy, which is the caller's to say.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}. {remedy}")
        self.what = what


class RejectError(ValueError):
    """One record cannot be used; the message is the reason, as written to rejected.jsonl."""
