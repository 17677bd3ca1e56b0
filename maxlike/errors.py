"""The one exception for what a user can cause."""


class UserError(ValueError):
    """A mistake or a condition the user can mend. Its text is one sentence that names the fix; the command line prints
    it without a traceback and exits with code 2. Anything else that escapes is our fault and keeps its traceback."""
