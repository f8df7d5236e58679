"""The fewest bytes and operations of each kernel, by arithmetic: the table of ``src/peft_pte/ops/README.md``.

Nothing is measured. Bytes are those that must cross the memory bus once; what the L2 cache serves again is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.models import GPU_SHAPES, TRUE_SHAPES
from ..common.pages import Section, table
from ..common.records import ROOT

README = ROOT / "src" / "peft_pte" / "ops" / "README.md"
HBM = 3.35e12
"""Bytes per second of an H100 SXM (data sheet)."""
STATE_BYTES = 4
SEGMENT_BATCH = 4


@dataclass(frozen=True)
class Shape:
    """One model at one setting of the method; letters as in ``peft_pte.shapes``."""

    name: str
    layers: int
    heads: int
    head_dim: int
    hidden: int
    query_width: int
    inter: int
    parameters: int
    batch: int = 64
    window: int = 1024
    evicted: int = 256
    queries: int = 32
    rank: int = 32
    itemsize: int = 2

    @property
    def width(self) -> int:
        """``D``, keys of all heads side by side."""
        return self.heads * self.head_dim

    @property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Linears of a layer that read the same input: ``(in, outs)``."""
        return (
            (self.hidden, (self.query_width, self.width, self.width)),
            (self.query_width, (self.hidden,)),
            (self.hidden, (self.inter, self.inter)),
            (self.inter, (self.hidden,)),
        )


@dataclass(frozen=True)
class Account:
    """Bytes and floating-point operations (a product and its sum are two) of one launch, or of all of one step."""

    bytes: int
    operations: int

    def __add__(self, other: Account) -> Account:
        return Account(self.bytes + other.bytes, self.operations + other.operations)

    @property
    def microseconds(self) -> float:
        """Least time at the bandwidth of the memory."""
        return self.bytes / HBM * 1e6


def shapes(batch: int = 64) -> list[Shape]:
    """The models of the paper."""
    found = []
    for name in GPU_SHAPES:
        shape = TRUE_SHAPES[name]
        fields = shape.fields
        head_dim = fields["hidden_size"] // fields["num_attention_heads"]
        sizes = (fields["num_hidden_layers"], fields["num_key_value_heads"], head_dim, fields["hidden_size"])
        found.append(
            Shape(name, *sizes, fields["hidden_size"], fields["intermediate_size"], shape.parameters, batch=batch)
        )
    return found


def compress(s: Shape) -> Account:
    """One eviction in all layers: K and V of what leaves, states in and out, folded queries, ``W_V``, cosines and sines."""
    data = 2 * s.layers * s.batch * s.evicted * s.width * s.itemsize
    states = 2 * s.layers * s.batch * s.queries * s.rank * STATE_BYTES
    weights = s.layers * (s.queries + s.rank) * s.width * STATE_BYTES
    # One of each pair.
    rotation = s.batch * s.evicted * s.head_dim * STATE_BYTES
    token = s.queries * s.width + s.rank * s.width + s.queries * s.rank
    return Account(data + states + weights + rotation, 2 * s.layers * s.batch * s.evicted * token)


def projected_values_first(s: Shape) -> int:
    """Multiply-adds of ``w (V W_V^T)`` for one layer and sequence."""
    return s.evicted * s.rank * (s.width + s.queries)


def weighted_values_first(s: Shape) -> int:
    """Multiply-adds of ``(w V) W_V^T`` for one layer and sequence."""
    return s.queries * s.width * (s.evicted + s.rank)


def encode_forward(s: Shape) -> Account:
    """One layer, for training: as :func:`compress`, with float32 rows, and the projected rows written for the backward."""
    rows = 2 * s.batch * s.evicted * s.width * STATE_BYTES
    saved = 2 * s.batch * s.evicted * s.rank * STATE_BYTES
    states = 3 * s.batch * s.queries * s.rank * STATE_BYTES
    weights = 2 * s.rank * s.width * STATE_BYTES
    token = 2 * s.rank * s.width + 2 * s.queries * s.rank
    return Account(rows + saved + states + weights, 2 * s.batch * s.evicted * token)


def delta_segment(s: Shape, tokens: int, inner: int, outer: int) -> Account:
    """``delta(..., onto=...)`` forward on ``tokens`` of each sequence: ``h`` and ``z`` are kept for the backward pass."""
    rows = s.batch * tokens
    wide = (rows * inner + 2 * rows * outer + s.rank * inner + s.queries * outer) * s.itemsize
    # z is written by the first launch and read by the second.
    narrow = rows * (s.rank + 2 * s.queries) * s.itemsize + s.batch * s.queries * s.rank * STATE_BYTES
    return Account(wide + narrow, 2 * rows * (s.rank * inner + s.queries * s.rank + s.queries * outer))


def delta_group(s: Shape, inner: int, outs: tuple[int, ...]) -> Account:
    """One group of linears at one token per sequence, all launches: everything read once, the outputs changed in place."""
    group, tokens = len(outs), s.batch
    read = (tokens * inner + group * s.rank * inner) * s.itemsize + tokens * s.queries * s.rank * STATE_BYTES
    between = 2 * group * tokens * s.queries * STATE_BYTES
    expand = sum(2 * tokens * outer + outer * s.queries for outer in outs) * s.itemsize
    token = group * s.rank * (inner + s.queries) + sum(outs) * s.queries
    return Account(read + between + expand, 2 * tokens * token)


def delta_step(s: Shape) -> Account:
    """All adapters of one decoding step."""
    total = Account(0, 0)
    for inner, outs in s.groups:
        total += delta_group(s, inner, outs)
    return Account(total.bytes * s.layers, total.operations * s.layers)


def decode_step(s: Shape, prompt: int = 256) -> Account:
    """The base model's own step with a full window: every weight once, keys and values of all slots."""
    cache = 2 * s.layers * s.batch * (prompt + s.window) * s.width * s.itemsize
    return Account(s.parameters * s.itemsize + cache, 2 * s.parameters * s.batch)


def render(batch: int = 64) -> str:
    """The table as markdown."""
    body = []
    for s in shapes(batch):
        step, eviction, adapters = decode_step(s), compress(s), delta_step(s)
        group = delta_group(s, *s.groups[0])
        per_step = eviction.bytes / s.evicted / step.bytes
        body.append(
            [
                s.name,
                f"{step.bytes / 1e9:.2f}",
                f"{step.microseconds:,.0f}",
                f"{eviction.bytes / 1e6:,.0f}",
                f"{eviction.operations / 1e9:.1f}",
                f"{eviction.microseconds:,.0f}",
                f"{per_step:.3%}",
                f"{group.bytes / 1e6:.2f}",
                f"{adapters.bytes / 1e6:,.0f}",
                f"{adapters.microseconds:,.0f}",
                f"{adapters.bytes / step.bytes:.1%}",
            ]
        )
    header = [
        "model",
        "step, GB",
        "step, µs",
        "`compress_`, MB",
        "GFLOP",
        "µs",
        "of a step",
        "`delta_read`, `delta_add_` q, k, v, MB",
        "all adapters, MB",
        "µs",
        "of a step",
    ]
    first = shapes(batch)[0]
    training = []
    for s in shapes(SEGMENT_BATCH):
        accounts = (encode_forward(s), delta_segment(s, s.evicted, s.hidden, s.inter))
        cells = [(each.bytes / 1e6, each.operations / 1e9, each.microseconds) for each in accounts]
        training.append([s.name, *(f"{cell:.2f}" for cell in (*cells[0], *cells[1]))])
    columns = [f"{name}, {unit}" for name in ("`encode`", "`delta`") for unit in ("MB", "GFLOP", "µs")]
    return (
        f"Computed, not measured, by `python -m benchmarks report kernels`: B = {batch}, W = {first.window:,}, "
        f"E = {first.evicted}, prompt 256, bfloat16, Q = R = {first.rank}; times are bytes at {HBM / 1e12} TB/s and nothing "
        "else. `compress_` runs once in E steps, and its share is spread over them.\n\n"
        + table(header, body)
        + f"\n\nOne layer of a chunk while training, forward, {SEGMENT_BATCH} sequences of {first.evicted} tokens: `encode` "
        "(float32 rows), and `delta` onto the gate projection.\n\n" + table(["model", *columns], training)
    )


SECTIONS = (Section(str(README.relative_to(ROOT)), "figures", lambda records: render()),)
