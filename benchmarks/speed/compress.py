"""One eviction in all layers: evicted keys and values become an update of the thought states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.models import shape_config
from ..common.session import Row, Session, release
from ..common.timing import captured
from ..common.timing import measure as measure_time

PEERS = ("encode_reference", "encode_triton", "compress_reference", "compress_triton")
"""``encode``: un-rotation and one call per layer, as an eager replay does; ``compress``: all layers in one call."""
ROTARY_STYLE = "half"
"""Llama and Qwen2 rotate the two halves of a head against each other."""
GAIN = 0.3


@dataclass(frozen=True)
class CompressCase:
    """One shape and batch; ``evict`` of ``window`` thoughts leave."""

    shape: str
    batch: int
    window: int
    prompt: int
    evict: int
    rank: int


def cases(session: Session) -> list[CompressCase]:
    """One case per shape."""
    sizes = (64, 1024, 256, 256, 32) if session.gpu else (4, 64, 32, 16, 8)
    return [CompressCase(shape, *sizes) for shape in session.shapes]


def measure(session: Session) -> Iterator[Row]:
    """One row per case and peer."""
    for case in cases(session):
        operands = None
        for peer in session.missing("compress", case, PEERS):
            operands = operands or Operands.draw(session, case)
            yield session.attempt("compress", case, peer, partial(_measure, session, case, peer, operands))
        del operands
        release(session.device)


@dataclass(frozen=True)
class Operands:
    """What an eviction reads and writes."""

    state: Tensor
    """``[L, B, Q, R]``, float32."""
    keys: Tensor
    """``[L, B, G, C, head_dim]``, rotated."""
    values: Tensor
    query: Tensor
    """``[L, Q, R]``, float32."""
    key_projection: Tensor
    """``[L, R, D]``."""
    value_projection: Tensor
    slots: Tensor
    """``[B, E]``, those behind the prompt."""
    prompt: int
    cos: Tensor
    """``[B, E, head_dim]``, of the inverse rotation."""
    sin: Tensor

    @classmethod
    def draw(cls, session: Session, case: CompressCase) -> Operands:
        """Random operands of ``case``."""
        config: Any = shape_config(case.shape)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        draw = partial(torch.randn, device=session.device)
        cache = (layers, case.batch, heads, case.prompt + case.window, head_dim)
        angle = draw(case.batch, case.evict, head_dim // 2).repeat(1, 1, 2)
        return cls(
            state=draw(layers, case.batch, case.rank, case.rank),
            keys=draw(*cache, dtype=session.dtype),
            values=draw(*cache, dtype=session.dtype),
            query=draw(layers, case.rank, case.rank),
            key_projection=draw(layers, case.rank, heads * head_dim, dtype=session.dtype),
            value_projection=draw(layers, case.rank, heads * head_dim, dtype=session.dtype),
            slots=torch.arange(case.prompt, case.prompt + case.evict, device=session.device).repeat(case.batch, 1),
            prompt=case.prompt,
            cos=angle.cos(),
            sin=angle.sin(),
        )

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move: evicted keys and values, rotation, projections and queries read, states read and written."""
        layers, _, heads, _, head_dim = self.keys.shape
        evicted = layers * heads * self.slots.numel() * head_dim * self.keys.element_size()
        read = (self.query, self.key_projection, self.value_projection, self.cos, self.sin)
        return 2 * evicted + 2 * _nbytes(self.state) + sum(map(_nbytes, read))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _measure(session: Session, case: CompressCase, peer: str, operands: Operands) -> Row:
    call = _call(peer, operands)
    with torch.no_grad():
        spread = measure_time(captured(call, session.device), session.device, repeats=10, budget=session.budget)
    floor = operands.floor_bytes
    return {
        "seconds": spread.row(),
        "floor_bytes": floor,
        "share_of_bandwidth": floor / session.ceilings["bytes_per_second"] / spread.median,
    }


def _call(peer: str, operands: Operands) -> Callable[[], Any]:
    operation, impl = peer.split("_")
    if operation == "encode":
        return partial(_encode_layers, operands, impl)
    from peft_pte.ops.compress import compress_

    return partial(
        compress_,
        operands.state,
        operands.keys,
        operands.values,
        operands.slots,
        operands.query,
        operands.key_projection,
        operands.value_projection,
        operands.cos,
        operands.sin,
        None,
        gain=GAIN,
        attention="linear",
        rotary_style=ROTARY_STYLE,
        impl=impl,
    )


def _encode_layers(operands: Operands, impl: str) -> None:
    from peft_pte.ops import encode

    first, evict = operands.prompt, operands.slots.shape[1]
    for layer in range(operands.state.shape[0]):
        keys, values = (part[layer].narrow(2, first, evict).float() for part in (operands.keys, operands.values))
        half = keys.shape[-1] // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
        keys = keys * operands.cos[:, None] + turned * operands.sin[:, None]
        state = encode(
            operands.state[layer],
            operands.query[layer],
            keys.transpose(1, 2).flatten(2)[:, None],
            values.transpose(1, 2).flatten(2)[:, None],
            operands.key_projection[layer],
            operands.value_projection[layer],
            gain=GAIN,
            impl=impl,
        )
        operands.state[layer].copy_(state[:, 0])
