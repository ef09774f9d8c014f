"""The command line: arguments in, one call, a few lines out. Heavy imports wait until a command runs."""
