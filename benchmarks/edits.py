"""Measures quality, tokens read and time when an edited prompt uses the K and V of the prompt before.

    python benchmarks/edits.py MODEL.gguf [--prompt 1024] [--mend 1 16 64] [--pieces 1] [--max-loss X]
    python benchmarks/edits.py MODEL.gguf --prompt 8000 --time 2 [--threads N]

A prompt of each text is read, then an edited form of it under ``reuse="edits"``. Five documents are also read alone,
saved, and put together. Divergence and added loss compare the following tokens with the whole model, which reads the
edited prompt anew. One answer continues the prompt, one copies from it. An edit also changes a pass key and the name of
a ship, which are then asked for: the new one must be found, the old one never. Texts are those of
benchmarks/promise.py. With ``--max-loss`` the plan is used that `serve` takes for that promise. Losses and times
include it. Times are those to the first token of an answer; run nothing else meanwhile. Start at :func:`main`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from promise import unseen_texts

from adaskip_cpp import AdaSkipLlama, Edits
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.measuring.corpus import cut, tokens_of
from adaskip_cpp.measuring.probes import passkeys
from adaskip_cpp.model.plan_file import plan_beside

N_ANSWER = 128
LINE = "\n# The limit was raised to 4096 in March, see the notes of the maintainers.\n"
HEAD = 60  # first tokens, which stay in their places when texts are dropped or swapped
N_DOCUMENTS = 5
SHIP = "\n\nLet the ship of this story be called {}. It sails at dawn.\n\n", "\n\nThe ship of this story is called {}"
KEY = "\n\nThe pass key is {}. Remember it.\n\n", "\n\nThe pass key is {}"

Tokens = list[int]
Edit = Callable[[Tokens, Tokens], Tokens]
EDITS: dict[str, Edit] = {
    "a line changed at 2%": lambda t, line: changed(t, line, len(t) // 50),
    "a line changed at 50%": lambda t, line: changed(t, line, len(t) // 2),
    "a line inserted at 2%": lambda t, line: t[: len(t) // 50] + line + t[len(t) // 50 :],
    "20 tokens deleted at 2%": lambda t, line: t[: len(t) // 50] + t[len(t) // 50 + 20 :],
    "the oldest third dropped": lambda t, line: t[:HEAD] + t[len(t) // 3 :],
    "two halves swapped": lambda t, line: t[:HEAD] + t[len(t) // 2 : -100] + t[HEAD : len(t) // 2] + t[-100:],
}


def changed(tokens: Tokens, line: Tokens, at: int) -> Tokens:
    """Return a prompt in which a line replaces a slightly shorter one."""
    return tokens[:at] + line + tokens[at + len(line) - 5 :]


def answers(llm: AdaSkipLlama, prompt: Tokens, given: list[Tokens]) -> tuple[list[npt.NDArray[np.float64]], float, int]:
    """Return the log-probabilities of each answer's tokens, the seconds to the first, and the tokens read before it."""
    found, seconds, n_read = [], 0.0, 0
    for answer in given:
        start, n_before = time.perf_counter(), llm.n_evaluated
        next(llm.generate(prompt, temp=0.0))
        seconds = seconds or time.perf_counter() - start
        n_read = n_read or llm.n_evaluated - n_before
        row = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)).copy()
        logits = np.concatenate([row[None], llm.logits_after(answer[:-1])]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        llm.truncate(len(prompt))
    return found, seconds, n_read


def lost(whole: npt.NDArray[np.float64], edited: npt.NDArray[np.float64], answer: Tokens) -> tuple[float, float]:
    """Return divergence and added loss in nats per token."""
    divergence = (np.exp(whole) * (whole - edited)).sum(axis=1).mean()
    return float(divergence), float((whole - edited)[np.arange(len(answer)), answer].mean())


def timed(llm: AdaSkipLlama, prompt: Tokens) -> tuple[float, int]:
    """Return the seconds to the first token of an answer, and the tokens read before it."""
    start, n_before = time.perf_counter(), llm.n_evaluated
    next(llm.generate(prompt, temp=0.0))
    seconds, n_read = time.perf_counter() - start, llm.n_evaluated - n_before
    llm.truncate(len(prompt))
    return seconds, n_read


def time_edits(llm: AdaSkipLlama, text: Tokens, line: Tokens, n_rounds: int) -> None:
    """Time each edit of a prompt against the whole reading of the prompt before it, in turn."""
    n, found = len(text), defaultdict(list)
    short = text[: n * 3 // 4]
    documents = [text[HEAD + i * (n - HEAD) // N_DOCUMENTS :][: (n - HEAD) // N_DOCUMENTS] for i in range(N_DOCUMENTS)]
    ordered = [*text[:HEAD], *(token for i in (3, 0, 4, 2, 1) for token in documents[i])]
    for _ in range(n_rounds):
        line_changed = changed(text, line, 100)
        steps = {
            f"a line changed at token 100 of {n:,}": [text, line_changed],
            "a second one changed in the middle": [line_changed, changed(line_changed, line, n // 2)],
            f"the oldest third of {len(short):,} dropped": [short, short[:HEAD] + short[n // 4 :]],
            f"{N_DOCUMENTS} documents of {len(documents[0]):,} in another order": [text, ordered],
        }
        for kind, (before, after) in steps.items():
            llm.saved_prompts = ()
            if llm.input_ids[: llm.n_tokens].tolist() != before:
                llm.reset()
                cold, _ = timed(llm, before)
            found[kind].append((*timed(llm, after), cold))
        saved = []
        for document in documents:
            llm.saved_prompts = ()
            llm.reset()
            timed(llm, text[:HEAD] + document)
            saved.append(llm.save_prompt())
        llm.reset()
        llm.saved_prompts = saved
        found[f"{N_DOCUMENTS} documents that were read alone put together"].append((*timed(llm, ordered), cold))
    print("| edit | tokens read | seconds | whole prompt, seconds | share |\n|---|---|---|---|---|")
    for kind, values in found.items():
        seconds, n_read, cold = np.median(np.array(values), axis=0)
        print(f"| {kind} | {n_read:,.0f} | {seconds:.1f} | {cold:.1f} | {seconds / cold:.1%} |")


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--mend", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--pieces", type=int, default=1, help="prompts of each text")
    parser.add_argument("--max-loss", type=float, default=None, help="use the plan of this promise, in nats per token")
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS", help="measure times alone")
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    llm = AdaSkipLlama(args.model, n_ctx=args.prompt + 512, flash_attn=bool(args.time), verbose=False, **threads)
    plan = None
    if args.max_loss is not None:
        frontier = plan_beside(args.model).frontier
        plan = None if frontier is None else frontier.choose(args.prompt, args.max_loss, edited=True)
    used = "the whole model" if plan is None else f"the plan of the promise {args.max_loss:g}"
    if args.time:
        [text] = cut(llm, "\n\n".join(unseen_texts().values()), 1, args.prompt)
        print(f"{args.model}, {used}, flash attention, {args.threads} threads, {args.time} rounds\n")
        llm.set_reuse("edits")
        llm.set_plan(plan)
        time_edits(llm, list(text), tokens_of(llm, LINE), args.time)
        return
    line, figures, keys = tokens_of(llm, LINE), defaultdict(list), defaultdict(list)

    def read(prompt: Tokens) -> Any:
        llm.set_reuse("prefix")
        llm.set_plan(plan)
        llm.reset()
        next(llm.generate(prompt, temp=0.0))
        return llm.save_state()

    def read_alone(documents: list[Tokens]) -> list[Any]:
        found = []
        for document in documents:
            read(document)
            llm.truncate(len(document))
            found.append(llm.save_prompt())
        llm.reset()
        return found

    def judge(kind: str, before: Any, prompt: Tokens, given: list[Tokens], saved: Any = ()) -> dict[str, Any]:
        llm.saved_prompts = ()
        llm.set_reuse("prefix")
        llm.set_plan(None)
        llm.reset()
        whole, cold, _ = answers(llm, prompt, given)
        found = {"whole": whole}
        llm.set_plan(plan)
        llm.saved_prompts = saved
        for mend in args.mend:
            if before is None:
                llm.reset()
            else:
                llm.load_state(before)
            llm.set_reuse(Edits(mend=mend))
            edited, seconds, n_read = answers(llm, prompt, given)
            figures[kind, mend].append((n_read, seconds / cold))
            found[mend] = edited
        return found

    pieces = [list(piece) for text in unseen_texts().values() for piece in cut(llm, text, args.pieces, args.prompt)]
    n_prompt = args.prompt - N_ANSWER
    rows = defaultdict(list)
    for number, piece in enumerate(pieces):
        text, answer = piece[:n_prompt], piece[n_prompt:]
        before = read(text)
        for kind, edit in EDITS.items():
            prompt = edit(text, line)
            given = [answer, prompt[len(prompt) // 4 :][:N_ANSWER]]
            found = judge(kind, before, prompt, given)
            for mend in args.mend:
                pairs = zip(found["whole"], found[mend], given, strict=True)
                rows[kind, mend].append([value for pair in pairs for value in lost(*pair)])
        cut_at = [HEAD + i * (n_prompt - 100 - HEAD) // N_DOCUMENTS for i in range(N_DOCUMENTS + 1)]
        documents = [text[begin:end] for begin, end in pairwise(cut_at)]
        order = [documents[i] for i in (3, 0, 4, 2, 1)]
        prompt = [*text[:HEAD], *(token for each in order for token in each), *text[-100:]]
        given = [answer, prompt[len(prompt) // 4 :][:N_ANSWER]]
        kind, saved = "documents put together", read_alone([text[:HEAD] + each for each in documents])
        found = judge(kind, None, prompt, given, saved)
        for mend in args.mend:
            pairs = zip(found["whole"], found[mend], given, strict=True)
            rows[kind, mend].append([value for pair in pairs for value in lost(*pair)])
        digits, names = zip(passkeys(-1 - number)[0], passkeys(number)[0], strict=True)
        for what, (told, asked), words in (("pass key", KEY, digits), ("name", SHIP, names)):
            lines, answers_ = ([tokens_of(llm, form.format(word)) for word in words] for form in (told, asked))
            n_same = next(i for i, (a, b) in enumerate(zip(*answers_, strict=False)) if a != b)
            at = len(text) // 10
            old, new = (text[:at] + each + text[at:] + answers_[0][:n_same] for each in lines)
            kind = f"a {what} changed at 10%"
            found = judge(kind, read(old), new, [each[n_same:] for each in answers_])
            for name, both in found.items():
                right = [all(p.argmax(axis=1) == each[n_same:]) for p, each in zip(both, answers_, strict=True)]
                keys[what, name].append((right[1], right[0]))
        print(f"{number + 1} of {len(pieces)} texts", flush=True)
    print(f"\n{args.model}, edited prompts of about {n_prompt:,} tokens, {len(pieces)} texts; {used}\n")
    print("| edit | mend | read | time | divergence | added loss | copies: divergence | added loss |")
    print("|---|---|---|---|---|---|---|---|")
    for (kind, mend), values in figures.items():
        n_read, share = np.median(np.array(values), axis=0)
        cells = [f"{each:.3f}" for each in np.mean(rows[kind, mend], axis=0)] if (kind, mend) in rows else 4 * ["-"]
        print(f"| {kind} | {mend} | {n_read:.0f} | {share:.0%} | {' | '.join(cells)} |")
    print("\n| | | new one found | old one answered |\n|---|---|---|---|")
    for (what, name), values in keys.items():
        new_found, old_told = np.sum(values, axis=0)
        how = "whole model" if name == "whole" else f"mend {name}"
        print(f"| {what} | {how} | {new_found} of {len(values)} | {old_told} |")


if __name__ == "__main__":
    main()
