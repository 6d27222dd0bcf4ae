"""A model of bytes that reads questions, and lines of LongBench."""

from typing import Any

from oracles.fake_llama import BOS, FakeLlama

from adaskip_cpp.measuring.tasks import QuestionItem


class ByteLlama(FakeLlama):
    def detokenize(self, tokens: list[int]) -> bytes:
        return bytes(token - 2 for token in tokens if token >= 2)


LLM: Any = ByteLlama()


def chat(prompt: str) -> list[int]:
    return LLM.tokenize(f"<user>{prompt}</user>".encode())


def record(dataset: str = "hotpotqa", **fields: Any) -> dict[str, Any]:
    """A line as LongBench publishes it."""
    asked = {"input": "Who?", "context": "Passage.", "answers": ["Ada"], "length": 7, "dataset": dataset}
    return {**asked, "language": "en", "all_classes": None, "_id": "f00", **fields}


def text_of(item: QuestionItem) -> str:
    assert item.prompt[0] == BOS
    return LLM.detokenize(list(item.prompt)).decode()
