"""Every error and warning that a user can meet is told of in docs/troubleshooting.md, and a test raises it."""

import ast
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.messages import GAP, all_texts, messages, says

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "troubleshooting.md").read_text()
SAYS = [line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| ")]
"""First cells of the tables: one or more messages."""
ENTRIES = [first or other for cell in SAYS for first, other in re.findall(r"`` (.+?) ``|`([^`]+)`", cell)]
INTERNAL = {
    "This cache layer was told of no tokens": "layers of a cache are written by calls alone",
    "This cache layer is empty": "the same",
    "This cache layer lacks what it needs": "the same",
    "A thought needs a cache that holds a prompt": "the same",
    "Rows can be replaced by those of a layer": "caches of other configurations are refused before",
    "`evictions` must be of … heads in layer …, got …. Hand on what `generate` returned for these very sequences.": "checked before the call begins",
    "the rotary code of": "caught: the rotation is then looked for by trying",
    "no rotation that": "caught: a warning says that keys are encoded as cached",
    "it runs without a cache": "caught: the message of the refusal quotes it",
    "… sines are no layout of": "caught: the rotation is one that is not known",
    "it is off by … of the largest entry": "caught: a warning says that the reference is taken",
    "`num_global_tokens` must be above 0 to carry a LoRA": "fewer than its rank are refused before",
    "`updates` must hold at least one eviction": "`encode` is not asked for none",
}
"""By its first words, what no user meets, and why."""


def is_internal(message):
    return any(message.starts_with(words) for words in INTERNAL)


MET = [message for message in messages() if re.search(r"[a-z]{3}", message.text) and not is_internal(message)]
"""Those that say something of their own, and that users meet."""


@pytest.mark.parametrize("message", MET, ids=lambda message: message.place)
def test_the_page_tells_of_it(message):
    found = [entry for entry in ENTRIES if message.starts_with(entry)]
    assert found, f"docs/troubleshooting.md lacks {message.text.replace(GAP, '…')}"


def test_the_page_tells_of_nothing_else():
    texts = list(all_texts())
    own = ENTRIES[ENTRIES.index("`…` must be an integer, got") :]
    stale = [entry for entry in own if not any(says(entry, text) for text in texts)]
    assert not stale


def test_what_is_internal_is_there():
    texts = [message for message in messages() if is_internal(message)]
    assert all(any(message.starts_with(words) for message in texts) for words in INTERNAL)


LENGTH = 12
"""Characters in a row that are enough to know a message by."""


def marks(text):
    """What a message may be known by: some characters in a row, or what stands before and behind something that differs."""
    pieces = text.split(GAP)
    yield from (piece[at : at + LENGTH] for piece in pieces for at in range(len(piece) - LENGTH + 1))
    yield from ((one[-LENGTH:], other[:LENGTH]) for one, other in pairwise(pieces) if one and other)


OWNERS = Counter(mark for text in {message.text for message in MET} for mark in set(marks(text)))


def words_of_tests():
    """What the tests that expect errors and warnings say that they say."""
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text()
        if path != Path(__file__) and ("pytest.raises" in text or "pytest.warns" in text or "caplog" in text):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value.replace("\\", "")


SAID = "\n".join(words_of_tests())


def is_said(mark):
    if isinstance(mark, str):
        return mark in SAID
    before, behind = map(re.escape, mark)
    return re.search(f"{before}[^\n]{{1,60}}?{behind}", SAID) is not None


@pytest.mark.parametrize("message", MET, ids=lambda message: message.place)
def test_a_test_raises_it(message):
    own = {mark for mark in marks(message.text) if OWNERS[mark] == 1}
    assert any(map(is_said, own)), f"no test names {message.text.replace(GAP, '…')}"
