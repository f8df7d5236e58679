"""Tables in Markdown, where they come from, and the pages that they stand in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .records import FILE, ROOT, Record, read

Item = TypeVar("Item")


@dataclass(frozen=True)
class Section:
    """A table of a page, between the markers ``<!-- marker:begin -->`` and ``<!-- marker:end -->``."""

    page: str
    """From the root of the repository."""
    marker: str
    render: Callable[[list[Record]], str]
    file: str = FILE
    """Of the folder of its question."""

    key: Sequence[str] = ()
    """Fields of which the last record counts."""

    @property
    def path(self) -> Path:
        """Of the page."""
        return ROOT / self.page

    def block(self, folder: Path) -> str:
        """What stands between the markers, from the results in ``folder``, that of the question."""
        return self.render(read(folder / self.file, self.key))

    def write(self, folder: Path) -> None:
        """Render the page anew."""
        text = insert(self.path.read_text(encoding="utf-8"), self.block(folder), self.marker)
        self.path.write_text(text, encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> dict[Hashable, list[Item]]:
    """Items by their key, in the order in which keys come."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def origin(records: Sequence[Record], commands: bool = True) -> str:
    """One sentence: what was run when, on which machine, with which versions, at which commits."""
    sources = [record["source"] for record in records]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(source[name]) for source in sources}))

    said = [", ".join(f"`{command}`" for command in sorted({source["command"] for source in sources}))]
    dates = sorted({source["date"][:10] for source in sources})
    commits = {
        (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
        for source in sources
    }
    gpus = ", ".join(sorted({source["gpu"] or "no GPU" for source in sources}))
    parts = [
        *(said if commands else [f"{len(records)} runs"]),
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        f"{all_of('cpu')}, {all_of('cores')} cores, {all_of('threads')} in use, {gpus}",
        "; ".join(sorted({", ".join(f"{name} {v}" for name, v in source["versions"].items()) for source in sources})),
        f"commit {', '.join(sorted(commits))}",
    ]
    return f"*{'; '.join(parts)}.*"


def insert(text: str, block: str, name: str) -> str:
    """``text`` with ``block`` between its markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: The markers are not there once each, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The page must hold the lines `{begin}` and `{end}` once each, in this order. Add them.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
