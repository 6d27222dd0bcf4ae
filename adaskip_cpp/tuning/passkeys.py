"""Pass keys in long prompts: what a plan may lose before any loss of text tells."""

from collections.abc import Callable, Sequence
from functools import cached_property

from ..engine.llama import AdaSkipLlama
from ..measuring.synthetic import finds_answer
from ..measuring.tasks import QuestionItem
from ..model.plan import SkipPlan


class Retrieval:
    """Asks a model for pass keys, greedily, under one plan after another; only for those that the full model finds.

    The model's plan is set and left as it was last; its KV cache is dropped. ``advance`` is called with the number of
    tokens after each prompt.
    """

    def __init__(
        self,
        llm: AdaSkipLlama,
        items: Sequence[QuestionItem],
        *,
        advance: Callable[[int], None] = lambda n_tokens: None,
    ) -> None:
        self._llm, self.items, self._advance = llm, items, advance

    @property
    def n_tokens(self) -> int:
        return sum(len(item.prompt) for item in self.items)

    @cached_property
    def found(self) -> list[QuestionItem]:
        """Those that the full model finds."""
        return [item for item in self.items if self._finds(None, item)]

    def n_found(self, plan: SkipPlan) -> int:
        return sum(self._finds(plan, item) for item in self.found)

    def loses(self, plan: SkipPlan) -> bool:
        """Whether a plan loses any of them; what was lost last is asked for first."""
        lost = next((item for item in self.found if not self._finds(plan, item)), None)
        if lost is not None:
            self.found.remove(lost)
            self.found.insert(0, lost)
        return lost is not None

    def _finds(self, plan: SkipPlan | None, item: QuestionItem) -> bool:
        self._llm.set_plan(plan)
        try:
            return finds_answer(self._llm, item)
        finally:
            self._llm.reset()
            self._advance(len(item.prompt))
