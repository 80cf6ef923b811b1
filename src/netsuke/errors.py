"""The one exception a user may see: what was asked, what was found, what is allowed, what to try."""

from __future__ import annotations


class NetsukeError(Exception):
    """A mistake that the user can mend. The command line prints it as one sentence and exits with `code`.

    asked    what the user wanted ("load weights from model.bin")
    found    what stood in the way ("the file is a pickle")
    allowed  what would have been accepted ("safetensors or llama2.c files")
    attempt  the next thing to try ("convert it with ...")
    code     2 for misuse, 1 for a budget or a claim that is not met
    """

    def __init__(self, asked: str, found: str, allowed: str = "", attempt: str = "", code: int = 2):
        self.asked, self.found, self.allowed, self.attempt, self.code = asked, found, allowed, attempt, code
        text = f"cannot {asked}: {found}"
        if allowed:
            text += f"; allowed: {allowed}"
        if attempt:
            text += f"; try: {attempt}"
        super().__init__(" ".join(text.split()))

    def as_dict(self) -> dict[str, str]:
        return {"asked": self.asked, "found": self.found, "allowed": self.allowed, "try": self.attempt}
