"""The error of every command for input that cannot work."""


class InputError(ValueError):
    """The user gave something that cannot work; the message is one line and names it."""
