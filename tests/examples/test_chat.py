"""The chat: a conversation in one cache reads what a whole rendering of it would."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_pte
from tests.helpers import SMALL, make_pte
from tests.integrations.trainers import make_chat_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WINDOW = SMALL["cache_window"]


@pytest.fixture(scope="module")
def chat():
    sys.path.insert(0, str(EXAMPLES))
    import chat

    yield chat
    sys.path.remove(str(EXAMPLES))


def make_talker(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_turns_are_those_of_the_template(chat):
    tokenizer = make_chat_tokenizer()
    conversation = [
        {"role": "user", "content": "w3 w4"},
        {"role": "assistant", "content": "w5 w6"},
        {"role": "user", "content": "w7"},
    ]
    whole = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    first = chat.turn(tokenizer, "w3 w4", [])
    written = [*first, *tokenizer("w5 w6", add_special_tokens=False)["input_ids"]]
    assert [*written, *chat.turn(tokenizer, "w7", written)] == whole
    ended = [*written, tokenizer.eos_token_id]
    assert [*ended, *chat.turn(tokenizer, "w7", ended)] == whole


def test_a_conversation_is_written_as_if_it_were_one_text(chat):
    tokenizer = make_chat_tokenizer()
    model = make_pte(base=make_talker(tokenizer), prompt_end=peft_pte.prompt_end(tokenizer))
    conversation = chat.Conversation(model, tokenizer)
    for text in ("w3 w4", "w5 w6 w7", "w8"):
        conversation.say(text, max_new_tokens=2 * WINDOW, min_new_tokens=WINDOW, do_sample=False)
    ids = torch.tensor([conversation.ids])
    assert conversation.cache.evictions > 3
    last = conversation.cache.nbytes
    with torch.no_grad():
        scored = model(ids).logits[0]
    # The last answer, greedily, by a call that reads the conversation at once.
    answer = len(conversation.ids) - WINDOW
    assert scored[answer - 1 : -1].argmax(-1).tolist() == conversation.ids[answer:]
    conversation.say("w9", max_new_tokens=WINDOW, min_new_tokens=WINDOW, do_sample=False)
    assert conversation.cache.nbytes == last


def test_an_answer_is_interrupted_and_the_conversation_goes_on(chat):
    tokenizer = make_chat_tokenizer()
    model = make_pte(base=make_talker(tokenizer), prompt_end=peft_pte.prompt_end(tokenizer))
    conversation = chat.Conversation(model, tokenizer)
    put = conversation.streamer.put
    seen = []

    def counting(value):
        put(value)
        seen.append(value)
        conversation.interrupt.asked = len(seen) == 4

    conversation.streamer.put = counting
    conversation.say("w3", max_new_tokens=50, min_new_tokens=50, do_sample=False)
    assert len(seen) == 5
    conversation.streamer.put = put
    conversation.say("w4", max_new_tokens=3 * WINDOW, min_new_tokens=3 * WINDOW, do_sample=False)
    assert conversation.cache.evictions > 0


def test_it_talks_in_a_terminal(tmp_path):
    tokenizer = make_chat_tokenizer()
    make_talker(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ["--model", tmp_path, "--cache-window", 8, "--max-new-tokens", 24, "--temperature", 0]
    talked = subprocess.run(
        [sys.executable, *map(str, [EXAMPLES / "chat.py", *options])],
        input="w3 w4\nw5\n\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert talked.returncode == 0, talked.stderr[-3000:]
    assert talked.stdout.count("evictions per sequence") == 2
    assert "a full one" in talked.stdout
    assert talked.stderr == ""
