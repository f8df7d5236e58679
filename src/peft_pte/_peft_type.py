"""Adds the member ``PTE`` to :class:`peft.PeftType`.

``peft.utils.register_peft_method`` refuses a name that the enum does not hold, and a config names its
member in ``__post_init__``, so the member must exist before either runs. Enums are closed by design and
peft offers no opening, hence this one place that writes into the enum's tables (CPython 3.10 to 3.14).
"""

from __future__ import annotations

from peft import PeftType

NAME = "PTE"


def add_peft_type() -> PeftType:
    """Return ``PeftType.PTE``, creating it on the first call (idempotent)."""
    known = PeftType._value2member_map_.get(NAME)
    if known is not None:
        return PeftType(known)
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    # `type.__setattr__`, because EnumMeta refuses assignment to what it takes for a member.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


PTE = add_peft_type()
