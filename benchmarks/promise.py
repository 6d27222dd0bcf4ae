"""Checks whether promises are kept: the loss of a frontier's plans on texts that nothing was fitted or chosen on.

    adaskip-cpp tune MODEL.gguf
    python benchmarks/promise.py MODEL.gguf --prompt 2048 --max-loss 0.02 0.05 0.1 --text quality.jsonl stories.txt

Texts are of kinds that neither calibration nor tuning uses: IDLE's manual, IDLE's changelog, and your files. A file is
text, or a task file of L-Eval or LongBench, whose documents are put together. After a prompt of each text, an answer
that continues it and one that copies from it are judged against the whole model, and six pass keys are asked for.
Intervals are over the prompts. ``--time`` times the first token of a prompt, in turn:
stock llama-cpp-python with its defaults, ours with the settings that `tune` found, and ours with the plan too. Run
nothing else meanwhile. Start at :func:`main`.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.engine.settings import is_here
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.corpus import cut
from adaskip_cpp.measuring.judge import Judge
from adaskip_cpp.measuring.probes import KINDS, Probe, probes_of
from adaskip_cpp.model.plan_file import plan_beside
from adaskip_cpp.tuning.figures import quality_of
from adaskip_cpp.tuning.speed import measure_speed

N_CONTINUED, N_COPIED = 192, 128


def unseen_texts(files: Sequence[str] = ()) -> dict[str, str]:
    """Return one text of each kind: those of IDLE, and those of files."""
    library, found = Path(sysconfig.get_path("stdlib")), {}
    manual = (library / "idlelib/help.html").read_text("utf-8")
    plain = html.unescape(re.sub(r"(?s)<(head|script|style)\b.*?</\1>|<[^>]*>", "", manual))
    found["manual"] = re.sub(r"\s*\n\s*\n\s*", "\n\n", plain).strip()
    news = [library / "idlelib" / name for name in ("News3.txt", "NEWS.txt")]
    found["changelog"] = "\n\n".join(path.read_text("utf-8", "replace") for path in news if path.exists())
    for path in map(Path, files):
        found[path.stem] = text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            documents = [json.loads(line) for line in filter(None, text.split("\n"))]
            found[path.stem] = "\n\n".join(each.get("context") or each["input"] for each in documents)
    return {kind: text for kind, text in found.items() if text}


def probes(llm: AdaSkipLlama, prompt: int, n_each: int, files: Sequence[str]) -> list[Probe]:
    """Return the probes of up to ``n_each`` pieces of each kind of text."""
    found = []
    for kind, text in unseen_texts(files).items():
        pieces = cut(llm, text, n_each, prompt + N_CONTINUED)
        for i, piece in enumerate(piece for piece in pieces if len(piece) == prompt + N_CONTINUED):
            key = 1000 + len(found), (i + 0.5) / n_each  # other pass keys than those of tune
            found += probes_of(
                llm, f"{kind} {i}", piece, (prompt,), n_continued=N_CONTINUED, n_copied=N_COPIED, key=key
            )
    return found


def figure(interval: Interval) -> str:
    """Return a mean with its 95% interval."""
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--pieces", type=int, default=4, help="prompts of each kind of text")
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="more kinds of text")
    parser.add_argument("--max-loss", type=float, nargs="*", default=[0.02, 0.05, 0.1])
    parser.add_argument("--time", type=int, default=0, metavar="N", help="rounds of timing")
    args = parser.parse_args()
    frontier = plan_beside(args.model).frontier
    if frontier is None:
        raise SystemExit(f"there is no frontier beside {args.model}; run adaskip-cpp tune {args.model}")
    llm = AdaSkipLlama(args.model, n_ctx=args.prompt + 512, verbose=False, **frontier.settings.to_kwargs())
    judge = Judge(llm, probes(llm, args.prompt, args.pieces, args.text))
    names = list(dict.fromkeys(probe.text for probe in judge.probes))
    here = "this machine" if is_here(frontier.machine) else "another machine"
    print(f"{args.model}, prompts of {args.prompt:,} tokens: {', '.join(names)}; tuned on {here}")
    print(f"settings {frontier.settings}\n")
    print(
        "| promise | skipped: attentions, FFNs; windows | predicted | divergence | 99%, 99.9% | added loss "
        "| agreement | copying: divergence | added loss | pass keys: divergence | found by the plan, the whole model |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    plans = {}
    for promise in args.max_loss:
        point, plan = frontier.point(args.prompt, promise), frontier.choose(args.prompt, promise)
        if point is None or plan is None or plan.bulk is None:
            print(f"| {promise:g} | the whole model |")
            continue
        plans[promise] = plan
        scores = judge(plan)
        continued, copied, found = (quality_of(judge.probes, scores, kind) for kind in KINDS)
        keys = [each for probe, each in zip(judge.probes, scores, strict=True) if probe.kind == "retrieval"]
        by_plan, by_whole = sum(each.right.all() for each in keys), sum((each.whole_margin > 0).all() for each in keys)
        skip = plan.bulk.skip
        print(
            f"| {promise:g} | {len(skip.attention)}, {len(skip.ffn)}; {len(plan.narrowed)} "
            f"| {point.speedup(args.prompt):.2f} x | {figure(continued.divergence)} "
            f"| {continued.tails[0]:.2f}, {continued.tails[1]:.2f} | {figure(continued.loss)} "
            f"| {continued.agreement.value:.3f} | {figure(copied.divergence)} | {figure(copied.loss)} "
            f"| {figure(found.divergence)} | {by_plan}, {by_whole} of {len(keys)} |",
            flush=True,
        )
    prompt = list(judge.probes[0].tokens[: args.prompt])
    llm.close()
    for promise, plan in plans.items() if args.time else ():
        for each in measure_speed(args.model, frontier.settings, plan, prompt, n_rounds=args.time):
            seconds = f"{each.seconds[0]:.2f} s, {each.seconds[1]:.2f} s"
            print(f"promise {promise:g}, {each.of}: {figure(each.ratio)} times as fast ({seconds})", flush=True)


if __name__ == "__main__":
    main()
