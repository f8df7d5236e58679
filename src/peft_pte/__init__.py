"""Progressive Thought Encoding (arXiv 2602.16839) as a method of Hugging Face peft.

Importing this package registers the method with peft and patches nothing else.
"""

from peft.utils import register_peft_method

from ._peft_type import PTE
from .cache.cache import PTECache
from .chat import prompt_end
from .config import PTEConfig
from .eviction.policy import EvictionPolicy, Window, register_eviction
from .eviction.records import Evictions
from .tuner.convert import convert_lora
from .tuner.importance import head_importance
from .tuner.model import PTEModel
from .updates import register_update

__all__ = [
    "EvictionPolicy",
    "Evictions",
    "PTECache",
    "PTEConfig",
    "PTEModel",
    "Window",
    "__version__",
    "convert_lora",
    "head_importance",
    "prompt_end",
    "register_eviction",
    "register_update",
]

__version__ = "0.2.0"


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    # A reload of the package finds itself registered.
    if PTE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="pte", config_cls=PTEConfig, model_cls=PTEModel)


_register()
