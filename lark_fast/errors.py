"""What can go wrong through no fault of the program."""


class UserError(Exception):
    """Bad usage or input. The command line prints the message as one line and exits with 2."""


class DivergedError(UserError):
    """Training blows up: a loss or a gradient is not finite, or jumps. What was finished is kept."""


class RejectError(ValueError):
    """One record cannot be used; the message is the reason, as written to rejected.jsonl."""
