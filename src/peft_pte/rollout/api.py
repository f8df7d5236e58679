"""`generate_batch`: transformers' own signature and result, on rows of constant size that are refilled."""

from __future__ import annotations

import logging
import operator
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.logging import tqdm

from ..host.compat import generation_options, optimized_for_decoding
from ..passes.boundary import Columns, PromptSpec, find_prompt_ends
from ..passes.ends import check_prompts
from ..passes.modes import evaluating
from ..passes.recorded import check_recorded
from ..seam import Seam
from .batch import PREFILLED_TOKENS, Batch, Sizes
from .choice import Chooser, Options
from .memory import rows_that_fit
from .refusals import refuse_batch
from .requests import Request

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate_batch(
    seam: Seam,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = True,
    *,
    prompt_length: int | Sequence[int] | None = None,
    return_evictions: bool = False,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a sequence for each request, in as many rows as there is memory for; a row that ended is refilled at once.

    Each request gets what ``generate`` would give it alone: a row holds the same bytes whatever it writes, so none waits for another, and nothing
    is paged or preempted. What is drawn for a request depends on the seed and its place in ``inputs``, not on where or when it is
    written. The model is in evaluation mode meanwhile.

    Args:
        seam: The adapted model; ``model.generate_batch`` fills it in.
        inputs: Token ids of each request, without padding. Behind the end of its prompt (``PTEConfig.prompt_end``) a request may hold thoughts.
        generation_config: The options of the generation; ``None``: those of the model. ``cache_implementation="static"`` writes on fixed
            addresses, compiled where `generate` would compile.
        continuous_batching_config: ``max_requests_per_batch`` (rows; ``None``: as many as fit into ``max_memory_percent`` of the memory that is
            free), ``max_batch_tokens`` (of a prefill), ``allow_block_sharing`` (equal prompts that join together are read once),
            ``return_logprobs`` and ``seed``. There are no pages, so what it says about them is not used.
        record_timestamps: Whether the result says when each token was written.
        progress_bar: Whether requests are counted where a user sees it.
        persistent_manager: Unused: nothing is kept between calls.
        warmup: Unused: a step is compiled when it is first taken.
        prompt_length: Tokens of the prompt, for all requests or one each; ``None``: what `prompt_end` says, or all of them.
        return_evictions: Whether each output has ``evictions``, what left while it was written, for scoring.
        logits_processor: As in ``generate``. Each request gets a copy, which sees its tokens alone.
        stopping_criteria: As in ``generate``, likewise.
        prefix_allowed_tokens_fn: As in ``generate``; it is told the place of the request in ``inputs``.
        tokenizer: As in ``generate``, for ``stop_strings``.
        **options: Options of ``generate`` that replace those of ``generation_config``.

    Returns:
        By name, in the order of ``inputs``: ``generated_tokens``, ``logprobs`` where asked for (of the distribution that was sampled from),
        ``error`` of a request that failed, which is logged too.

    Raises:
        TypeError: An option is none of ``generate``'s.
        ValueError: Options contradict each other.
        NotImplementedError: The model or the options cannot have it; the message says what to do instead.
        Exception: That of the first request, where all of them failed.
    """
    if not len(inputs):
        return {}
    batching = continuous_batching_config or ContinuousBatchingConfig()
    adapter = seam.require_adapter()
    config, unknown = generation_options(seam.model, generation_config, options)
    if unknown:
        raise TypeError(
            f"`generate_batch` got {sorted(unknown)}, which are no options of a generation from tokens alone. Leave them out."
        )
    refuse_batch(seam, adapter, config)
    if return_evictions:
        check_recorded(seam, adapter, returns_dict=True)
    remembers = seam.remembers(adapter)
    asked = Options(
        config,
        LogitsProcessorList(logits_processor or ()),
        StoppingCriteriaList(stopping_criteria or ()),
        prefix_allowed_tokens_fn,
        tokenizer,
    )
    _warn_of_half_precision(seam, adapter)
    chooser = Chooser(seam.model, asked, batching.return_logprobs)
    default_length = all(
        given is None
        for given in (
            options.get("max_length"),
            generation_config and generation_config.max_length,
            seam.model.generation_config.max_length,
        )
    )
    requests = _requests(seam, adapter, inputs, asked, prompt_length, default_length)
    if config.do_sample:
        _seed(requests, batching.seed)
    if record_timestamps:
        for request in requests:
            request.timestamps = []
    bar = tqdm(total=len(requests), disable=not progress_bar, desc=f"Solving {len(requests)} requests", unit="request")
    start = time.perf_counter()
    with bar, evaluating(seam.model), optimized_for_decoding(seam.model):
        bar.update(sum(request.over for request in requests))
        waiting = deque(request for request in requests if not request.over)
        if waiting:
            sizes = replace(_sizes(seam, adapter, waiting, batching, config), record=return_evictions or remembers)
            batch = Batch(seam, adapter, chooser, config, sizes, prompt_length is not None)
            for count in _run(seam, batch, waiting):
                bar.update(count)
    seam.statistics.note_written(sum(len(request.generated) for request in requests), time.perf_counter() - start)
    if remembers:
        _remember(seam, adapter, requests)
    return _results(requests)


def _remember(seam: Seam, adapter: str, requests: Sequence[Request]) -> None:
    """Let what left while ``requests`` were written be found by their tokens."""
    for request in requests:
        if seam.memory is not None and request.evictions is not None:
            seam.memory.note(seam.writer(adapter), [[*request.tokens, *request.generated]], request.evictions)


def _warn_of_half_precision(seam: Seam, adapter: str) -> None:
    """Say that trainable weights were cast, which TRL does to the whole model before it calls."""
    part = f".{adapter}."
    trained = (weight for name, weight in seam.model.named_parameters() if weight.requires_grad and part in name)
    dtypes = {weight.dtype for weight in trained} & {torch.bfloat16, torch.float16}
    if dtypes:
        warnings.warn(
            f"Trainable weights of the adapter {adapter!r} are in {dtypes.pop()}, which rounds small updates away. TRL casts the whole model before "
            "`generate_batch` where `bf16` or `fp16` is on: set both to False, and load the base model in the dtype that you want.",
            UserWarning,
            stacklevel=3,
        )


def _run(seam: Seam, batch: Batch, waiting: deque[Request]) -> Iterator[int]:
    """Write all requests that are ``waiting``; yields how many have ended since."""
    seam.calls.generations.append(batch.generation)
    try:
        while waiting or batch.live:
            if waiting and batch.chooser.overdue:
                yield _cancel(waiting, batch.config.max_time)
            if waiting:
                batch.join(waiting)
            else:
                batch.shrink()
            batch.look()
            if not waiting or batch.full:
                batch.step()
                batch.look()
            ended = batch.take_ended()
            if ended:
                seam.statistics.note_end(batch.cache, seam.token_width)
            yield ended
    finally:
        seam.calls.generations.remove(batch.generation)


def _cancel(waiting: deque[Request], seconds: float) -> int:
    """Let requests that have no row by the end of the time fail."""
    count = len(waiting)
    while waiting:
        request = waiting.popleft()
        request.fail(
            TimeoutError(
                f"`max_time` of {seconds} s was over before a row was free for this request. Allow more time, or more rows."
            )
        )
        request.finish()
    return count


def _sizes(seam: Seam, adapter: str, waiting: Sequence[Request], batching: Any, config: Any) -> Sizes:
    prompt = max(request.prompt for request in waiting)
    length = max(len(request.tokens) + request.limit for request in waiting)
    static = config.cache_implementation == "static"
    rows = rows_that_fit(
        seam, adapter, prompt, length, batching.max_requests_per_batch, batching.max_memory_percent, static
    )
    return Sizes(
        rows=min(rows, len(waiting)),
        prompt=prompt,
        length=length,
        written=max(request.limit for request in waiting),
        prefilled=batching.max_batch_tokens or PREFILLED_TOKENS,
        share_prompts=batching.allow_block_sharing,
    )


def _requests(
    seam: Seam, adapter: str, inputs: Sequence[Sequence[int]], asked: Options, prompt_length: Any, default_length: bool
) -> list[Request]:
    """All requests, those that cannot be written with their errors.

    Raises:
        ValueError: There is not one ``prompt_length`` for each.
    """
    lengths = (
        [prompt_length] * len(inputs)
        if prompt_length is None or isinstance(prompt_length, int)
        else list(prompt_length)
    )
    if len(lengths) != len(inputs):
        raise ValueError(
            f"`prompt_length` must be one number, or one for each of {len(inputs)} requests, got {len(lengths)}."
        )
    copies = asked.config.num_return_sequences or 1
    requests: list[Request] = []
    for number, (tokens, length) in enumerate(zip(inputs, lengths, strict=True)):
        # transformers names and orders them so.
        children = [f"req_{number}__child#{copy}" for copy in range(copies - 1)]
        for name in (*children, f"req_{number}"):
            request = Request(index=number, name=name)
            requests.append(request)
            try:
                _fill(request, seam, adapter, tokens, length)
                request.limit, request.too_long = _limit(seam, asked, len(request.tokens), default_length)
            except (TypeError, ValueError) as error:
                request.fail(error)
                request.finish()
    return requests


def _fill(request: Request, seam: Seam, adapter: str, tokens: Sequence[int], length: int | None) -> None:
    """Note what a request goes on from.

    Raises:
        TypeError: It is not made of token ids.
        ValueError: It is empty, or holds what is no token, or its prompt does not come to its end, or has no room.
    """
    request.tokens = tuple(map(operator.index, tokens))
    vocabulary = seam.model.get_input_embeddings().weight.shape[0]
    if not request.tokens or not all(0 <= token < vocabulary for token in request.tokens):
        raise ValueError(
            f"A request must have tokens, all of them from 0 to {vocabulary - 1}, got {list(request.tokens)[:20]}."
        )
    ids = torch.tensor([request.tokens])
    rule = seam.config(adapter).prompt_end
    spec = PromptSpec(length=None if length is None else [length])
    ends = find_prompt_ends(rule, spec, Columns(ids, None, (1, ids.shape[1]), ids.device), None)
    check_prompts(rule, ends)
    request.prompt = len(request.tokens) if ends.first is None else int(ends.first)
    seam.check_positions(request.prompt if seam.rotary else len(request.tokens))


def _limit(seam: Seam, asked: Options, given: int, default_length: bool) -> tuple[int, str | None]:
    """How many tokens a request of ``given`` may write, and why it fails if it does; ``None``: it may end there.

    Raises:
        ValueError: It may write none.
    """
    config, own = asked.config, asked.criteria.max_length
    if own is not None:
        limit = own - given
    elif config.max_new_tokens is not None or default_length:
        limit = config.max_length if config.max_new_tokens is None else config.max_new_tokens
    else:
        limit = config.max_length - given
    if limit < 1:
        raise ValueError(
            f"`max_length` must be above the {given} tokens of a request, got {given + limit}. Set `max_new_tokens` instead."
        )
    positions = getattr(seam.text_config, "max_position_embeddings", None)
    if seam.rotary or positions is None or limit <= positions + 1 - given:
        return limit, None
    return positions + 1 - given, (
        f"The model has positions for {positions} tokens (`max_position_embeddings`), which this request has used up. Set a smaller "
        "`max_new_tokens`, or use a model with a longer range."
    )


def _seed(requests: Sequence[Request], seed: int | None) -> None:
    """Let each request have a seed of its own, by its place among them; ``None``: by torch's generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for request, own in zip(
        requests, torch.randint(2**62, (len(requests),), generator=generator).tolist(), strict=True
    ):
        request.seed = own


def _results(requests: Sequence[Request]) -> dict[str, Any]:
    failed = [request for request in requests if request.error is not None]
    for request in failed:
        logger.error("Request %s failed: %s", request.name, request.error)
    if len(failed) == len(requests) and failed[0].error is not None:
        raise failed[0].error
    return {request.name: request.output() for request in requests}
