"""Text that spells a mark of a file format, written so that it is read as text again.

The first character of the mark is written as HTML writes it, and the ampersand of what already looks so gets an
`amp;`: `<image>` becomes `&lt;image>`, and `&lt;image>` becomes `&amp;lt;image>`. Every text comes back as it was, and
other tools do not find the mark.
"""

from __future__ import annotations

import re


class Mark:
    """A character that begins a mark where a fixed pattern follows it."""

    def __init__(self, character: str, entity: str, after: str = "") -> None:
        follows = f"(?={after})" if after else ""
        self.character, self.entity = character, entity
        self.plain = re.compile(re.escape(character) + follows, re.IGNORECASE)
        self.written = re.compile(f"&((?:amp;)*){re.escape(entity)}{follows}", re.IGNORECASE)

    def keep(self, text: str) -> str:
        """The text with what already looks escaped escaped once more; marks stay marks."""
        return self.written.sub(lambda found: f"&amp;{found[1]}{self.entity}", text)

    def escape(self, text: str) -> str:
        return self.plain.sub(f"&{self.entity}", self.keep(text))

    def unescape(self, text: str) -> str:
        return self.written.sub(
            lambda found: f"&{found[1].removeprefix('amp;')}{self.entity}" if found[1] else self.character, text
        )
