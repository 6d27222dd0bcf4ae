"""Answers questions about a document. The model reads it once, and in later turns only what is new.
Run `python chat_over_document.py model.gguf report.txt --ctx 16384`. An empty line ends it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from adaskip_cpp import AdaSkipLlama


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ctx", type=int, default=8192, help="tokens of document and conversation (default: 8192)")
    options = parser.parse_args()
    is_tuned = options.model.with_suffix(".adaskip-plan.json").exists()
    llm = AdaSkipLlama(str(options.model), n_ctx=options.ctx, plan="auto" if is_tuned else None, verbose=False)
    document, messages = options.file.read_text(encoding="utf-8"), list[Any]()
    try:
        for question in iter(lambda: input("\nQuestion: "), ""):
            messages.append({"role": "user", "content": question if messages else f"{document}\n\n{question}"})
            start, n_before, said = time.perf_counter(), llm.n_evaluated, ""
            answer: Any = llm.create_chat_completion(messages, max_tokens=300, stream=True)
            next(answer)  # returns with the first token
            print(f"[{llm.n_evaluated - n_before} tokens read, first token after {time.perf_counter() - start:.2f} s]")
            for event in answer:
                said += (text := event["choices"][0]["delta"].get("content", ""))
                print(text, end="", flush=True)
            messages.append({"role": "assistant", "content": said})
    except EOFError:
        print()
    except ValueError as error:
        parser.error(f"{error}; use a larger --ctx")


if __name__ == "__main__":
    main()
