"""DeepSpeed's ZeRO over two processes on the CPU (gloo), by its own engine; through trainers: test_processes.py."""

import os
import socket

import pytest
import torch
from peft import get_peft_model
from torch import distributed, multiprocessing
from trl.models.utils import add_hooks, remove_hooks

from tests.helpers import assert_close
from tests.integrations.common import make_trl_base, pte_config
from tests.integrations.test_fsdp import LENGTHS, PROMPTS, make_batch


def work(rank, port, stage, checkpointing):
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed("gloo")
    model = get_peft_model(make_trl_base("qwen2"), pte_config())
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    losses = [model(**make_batch(each)).loss for each in range(2)]
    (sum(losses) / 2).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    prompt = {name: rows[:, : PROMPTS[rank]] for name, rows in make_batch(rank).items() if name != "labels"}
    options = {"min_new_tokens": LENGTHS[rank], "max_new_tokens": LENGTHS[rank], "do_sample": False}
    decoded = model.eval().generate(**prompt, **options)

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model.train(), optimizer=optimizer, config=config)
    for _ in range(2):
        loss = engine(**make_batch(rank)).loss
        assert_close(loss.detach(), losses[rank].detach())
        engine.backward(loss)
        for name, gradient in expected.items():
            # All processes have to ask, as the whole is gathered.
            assert_close(safe_get_full_grad(dict(model.named_parameters())[name]), gradient)
        engine.step()
    model.eval()
    if stage == 3:
        # As TRL generates: weights are gathered for the whole of it, and nobody fetches them.
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            remove_hooks(engine)
            assert torch.equal(model.generate(**prompt, **options), decoded)
            add_hooks(engine)
    else:
        assert torch.equal(model.generate(**prompt, **options), decoded)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_partitioned_scores_gradients_and_generations_are_those_of_whole_weights(stage, checkpointing, monkeypatch):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port, stage, checkpointing), nprocs=2)
