"""The error of every command for input that cannot work."""

from ysnake.shared.shown import escape_controls


class InputError(ValueError):
    """The user gave something that cannot work; the message is one line and names it.

    A name in a stranger's file may hold line breaks and escape sequences: the message shows them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_controls(message))
