"""The error of every command for input that cannot work."""

from ysnake.shared.shown import escape_controls


class InputError(ValueError):
    """The user gave something that cannot work. The message is one line.

    A name in a foreign file may hold line breaks and escape sequences. The message shows them.

    Attributes:
        field: what is at fault, by the name that the user knows: an option such as "--top-p", or a
            size in a config.json; empty where the reason itself names a file or several things.
        reason: what is wrong with it. The message is "FIELD: REASON".
    """

    def __init__(self, reason: str, field: str = ""):
        super().__init__(escape_controls(f"{field}: {reason}" if field else reason))
        self.reason, self.field = escape_controls(reason), field
