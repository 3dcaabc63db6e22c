"""The one exception that a user's mistake raises; the command line prints its line and stops."""


class UserError(ValueError):
    """Wrong input: one line that names the field or file, the value, and what would do."""
