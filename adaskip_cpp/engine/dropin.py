"""Puts our model in the place of ``llama_cpp.Llama``, for code that was written for that: :func:`replace_llama`."""

import functools
import logging
import os
import sys
from abc import ABCMeta
from typing import Any

import llama_cpp
import llama_cpp.llama

from ..errors import AdaSkipError, LibraryError
from ..files import StrPath
from ..model.frontier import LEAST_CONTEXT
from ..model.identity import plan_path
from .llama import AdaSkipLlama

_STOCK = llama_cpp.Llama
_PACKAGE = __name__.partition(".")[0]
_LOG = logging.getLogger(_PACKAGE)

_WITHOUT_PLANS = {
    "vocab_only": "loads no layers",
    "embedding": "computes embeddings, for which no plan is measured",
    "logits_all": "asks for the logits of the prompt's own tokens, for which no plan is measured",
}
"""Arguments of ``llama_cpp.Llama`` that ask for other results than answers, and why no plan is used then."""


class Llama(AdaSkipLlama, metaclass=ABCMeta):
    """``llama_cpp.Llama`` with the plans that `adaskip-cpp tune` wrote beside the model, or else the whole model."""

    def __init__(self, model_path: StrPath, **kwargs: Any) -> None:
        if "plan" in kwargs:  # it was pickled, with its plan
            super().__init__(model_path, **kwargs)
            return
        # Libraries pass None for what their user left out.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        name, told = os.fspath(model_path), os.path.basename(plan_path(model_path))
        why, refused = "", next((f"{each}=True {why}" for each, why in _WITHOUT_PLANS.items() if kwargs.get(each)), "")
        if not refused:
            try:
                super().__init__(name, plan="auto", **kwargs)
                why = self._why_whole()
            except (AdaSkipError, OSError) as error:
                refused = str(error)
        if refused:
            self.close()
            super().__init__(name, **kwargs)
        if why := refused or why:
            _LOG.warning("%s: the whole model runs: %s", name, why)
        elif self.max_loss is None:
            _LOG.info("%s: the plan of %s is in force", name, told)
        else:
            words = "%s: plans of %s lose at most %g nats per token, in prompts of %d tokens or more"
            _LOG.info(words, name, told, self.max_loss, LEAST_CONTEXT)

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return issubclass(other, _STOCK) if cls is Llama else NotImplemented

    def _why_whole(self) -> str:
        """Return why no prompt can run under a plan, "" if one can; raise what setting a plan of a frontier raises."""
        if self.frontier is None or self.max_loss is None:
            return "the plan file skips nothing" if self.plan is None or self.plan.is_whole else ""
        max_loss, plans = self.max_loss, self.frontier.readable(self.max_loss, self.context_size)
        self.set_plan(None, readable=plans)
        self.set_plan("auto", max_loss=max_loss)
        return "" if plans else f"no plan keeps {max_loss:g} nats per token in {self.context_size} tokens"


functools.update_wrapper(Llama.__init__, _STOCK.__init__)  # some programs ask for the names of its arguments


def replace_llama() -> None:
    """Make ``llama_cpp.Llama`` a class that uses the plans beside a model, for code that opens models by itself.

    Call it before anything imports that name: a LibraryError otherwise. Each model that is opened then logs one line,
    under "adaskip_cpp": the plan file in force, or why the whole model runs. Other processes keep the stock class.
    """
    others = [name for name in list(sys.modules) if name.partition(".")[0] not in ("llama_cpp", _PACKAGE)]
    values = {name: list(getattr(sys.modules.get(name), "__dict__", {}).values()) for name in others}
    if late := ", ".join(name for name, found in values.items() if any(each is _STOCK for each in found)):
        raise LibraryError(f"{late} imported llama_cpp.Llama already; call adaskip_cpp.replace_llama() before that.")
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama  # type: ignore[misc]
