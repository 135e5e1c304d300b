"""What a browser would make of a page, and whether anything in it could run or fetch."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import chainforge.report.html

OWN = Path(chainforge.report.html.__file__).parent
TAGS = """html head meta title style body header main footer section nav article h1 h2 h3 h4 p
small strong bdi ul ol li a dl dt dd div span table thead tbody tr th td details summary pre code
bdi kbd form label select option input output button script
figure figcaption picture source img svg line circle rect text"""
IMAGE = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """What a browser would make of the page: its elements and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.comments: list[str] = []
        self.own: dict[str, str] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img", "source"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.own[self.open[-1]] = self.own.get(self.open[-1], "") + data
        else:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def assert_harmless(page: Page) -> None:
    """No element, attribute or address that could run or fetch anything."""
    assert {tag for tag, _ in page.elements} <= set(TAGS.split())
    assert page.comments == []
    assert page.open == []
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("style")) == (1, 1)
    assert page.own["script"] == (OWN / "page.js").read_text()
    assert page.own["style"] == (OWN / "page.css").read_text()
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("style", "srcdoc", "xlink:href", "action")
            if name in ("src", "srcset"):
                assert re.fullmatch(f"{re.escape(IMAGE)}[A-Za-z0-9+/=]+", value or ""), value
            if name == "href":
                assert re.fullmatch("#[a-z]+", value or ""), value
        if tag == "meta" and "http-equiv" in attributes:
            assert attributes["http-equiv"] == "Content-Security-Policy"
            assert attributes["content"] == (
                f"default-src 'none'; img-src data:; style-src '{digest(page.own['style'])}'; "
                f"script-src '{digest(page.own['script'])}'; base-uri 'none'; form-action 'none'"
            )


def digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
