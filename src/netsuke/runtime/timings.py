"""How long a generation took: filled by both runtimes, printed by `run`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timings:
    """Seconds; filled while `generate` runs."""

    prompt_tokens: int = 0
    first_token: float = 0.0
    new_tokens: int = 0
    decode: float = 0.0

    def as_dict(self) -> dict:
        rate = (self.new_tokens - 1) / self.decode if self.decode > 0 else None
        return {
            "prompt_tokens": self.prompt_tokens, "first_token_seconds": self.first_token,
            "new_tokens": self.new_tokens, "decode_seconds": self.decode, "tokens_per_second": rate,
        }  # fmt: skip
