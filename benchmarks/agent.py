"""Measures a day of an agent: a client's time to the first token of a server, while its prompts are edited.

    python benchmarks/agent.py MODEL.gguf [--turns 30] [--tokens 10000] [--ctx 16384] [--plan auto|none|PLAN]
                               [--reuse auto|edits] [--pair] [--count]

The servers of benchmarks/serve.py run one after the other, ours with its default and with `--reuse prefix`. With --pair
only ours with its default and the stock server run. All get the same requests. The system prompt has --tokens tokens:
the date, and descriptions of tools. The date changes every fifth turn, a tool's text every seventh. A file of up to
1,500 tokens is in the history from the fourth turn on, and a line near its top changes every third turn. A prompt
longer than the context loses the oldest third of its history, but not the file. The messages are so long that this
begins after half of the turns. A turn with two changes counts for the change that comes first in the table.

Run it on an idle machine: 30 turns with a model of 0.5B take about two hours on 2 slow cores. With --count only our
server runs, and the table has tokens: those that it reads, and those that any server reads which uses the common prefix
alone. Such counts are exact, also on a busy machine. Start at :func:`main`.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections import defaultdict
from contextlib import closing
from datetime import datetime, timedelta
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np
from serve import CACHED, OURS, STOCK, ask, beginnings, describe, options, server, sources

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.engine.generation import chat_tokens
from adaskip_cpp.engine.runs import n_common

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve import Messages, Wait

PREFIX = f"{OURS} --reuse prefix"
ANSWER = 16  # tokens of an agent's turn
TURNS = (
    "the first",
    "the date changed",
    "a tool's text changed",
    "the history trimmed",
    "the file edited",
    "a new message alone",
)


def tools() -> Iterator[str]:
    """Yield descriptions of tools: functions of the standard library with docstrings of several lines."""
    for module, source in sources().items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and "\n" in (text := ast.get_docstring(node) or ""):
                yield f"\n## {module}.{node.name}({ast.unparse(node.args)})\n{text}\n"


def day(args: argparse.Namespace, tokenizer: AdaSkipLlama) -> list[tuple[str, Messages]]:
    """Return the turns of an agent: the change, and the messages. Answers are fixed, so all servers read the same."""
    n_file = min(1500, (args.ctx - args.tokens) // 4)
    n_turn = 2 * (args.ctx - args.tokens - n_file) // max(args.turns, 8)
    [described] = beginnings(tokenizer, ["".join(tools()).encode()], [args.tokens])
    file, *outputs = beginnings(tokenizer, sources().values(), [n_file] + [n_turn] * args.turns)
    lines = file.split("\n")
    middle = described.index("\n", described.rindex("\n## ", 0, len(described) // 2) + 1)

    def prompt(turn: int, first: int) -> Messages:
        """Return the messages of a turn, with the history from the turn ``first`` on."""
        edited = "\n".join([*lines[:3], f"LIMIT = {turn // 3}", *lines[3:]])
        now = datetime(2026, 6, 1, 9) + turn // 5 * timedelta(days=1, minutes=7)
        tool = f"\nVersion {turn // 7} of this tool.\nIt answers within {2 + turn // 7} seconds."
        system = f"You work on Python programs. These are your tools.\nIt is {now:%A, %d %B %Y, %H:%M}.\n"
        messages = [{"role": "system", "content": system + described[:middle] + tool + described[middle:]}]
        for each in range(first, turn + 1):
            shown = f"The file to work on:\n\n{edited}\n\n" if each == max(first, 4) else ""
            messages.append({"role": "user", "content": f"{shown}Step {each} printed:\n\n{outputs[each - 1]}"})
            messages.append({"role": "assistant", "content": f"I have read what step {each} printed, and go on."})
        return messages[:-1]

    def n_tokens(messages: Messages) -> int:
        return sum(10 + len(tokenizer.tokenize(each["content"].encode(), add_bos=False)) for each in messages)

    turns, first = [], 1
    for turn in range(1, args.turns + 1):
        is_trimmed = turn > first and n_tokens(prompt(turn, first)) + ANSWER > args.ctx
        first += -(-(turn - first) // 3) if is_trimmed else 0
        changes = [turn == 1, turn % 5 == 0, turn % 7 == 0, is_trimmed, turn > 4 and turn % 3 == 0, True]
        turns.append((TURNS[changes.index(True)], prompt(turn, first)))
    return turns


def run_day(args: argparse.Namespace, turns: list[tuple[str, Messages]]) -> None:
    """Ask one server after another for all turns of an agent, and print the table."""
    waits: defaultdict[str, list[Wait]] = defaultdict(list)
    edits = f"{OURS} --reuse {args.reuse}"
    names = (edits, STOCK) if args.pair else (edits, PREFIX, STOCK, CACHED)
    for name in names:
        # By default, stock keeps the logits of all tokens, and its cache copies them: a day takes more than 20 GB.
        with server(name, args, "", stock=("--logits_all", "False")) as address:
            for number, (kind, messages) in enumerate(turns, 1):
                waits[name].append(wait := ask(address, messages, ANSWER))
                print(
                    f"{name}, turn {number}, {kind}: {wait.seconds:.2f} s, {wait.n_read} read, {wait.n_moved} moved",
                    file=sys.stderr,
                )

    heads = [head for name in names for head in ([name, "tokens read"] if OURS in name else [name])]
    print(f"| | turns | {' | '.join(heads)} | {STOCK} / {edits} |")
    print(f"|---|---|{'---|' * len(heads)}---|")
    rows = [(kind, [kind == each for each, _ in turns], statistics.median) for kind in TURNS]
    for kind, chosen, combine in [*rows, ("the whole day", [True] * len(turns), sum)]:
        if any(chosen):
            each = {name: list(compress(waits[name], chosen)) for name in names}
            seconds = {name: combine(wait.seconds for wait in each[name]) for name in names}
            cells = []
            for name in names:
                cells.append(f"{seconds[name]:.2f}")
                if OURS in name:
                    cells.append(f"{combine(wait.n_read for wait in each[name]):,.0f}")
            print(f"| {kind} | {sum(chosen)} | {' | '.join(cells)} | {seconds[STOCK] / seconds[edits]:.1f} |")


def count_day(args: argparse.Namespace, turns: list[tuple[str, Messages]], tokenizer: AdaSkipLlama) -> None:
    """Print how many tokens of each turn our server reads, and how many follow the prefix of the turn before."""
    name, found, before = f"{OURS} --reuse {args.reuse}", defaultdict(list), np.zeros(0, np.int32)
    with server(name, args, "") as address:
        for number, (kind, messages) in enumerate(turns, 1):
            wait = ask(address, messages, ANSWER)
            prompt = np.array(chat_tokens(tokenizer, [(each["role"], each["content"]) for each in messages]), np.int32)
            counts = len(prompt), len(prompt) - n_common(before, prompt), wait.n_read
            print(f"turn {number}, {kind}: {counts}, {wait.n_moved} moved", file=sys.stderr)
            for each in (kind, "the whole day"):
                found[each].append(counts)
            before = prompt

    print(f"| | turns | tokens | after the common prefix | read by {name} | ratio |\n|---|---|---|---|---|---|")
    for kind in (each for each in (*TURNS, "the whole day") if each in found):
        counts = (np.sum if kind == "the whole day" else np.median)(np.array(found[kind]), axis=0)
        cells = " | ".join(f"{count:,.0f}" for count in counts)
        print(f"| {kind} | {len(found[kind])} | {cells} | {counts[1] / counts[2]:.1f} |")


def main() -> None:
    parser = options(__doc__, tokens=10000, ctx=16384)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--reuse", default="auto", help="reuse of our server, compared with prefix")
    parser.add_argument("--pair", action="store_true", help="run only our server and the stock one")
    parser.add_argument("--count", action="store_true", help="count tokens; measure no times")
    args = parser.parse_args()
    with closing(AdaSkipLlama(args.model, vocab_only=True, verbose=False)) as tokenizer:
        turns = day(args, tokenizer)
        describe(args, "a system prompt", "Tokens of prompts" if args.count else "Seconds to the first token")
        if args.count:
            count_day(args, turns, tokenizer)
    if not args.count:
        run_day(args, turns)


if __name__ == "__main__":
    main()
