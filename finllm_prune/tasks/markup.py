"""The text of a filing: EDGAR's HTML without its tags, entities and layout."""

import html
import re
from collections.abc import Mapping

from lxml import etree

_HTML = (
    "html|head|title|body|p|div|span|font|center|br|hr|pre|table|thead|tbody|tr|td|th|ul|ol|li|dl|dt|dd|h[1-6]|a|b|i|u|em|strong|small|"
    "big|sub|sup|s|strike|blockquote|section|article|header|footer|img|script|style|meta|link|ix:[a-z]+"
)
_TAG = re.compile(rf"</?(?:{_HTML})(?:\s[^<>]*)?/?>|<!--|<!doctype|<\?xml", re.IGNORECASE)
_INLINE = (
    "a", "abbr", "b", "big", "code", "del", "em", "font", "i", "ins", "mark", "s", "small", "span", "strike", "strong", "sub",
    "sup", "tt", "u", "wbr",
)  # fmt: skip
_UNSEEN = ("head", "script", "style", "ix:header")
_HIDDEN = re.compile(r"display\s*:\s*none", re.IGNORECASE)


def plain_text(text: str) -> str:
    """What a reader sees: tags and entities resolved, scripts and what is hidden left out, white space single.

    It is one line, but each row of a table has a line of its own, with its cells in reading order. Text without a tag of HTML
    loses nothing but its white space: ``a margin <10 and a cost >5`` is no markup.
    """
    if _TAG.search(text) is None:
        return " ".join(html.unescape(text).split())
    reader = _Reader()
    # A target takes elements as they come: a tree may be no deeper than 2,048, and old filings leave thousands of tags open.
    etree.fromstring(text.encode("utf-8", "replace"), etree.HTMLParser(target=reader, encoding="utf-8", huge_tree=True))
    lines = (" ".join("".join(parts).split()) for parts in reader.lines)
    return "\n".join(line for line in lines if line)


class _Reader:
    """What lxml tells of a document."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = [[]]
        self.open: list[bool] = []  # of each element around: is it out of sight?

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self._part(tag)
        hidden = "hidden" in attributes or _HIDDEN.search(attributes.get("style", ""))
        self.open.append(bool(hidden) or tag.lower() in _UNSEEN or (bool(self.open) and self.open[-1]))

    def end(self, tag: str) -> None:
        self.open.pop()
        self._part(tag)

    def data(self, text: str) -> None:
        if not (self.open and self.open[-1]):
            self.lines[-1].append(text)

    def comment(self, text: str) -> None:
        pass

    def pi(self, target: str, text: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass

    def _part(self, tag: str) -> None:
        """A paragraph or a cell ends a word, a change of the font within it does not; iXBRL tags wrap single figures."""
        if tag == "tr":
            self.lines.append([])
        elif tag not in _INLINE and not tag.lower().startswith("ix:"):
            self.lines[-1].append(" ")
