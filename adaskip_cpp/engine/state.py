"""Saved states that know what they were saved from."""

from typing import Any

from llama_cpp.llama import LlamaState

from ..errors import StateError
from ..model.identity import ModelInfo
from .self_describing import SelfDescribingLlama


class AdaSkipState(LlamaState):
    """A state with its model and the layers that have no KV; what its cells are of is in llama.cpp's own part."""

    model: ModelInfo
    elided_kv: tuple[int, ...]

    @classmethod
    def of(cls, state: LlamaState, **ours: Any) -> "AdaSkipState":
        result = cls.__new__(cls)
        result.__dict__.update(vars(state), **ours)
        return result


def check_state(state: LlamaState, llm: SelfDescribingLlama) -> None:
    """Refuse a state that is of another model, other context settings or another KV layout than ``llm``."""
    elided: tuple[int, ...] = ()
    differences: list[str] = []
    if isinstance(state, AdaSkipState):
        differences, elided = state.model.differences(llm.model_info), state.elided_kv
    if differences:
        raise StateError(
            f"the state was saved from another model: {'; '.join(differences)}; load it into the model that it was "
            "saved from."
        )
    if elided != llm.elided_kv:
        raise StateError(
            "the state was saved with KV for other layers; load it into a model that was opened with the same plan=, "
            "or without one where this was."
        )
    if state.input_ids.shape != llm.input_ids.shape or state.scores.shape != llm.scores[: state.n_tokens].shape:
        raise StateError(
            "the state was saved with another n_ctx, n_batch or logits_all; open the model with the same settings."
        )
