"""A paper as a PDF file, from the very HTML that is kept: headings, pairs, lists and paragraphs, no second text of it.

A pure function of its arguments: the same paper is the same bytes at any time. The file has its title, language, subject and the
HTML's hash in its metadata, an outline of its headings, and numbered pages. Letters that the embedded font (Bitstream Vera) lacks
lose their accent; CJK is set in the reader's own font; what is left stands as "?", and the foot of the first page says so.
"""

import io
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from html import escape
from html.parser import HTMLParser
from typing import Any

from reportlab.lib.colors import HexColor
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Paragraph, SimpleDocTemplate, Spacer, Table

CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+")
INK, SOFT, LINE = HexColor("#16282b"), HexColor("#4c6266"), HexColor("#d5dfe0")
BLOCKS = {"h2": "heading", "p": "text", "dt": "name", "dd": "value", "li": "item"}


@dataclass
class _Blocks(HTMLParser):
    """The paper's blocks in order: (kind, text). Inline tags are only their text."""

    found: list[tuple[str, str]] = field(default_factory=list)
    open_: str = ""
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        if tag in BLOCKS:
            self.open_, self.text = tag, []

    def handle_data(self, data: str) -> None:
        if self.open_:
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.open_:
            self.found.append((BLOCKS[tag], " ".join("".join(self.text).split())))
            self.open_ = ""


def blocks(html: str) -> list[tuple[str, str]]:
    """(`heading`, `text`, `name`, `value` or `item`; its words) in the order of the paper."""
    parser = _Blocks()
    parser.feed(html)
    parser.close()
    return parser.found


@cache
def _fonts() -> frozenset[int]:
    """Registers the fonts once; the letters that the embedded one has."""
    pdfmetrics.registerFont(TTFont("Vera", "Vera.ttf"))
    pdfmetrics.registerFont(TTFont("Vera-Bold", "VeraBd.ttf"))
    pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    return frozenset(pdfmetrics.getFont("Vera").face.charToGlyph)


def _letters(text: str) -> tuple[str, bool]:
    """(the text as a paragraph's markup, whether a letter was lost)."""
    have, lost, out = _fonts(), False, []
    for part in re.split(f"({CJK.pattern})", text):
        if CJK.fullmatch(part):
            out.append(f'<font name="STSong-Light">{escape(part)}</font>')
            continue
        plain = ""
        for letter in part:
            base = letter if ord(letter) in have else unicodedata.normalize("NFKD", letter)
            kept = "".join(c for c in base if ord(c) in have)
            plain, lost = plain + (kept or "?"), lost or not kept
        out.append(escape(plain))
    return "".join(out), lost


def render(*, title: str, html: str, digest: str, kept: str) -> bytes:
    """The file. `digest`: SHA-256 of `html`; `kept`: the sentence that says since when, and under which name, it is kept."""
    _fonts()
    base = ParagraphStyle("text", fontName="Vera", fontSize=9.5, leading=13.5, textColor=INK, spaceAfter=5)
    styles = {
        "text": base,
        "title": ParagraphStyle("title", base, fontName="Vera-Bold", fontSize=16, leading=21, spaceAfter=8),
        "heading": ParagraphStyle("heading", base, fontName="Vera-Bold", fontSize=11, leading=15, spaceBefore=9, keepWithNext=1),
        "name": ParagraphStyle("name", base, textColor=SOFT, spaceAfter=0),
        "value": ParagraphStyle("value", base, spaceAfter=0),
        "item": ParagraphStyle("item", base, leftIndent=12, bulletIndent=2),
        "small": ParagraphStyle("small", base, fontSize=7.5, leading=10.5, textColor=SOFT, wordWrap="CJK"),
    }  # fmt: skip
    lost = False

    def words(kind: str, text: str, **more: Any) -> Paragraph:
        nonlocal lost
        markup, missed = _letters(text)
        lost = lost or missed
        return Paragraph(markup, styles[kind], **more)

    story: list[Any] = [words("title", title)]
    pairs: list[list[Paragraph]] = []
    for kind, text in [*blocks(html), ("end", "")]:
        if kind not in {"name", "value"} and pairs:
            story += [_table(pairs), Spacer(1, 6)]
            pairs = []
        if kind == "name":
            pairs.append([words("name", text)])
        elif kind == "value" and pairs:
            pairs[-1].append(words("value", text))
        elif kind == "item":
            story.append(words("item", text, bulletText="\u2022"))
        elif kind == "heading":
            story.append(_Heading(*_heading(words("heading", text), text)))
        elif kind != "end":
            story.append(words("text", text))
    story += [Spacer(1, 10), words("small", f"{kept} SHA-256 of its HTML: {digest}")]
    if lost:
        story.append(words("small", 'A letter that this file\'s font lacks stands as "?"; the HTML has it.'))
    out = io.BytesIO()
    SimpleDocTemplate(
        out, pagesize=A4, leftMargin=22 * mm, rightMargin=22 * mm, topMargin=20 * mm, bottomMargin=22 * mm, title=title,
        author="Tailrace", subject=kept, keywords=f"sha256:{digest}", creator="Tailrace", lang="en", invariant=1,
        displayDocTitle=True,
    ).build(story, canvasmaker=lambda *args, **kwargs: _Numbered(title, *args, **kwargs))  # fmt: skip
    return out.getvalue()


def _table(pairs: list[list[Paragraph]]) -> Table:
    rows = [row if len(row) == 2 else [*row, ""] for row in pairs]
    style = [
        ("VALIGN", (0, 0), (-1, -1), "TOP"), ("LEFTPADDING", (0, 0), (0, -1), 0), ("TOPPADDING", (0, 0), (-1, -1), 3),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 3), ("LINEBELOW", (0, 0), (-1, -2), 0.4, LINE),
    ]  # fmt: skip
    return Table(rows, colWidths=[42 * mm, 124 * mm], style=style, hAlign="LEFT")


def _heading(paragraph: Paragraph, text: str) -> tuple[str, ParagraphStyle, str]:
    return paragraph.text, paragraph.style, text


class _Heading(Paragraph):
    """A heading that stands in the outline too."""

    def __init__(self, markup: str, style: ParagraphStyle, plain: str) -> None:
        super().__init__(markup, style)
        self.plain = plain

    def draw(self) -> None:
        key = f"h-{self.canv.getPageNumber()}-{self.plain}"
        self.canv.bookmarkPage(key)
        self.canv.addOutlineEntry(self.plain, key, level=0)
        super().draw()


class _Numbered(Canvas):
    """Pages say which of how many they are: known only when all are there."""

    def __init__(self, title: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._paper = title
        self._pages: list[dict[str, Any]] = []

    def showPage(self) -> None:  # noqa: N802 - reportlab's name
        self._pages.append(dict(self.__dict__))
        self._startPage()

    def save(self) -> None:
        for number, page in enumerate(self._pages, 1):
            self.__dict__.update(page)
            self.setFont("Vera", 7.5)
            self.setFillColor(SOFT)
            self.drawString(22 * mm, 12 * mm, self._paper)
            self.drawRightString(A4[0] - 22 * mm, 12 * mm, f"Page {number} of {len(self._pages)}")
            super().showPage()
        super().save()
