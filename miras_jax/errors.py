"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the cause and the fix.

    The command line prints it as a single line and exits with status 2; a library
    caller sees an ordinary ValueError.
    """
