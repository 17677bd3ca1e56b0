"""The exceptions that the command line prints as a sentence."""


class UserError(ValueError):
    """A mistake or a condition the user can mend. Its text is one sentence that names the fix; the command line prints
    it without a traceback and exits with code 2. Anything else that escapes is our fault and keeps its traceback."""


class Failed(Exception):
    """A job that ran to its end and whose answer is no: what it was asked to prove does not hold. The command line
    prints the sentence and exits with code 1."""
