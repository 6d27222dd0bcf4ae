"""What a user of llama_cpp.Llama calls, as a program: prints one JSON object of results.

Usage: behaviour.py stock|ours MODEL. Run on both, the outputs must be equal.
"""

import hashlib
import json
import sys
from typing import Any

GRAMMAR = 'root ::= "yes" | "no"'


def load() -> Any:
    """The Llama class that is asked for, imported in a process that has not seen the other one."""
    if sys.argv[1] == "ours":
        from adaskip_cpp import AdaSkipLlama

        return AdaSkipLlama
    from llama_cpp import Llama

    return Llama


def digest(array: Any) -> str:
    """Bit-exact identity of an array."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def main() -> None:
    """Calls everything once."""
    cls = load()
    from llama_cpp import LlamaGrammar, LlamaRAMCache

    options = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 3}
    llm = cls(sys.argv[2], **options)
    results: dict[str, Any] = {}

    def text(response: Any) -> Any:
        return response["choices"][0]

    results["completion"] = text(llm.create_completion("the other", max_tokens=12, temperature=0))
    results["sampled"] = text(llm.create_completion("the other", max_tokens=12, temperature=1.0, seed=5))
    results["call"] = text(llm("the", max_tokens=5, temperature=0))
    results["streamed"] = [
        text(chunk) for chunk in llm.create_completion("the", max_tokens=8, temperature=0, stream=True)
    ]
    results["stopped"] = text(llm.create_completion("the", max_tokens=30, temperature=0, stop=["e"]))
    results["grammar"] = text(
        llm.create_completion("the", max_tokens=8, temperature=0, grammar=LlamaGrammar.from_string(GRAMMAR))
    )
    messages = [{"role": "user", "content": "the other of the"}]
    results["chat"] = text(llm.create_chat_completion(messages, max_tokens=8, temperature=0))
    results["chat streamed"] = [
        text(chunk) for chunk in llm.create_chat_completion(messages, max_tokens=8, temperature=0, stream=True)
    ]
    prompt = llm.tokenize(b"the other of the in an", special=True)
    results["tokens"] = prompt
    results["prefix"] = [
        token for token, _ in zip(llm.generate([*prompt, 300 % llm.n_vocab()], temp=0), range(6), strict=False)
    ]
    results["n_tokens"] = llm.n_tokens
    state = llm.save_state()
    results["after save"] = text(llm.create_completion("of", max_tokens=6, temperature=0))
    llm.load_state(state)
    results["after load"] = [token for token, _ in zip(llm.generate(prompt, temp=0), range(6), strict=False)]
    llm.reset()
    results["after reset"] = text(llm.create_completion("of", max_tokens=6, temperature=0))
    llm.set_cache(LlamaRAMCache())
    results["cached"] = [text(llm.create_completion("the in", max_tokens=6, temperature=0)) for _ in range(2)]

    everything = cls(sys.argv[2], logits_all=True, **options)
    everything.eval(prompt)
    results["all logits"] = digest(everything.scores[: everything.n_tokens])
    results["logprobs"] = text(everything.create_completion("the", max_tokens=4, temperature=0, logprobs=2))

    embedder = cls(sys.argv[2], embedding=True, **options)
    results["embedding"] = embedder.embed("the other", normalize=True)
    results["embeddings"] = embedder.create_embedding(["the", "of the"])["data"]
    print(json.dumps(results, default=float))


main()
