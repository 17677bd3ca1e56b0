"""Pages of HTML that need no other file and no network."""

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; }
table { border-collapse: collapse; } td { padding: .22rem 1.4rem .22rem 0; vertical-align: top; }
td:first-child { color: #666; white-space: nowrap; }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.number { border: 1px solid #ddd; border-radius: 6px; padding: .55rem 1rem; min-width: 8rem; }
.number b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; } .number span { color: #666; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; }
pre { background: #f6f6f4; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
blockquote { margin: 0 0 1.2rem; padding: .1rem 0 .1rem 1rem; border-left: 3px solid #d1652b; white-space: pre-wrap;
  overflow-wrap: anywhere; } blockquote b { color: #2f6fb5; }
"""


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page of parts that are HTML; empty ones are left out. style: CSS beside that of all pages."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}{style}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def section(name: str, content: str) -> str:
    """Content under a heading; nothing where there is none."""
    return f"<h2>{name}</h2>\n{content}" if content else ""


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of a name and a value."""
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>" if rows else ""


def images(titled: Sequence[tuple[str, bytes]]) -> str:
    """PNG pictures, each with its title for those who cannot see it."""
    encoded = ((html.escape(title), base64.b64encode(png).decode()) for title, png in titled)
    cells = (f'<img alt="{title}" src="data:image/png;base64,{data}">' for title, data in encoded)
    return f'<div class="curves">{"".join(cells)}</div>' if titled else ""


def command(what: str, line: str) -> str:
    """A command line to copy, and what it does."""
    return f"<p>{html.escape(what)}</p><pre>{html.escape(line)}</pre>"
