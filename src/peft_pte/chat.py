"""Where thinking starts in a chat: the marker that a chat template puts in front of the assistant's first turn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

# What turns may end and begin with: a tokenizer may merge it with what stands beside it.
_QUESTIONS = ("What is 7 times 8?", "x", "Think twice\n", "{a}")
_ANSWERS = ("Fifty-six.", "\n56", "\n\n56", "\n\n\n56", " 56", "    56", "\t56")
_REMEDY = (
    "Give the token ids yourself, PTEConfig(prompt_end=tokenizer.encode(header, add_special_tokens=False)), an integer such as "
    "prompt_end=4 for text without prompts, or `prompt_length=` with every call."
)

Messages = list[dict[str, str]]


def prompt_end(tokenizer: Any) -> list[int]:
    """The token ids for ``PTEConfig(prompt_end=...)`` of a chat model, after whose first occurrence thinking starts.

    They are the header of the assistant's turn as the chat template writes it, up to its last special token (``<|start_header_id|>
    assistant <|end_header_id|>``), or as far as no neighbour can merge with it (``<|im_start|> assistant``). It was verified
    that they end in the same column of a generation prompt, of a finished chat and of a history, and stand nowhere before::

        PTEConfig(task_type="CAUSAL_LM", prompt_end=peft_pte.prompt_end(tokenizer))

    Args:
        tokenizer: A tokenizer of transformers with a chat template, or a processor that holds one.

    Returns:
        Token ids, at least one.

    Raises:
        TypeError: ``tokenizer`` is no tokenizer.
        ValueError: It has no chat template, the template cannot be rendered, or no such ids can be found.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise TypeError(f"`tokenizer` must be a tokenizer of transformers, got {type(tokenizer).__name__}. {_REMEDY}")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"`tokenizer` must have a chat template, got {type(tokenizer).__name__} without one. {_REMEDY}"
        )
    template = _Template(tokenizer)
    header = template.header()
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    lengths = sorted(
        range(1, len(header) + 1), key=lambda length: (header[length - 1] in special, length), reverse=True
    )
    for length in lengths:
        if template.agrees(header[:length], len(header) - length):
            return header[:length]
    raise ValueError(
        "`tokenizer` must write a header of the assistant's turn that is the same in a generation prompt, a finished chat and a "
        f"history, and stands nowhere before; its chat template writes {tokenizer.decode(header)!r} in a generation prompt. {_REMEDY}"
    )


class _Template:
    """Renderings of one chat template as token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.starts: list[Messages] = [[]]
        system: Messages = [{"role": "system", "content": "Be brief."}]
        try:
            self.render([*system, *_turn("user", "x")], True)
        except ValueError:
            return  # A template without a system role.
        self.starts.append(system)

    def render(self, messages: Messages, generation: bool) -> list[int]:
        """The ids of ``messages``.

        Raises:
            ValueError: The template refuses them.
        """
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, tokenize=True, return_dict=False
            )
        except Exception as error:  # Templates raise what they like.
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"The chat template refuses a chat of {roles}: {error}. {_REMEDY}") from error
        return [int(token) for token in ids]

    def header(self) -> list[int]:
        """What a generation prompt ends in, whatever was asked; without the end of the user's turn where that can be told."""
        prompts = [self.render(_turn("user", question), True) for question in _QUESTIONS]
        common = 0
        while common < min(map(len, prompts)) and len({prompt[-1 - common] for prompt in prompts}) == 1:
            common += 1
        asked = self.render(_turn("user", _QUESTIONS[0]), False)
        same = next(
            (column for column, pair in enumerate(zip(asked, prompts[0], strict=False)) if pair[0] != pair[1]), None
        )
        added = len(prompts[0]) - (min(len(asked), len(prompts[0])) if same is None else same)
        if added > 0:
            common = min(added, common)
        else:
            # The header is what ends the user's turn: its last special token and what follows.
            tail = prompts[0][len(prompts[0]) - common :]
            places = [place for place, token in enumerate(tail) if token in self.tokenizer.added_tokens_decoder]
            common -= places[-1] if places else 0
        return prompts[0][len(prompts[0]) - common :]

    def agrees(self, marker: list[int], behind: int) -> bool:
        """Whether ``marker`` ends ``behind`` tokens before the end of every generation prompt, and there in all that follows it."""
        return all(
            _first_end(ids, marker) == len(prompt) - behind for prompt, rows in self.chats() for ids in (prompt, *rows)
        )

    def chats(self) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Generation prompts, each with finished chats and histories that begin with the same question."""
        for start, question in product(self.starts, _QUESTIONS):
            asked = [*start, *_turn("user", question)]
            answered = [[*asked, *_turn("assistant", answer)] for answer in _ANSWERS]
            finished = [self.render(chat, False) for chat in answered]
            histories = [self.render([*chat, *_turn("user", "And 8 times 8?")], True) for chat in answered]
            yield self.render(asked, True), [*finished, *histories]


def _turn(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def _first_end(ids: list[int], marker: list[int]) -> int:
    """The column behind the first occurrence of ``marker``; -1 where there is none."""
    size = len(marker)
    return next((end for end in range(size, len(ids) + 1) if ids[end - size : end] == marker), -1)
