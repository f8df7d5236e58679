"""Where thinking starts in a chat: the marker that a chat template puts in front of the assistant's first turn."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

# What turns may end and begin with: a tokenizer merges it with what stands beside it.
_ASKED, _TOLD = "What is seven times eight", "Fifty"
_QUESTIONS = tuple(_ASKED + end for end in ("?", "", "\n", "}"))
_ANSWERS = tuple(start + _TOLD for start in ("", "\n", "\n\n", "\n\n\n", " ", "    ", "\t"))
# What only some templates know: thinking asked for or not, thoughts within and beside an answer, a tool in place of it.
_OPTIONS: tuple[dict[str, Any], ...] = ({"enable_thinking": True}, {"enable_thinking": False}, {"thinking": True})
_REASONED: tuple[dict[str, Any], ...] = (
    {"content": f"<think>\nSevens.\n</think>\n\n{_TOLD}"},
    {"content": _TOLD, "reasoning_content": "Sevens."},
    {"content": _TOLD, "thinking": "Sevens."},
    {"content": _TOLD, "reasoning": "Sevens."},
    {"content": "", "tool_calls": [{"type": "function", "function": {"name": "multiply", "arguments": {"by": _TOLD}}}]},
)
_REMEDY = (
    'Give the token ids yourself, PTEConfig(prompt_end=tokenizer.encode("...", add_special_tokens=False)), an integer such as '
    "prompt_end=4 for text without prompts, or `prompt_length=` with every call."
)

Messages = list[dict[str, Any]]


def prompt_end(tokenizer: Any) -> list[int]:
    """The token ids for ``PTEConfig(prompt_end=...)`` of a chat model, after whose first occurrence thinking starts.

    They are the header of the assistant's turn as the chat template writes it, up to its last special token (``<|start_header_id|>
    assistant <|end_header_id|>``), or without one up to where an answer could merge with it (``<|im_start|> assistant``); to plain
    words, which a user could write too, the end of the user's turn is added (``<end_of_utterance> Assistant:``). It was verified
    that they end in the same column of a generation prompt, of a finished chat and of a history, and stand nowhere before::

        PTEConfig(task_type="CAUSAL_LM", prompt_end=peft_pte.prompt_end(tokenizer))

    Args:
        tokenizer: A tokenizer of transformers with a chat template, or a processor that holds a tokenizer.

    Returns:
        Token ids, at least one.

    Raises:
        TypeError: ``tokenizer`` is no tokenizer.
        ValueError: It has no chat template, the template cannot be rendered, or no such ids can be found.
    """
    template = _Template(tokenizer)
    tail, size = template.tail_and_header_size()
    header, before = tail[len(tail) - size :], tail[: len(tail) - size]

    def preference(length: int) -> tuple[bool, bool, int]:
        text = template.tokenizer.decode(header[:length])
        return header[length - 1] in template.special, text == text.rstrip(), length

    for length in sorted(range(1, size + 1), key=preference, reverse=True):
        markers = [header[:length]]
        places = [place for place, token in enumerate(before) if token in template.special]
        if places and template.special.isdisjoint(header[:length]):
            # Plain words a user could write too: the end of the user's turn belongs to them.
            markers.insert(0, before[places[-1] :] + header[:length])
        for marker in markers:
            if template.agrees(marker, size - length):
                return marker
    raise ValueError(
        "`tokenizer` must write a header of the assistant's turn that is the same in a generation prompt, a finished chat and a "
        f"history, and stands nowhere before. What its chat template ends a generation prompt with is "
        f"{template.tokenizer.decode(header)!r}, and none of its {size} beginnings is such a header. {_REMEDY}"
    )


class _Template:
    """Renderings of one chat template as token ids."""

    def __init__(self, given: Any) -> None:
        tokenizer = given if isinstance(given, PreTrainedTokenizerBase) else getattr(given, "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"`tokenizer` must be a tokenizer of transformers, got {type(given).__name__}. {_REMEDY}")
        # That of a processor comes first: old ones keep it to themselves.
        self.chat_template = getattr(given, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if not self.chat_template:
            raise ValueError(
                f"`tokenizer` must have a chat template, got {type(given).__name__} without one. {_REMEDY}"
            )
        self.tokenizer: Any = tokenizer
        # What stands for any unknown word is no landmark.
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        self.special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - unknown
        self.parts = False
        if _ASKED not in self.render([_user(_ASKED)], tokenize=False):
            self.parts = True  # A multimodal template, which passes over a content that is a string.
            if _ASKED not in self.render([_user(_ASKED)], tokenize=False):
                raise ValueError(
                    f"`tokenizer` must write what the user says, got a chat template that does not. {_REMEDY}"
                )

    def render(self, messages: Messages, generation: bool = True, tokenize: bool = True, **options: Any) -> Any:
        """The ids of ``messages``, or their text.

        Raises:
            ValueError: The template refuses them.
        """
        if self.parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        template = None if self.chat_template is self.tokenizer.chat_template else self.chat_template
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=generation,
                tokenize=tokenize,
                return_dict=False,
                **options,
            )
        except Exception as error:  # Templates raise what they like.
            roles = ", ".join(turn["role"] for turn in messages)
            raise ValueError(
                f"`tokenizer` must have a chat template that renders a chat of {roles}, got {error!r}. {_REMEDY}"
            ) from error
        return [int(token) for token in rendered] if tokenize else rendered

    def tail_and_header_size(self) -> tuple[list[int], int]:
        """What a generation prompt ends in, whatever was asked, and how many ids of it are the header."""
        prompts = [self.render([_user(question)]) for question in _QUESTIONS]
        common = 0
        while common < min(map(len, prompts)) and len({prompt[-1 - common] for prompt in prompts}) == 1:
            common += 1
        prompt = prompts[0]
        tail = prompt[len(prompt) - common :]
        asked = self.render([_user(_QUESTIONS[0])], generation=False)
        pairs = enumerate(zip(asked, prompt, strict=False))
        same = next((column for column, (one, other) in pairs if one != other), min(len(asked), len(prompt)))
        if same < len(prompt):
            return tail, min(len(prompt) - same, common)
        # Nothing was added: the header is what ends the user's turn, from its last special token on.
        places = [place for place, token in enumerate(tail) if token in self.special]
        return tail, common - (places[-1] if places else 0)

    def agrees(self, marker: list[int], behind: int) -> bool:
        """Whether ``marker`` ends ``behind`` ids before the end of every generation prompt, and there in all that goes on."""
        for prompt, others in self.chats:
            end = len(prompt) - behind
            if _first_end(prompt, marker) != end:
                return False
            if not all(ids[:end] == prompt[:end] or self.is_between(ids, marker) for ids in others):
                return False
        return True

    def is_between(self, ids: list[int], marker: list[int]) -> bool:
        """Whether ``marker`` ends between question and answer, in a chat whose beginning is not the generation prompt's.

        Mistral's templates move the system message into the last turn of the user; thinking may be announced at the top.
        """
        before = self.tokenizer.decode(ids[: max(_first_end(ids, marker), 0)])
        return _ASKED in before and _TOLD not in before

    @cached_property
    def chats(self) -> list[tuple[list[int], list[list[int]]]]:
        """Generation prompts, each with others of the same question, finished chats and histories."""
        starts: list[Messages] = [[], [{"role": "system", "content": "Be brief."}]]
        starts = [start for start in starts if not start or self.known([*start, _user(_ASKED)])]
        chats = []
        for start, question in product(starts, _QUESTIONS):
            asked = [*start, _user(question)]
            others = [self.known(asked, **options) for options in _OPTIONS]
            for answer in _ANSWERS:
                chat = [*asked, {"role": "assistant", "content": answer}]
                others += [self.render(chat, generation=False), self.render([*chat, _user("And nine times?")])]
            for turn in _REASONED:
                chat = [*asked, {"role": "assistant", **turn}]
                after = {"role": "tool", "name": "multiply", "content": "56"} if "tool_calls" in turn else _user("And?")
                others += [self.known(chat, generation=False), self.known([*chat, after])]
            chats.append((self.render(asked), [ids for ids in others if ids]))
        return chats

    def known(self, messages: Messages, **options: Any) -> list[int]:
        """The ids of ``messages``, none where the template refuses them."""
        try:
            return self.render(messages, **options)
        except ValueError:
            return []


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _first_end(ids: list[int], marker: list[int]) -> int:
    """The column behind the first occurrence of ``marker``; -1 where there is none."""
    size = len(marker)
    return next((end for end in range(size, len(ids) + 1) if ids[end - size : end] == marker), -1)
