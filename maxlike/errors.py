"""The exceptions that the command line prints as a sentence."""


class UserError(ValueError):
    """A mistake or a condition the user can mend. Its text is one sentence that names the fix; the command line prints
    it without a traceback and exits with code 2. Anything else that escapes is our fault and keeps its traceback."""


class Diverged(UserError):
    """A training run whose loss went where no step brings it back: a comparison takes it for a result."""


class Failed(Exception):
    """A job that ran to its end and whose answer is no: what it was asked to prove does not hold. The command line
    prints the sentence and exits with code 1."""


TRY_AGAIN = 75
"""Exit code (EX_TEMPFAIL of sysexits.h) of a process that stopped for a cause outside it, such as another process that
vanished: the same command, run again, goes on from the last checkpoint."""
