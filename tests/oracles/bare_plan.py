"""Plans as the native layer takes them, in which nothing was checked.

Set under tag 0, the one of no plan, as ``AdaSkipLlama`` knows nothing of them.
"""

from types import SimpleNamespace
from typing import Any

__all__ = ["bare_plan"]


def bare_plan(prefill: Any, *steps: tuple[int, Any], online: Any = None) -> Any:
    """What ``NativeContext.set_plan`` reads of a plan; without steps, decode has the set of prefill."""
    return SimpleNamespace(bulk=None, prefill=prefill, decode_sets=steps or ((0, prefill),), online=online)
