"""Measures on a text of yours, of 8,800 tokens or more, what each promise costs and brings.

First run `adaskip-cpp tune model.gguf`, then `python evaluate_mine.py model.gguf mine.txt`. It writes a report into the
folder mine.txt.results. After Ctrl-C, the same command goes on.
"""

import sys

from adaskip_cpp import AdaSkipError, EvaluationOptions, evaluate


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("Usage: python evaluate_mine.py MODEL TEXT")
    model, text = sys.argv[1:]
    options = EvaluationOptions(text_files=(text,), max_losses=(0.02, 0.05, 0.1))
    try:
        results = evaluate(model, None, f"{text}.results", options, on_progress=show)
    except AdaSkipError as error:
        sys.exit(f"Error: {error}")
    for row in results.contenders:
        loss, added, speed = row.figure("loss"), row.figure("added_loss"), row.speed.get("first_token")
        if loss and added and speed:  # after Ctrl-C there may be none
            print(f"{row.label}: loss {loss.mean:.3f} nats per token ({added.mean:+.3f} ± {added.error:.3f}), ", end="")
            print(f"first token after {speed.seconds.mean:.3f} s ({speed.speedup.value:.2f} times as fast)")
    print(*results.notes, sep="\n")


def show(share: float) -> None:
    print(f"\r{share:4.0%} done", end="" if share < 1 else "\n", file=sys.stderr)


if __name__ == "__main__":
    main()
