r"""The six test sets under a cache window, through lm-evaluation-harness with our model object.

    python examples/paper/evaluation.py --model qwen2.5-3b --arm pte --adapter outputs/paper/qwen2.5-3b-pte \
        --cache-window 768 1024 2048 --max-new-tokens 3072

One record per window and length goes to `--results`, its responses to a folder beside it; `table.py` reads the records. `--arm base`
(no adapter) under a window is the model itself in a bounded cache. `--data math500=rows.json` reads a local file in the data set's own schema. Under
`accelerate launch` each process answers a share of the problems.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from arms import ARMS, MAX_COMPLETION_LENGTH, model_name, short_name
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftConfig, PeftModel, get_peft_model
from records import (
    FULL,
    RESULTS,
    changed_adapter,
    changed_arguments,
    check_adapter,
    path_of,
    weights_digest,
    write,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_pte
from peft_pte import PTEConfig

TASKS = ("math500", "olympiadbench", "minerva", "amc", "aime24", "aime25")
HERE = Path(__file__).resolve().parent
# Arguments that decide what is measured; their defaults are the protocol's.
MEASURED = ("temperature", "top_p", "dtype")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="qwen2.5-3b, qwen2.5-7b, r1-llama-8b, a hub id or a local folder")
    add("--arm", required=True, choices=["base", *ARMS], help="what the results are filed under")
    add("--adapter", type=Path, help="folder that train.py wrote; none for --arm base")
    add("--cache-window", nargs="+", default=["768", "1024", "2048"], help=f"thoughts the cache holds, or {FULL!r}")
    add("--max-new-tokens", nargs="+", type=int, default=[MAX_COMPLETION_LENGTH], help="lengths, e.g. 3072 65536")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add(
        "--data", nargs="*", default=[], metavar="TASK=FILE", help="local JSON or JSON-lines files instead of the hub's"
    )
    add("--limit", type=int, help="problems per task, to try things out")
    add("--batch-size", type=int, default=16, help="sequences that are decoded together, per process")
    add("--temperature", type=float, default=0.6, help="0: greedy")
    add("--top-p", type=float, default=0.95)
    add("--dtype", default="bfloat16", help="of the base model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--results", type=Path, default=RESULTS)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    windows = [None if window == FULL else int(window) for window in args.cache_window]
    if (args.arm == "base") != (args.adapter is None):
        parser.error(f"`--adapter` must be given for every arm but base, got {args.adapter} for {args.arm}.")
    if args.arm == "lora" and windows != [None]:
        parser.error(
            f"`--cache-window` must be {FULL} for --arm lora, got {args.cache_window}: LoRA has no bounded cache."
        )
    args.cache_window = windows
    args.changed = changed_arguments(args, parser, MEASURED)
    args.data = dict(entry.split("=", 1) for entry in args.data)
    unknown = sorted(set(args.data) - set(TASKS))
    if unknown:
        parser.error(f"`--data` must name tasks of {', '.join(TASKS)}, got {', '.join(unknown)}.")
    return args


def load_model(name: str, adapter: Path | None, window: int | None, dtype: str, device: str | torch.device) -> Any:
    """The model as it is to be evaluated, under ``window`` thoughts of cache (``None``: unbounded)."""
    model = AutoModelForCausalLM.from_pretrained(model_name(name), dtype=dtype)
    if adapter is not None:
        config = PeftConfig.from_pretrained(str(adapter))
        if isinstance(config, PTEConfig):
            config.cache_window = window  # Nothing that was trained depends on the window's size.
        model = PeftModel.from_pretrained(model, str(adapter), config=config)
    elif window is not None:
        # A fresh adapter is exactly the base model, and its cache is bounded.
        bounded = PTEConfig(
            task_type="CAUSAL_LM",
            r=1,
            num_global_tokens=1,
            target_modules=["q_proj"],
            state_update="off",
            cache_window=window,
        )
        model = get_peft_model(model, bounded)
    return model.to(device).eval()


def make_harness(model: Any, tokenizer: Any, tokens: int, batch_size: int, accelerator: Accelerator) -> HFLM:
    """The harness' own model class around ours; each process answers its share."""
    # The harness keeps `max_length - max_gen_toks` columns of a prompt and cuts the rest off on the left. The cache is
    # bounded and positions are absolute, so neither the prompt nor the length has to fit its idea of a context.
    longest_prompt = model.config.max_position_embeddings
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest_prompt + tokens)
    if accelerator.num_processes > 1:
        # For a model object the harness leaves this to its caller.
        harness.accelerator = accelerator
        harness._rank, harness._world_size = accelerator.process_index, accelerator.num_processes
    return harness


def override_data(data: dict[str, str], folder: Path) -> None:
    """Write tasks to ``folder`` that are those of ``tasks/*.yaml``, reading local files in place of the hub."""
    for name, file in data.items():
        config = {
            "include": str(HERE / "tasks" / f"{name}.yaml"),
            "task": f"paper_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML.


def evaluate(
    harness: HFLM, task_manager: TaskManager, args: argparse.Namespace, tokens: int
) -> tuple[dict[str, Any], dict[str, list[Any]]] | None:
    """Scores by task, e.g. ``{"aime24": {"pass_at_1": 0.1, "pass_at_16": 0.3}}``, and the harness' samples by task.

    ``None`` but on the main process.
    """
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    output = lm_eval.simple_evaluate(
        model=harness,
        tasks=[f"paper_{name}" for name in args.tasks],
        task_manager=task_manager,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": tokens, **(sampling if args.temperature > 0 else {"do_sample": False})},
        limit=args.limit,
        log_samples=True,
        bootstrap_iters=0,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        torch_random_seed=args.seed,
    )
    if output is None:
        return None
    scores, all_samples = {}, {}
    for name in args.tasks:
        samples = all_samples[name] = output["samples"][f"paper_{name}"]
        metrics = {metric: output["results"][f"paper_{name}"][f"{metric},all"] for metric in samples[0]["metrics"]}
        scores[name] = {**metrics, "problems": len(samples), "samples": len(samples[0]["resps"][0])}
    return scores, all_samples


def save_responses(folder: Path, all_samples: dict[str, list[Any]]) -> None:
    """One JSON-lines file per task: problem, golds, every response and the scores, so that they can be graded again."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in all_samples.items():
        rows = [
            {
                **{key: sample["doc"][key] for key in ("problem", "golds")},
                "responses": sample["resps"][0],
                **{metric: sample[metric] for metric in sample["metrics"]},
            }
            for sample in samples
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str] | None = None) -> None:
    """Every window and length; one results file each."""
    args = parse_arguments(argv)
    # Ranks finish at different times.
    accelerator = Accelerator(
        cpu=args.device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=4))]
    )
    with tempfile.TemporaryDirectory() as overridden:
        override_data(args.data, Path(overridden))
        # What comes later wins.
        task_manager = TaskManager(include_path=[str(HERE / "tasks"), overridden], include_defaults=False)
        run(args, accelerator, task_manager)


def run(args: argparse.Namespace, accelerator: Accelerator, task_manager: TaskManager) -> None:
    """Evaluate under every window, at every length."""
    device = accelerator.device if accelerator.num_processes > 1 else args.device
    tokenizer = AutoTokenizer.from_pretrained(model_name(args.model), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    origin: dict[str, Any] = {"adapter": None, "adapter_weights": None, "changed": args.changed}
    if args.adapter is not None:
        config = PeftConfig.from_pretrained(str(args.adapter))
        check_adapter(args.arm, args.model, config)
        origin["adapter"] = {name: value for name, value in config.to_dict().items() if value is not None}
        origin["adapter_weights"] = weights_digest(args.adapter)
        origin["changed"] = {**args.changed, **changed_adapter(args.arm, config)}
    for window in args.cache_window:
        model = load_model(args.model, args.adapter, window, args.dtype, device)
        for tokens in args.max_new_tokens:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            harness = make_harness(model, tokenizer, tokens, args.batch_size, accelerator)
            found = evaluate(harness, task_manager, args, tokens)
            del harness
            if found is None:
                continue
            scores, samples = found
            identity = {
                "kind": "evaluation",
                "model": short_name(args.model),
                "arm": args.arm,
                "cache_window": window,
                "max_new_tokens": tokens,
                **origin,
                **{name: getattr(args, name) for name in ("limit", "data", "seed", *MEASURED)},
            }
            cuda = torch.cuda.is_available()
            record = {
                **identity,
                "scores": scores,
                "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
                "machine": torch.cuda.get_device_name() if cuda else "CPU",
                "versions": {
                    module.__name__: module.__version__ for module in (peft_pte, torch, transformers, lm_eval)
                },
            }
            names = (identity["model"], args.arm, FULL if window is None else window, tokens)
            path = path_of(args.results, identity, *names)
            write(path, record)
            save_responses(path.with_suffix(""), samples)
            print(f"{path.name}: {json.dumps(scores)}")
        # Before the next is loaded, or two would have to fit. Modules refer to each other, so counting does not free them.
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
