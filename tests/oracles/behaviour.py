"""What a user of llama_cpp.Llama calls, as a program: behaviour.py stock|ours MODEL prints the results as JSON."""

import hashlib
import importlib
import json
import sys
from itertools import islice
from typing import Any


def main() -> None:
    """Calls everything once."""
    module, name = ("adaskip_cpp", "AdaSkipLlama") if sys.argv[1] == "ours" else ("llama_cpp", "Llama")
    cls = getattr(importlib.import_module(module), name)  # first, as the package chooses the library of llama_cpp
    from llama_cpp import LlamaGrammar, LlamaRAMCache

    options = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 3}
    llm = cls(sys.argv[2], **options)

    def complete(prompt: str, max_tokens: int, llm: Any = llm, **more: Any) -> Any:
        return choice(llm.create_completion(prompt, max_tokens=max_tokens, **{"temperature": 0, **more}))

    def chat(**more: Any) -> Any:
        messages = [{"role": "user", "content": "the other of the"}]
        return choice(llm.create_chat_completion(messages, max_tokens=8, temperature=0, **more))

    results: dict[str, Any] = {}
    results["completion"] = complete("the other", 12)
    results["sampled"] = complete("the other", 12, temperature=1.0, seed=5)
    results["call"] = choice(llm("the", max_tokens=5, temperature=0))
    results["streamed"] = complete("the", 8, stream=True)
    results["stopped"] = complete("the", 30, stop=["e"])
    results["grammar"] = complete("the", 8, grammar=LlamaGrammar.from_string('root ::= "yes" | "no"'))
    results["chat"] = chat()
    results["chat streamed"] = chat(stream=True)
    prompt = llm.tokenize(b"the other of the in an", special=True)
    results["tokens"] = prompt
    results["prefix"] = list(islice(llm.generate([*prompt, 300 % llm.n_vocab()], temp=0), 6))
    results["n_tokens"] = llm.n_tokens
    state = llm.save_state()
    results["after save"] = complete("of", 6)
    llm.load_state(state)
    results["after load"] = list(islice(llm.generate(prompt, temp=0), 6))
    llm.reset()
    results["after reset"] = complete("of", 6)
    llm.set_cache(LlamaRAMCache())
    results["cached"] = [complete("the in", 6) for _ in range(2)]

    everything = cls(sys.argv[2], logits_all=True, **options)
    everything.eval(prompt)
    results["all logits"] = hashlib.sha256(everything.scores[: everything.n_tokens].tobytes()).hexdigest()
    results["logprobs"] = complete("the", 4, everything, logprobs=2)

    embedder = cls(sys.argv[2], embedding=True, **options)
    results["embedding"] = embedder.embed("the other", normalize=True)
    results["embeddings"] = embedder.create_embedding(["the", "of the"])["data"]
    print(json.dumps(results, default=float))


def choice(response: Any) -> Any:
    """What is chosen in an answer, or in each piece of a stream."""
    return response["choices"][0] if isinstance(response, dict) else [each["choices"][0] for each in response]


main()
