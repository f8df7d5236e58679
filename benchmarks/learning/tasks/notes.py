"""A real model: SmolLM2-135M-Instruct repeats names, towns and numbers of its notes in another order, after they left a window of 128 thoughts.

Notes:
    - Anna from Paris has number 47.
    ...
    The same notes in another order:
    - Karen from Oslo has number 12.

The first four tokens are the prompt (attention sinks); all else is thought. What is asked for are town and number, as the text is read with its
own words before them (teacher forcing). Perplexity is that of Python's own reference, ``pydoc_data.topics``: English that comes with the interpreter.
"""

from __future__ import annotations

import pydoc_data.topics
import random
import sys
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.common import SMOLLM2, load_model

from ...common.intervals import share
from .task import EVALUATION_SEED, Batch, Task, tokenizer_of, window_of

NAMES = [
    "Anna",
    "Boris",
    "Carla",
    "David",
    "Elena",
    "Frank",
    "Grace",
    "Henry",
    "Irene",
    "Jacob",
    "Karen",
    "Louis",
    "Maria",
    "Nancy",
    "Oscar",
    "Peter",
    "Robert",
    "Sarah",
    "Thomas",
    "Victor",
]
TOWNS = [
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Athens",
    "Dublin",
    "Oslo",
    "Lisbon",
    "Prague",
    "Warsaw",
    "Tokyo",
    "Cairo",
    "Delhi",
    "Boston",
]
NOTES = 14
HEAD = "Notes:\n"
AGAIN = "\nThe same notes in another order:\n"
MICRO_BATCH = 8
SEGMENT, SEGMENTS = 256, 8


def write(generator: random.Random, count: int = NOTES) -> tuple[str, list[tuple[int, int, int]]]:
    """A text, and of each town and number that is asked for: where it stands the second time (from, to) and the first, in characters."""
    people = generator.sample(NAMES, count)
    notes = {who: f"- {who} from {generator.choice(TOWNS)} has number {generator.randint(10, 99)}.\n" for who in people}
    text, stated = HEAD, {}
    for who in people:
        stated[who] = len(text)
        text += notes[who]
    text, asked = text + AGAIN, []
    for who in generator.sample(people, count):
        line = notes[who]
        town, number = line.split(" from ")[1].split(" ")[0], line.split(" ")[-1].strip(".\n")
        for value in (town, number):
            at = line.rindex(value)
            asked.append((len(text) + at, len(text) + at + len(value), stated[who] + at))
        text += line
    return text.rstrip("\n"), asked


class Notes(Task):
    """Notes, twice."""

    name = "notes"
    notes = NOTES
    window, windows, probe = 128, (128, 192, 256, None), (96, 128, 256, None)
    prompt_end = 4
    batch, micro_batch, given = 2, 2, True
    count, probed = 16, 4
    log_every, save_every = 5, 20

    def base(self, seed: int) -> LlamaForCausalLM:
        """SmolLM2, whatever the seed."""
        return load_model(SMOLLM2, "float32")[0]

    def make(self, count: int, generator: torch.Generator, done: float = 0.0) -> Batch:
        """Texts of about 260 tokens; the labels are what is asked for."""
        ids, _, asked = self._encode(count, generator)
        labels = torch.full_like(ids, -100)
        for row, spans in enumerate(asked):
            for columns, _ in spans:
                labels[row, columns] = ids[row, columns]
        return Batch(ids, labels, self.prompt_end)

    def _texts(self, count: int, generator: torch.Generator) -> list[tuple[str, list[tuple[int, int, int]]]]:
        draws = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        return [write(draws, self.notes) for _ in range(count)]

    def _encode(
        self, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[list[tuple[list[int], int]]]]:
        """``[B, N]`` tokens padded on the right, their mask, and of what is asked for its columns and the column where it was stated."""
        texts = self._texts(count, generator)
        encoded = self.tokenizer()(
            [text for text, _ in texts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        asked = []
        for row, (_, spans) in enumerate(texts):
            places = encoded["offset_mapping"][row].tolist()
            found = []
            for start, end, stated in spans:
                columns = [column for column, (low, high) in enumerate(places) if high > start and low < end]
                found.append((columns, next(column for column, (_, high) in enumerate(places) if high > stated)))
            asked.append(found)
        return encoded["input_ids"], encoded["attention_mask"], asked

    def data(self, count: int, generator: torch.Generator) -> Dataset:
        """The first word is the prompt, the rest the completion."""
        texts = [text for text, _ in self._texts(count, generator)]
        return Dataset.from_dict({"prompt": [HEAD] * count, "completion": [text[len(HEAD) :] for text in texts]})

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's."""
        return tokenizer_of(SMOLLM2)

    @torch.no_grad()
    def evaluate(self, model: PeftModel, window: int | None, count: int) -> dict[str, Any]:
        """``recall``: what had left the *trained* window; ``in_window``, ``evicted``: by this one; KL to the full cache in nats; perplexity."""
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        ids, mask, asked = self._encode(count, generator)
        model.eval()
        right, distance, kl, thoughts = [], [], [], []
        for start in range(0, count, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            with window_of(model, window):
                bounded = model(input_ids=ids[part], attention_mask=mask[part]).logits.log_softmax(dim=-1)
            with model.disable_adapter():
                full = model(input_ids=ids[part], attention_mask=mask[part]).logits.log_softmax(dim=-1)
            real = mask[part].bool()
            kl.append((bounded.exp() * (bounded - full)).sum(dim=-1)[real])
            thoughts.append((torch.arange(ids.shape[1]) - self.prompt_end).expand_as(real)[real])
            best = bounded.argmax(dim=-1)
            for row, spans in enumerate(asked[part]):
                for columns, stated in spans:
                    before = torch.tensor(columns) - 1
                    right.append(bool((best[row, before] == ids[start + row, columns]).all()))
                    distance.append(columns[0] - 1 - stated)
        hits, away = torch.tensor(right), torch.tensor(distance)
        divergence, at = torch.cat(kl), torch.cat(thoughts) / self.window
        left = away >= (sys.maxsize if window is None else window)
        return {
            "recall": share(hits[away >= self.window]),
            "all": share(hits),
            "in_window": share(hits[~left]),
            "evicted": share(hits[left]),
            "kl_by_windows": [float(divergence[(at > low) & (at <= low + 1)].mean()) for low in range(-1, 2)],
            "perplexity": self._perplexity(model, window),
        }

    def _perplexity(self, model: PeftModel, window: int | None) -> float:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics))
        ids = torch.tensor(self.tokenizer()(text, truncation=True, max_length=4 * SEGMENT * SEGMENTS)["input_ids"])
        rows = ids[: len(ids) // SEGMENT * SEGMENT].view(-1, SEGMENT)[:SEGMENTS]
        losses = []
        for part in rows.split(MICRO_BATCH):
            with window_of(model, window):
                logits = model(input_ids=part).logits[:, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            )
        return float(torch.cat(losses).mean().exp())


class FewNotes(Notes):
    """Three notes, twice, under a window of 24: texts that are short enough for many of them to be read on a CPU."""

    name = "few-notes"
    notes = 3
    window, windows, probe = 24, (24, 32, 48, None), (18, 24, 48, None)
    batch, micro_batch = 8, 8
    count, probed = 128, 32
    save_every = 40
