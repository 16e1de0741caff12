"""The HTML of a page that needs no other file, for dark and light screens."""

import base64
import html
from collections.abc import Iterable

Section = tuple[str, str, str]  # its anchor, its title, its HTML

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
nav a { color: var(--soft); margin-right: 1rem; font-size: .9rem; }
figure { margin: 1rem 0 1.6rem; }
figure svg, figure img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .7rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; }
th[scope=row] { white-space: nowrap; }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: 4px; }
summary { cursor: pointer; color: var(--soft); }
mark { background: none; color: var(--wrong); text-decoration: underline; }
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
    """Plain cells; the first of a row is its name. A header of () leaves it out."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for name, *cells in rows
    )
    return f'<div class="wide"><table>{head}<tbody>\n{body}</tbody></table></div>\n'


def figure(svg: str, caption: str, above: bool = False) -> str:
    """An SVG of `train.draw.figures`, set into the page so that it takes its text
    colour; the caption stands below it, or above."""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    said = f"<figcaption>{text(caption)}</figcaption>"
    return f"<figure>{said + svg if above else svg + said}</figure>\n"


def picture(image: bytes, caption: str, above: bool = False) -> str:
    """A PNG or GIF as a `figure`."""
    kind = "gif" if image.startswith(b"GIF8") else "png"
    data = base64.b64encode(image).decode()
    shown = f'<img alt="{text(caption)}" src="data:image/{kind};base64,{data}">'
    return figure(shown, caption, above)
