"""The one exception for mistakes a user can make."""


class UserError(ValueError):
    """One clear sentence naming the field, its value and what is allowed. The command line prints it and exits with status 2."""
