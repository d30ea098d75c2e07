"""The one error a person is meant to read."""


class UserError(Exception):
    """Bad input. The message is one paragraph: what is wrong, where, and what would be right."""
