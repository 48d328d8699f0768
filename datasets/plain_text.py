"""Text that was written for a web page, as plain words: no tags, no entities, no line breaks, bounded."""

import re
from html.parser import HTMLParser

__all__ = ["plain_text"]

MAX_MARKUP = 10_000  # characters read of one field; descriptions can hold whole pages
_UNSEEN = frozenset({"script", "style"})
_INLINE = frozenset({"a", "b", "em", "font", "i", "small", "span", "strong", "u"})
# The parser takes quadratic time over tags that never end, and raises at marked sections (`<![new]!>`), so both are
# made text before it sees them.
_NO_TAG = re.compile(r"<(?!!--|[^<>]*>)|<(?=!\[)")
_SPACE = re.compile(r"[\x00-\x1f\x7f\s]+")


class _Words(HTMLParser):
    """Collects what a reader of the page would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Separate the words on both sides of a tag, unless it stands within a line."""
        self._unseen += tag in _UNSEEN
        self.parts.append("" if tag in _INLINE else " ")

    def handle_endtag(self, tag: str) -> None:
        """Separate the words on both sides of a tag, unless it stands within a line."""
        self._unseen = max(0, self._unseen - (tag in _UNSEEN))
        self.parts.append("" if tag in _INLINE else " ")

    def handle_data(self, data: str) -> None:
        """Keep text, unless a browser would not show it."""
        if not self._unseen:
            self.parts.append(data)


def plain_text(markup: str) -> str:
    """Return the visible text of a piece of HTML; text that is none already comes back with single spaces.

    Entities that were escaped twice (`&amp;quot;`), as publishers of product data often do, are resolved. Half of a
    surrogate pair, which texts that were cut off may end with, becomes a question mark.
    """
    text = markup[:MAX_MARKUP].encode("utf-8", "replace").decode()
    for _ in range(2):
        if "<" in text or "&" in text:
            parser = _Words()
            parser.feed(_NO_TAG.sub("&lt;", text))
            parser.close()
            text = "".join(parser.parts)
    return _SPACE.sub(" ", text).strip()
