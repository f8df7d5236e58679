"""`EvictionPolicy`: a small dataclass that scores the thoughts of a window; the registry that `PTEConfig.eviction` names.

When thoughts leave is the clock's (DESIGN.md, section 2), and the same for all policies: ``m`` of each head, before a thought is written to a
full window. *Which* they are is a policy's, per head. Prompts never leave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..shapes import HeadScores


@dataclass(frozen=True)
class Window:
    """What a layer holds when thoughts must leave: ``N = W`` thoughts per head, from the oldest to the newest."""

    keys: Tensor
    """``[B, G, N, head_dim]``, as cached: rotated, where the model rotates."""
    values: Tensor
    """``[B, G, N, head_dim]``."""
    positions: Tensor
    """``[B, G, N]``, absolute: what was written first in a row has the lowest."""
    layer: int
    """Of the model, counted from 0."""
    valid: Tensor | None = None
    """``[B, G, N]``, False in front of the oldest thought of a head that holds fewer than others; ``None``: all hold ``N``."""
    queries: Tensor | None = None
    """``[B, H, n, head_dim]``, those of the last ``n`` thoughts (:attr:`EvictionPolicy.observed`), oldest first, as attention takes them."""
    query_positions: Tensor | None = None
    """``[B, n]``, absolute."""
    prompt_keys: Tensor | None = None
    """``[B, G, P, head_dim]``, where queries are asked for."""
    prompt_mask: Tensor | None = None
    """``[B, P]``, False for padding; ``None``: no padding."""
    scaling: float = 1.0
    """What attention multiplies the product of a query and a key with."""
    softcap: float | None = None
    """What attention bounds it by; ``None``: nothing."""

    def attention(self) -> Tensor:
        """``[B, H, n, N]``, how much the last queries attend to each thought that is still there, beside the prompt; float32 or float64.

        Zero for thoughts that a query does not see. A sink that the model learned aside from keys is left out: it takes from all alike.

        Raises:
            RuntimeError: The policy does not ask for queries (:attr:`EvictionPolicy.observed`).
        """
        if self.queries is None or self.query_positions is None or self.prompt_keys is None:
            raise RuntimeError(
                "This policy looks at attention, and has not asked for queries. Let its `observed` be the number of thoughts whose queries it "
                "wants."
            )
        queries, prompt, count = self.queries, self.prompt_keys, self.keys.shape[2]
        wide = torch.promote_types(queries.dtype, torch.float32)
        keys = torch.cat([prompt, self.keys], dim=2).repeat_interleave(queries.shape[1] // prompt.shape[1], dim=1)
        scores = queries.to(wide) @ keys.to(wide).transpose(2, 3) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        # By their positions: a query of a thought does not see those that came after it.
        seen = self.positions[:, :, None] <= self.query_positions[:, None, :, None]
        if self.valid is not None:
            seen = seen & self.valid[:, :, None]
        seen = seen.repeat_interleave(queries.shape[1] // seen.shape[1], dim=1)
        before = torch.ones_like(seen[..., :1])
        if self.prompt_mask is not None:
            before = before & self.prompt_mask[:, None, None]
        visible = torch.cat([before.expand(*seen.shape[:3], prompt.shape[2]), seen], dim=-1)
        weights = scores.masked_fill(~visible, torch.finfo(wide).min).softmax(dim=-1)
        return torch.where(seen, weights[..., -count:], 0.0)


@dataclass(frozen=True)
class EvictionPolicy:
    """Base of the policies: a subclass gives ``score``, or says ``uniform``.

    What it is given depends on the tokens of one row alone, and so must what it makes of it: not on other rows, on a random state, or on
    what it was asked before. Then scoring a sequence evicts what writing it evicted.
    """

    uniform: ClassVar[bool] = False
    """Whether the oldest leave, in every head and layer, and nothing is scored."""
    exact: ClassVar[bool] = False
    """Whether it looks at integers alone, so that rounding cannot change what it chooses."""

    @property
    def observed(self) -> int:
        """Of how many thoughts, the last before an eviction, it wants the queries."""
        return 0

    def score(self, window: Window) -> HeadScores:
        """Importance of the thoughts; those with the highest stay.

        Args:
            window: What the layer holds.

        Returns:
            ``[B, G, N]``, one score for each thought and KV head, of any floating dtype.

        Raises:
            NotImplementedError: The policy is ``uniform``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is uniform: it evicts the oldest thoughts and scores nothing."
        )

    def budgets(self, layer: int, window: int, evict: int) -> tuple[int, ...] | None:
        """How many thoughts each head of a layer holds at most.

        Args:
            layer: Of the model, counted from 0.
            window: ``W``, in thoughts.
            evict: ``m``, in thoughts.

        Returns:
            One number for each KV head, at least ``m`` and ``window`` on average; ``None``: ``window`` each.
        """
        return None

    def check(self, window: int, evict: int) -> None:
        """Refuse a window that is none for this policy.

        Args:
            window: ``W``, in thoughts.
            evict: ``m``, thoughts that leave together.

        Raises:
            ValueError: The window is too small.
        """
        if self.observed > window:
            raise ValueError(
                f"`cache_window` must be at least {self.observed} for {type(self).__name__}, which looks at the queries of as many thoughts, got "
                f"{window}. Use a larger window, or let it look at fewer (eviction_options)."
            )

    @torch.no_grad()
    def leaving(self, window: Window, evict: int) -> Tensor:
        """Which thoughts leave: by default those with the lowest scores, the older of equal ones.

        Args:
            window: What the layer holds.
            evict: ``m``, how many leave each head.

        Returns:
            ``[B, G, evict]``, indices into the window, the least important first.

        Raises:
            ValueError: ``score`` gives another number of scores.
        """
        scores = self.score(window)
        if scores.shape != window.positions.shape:
            raise ValueError(
                f"{type(self).__name__}.score must return one score for each thought and head, {tuple(window.positions.shape)}, got "
                f"{tuple(scores.shape)}."
            )
        if window.valid is not None:
            scores = scores.masked_fill(~window.valid, torch.inf)
        # A stable sort, so that equal scores evict the older thought on every device.
        return scores.argsort(dim=-1, stable=True)[..., :evict]

    def chosen(self, window: Window, evict: int, lost: Tensor | None = None) -> Tensor:
        """Where in the window the thoughts are that leave.

        Args:
            window: What the layer holds.
            evict: ``m``, how many leave each head at most.
            lost: ``[B, G]``, how many leave where heads lose different numbers; ``None``: ``evict`` each.

        Returns:
            ``[B, G, N]``, True for thoughts that leave.

        Raises:
            ValueError: A policy that says for itself which leave names too few, or one twice, or one that is not there.
        """
        leaving = self.leaving(window, evict)
        if type(self).leaving is not EvictionPolicy.leaving:
            self._check_leaving(leaving, window, evict)
        leave = torch.ones_like(leaving, dtype=torch.bool)
        if lost is not None:
            leave = torch.arange(leaving.shape[2], device=lost.device) < lost[..., None]
        return torch.zeros_like(window.positions, dtype=torch.bool).scatter(2, leaving, leave)

    def _check_leaving(self, leaving: Tensor, window: Window, evict: int) -> None:
        expected = (*window.positions.shape[:2], evict)
        if leaving.shape != expected:
            raise ValueError(
                f"{type(self).__name__}.leaving must name {evict} thoughts for each head, {expected}, got {tuple(leaving.shape)}."
            )
        ordered = leaving.sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]).any()
        outside = (leaving < 0).any() | (leaving >= window.positions.shape[2]).any()
        if window.valid is not None and not bool(outside):
            outside = (~window.valid.gather(2, leaving)).any()
        if bool(twice | outside):
            raise ValueError(
                f"{type(self).__name__}.leaving must name {evict} different thoughts from 0 to {window.positions.shape[2] - 1} for each head; one "
                "was named twice, or is not there."
            )


POLICIES: dict[str, type[EvictionPolicy]] = {}
"""By the name that `PTEConfig.eviction` takes."""

P = TypeVar("P", bound=EvictionPolicy)


def register_eviction(name: str) -> Callable[[type[P]], type[P]]:
    """Let ``PTEConfig(eviction=name)`` be the policy that is decorated; its fields are ``eviction_options``.

    Args:
        name: What ``PTEConfig.eviction`` calls it. Whoever loads the adapter registers it before.

    Returns:
        A decorator that gives the class back.

    Raises:
        TypeError: It is no dataclass that extends :class:`EvictionPolicy`.
        ValueError: Another policy has the name.
    """

    def register(policy: type[P]) -> type[P]:
        if not (inspect.isclass(policy) and issubclass(policy, EvictionPolicy)):
            raise TypeError(f"A policy must extend peft_pte.EvictionPolicy, got {policy!r}.")
        known = POLICIES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (policy.__module__, policy.__qualname__):
            raise ValueError(f"`eviction` {name!r} is {known.__qualname__} already. Choose another name.")
        POLICIES[name] = policy
        return policy

    return register


def make_policy(name: str, options: dict[str, Any]) -> EvictionPolicy:
    """The policy that ``PTEConfig.eviction`` names, with its ``eviction_options``.

    Raises:
        ValueError: There is none of that name, or it has no such options.
    """
    if name not in POLICIES:
        raise ValueError(
            f"`eviction` must be one of {', '.join(repr(known) for known in POLICIES if not known.startswith('_'))}, got {name!r}. A policy of your own is registered before: "
            "@peft_pte.register_eviction(name)."
        )
    known = {option.name for option in fields(POLICIES[name])}
    unknown = sorted(set(options) - known)
    if unknown:
        has = f"has {', '.join(map(repr, sorted(known)))}" if known else "has none"
        raise ValueError(f"`eviction_options` must be options of {name!r}, which {has}, got {unknown[0]!r}.")
    return POLICIES[name](**options)
