"""``docs/models.md``, from outcomes."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

VERDICTS = ("works", "refused", "not tried", "wrong", "crash")
_HEAD = """# Models

Every type that `AutoModelForCausalLM` of transformers {transformers} knows, tiny and random and with its own mix of layers, each asked the
same questions with LoRA beside it: generation past the window, scoring equal to it with left padding, a window that makes a difference, a
fresh adapter equal to the base model, gradients with and without checkpointing, the static form, `generate_batch` on rows that are refilled, saving and
loading. Written by
`python -m benchmarks.models` (python {python}, torch {torch}, peft {peft}, CPU).

**{works} work, {refused} are refused, {rest} could not be tried, {bad} are wrong or crash**, of {all}. LoRA works on {lora}.

*Bounded layers* is how many of the tiny model's layers get the window, and what the others keep. *Static*: whether
`generate(cache_implementation="static")` works. *generate_batch*: whether its rows are refilled. What of a decoder layer no adapter sits on is said at injection, and by
`model.base_model.left_out()`.
"""


def render(outcomes: dict[str, dict[str, Any]]) -> str:
    """The document."""
    by_verdict = {verdict: [one for one in outcomes.values() if one["verdict"] == verdict] for verdict in VERDICTS}
    counts = {verdict: len(found) for verdict, found in by_verdict.items()}
    parts = [
        _HEAD.format(
            transformers=version("transformers"),
            python=platform.python_version(),
            torch=version("torch"),
            peft=version("peft"),
            works=counts["works"],
            refused=counts["refused"],
            rest=counts["not tried"],
            bad=counts["wrong"] + counts["crash"],
            all=len(outcomes),
            lora=sum(one["lora"] == "works" for one in outcomes.values()),
        ),
        "## Works\n\n"
        + _table(("type", "bounded layers", "static", "generate_batch"), map(_working, by_verdict["works"])),
        "## Refused\n\n" + _table(("type", "why", "LoRA"), map(_refused, by_verdict["refused"])),
        "## Not tried\n\nNo small model of these could be made to run, by this table or at all.\n\n"
        + _table(("type", "why"), ((f"`{one['kind']}`", _cell(one["reason"])) for one in by_verdict["not tried"])),
    ]
    bad = [*by_verdict["wrong"], *by_verdict["crash"]]
    if bad:
        rows = ((f"`{one['kind']}`", one["verdict"], one["where"], _cell(one["reason"])) for one in bad)
        parts.append("## Wrong, or crash\n\n" + _table(("type", "", "at", "what"), rows))
    return "\n".join(parts)


def _working(one: dict[str, Any]) -> tuple[str, ...]:
    kinds = one["layers"].replace("ThoughtLayer", "bounded").replace("DynamicSlidingWindowLayer", "sliding or chunked")
    kinds = kinds.replace("LinearAttentionLayer", "recurrent or convolution").replace(
        "DummyLayer", "without keys and values"
    )
    return f"`{one['kind']}`", kinds, *("yes" if one[name] == "works" else "no" for name in ("static", "refilled"))


def _refused(one: dict[str, Any]) -> tuple[str, ...]:
    return f"`{one['kind']}`", _cell(one["reason"]), "works" if one["lora"] == "works" else "fails too"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])
