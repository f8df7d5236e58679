r"""Right or wrong, by math-verify, in DAPO's answer format; for the reward of training and for the harness alike.

A response is judged by what follows its last ``Answer:``, else by its last ``\boxed{...}``; a response with neither is
wrong. Both sides are read as LaTeX.
"""

from __future__ import annotations

import math
import re
from typing import Any

from math_verify import parse, verify

INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer "
    'on its own line after "Answer:".'
)
"""DAPO's prompt, around every problem of the test sets as it is around those of DAPO-Math-17k."""

_ANSWER = re.compile(r"Answer[*\s]*:[*\s]*(\S[^\n]*)", re.IGNORECASE)
_MATH_DELIMITERS = re.compile(r"\\[()\[\]]|\\?\$")
_SCIENTIFIC = re.compile(r"([+-]?\d*\.?\d+)[eE]([+-]?\d+)")


def extract_answer(response: str) -> str | None:
    """The answer that a response names, without the marks around it; ``None`` if it names none."""
    # A thought may quote the instruction.
    response = response.rpartition("</think>")[2]
    named = _ANSWER.findall(response)
    bare = _bare(named[-1]) if named else ""
    text = bare or response
    boxed = text.rfind("\\boxed{")
    return (bare or None) if boxed < 0 else _braced(text, boxed + len("\\boxed{"))


def is_correct(response: str, *golds: str) -> bool:
    """Whether the answer of a response is equal to one of ``golds``.

    Equal as text (some golds are words) or by math-verify, which limits its time with signals, so this has to run on the
    main thread.
    """
    answer = extract_answer(response)
    if answer is None:
        return False
    bare = [_bare(gold) for gold in golds]
    return answer in bare or any(_equal(gold, answer) for gold in bare)


def pass_at_k(right: list[bool], k: int) -> float:
    """The unbiased estimate of solving a problem with ``k`` samples, of ``n >= k`` drawn (arXiv 2107.03374).

    Raises:
        ValueError: There are fewer than ``k`` samples.
    """
    wrong = len(right) - sum(right)
    if len(right) < k:
        raise ValueError(f"`k` must be at most the number of samples, {len(right)}, got {k}. Set repeats={k}.")
    return 1.0 - math.comb(wrong, k) / math.comb(len(right), k)


def doc_to_text(doc: dict[str, Any]) -> str:
    """The harness' prompt; the model's chat template is put around it by the harness."""
    return INSTRUCTION.format(problem=doc["problem"])


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """The harness' scores of one problem: ``results`` holds the list of all samples (see ``filter_list``)."""
    right = [is_correct(response, *doc["golds"]) for response in results[0]]
    return {"pass_at_1": pass_at_k(right, 1)}


def process_results_16(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """As :func:`process_results`, with pass@16."""
    right = [is_correct(response, *doc["golds"]) for response in results[0]]
    return {"pass_at_1": pass_at_k(right, 1), "pass_at_16": pass_at_k(right, 16)}


def process_docs(dataset: Any) -> Any:
    """Rows of any of the test sets as ``problem`` and ``golds``, whatever their columns are called.

    Raises:
        ValueError: A row has none of the known columns.
    """
    return dataset.map(_as_problem, remove_columns=dataset.column_names)


def _as_problem(row: dict[str, Any]) -> dict[str, Any]:
    problem = next((row[name] for name in ("problem", "question") if row.get(name)), None)
    answers = next((row[name] for name in ("final_answer", "answer") if row.get(name) is not None), None)
    if problem is None or answers is None:
        raise ValueError(
            f"A row must have a `problem` (or `question`) and an `answer` (or `final_answer`), got {sorted(row)}. Use a "
            "file in the data set's own schema."
        )
    answers = answers if isinstance(answers, list) else [answers]
    return {"problem": problem, "golds": [_as_text(answer) for answer in answers]}


def _as_text(answer: Any) -> str:
    # AMC keeps its integers as floats.
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _bare(answer: str) -> str:
    return _MATH_DELIMITERS.sub("", answer).strip().strip("*").rstrip(".").strip()


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace before ``start`` and the one that closes it."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _equal(gold: str, answer: str) -> bool:
    number = _SCIENTIFIC.fullmatch(gold)
    if number is None:
        return bool(verify(_read(gold), _read(answer)))
    # math-verify reads no `e`, and rounds to six decimals, to which all small numbers are equal.
    written = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer)
    return bool(verify(_read(number[1]), _read(rf"{written.rpartition('=')[2]} \times 10^{{{-int(number[2])}}}")))


def _read(answer: str) -> Any:
    return parse(f"\\boxed{{{answer}}}")
