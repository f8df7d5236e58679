"""FSDP2 over two processes on the CPU (gloo), sharded by accelerate's own code; through trainers: test_processes.py."""

import os
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import get_peft_model
from torch import distributed, multiprocessing
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from trl.trainer.utils import add_fused_lm_head

from tests.cases import VOCABULARY
from tests.helpers import assert_close
from tests.integrations.common import COMPLETION, WINDOW, make_trl_base, pte_config

PROMPT = 6
# The processes score sequences of different lengths, in as many columns as each needs.
LENGTHS = (2 * WINDOW, COMPLETION)
PROMPTS = (PROMPT, PROMPT - 2)


def make_batch(rank):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, VOCABULARY, (2, PROMPTS[rank] + LENGTHS[rank]), generator=generator)
    labels = ids.clone()
    labels[:, : PROMPTS[rank]] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def score(model, rank):
    """As GRPO scores, through TRL's fused head."""
    return -model(**make_batch(rank), fused_lm_head=True).log_probs.mean()


def shard(model):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def work(rank, port, checkpointing, address):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    base = make_trl_base("qwen2")
    add_fused_lm_head(base)
    model = get_peft_model(base, pte_config(state_address=address))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses = [score(model, each) for each in range(2)]
    (sum(losses) / 2).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    prompt = {name: rows[:, : PROMPTS[rank]] for name, rows in make_batch(rank).items() if name != "labels"}
    # The processes stop at different lengths.
    options = {"min_new_tokens": LENGTHS[rank], "max_new_tokens": LENGTHS[rank], "do_sample": False}
    decoded = model.eval().generate(**prompt, **options)

    model = shard(model).train()
    assert isinstance(model, FSDPModule)
    for _ in range(2):
        loss = score(model, rank)
        loss.backward()
        assert_close(loss, losses[rank].detach())
        actual = {
            name: weight.grad.full_tensor() for name, weight in model.named_parameters() if weight.grad is not None
        }
        assert set(actual) == set(expected)
        for name, gradient in expected.items():
            assert_close(actual[name], gradient)
        model.zero_grad()
        register_fsdp_forward_method(model, "generate")
        with torch.no_grad():
            assert torch.equal(model.eval().generate(**prompt, **options), decoded)
        model.train()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "address"), [(False, "value"), (True, "value"), (True, "key")])
def test_sharded_scores_gradients_and_generations_are_those_of_whole_weights(checkpointing, address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port, checkpointing, address), nprocs=2)
