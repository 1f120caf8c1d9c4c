"""The text of a filing: EDGAR's HTML without its tags, entities and layout."""

from html.parser import HTMLParser

_INLINE = ("a", "b", "em", "font", "i", "small", "span", "strong", "sub", "sup", "u")
_UNSEEN = ("head", "script", "style", "ix:header")


def plain_text(text: str) -> str:
    """What a reader sees: tags and entities resolved, scripts and hidden headers left out, white space single.

    It is one line, but each row of a table has a line of its own, with its cells in reading order. Text without markup loses
    nothing but its white space.
    """
    reader = _Reader(convert_charrefs=True)
    reader.feed(text)
    reader.close()
    lines = (" ".join("".join(parts).split()) for parts in reader.lines)
    return "\n".join(line for line in lines if line)


class _Reader(HTMLParser):
    def __init__(self, convert_charrefs: bool):
        super().__init__(convert_charrefs=convert_charrefs)
        self.lines: list[list[str]] = [[]]
        self.unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.unseen += tag in _UNSEEN
        self._part(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._part(tag)

    def handle_endtag(self, tag: str) -> None:
        self.unseen = max(0, self.unseen - (tag in _UNSEEN))
        self._part(tag)

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.lines[-1].append(data)

    def _part(self, tag: str) -> None:
        """A paragraph or a cell ends a word, a change of the font within it does not; iXBRL tags wrap single figures."""
        if tag == "tr":
            self.lines.append([])
        elif tag not in _INLINE and not tag.startswith("ix:"):
            self.lines[-1].append(" ")
