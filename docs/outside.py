"""A hook of MkDocs: what pages link to in the rest of the repository becomes part of the site, so that one link serves both.

A file (a script, a picture, a README) is copied to ``repository/``; a README is a page there, whose own links are followed alike. A folder has no
page, so a link to one is left as its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
# Code first: what looks like a link in it is none.
LINK = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|(?P<open>!?\[(?P<text>[^\]]*)\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL,
)


def place_of(uri: str) -> Path:
    """Where a page of the site lies in the repository."""
    return ROOT / uri[len(COPIES) + 1 :] if uri.startswith(f"{COPIES}/") else ROOT / "docs" / uri


def uri_of(place: Path) -> str:
    """Where a file of the repository lies in the site."""
    docs = ROOT / "docs"
    return (
        place.relative_to(docs).as_posix()
        if place.is_relative_to(docs)
        else f"{COPIES}/{place.relative_to(ROOT).as_posix()}"
    )


def linked(uri: str, text: str) -> list[Path]:
    """The files of the repository that a page links to."""
    targets = [match["target"] for match in LINK.finditer(text) if match["target"] and ":" not in match["target"]]
    return [(place_of(uri).parent / target).resolve() for target in targets]


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what that links to."""
    pages = [file for file in files if file.src_uri.endswith(".md")]
    while pages:
        page = pages.pop()
        for place in linked(page.src_uri, place_of(page.src_uri).read_text(encoding="utf-8")):
            uri = uri_of(place)
            if not place.is_file() or files.get_file_from_path(uri) is not None:
                continue
            added = File.generated(config, uri, abs_src_path=str(place))
            files.append(added)
            if uri.endswith(".md"):
                pages.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Let links lead to the copies."""
    uri = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or ":" in target:
            return match[0]
        place = (place_of(uri).parent / target).resolve()
        if place.is_dir():
            return match["text"]
        if not place.is_file():
            return match[0]
        return f"{match['open']}({os.path.relpath(uri_of(place), os.path.dirname(uri) or '.')}{match['anchor'] or ''})"

    return LINK.sub(rewritten, markdown)


# What docstrings say to Sphinx: names of things, and what comes before code.
ROLE = re.compile(r":(?:func|class|attr|mod|data|meth):<code>(?P<name>[^<]+)</code>")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Let names in docstrings lead to where they are told of, if they are."""
    linked = ROLE.sub(r'<autoref optional identifier="\g<name>"><code>\g<name></code></autoref>', html)
    return linked.replace("::</p>", ":</p>")
