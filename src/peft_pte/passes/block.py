"""What one decoder layer does with the tokens of a pass, chunk by chunk: evict, encode, attend, write.

The forward of every decoder layer is wrapped where the adapter is injected. The backbone runs once per pass, as its host wrote
it; the wrapper takes all tokens of the pass and gives them to the layer's own forward in the chunks of the plan, each with the
state, the mask and the keys and values that belong to it. Decoding is the pass of one token.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cache.cache import PTECache
from ..cache.ragged import RaggedLayer
from ..cache.store import Departing, Ending, Step, ThoughtLayer
from ..host.attention import watch
from ..host.compat import CACHE, CACHE_NAMES, HOOKED_FORWARD, SHARED_STATES
from ..host.sites import Site
from ..method.encoder import PTEEncoder
from ..method.layer import PTELinear
from ..method.stacks import Stacks
from ..method.state import LayerState, Reading, ThoughtState, bind, bound
from .plan import Chunk
from .recompute import recomputed


@dataclass
class Work:
    """What a layer is to do with one chunk."""

    chunk: Chunk
    mask: Any
    """Over the columns that it sees."""
    departing: Departing | None
    """What leaves; ``None``: nothing."""
    positions: Tensor
    """``[B, T]``, absolute positions of its thoughts."""
    realigned: Tensor | None
    """``[B, columns]``, where columns go when it ends; ``None``: they stay."""
    ending: Ending | None
    """Rows that end in it, and are to be kept; ``None``: none."""
    mask_of_heads: Callable[[RaggedLayer], Any] | None
    """The mask of a layer whose heads hold different numbers of thoughts."""
    surplus: bool = False
    """Whether the eviction is of other processes alone, with which the weights of the encoder are shared."""


@dataclass
class Pass:
    """One run of the backbone over some columns of a call."""

    adapter: str
    encoders: dict[int, PTEEncoder]
    """By layer; those that hold the adapter."""
    rows: int
    columns: int
    prompt: int
    """Slots of the prompt when the call ends."""
    detach: bool
    """Whether keys and values are detached at every eviction."""
    functional: bool
    """Whether nothing held is overwritten."""
    again: bool
    """Whether a layer may run a second time after the pass, under a checkpoint that others put around it."""
    work: tuple[Work, ...] = ()
    """By chunk, where several tokens come."""
    recompute: bool = False
    """Whether a layer's chunk is a checkpoint of its own."""
    keep: bool = False
    """Whether the call ends here and is to be kept."""
    step: Step | None = None
    """What happens to slots, where one token per row comes."""
    bounds: bool = True
    """Whether there is a window."""
    mask: Any = None
    """Over the slots that it sees; where several tokens come, over all columns of the pass, for layers that read another's."""
    mask_of_heads: Callable[[RaggedLayer], Any] | None = None
    """The same where the heads of a layer hold different numbers of thoughts, for one token per row."""
    departing: Tensor | None = None
    """``[B', 1, m]``, positions of what leaves at a step, where heads do not choose."""
    stacks: Stacks | None = None
    """Weights of linears that read the same input, at a step without gradients."""
    groups: dict[int, list[tuple[PTELinear, ...]]] = field(default_factory=dict)
    """Those linears, by layer."""
    starts: dict[int, PTECache] = field(default_factory=dict)
    """What layers held when they ran first."""
    finished: set[int] = field(default_factory=set)
    """Layers that ran."""


class _Running(threading.local):
    """The cache of the pass that runs on this thread: some hosts do not hand it to their layers while they checkpoint them."""

    cache: PTECache | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Running:
        return self

    def __reduce__(self) -> str:
        return "_running"


_running = _Running()


def running(backbone: Callable[..., Any], cache: PTECache, this: Pass, arguments: dict[str, Any]) -> Any:
    """What ``backbone`` returns where its decoder layers run ``this`` pass of ``cache``."""
    # The layers' caches are those of `cache`; what runs is known to this call alone.
    view = copy.copy(cache)
    view.running = this
    before, _running.cache = _running.cache, view
    try:
        output = backbone(**arguments, **{CACHE: view})
    finally:
        _running.cache = before
    if output.get(CACHE) is not None:
        output[CACHE] = None
    cache.layers, cache.state = view.layers, view.state
    # A checkpoint that others put around a layer holds the view, whose content would hold the graph that holds the checkpoint.
    view.layers, view.state = [], ThoughtState(0)
    return output


@dataclass(frozen=True)
class _Layer:
    """A decoder layer that is wrapped."""

    module: nn.Module
    site: Site
    names: tuple[str, ...]
    """Of its inputs."""
    hooked: Any
    """The forward that stood on the instance before; ``None``: that of its class."""

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Its inputs by name."""
        return kwargs if not args else {**dict(zip(self.names, args, strict=False)), **kwargs}

    def host(self, arguments: dict[str, Any]) -> Any:
        """Its own forward, without the checkpoint that its class puts around it."""
        if self.hooked is not None:
            return self.hooked(**arguments)
        return _own_forward(type(self.module).forward)(self.module, **arguments)

    @property
    def axis(self) -> int:
        """The token axis of its hidden vectors, counted from the last."""
        return self.site.token_axes[self.names[0]]


@functools.cache
def _own_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """That of a class of decoder layers, without the checkpoint that it puts around it."""
    return inspect.unwrap(forward)


def wrap(layer: nn.Module, site: Site) -> None:
    """Let ``layer`` run in chunks wherever a pass runs; :func:`unwrap` takes it back.

    A partial over the module and not a method: methods are copied and pickled by their name. Where accelerate has hooked the
    layer, the wrapper stands inside of its hook, which keeps it when hooks are added or removed.
    """
    names = tuple(inspect.signature(inspect.unwrap(type(layer).forward)).parameters)[1:]
    hooked = HOOKED_FORWARD in layer.__dict__
    inner = None if hooked else layer.__dict__.get("forward")
    wrapped = functools.partial(_forward, _Layer(layer, site, names, inner))
    functools.update_wrapper(wrapped, type(layer).forward, assigned=("__doc__",), updated=())
    setattr(layer, HOOKED_FORWARD if hooked else "forward", wrapped)


def unwrap(layer: nn.Module) -> None:
    """Take the wrapper away, and nothing else."""
    for name in ("forward", HOOKED_FORWARD):
        wrapped = layer.__dict__.get(name)
        if isinstance(wrapped, functools.partial) and wrapped.func is _forward:
            inner = wrapped.args[0].hooked
            if name == "forward" and inner is None:
                del layer.forward
            else:
                setattr(layer, name, inner or type(layer).forward.__get__(layer))


def _forward(layer: _Layer, *args: Any, **kwargs: Any) -> Any:
    given = None
    for part in (*args, *kwargs.values()):
        if isinstance(part, PTECache):
            given = part
            break
    if given is not None and given.fixed is not None and given.fixed.ready:
        # Decoding at fixed addresses: one token, whose slot, mask and state stand ready.
        held = given.layers[layer.site.index]
        if isinstance(held, ThoughtLayer) and held.watched:
            with bind(given.reading(layer.site.index)), watch(held):
                return layer.host(layer.named(args, kwargs))
        with bind(given.reading(layer.site.index)):
            return layer.host(layer.named(args, kwargs))
    cache = given if given is not None and given.running is not None else _running.cache
    if cache is None:
        return (layer.hooked or functools.partial(type(layer.module).forward, layer.module))(*args, **kwargs)
    arguments = {**dict(zip(layer.names, args, strict=False)), **kwargs}
    this: Pass = cache.running
    if this.step is not None and not this.functional and isinstance(cache.layers[layer.site.index], ThoughtLayer):
        return _token(this, 0, layer, cache, arguments)[0]
    return _in_chunks(cache, layer, arguments)


@torch.compiler.disable(recursive=False)
def _in_chunks(cache: PTECache, layer: _Layer, arguments: dict[str, Any]) -> Any:
    this: Pass = cache.running
    index, shared = layer.site.index, arguments.get(SHARED_STATES)
    # What a checkpoint keeps is no cache.
    arguments = {name: None if name in CACHE_NAMES else value for name, value in arguments.items()}
    held = cache
    if this.functional:
        # Run a second time, a layer must find what it found, whatever it has left since.
        held = this.starts[index].fork() if index in this.starts else cache.one_layer(index)
        if this.again and index not in this.starts:
            this.starts[index] = held.fork()
    content = held.layers[index]
    bounded = isinstance(content, ThoughtLayer)
    if isinstance(content, ThoughtLayer):
        content.frozen = this.functional
    run = _whole if not bounded else _chunk if this.step is None else _token
    shows = run is _chunk and layer.site.sharing == "store"
    if shows and isinstance(content, ThoughtLayer):
        content.show()
    outputs: list[Any] = []
    for number in range(len(this.work) if run is _chunk else 1):
        call = functools.partial(run, this, number, layer)
        inputs = _cut(arguments, layer.site.token_axes, this, number) if run is _chunk else arguments
        output, held = recomputed(call, held, inputs) if this.recompute else call(held, inputs)
        outputs.append(output)
    if shows and shared is not None:
        shared[layer.site.layer_type] = cast(ThoughtLayer, held.layers[index]).shown()
    if this.keep and run is _chunk:
        cast(ThoughtLayer, held.layers[index]).rest(this.prompt)
    if this.functional and index not in this.finished:
        cache.take_layer(index, held)
        this.finished.add(index)
    return _join(outputs, layer)


def _chunk(this: Pass, number: int, layer: _Layer, held: PTECache, arguments: dict[str, Any]) -> tuple[Any, PTECache]:
    index = layer.site.index
    work, encoder = this.work[number], this.encoders.get(index)
    chunk, content = work.chunk, cast(ThoughtLayer, held.layers[index])
    state = states = _state(this, index, held)
    # Evict.
    if work.departing is None:
        content.drop(chunk.drop)
    else:
        if this.detach and not work.surplus:
            content.map(Tensor.detach)
        evicted = content.evict(
            held.tokens_per_eviction, chunk.evictions * held.tokens_per_eviction, chunk.drop, work.departing
        )
        # Encode.
        if encoder is not None and state is not None:
            after = encoder(this.adapter, state, evicted, chunk.evictions)
            state, states = after[:, -1], after.flatten(0, 1)
    if state is not None:
        held.state.layers[index] = LayerState(state)
    # Attend, and write.
    content.expect(chunk.prompt, work.positions)
    reading = None if states is None else Reading(states, this.rows, chunk.length, this.adapter)
    mask = work.mask
    if isinstance(content, RaggedLayer) and work.mask_of_heads is not None:
        mask = work.mask_of_heads(content)
    output = _attend(layer, held, reading, {**arguments, "attention_mask": mask})
    if work.realigned is not None:
        content.realign(work.realigned)
    if work.ending is not None:
        content.keep(work.ending, this.prompt)
    content.drop(content.columns - chunk.kept)
    return output, held


def _token(this: Pass, number: int, layer: _Layer, held: PTECache, arguments: dict[str, Any]) -> tuple[Any, PTECache]:
    index = layer.site.index
    step, encoder = cast(Step, this.step), this.encoders.get(index)
    content, kept = cast(ThoughtLayer, held.layers[index]), held.state.layers[index]
    content.frozen = this.functional
    if encoder is not None and kept.value is None:
        kept = LayerState(_state(this, index, held))
    # Evict, and encode the rows that are due.
    if step.leaving is not None:
        if this.detach:
            content.map(Tensor.detach)
        evicted = content.lose(step.leaving, this.departing)
        if encoder is not None and kept.value is not None:
            kept = LayerState(encoder.forward_rows(this.adapter, kept.value, evicted, step.leaving.rows))
    # Attend, and write.
    if content.policy.uniform and content.block is not None:
        content.write, content.slots = step.place.to(content.block.keys.device), step.slots
    else:
        content.ready(step, step.place)
    reading = None
    if encoder is not None and kept.value is not None:
        held.state.layers[index] = kept
        reading = Reading(kept.value, this.rows, 1, this.adapter)
        if not this.functional:
            reading.read = kept.read
        if this.stacks is not None and this.groups.get(index):
            reading.downs = this.stacks.of(this.groups[index], this.adapter)
    mask = this.mask
    if this.mask_of_heads is not None and isinstance(content, RaggedLayer):
        mask = this.mask_of_heads(content)
    arguments = {**arguments, "attention_mask": mask}
    for name in CACHE_NAMES:
        if name in arguments:
            # Where the host expects a cache stands the one layer that it writes to.
            arguments[name] = content
    if content.watched:
        with bind(reading), watch(content):
            return layer.host(arguments), held
    before, bound.reading = getattr(bound, "reading", None), reading
    try:
        if layer.hooked is not None:
            return layer.hooked(**arguments), held
        return _own_forward(type(layer.module).forward)(layer.module, **arguments), held
    finally:
        bound.reading = before


def _state(this: Pass, index: int, held: PTECache) -> Tensor | None:
    """``S [B, Q, R]`` of a layer that has an encoder."""
    state, encoder = held.state.layers[index].value, this.encoders.get(index)
    if state is None and encoder is not None:
        return encoder.initial_state(this.adapter).expand(this.rows, -1, -1)
    return None if encoder is None else state


def _attend(layer: _Layer, held: PTECache, reading: Reading | None, arguments: dict[str, Any]) -> Any:
    """The host's layer on its tokens and on what its cache layer holds, which takes what it writes."""
    for name in CACHE_NAMES:
        if name in arguments:
            # Where the host expects a cache stands the one layer that it writes to.
            arguments[name] = held.layers[layer.site.index]
    with bind(reading), watch(held.layers[layer.site.index]):
        return layer.host(arguments)


def _whole(this: Pass, number: int, layer: _Layer, held: PTECache, arguments: dict[str, Any]) -> tuple[Any, PTECache]:
    """A layer that evicts nothing: all tokens at once, on what it keeps itself, as its host calls it."""
    encoder = this.encoders.get(layer.site.index)
    if layer.site.borrows and this.bounds:
        arguments = {**arguments, "attention_mask": this.mask}
    reading = None
    if encoder is not None:
        state = encoder.initial_state(this.adapter).expand(this.rows, -1, -1)
        reading = Reading(state, this.rows, this.columns, this.adapter)
    for name in CACHE_NAMES:
        if name in arguments:
            arguments = {**arguments, name: held}
    with bind(reading):
        return layer.host(arguments), held


def _cut(arguments: dict[str, Any], axes: dict[str, int], this: Pass, number: int) -> dict[str, Any]:
    """What of the arguments of a layer belongs to a chunk.

    Raises:
        NotImplementedError: The layer takes a tensor with a token axis that is not known.
    """
    if len(this.work) == 1:
        return arguments
    chunk = this.work[number].chunk
    start = chunk.start - this.work[0].chunk.start
    part = slice(start, start + chunk.length)
    cut: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in axes:
            axis = axes[name]
            cut[name] = (
                tuple(_narrow(entry, axis, part) for entry in value)
                if isinstance(value, (tuple, list))
                else _narrow(value, axis, part)
            )
        elif name != "attention_mask" and isinstance(value, Tensor) and this.columns in value.shape:
            raise NotImplementedError(
                f"A decoder layer takes `{name}` of shape {tuple(value.shape)}, whose tokens cannot be told apart by chunk. "
                "Use PTEConfig(cache_window=None), or leave that input out."
            )
        else:
            cut[name] = value
    return cut


def _narrow(value: Any, axis: int, part: slice) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Without gradients a view of a leaf that requires one would say that it requires one too, and have nothing to show for it.
    value = value if torch.is_grad_enabled() else value.detach()
    return value.narrow(axis, part.start, part.stop - part.start)


def _join(outputs: list[Any], layer: _Layer) -> Any:
    """One output of the layer from those of its chunks; what it returns beside hidden vectors is that of the first."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    axis = layer.axis
    if isinstance(first, Tensor):
        return torch.cat(outputs, dim=axis)
    return (torch.cat([output[0] for output in outputs], dim=axis), *first[1:])
