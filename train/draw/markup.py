"""The HTML of a page that needs no other file, for dark and light screens, wide and
narrow ones: panels stand beside one another where there is room and below where there
is not, and what cannot be narrower scrolls in its own box."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Section = tuple[str, str, str]  # its anchor, its title, its HTML
WHOLE = 24  # characters of a cell that is not broken into lines
FULL = 0.85  # the share from which on a cell needs white text
UPRIGHT = 3  # characters of a column's name that need not be turned


class Panel(NamedTuple):
    """One part of a figure: its title, plain text, and its HTML."""

    title: str
    content: str


STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #63686e; --line: #d9dce0;
  --paper: #ffffff; --wrong: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e5e8; --soft: #9aa0a6;
  --line: #3b3f45; --paper: #17191c; --wrong: #ee8a80; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
p, figcaption, h1 { overflow-wrap: break-word; }
nav a { display: inline-block; color: var(--soft); margin-right: 1rem;
  font-size: .9rem; }
figure { margin: 1rem 0 1.6rem; }
figcaption { margin: .4rem 0; max-width: 52rem; }
.panels { display: grid; gap: .7rem var(--gap); margin: .6rem 0;
  --fits: max(var(--least), 100% / (var(--columns) + 1) + 1px);
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--fits)), 1fr)); }
.panel { min-width: 0; }
.panel.alone { max-width: 34rem; }
.panel > .name { font-size: .85rem; line-height: 1.3; overflow-wrap: anywhere; }
.panel svg { display: block; width: 100%; max-width: 34rem; height: auto; }
.panel img { display: block; width: 100%; height: auto; margin: .15rem 0;
  image-rendering: pixelated; }
figure > img { max-width: 100%; height: auto; }
.key { font-size: .85rem; }
.key span { display: inline-block; margin-right: 1.2rem; overflow-wrap: anywhere; }
.key i { display: inline-block; width: 1.5rem; margin-right: .4rem;
  vertical-align: middle; border-top: 3px solid; }
.key i.dashed { border-top-style: dashed; }
.wide { max-width: 100%; width: fit-content; }
.wide, pre { overflow-x: auto; background: /* a shade where there is more to see */
  linear-gradient(to right, var(--paper) 50%, transparent) 0 / 1.5rem 100% local,
  linear-gradient(to left, var(--paper) 50%, transparent) 100% / 1.5rem 100% local,
  linear-gradient(to right, var(--line), transparent) 0 / .7rem 100%,
  linear-gradient(to left, var(--line), transparent) 100% / .7rem 100%;
  background-repeat: no-repeat; }
table { border-collapse: collapse; font-size: .92rem; margin: .7rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
th { color: var(--soft); font-weight: 500; }
thead th { vertical-align: bottom; }
th[scope=row] { white-space: nowrap; }
th.long { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.counts td, .counts thead th { text-align: center; padding: .25rem .2rem;
  min-width: 1.5rem; border: 1px solid var(--line); }
.counts thead td, .counts thead th, .counts th[scope=row] { border-width: 0; }
.counts td { background: rgb(47 120 183 / var(--share, 0)); }
.counts td.most { color: #fff; }
.counts .turned { writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: left; margin: 0 auto; max-height: 11rem; overflow-wrap: anywhere; }
.counts th.long { max-width: 9rem; }
pre { white-space: pre;
  font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: 4px; }
summary { cursor: pointer; color: var(--soft); }
mark { background: none; color: var(--wrong); text-decoration: underline; }
@media (max-width: 30rem) { main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; } h2 { margin-top: 2rem; }
  table:not(.counts) th[scope=row] { white-space: normal; } }
"""


def page(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The whole page, in ASCII, so that no locale matters.

    Args:
        title, subtitle: plain text.
        sections: (id, heading, HTML); one whose HTML is empty is left out.
    """
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{i}">{text(h)}</a> ' for i, h, _ in sections)
    body = "".join(
        f'<section id="{i}">\n<h2>{text(h)}</h2>\n{content}</section>\n'
        for i, h, content in sections
    )
    whole = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<main>\n<header>\n<h1>{text(title)}</h1>\n<p class="soft">{text(subtitle)}'
        f"</p>\n<nav>{links}</nav>\n</header>\n{body}</main>\n</body>\n</html>\n"
    )
    return whole.encode("ascii", "xmlcharrefreplace").decode()


def text(value) -> str:
    """Plain text as HTML."""
    return html.escape(str(value))


def paragraph(value, kind: str = "") -> str:
    return (
        f'<p class="{kind}">{text(value)}</p>\n' if kind else f"<p>{text(value)}</p>\n"
    )


def code(value) -> str:
    return f"<pre>{text(value)}</pre>\n"


def details(summary, content: str) -> str:
    """`content`, HTML, folded below a plain summary."""
    return f"<details><summary>{text(summary)}</summary>\n{content}</details>\n"


def table(header: Iterable, rows: Iterable[Iterable]) -> str:
    """Plain cells; the first of a row is its name. A header of () leaves it out. Short
    cells, and so numbers, stay in one line; a table that is too wide scrolls."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row"{_long(name)}>{text(name)}</th>'
        + "".join(f"<td{_long(cell)}>{text(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for name, *cells in rows
    )
    return f'<div class="wide"><table>{head}<tbody>\n{body}</tbody></table></div>\n'


def _long(cell) -> str:
    return ' class="long"' if len(str(cell)) > WHOLE else ""


def counts(numbers: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> str:
    """How often, [n, m], under the names of rows and columns: cells are coloured by
    their share of the row, and those without any are empty."""
    shares = numbers / np.maximum(numbers.sum(axis=1, keepdims=True), 1)
    turned = max(map(len, columns)) > UPRIGHT
    names = [text(name) for name in columns]
    names = [f'<div class="turned">{x}</div>' for x in names] if turned else names
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = []
    for name, row, share in zip(rows, numbers, shares, strict=True):
        cells = "".join(
            f'<td style="--share:{s:.2f}"{" class=most" * bool(s > FULL)}>{n:.0f}</td>'
            if n
            else "<td></td>"
            for n, s in zip(row, share, strict=True)
        )
        body.append(f'<tr><th scope="row"{_long(name)}>{text(name)}</th>{cells}</tr>\n')
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return (
        f'<div class="wide"><table class="counts">{head}<tbody>\n{"".join(body)}'
        "</tbody></table></div>\n"
    )


def figure(
    panels: Sequence[Panel],
    caption: str,
    columns: int = 1,
    least: float = 15,
    above: bool = False,
    key: Iterable[tuple[str, str, bool]] = (),
) -> str:
    """Panels, such as those of `train.draw.figures`, and their caption.

    Args:
        panels: drawn in this order, row by row.
        caption: plain text, below them or `above`.
        columns: how many stand beside one another, at most.
        least: that a panel is narrowed to before there are fewer columns, in rem.
        key: (label, colour, dashed) of lines that all panels have.
    """
    note = f"<figcaption>{text(caption)}</figcaption>"
    alone = " alone" if columns == 1 else ""
    body = "".join(
        f'<div class="panel{alone}">'
        + (f'<div class="name">{text(title)}</div>' if title else "")
        + content.replace(
            "<svg ", f'<svg role="img" aria-label="{text(title or caption)}" ', 1
        )
        + "</div>\n"
        for title, content in panels
    )
    gap = 0.5 if least < 6 else 1
    look = f"--columns:{columns};--least:{least}rem;--gap:{gap}rem"
    body = f'<div class="panels" style="{look}">{body}</div>'
    lines = "".join(
        f'<span><i style="color:{colour}"{" class=dashed" * dashed}></i>{text(label)}'
        "</span> "
        for label, colour, dashed in key
    )
    body += f'<div class="key">{lines}</div>' if lines else ""
    return f"<figure>{note + body if above else body + note}</figure>\n"


def image(data: bytes, description: str) -> str:
    """A PNG or GIF with what it shows, plain text."""
    kind = "gif" if data.startswith(b"GIF8") else "png"
    coded = base64.b64encode(data).decode()
    return f'<img alt="{text(description)}" src="data:image/{kind};base64,{coded}">'


def picture(data: bytes, caption: str) -> str:
    """A PNG or GIF above its caption."""
    content = image(data, caption)
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>\n"
