"""Chat in a terminal, in a cache that does not grow: ``python examples/chat.py [--adapter outputs/demo]``.

The whole conversation lives in one `PTECache`: each turn reads what is new alone, and what leaves the window is in the state. The last line of the
screen says, token by token, what the cache holds; Ctrl-C ends an answer, an empty line the conversation.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from common import SMOLLM2, load_model
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList, TextStreamer

import peft_pte
from peft_pte import PTEConfig

QUESTION, ANSWER = "What was the question?", "That was the answer."


class Interrupt(StoppingCriteria):
    """Ends an answer when the user asks for it, at the next token, so that the cache stays whole."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether to stop, for every row."""
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)


class Streamer(TextStreamer):
    """Prints words as they come, and on a terminal keeps its last line for what the cache holds."""

    def __init__(self, tokenizer: Any, cache: peft_pte.PTECache) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache, self.live = cache, sys.stdout.isatty()

    def put(self, value: torch.Tensor) -> None:
        """Print a token, and the line."""
        super().put(value)
        if self.live:
            rows = shutil.get_terminal_size().lines
            # The screen scrolls above the last line; the cursor comes back to where it was.
            line = f"\x1b7\x1b[1;{rows - 1}r\x1b[{rows};1H\x1b[2K\x1b[7m {state(self.cache)} \x1b[0m\x1b8"
            print(line, end="", flush=True)

    def close(self) -> None:
        """Give the last line back."""
        if self.live:
            print("\x1b[r", end="", flush=True)


def state(cache: peft_pte.PTECache) -> str:
    """What a cache holds, in a line."""
    return f"{cache.get_seq_length():,} tokens read, {cache.evictions} evictions, cache of {cache.nbytes / 1e6:.2f} MB"


class Conversation:
    """A conversation in one cache.

    Args:
        model: An adapted model.
        tokenizer: With a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache: peft_pte.PTECache = model.base_model.new_cache()
        self.ids: list[int] = []
        self.interrupt = Interrupt()
        self.streamer = Streamer(tokenizer, self.cache)

    def say(self, text: str, **options: Any) -> str:
        """Add a turn of the user; prints the answer as it is written, and returns it.

        Args:
            text: What the user says.
            **options: Of ``generate``.
        """
        self.ids += turn(self.tokenizer, text, self.ids)
        read = len(self.ids)
        ids = torch.tensor([self.ids], device=self.model.device)
        self.interrupt.asked = False
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self.interrupt, "asked", True))
        try:
            written = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                streamer=self.streamer,
                stopping_criteria=StoppingCriteriaList([self.interrupt]),
                **options,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.ids = written[0].tolist()
        return self.tokenizer.decode(self.ids[read:], skip_special_tokens=True)


def turn(tokenizer: Any, text: str, before: list[int]) -> list[int]:
    """The tokens of a turn of the user and of the header of the answer to it, behind a conversation of the tokens ``before``.

    A template may render earlier turns otherwise once there are later ones, which the cache has read already; so a turn is rendered behind a
    conversation of two sentences, and what stands behind those is taken.

    Raises:
        ValueError: The template does not render a conversation turn by turn.
    """
    user = {"role": "user", "content": text}
    if not before:
        return list(tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"])
    earlier = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    whole = tokenizer.apply_chat_template([*earlier, user], add_generation_prompt=True, tokenize=False)
    _, found, rest = whole.partition(ANSWER)
    if not found or text not in rest:
        raise ValueError("The chat template does not render a conversation turn by turn. Use a model of which it does.")
    end = tokenizer.eos_token or ""
    if end and before[-1] == tokenizer.eos_token_id:
        rest = rest.lstrip(" ").removeprefix(end)
    return list(tokenizer(rest, add_special_tokens=False)["input_ids"])


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The adapted model and its tokenizer; without ``--adapter`` one that is fresh: the model itself, with a window."""
    if args.adapter is not None:
        model = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype=args.dtype)
        return model, AutoTokenizer.from_pretrained(args.adapter)
    base, tokenizer = load_model(args.model, args.dtype)
    end = peft_pte.prompt_end(tokenizer)
    config = PTEConfig(task_type="CAUSAL_LM", cache_window=args.cache_window, prompt_end=end)
    return get_peft_model(base, config), tokenizer


def main() -> None:
    """Talk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", type=Path, help="folder of a trained adapter, its tokenizer beside it")
    add("--model", default=SMOLLM2, help="without --adapter: hub id or local folder")
    add("--cache-window", type=int, default=256, help="without --adapter: thoughts the cache holds")
    add("--max-new-tokens", type=int, default=512, help="of an answer")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--dtype", default="float32", help="bfloat16 on a GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, tokenizer = load(args)
    conversation = Conversation(model.to(args.device).eval(), tokenizer)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    window = model.peft_config["default"].cache_window
    print(f"A window of {window} tokens behind the first turn, which stays. An empty line ends.")
    try:
        while text := input("\n> ").strip():
            conversation.say(text, max_new_tokens=args.max_new_tokens, **sampling)
            print(f"\n{model.report()}")
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        conversation.streamer.close()


if __name__ == "__main__":
    main()
