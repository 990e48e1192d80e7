"""The options of how the next token is drawn. Without torch, so that `--help` is quick."""

from dataclasses import dataclass

from ysnake.shared.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Raises:
        InputError: a value is out of range. `InputError.field` names the option.
    """

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens only; 0 means all."""
    top_p: float = 0.95
    """Draw among the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have appeared become less likely (arXiv 1909.05858)."""
    seed: int | None = None
    """Makes the same prompt give the same completion."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"expected at least 0, got {self.temperature}", field="--temperature")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError(f"expected at most 63 bits, got {self.seed}", field="--seed")
        if self.top_k < 0:
            raise InputError(f"expected at least 0, got {self.top_k}", field="--top-k")
        if not 0 < self.top_p <= 1:
            raise InputError(f"expected above 0 and at most 1, got {self.top_p}", field="--top-p")
        if not self.repetition_penalty > 0:
            raise InputError(
                f"expected above 0, got {self.repetition_penalty}", field="--repetition-penalty"
            )
