"""Summarises a text file. A bar shows how much of it the model has read.

Run `python summarise.py model.gguf report.txt`. Long texts need a larger context: `--ctx 16384`.
It uses the plans that `adaskip-cpp tune model.gguf` wrote beside the model. Without them the whole model runs.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from adaskip_cpp import AdaSkipLlama


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ctx", type=int, default=8192, help="tokens of the text and its summary (default: 8192)")
    options = parser.parse_args()
    is_tuned = options.model.with_suffix(".adaskip-plan.json").exists()
    llm = AdaSkipLlama(str(options.model), n_ctx=options.ctx, plan="auto" if is_tuned else None, verbose=False)
    prompt = f"{options.file.read_text(encoding='utf-8')}\n\nSummarise the text above in a few sentences."
    n_tokens = len(llm.tokenize(prompt.encode()))
    if n_tokens + 500 > options.ctx:  # room for the chat template and the summary
        parser.error(f"the text has {n_tokens} tokens; use --ctx {n_tokens + 500}")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Reading", total=n_tokens)
        llm.on_batch = lambda n_read: bar.update(task, completed=n_read)
        answer: Any = llm.create_chat_completion([{"role": "user", "content": prompt}], max_tokens=300, stream=True)
        next(answer)  # returns when the text is read
    for event in answer:
        print(event["choices"][0]["delta"].get("content", ""), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
