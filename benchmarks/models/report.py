"""The tables of docs/models.md."""

from __future__ import annotations

from ..common.pages import Section, grouped, origin, table
from ..common.records import Record
from .measure import KEY

KINDS = {
    "ThoughtLayer": "bounded",
    "DynamicSlidingWindowLayer": "sliding or chunked",
    "LinearAttentionLayer": "recurrent or convolution",
    "DummyLayer": "without keys and values",
}
"""Classes of cache layers, in words."""


def render(outcomes: list[Record]) -> str:
    """How many types work, and a table by verdict."""
    found = grouped(sorted(outcomes, key=lambda one: one["kind"]), lambda one: one["verdict"])
    works, refused, untried = (found.get(verdict, []) for verdict in ("works", "refused", "not tried"))
    bad = [*found.get("wrong", []), *found.get("crash", [])]
    lora = sum(one["lora"] == "works" for one in outcomes)
    parts = [
        f"**{len(works)} work, {len(refused)} are refused, {len(untried)} could not be tried, {len(bad)} are wrong or crash**, of "
        f"{len(outcomes)}. LoRA works on {lora}.",
        origin(outcomes, commands=False),
        "## Works",
        table(("type", "bounded layers", "static", "generate_batch"), map(_working, works), left=4),
        "## Refused",
        table(
            ("type", "why", "LoRA"),
            ((*_why(one), "works" if one["lora"] == "works" else "fails too") for one in refused),
            left=3,
        ),
        "## Not tried",
        "No small model of these could be made to run, by this table or at all.",
        table(("type", "why"), map(_why, untried), left=2),
    ]
    if bad:
        rows = ((f"`{one['kind']}`", one["verdict"], one["where"], _why(one)[1]) for one in bad)
        parts += ["## Wrong, or crash", table(("type", "", "at", "what"), rows, left=4)]
    return "\n\n".join(parts)


def _working(one: Record) -> tuple[str, ...]:
    layers = one["layers"]
    for name, word in KINDS.items():
        layers = layers.replace(name, word)
    return f"`{one['kind']}`", layers, *("yes" if one[name] == "works" else "no" for name in ("static", "refilled"))


def _why(one: Record) -> tuple[str, str]:
    return f"`{one['kind']}`", one["reason"].replace("|", "\\|")


SECTIONS = (Section("docs/models.md", "models", render, key=KEY),)
