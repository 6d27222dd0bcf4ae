# Above 300 lines: a figure, its table and its picture are of one record.
"""What the prompt mode loses at what speed, against the paper's mode and two that lie between: tables and the picture.

    adaskip-cpp calibrate MODEL.gguf -o PROFILE
    python benchmarks/prompt.py measure MODEL.gguf PROFILE --prompt 2048 -o FILE.json [--part text|passkeys]
    python benchmarks/prompt.py table FILE.json ...
    python benchmarks/prompt.py plot FILE.json ... [-o docs/prompt.svg]

Four contenders at several speed-ups, each chosen by the profile's cost model for a prompt of that length:

- prompt mode: chosen by divergence, in the bulk, with linear maps, and with windows.
- the paper's set in the bulk: chosen by similarity, the rest as before.
- suffix without maps: the last layers in the bulk, nothing in their place, as POP has it.
- the paper's mode: chosen by similarity, skipped for every token, with the ratio of norms. No online stage.

Quality is that of the 256 tokens behind a prompt, against the whole model, on text that calibration does not take, of
kinds that every Python or Debian carries: licences, IDLE's manual, sources of the standard library, IDLE's changelog.
Where no text of a kind is long enough, all of it is joined, and a kind too short even so is left out. Pass keys are
those of `evaluate`, at five depths. The time to the first token is that of the same prompts, in turn with the whole
model's, in one process, on one loaded model; nothing else may run meanwhile.

What was measured is kept in FILE.json as it comes: the same command goes on where it was stopped. SmolLM2 at 2,048
tokens takes 15 minutes of text and 5 of pass keys on 2 slow cores.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import itertools
import json
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import BudgetError, DataError
from adaskip_cpp.files import json_text, write_atomically
from adaskip_cpp.intervals import Interval, mean_interval, ratio_interval
from adaskip_cpp.measuring.cores import is_busy, load_average, physical_cores
from adaskip_cpp.measuring.corpus import SEPARATOR
from adaskip_cpp.measuring.distribution import kl_divergences, losses
from adaskip_cpp.measuring.synthetic import finds_answer, synthetic_items
from adaskip_cpp.measuring.tasks import QuestionItem, TextItem, python_sources, text_items
from adaskip_cpp.measuring.timing import in_turn, time_request
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.pictures import plots

PROMPT_MODE, PAPER = "prompt mode", "the paper's mode"
CONTENDERS: dict[str, dict[str, Any]] = {
    PROMPT_MODE: {"mode": "prompt"},
    "the paper's set in the bulk": {"mode": "prompt", "ranking": "similarity"},
    "suffix without maps": {"mode": "prompt", "strategy": "suffix", "compensation": "none"},
    PAPER: {"mode": "prefill", "ranking": "similarity", "compensation": "paper", "online": False},
}
LOOKS = [plots.STRATEGY[name] for name in ("adaskip", "paper", "suffix", "early_exit")]
PARTS = ("text", "passkeys")
N_BEHIND = 256
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
WHOLE = "whole"
N_WARM, N_GROUP = 64, 4
"""Tokens read before a prompt is timed, as the plan was changed, and plans that share one run of the whole model."""
LICENCES = Path("/usr/share/common-licenses")


class Record:
    """The results of one model and prompt, in a file that is written whenever there is a new one."""

    def __init__(self, path: Path, origin: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self.data: dict[str, Any] = {"origin": origin, "chosen": {}, "plans": {}, "pieces": [], "keys": []}
        self.data |= {part: {} for part in PARTS}
        if resume and path.exists():
            self.data = json.loads(path.read_text())
            was = self.data["origin"]
            if other := [name for name in origin if json.loads(json.dumps(origin[name])) != was.get(name)]:
                raise SystemExit(f"{path} is of another {', '.join(other)}; give another -o, or begin with --fresh")

    def of(self, part: str, name: str, new: Any) -> Any:
        """The results of a plan in one part, by its name, ``new`` where there are none yet."""
        return self.data[part].setdefault(name, new)

    def save(self) -> None:
        write_atomically(self._path, json_text(self.data))


def unseen_texts() -> dict[str, dict[str, str]]:
    """Text by kind and title; calibration takes pages, single modules but these, and docstrings, and none of IDLE's."""
    library = Path(sysconfig.get_path("stdlib"))
    licences = [path for path in sorted(LICENCES.glob("*")) if path.is_file() and not path.is_symlink()]
    found = {"licences": licences or [library / "LICENSE.txt"], "manual": [library / "idlelib/help.html"]}
    found["changelog"] = [library / "idlelib" / name for name in ("News3.txt", "NEWS.txt")]
    kinds = {
        kind: {path.name: path.read_text("utf-8", "replace") for path in paths if path.exists()}
        for kind, paths in found.items()
    }
    kinds["manual"] = {name: _without_tags(source) for name, source in kinds["manual"].items()}
    return {"sources": python_sources(), **{kind: texts for kind, texts in kinds.items() if texts}}


def _without_tags(source: str) -> str:
    source = re.sub(r"(?s)<(head|script|style)\b.*?</\1>|<[^>]*>", "", source)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", html.unescape(source)).strip()


def cut_pieces(llm: AdaSkipLlama, n_each: int, n_tokens: int) -> list[TextItem]:
    """As many pieces of each kind as were asked for, or as there are, of each kind in turn."""
    kinds = []
    for kind, texts in unseen_texts().items():
        joined = {"joined": SEPARATOR.join(texts.values())}
        for n, source in [(n_each, texts), *((n, joined) for n in range(n_each, 0, -1))]:
            with suppress(DataError):
                kinds.append(text_items(llm, source, n_items=n, n_tokens=n_tokens, task=kind, drop_short=True))
                break
        else:
            print(f"{kind}: there are no {n_tokens} tokens of it, left out")
    return [piece for turn in itertools.zip_longest(*kinds) for piece in turn if piece is not None]


def make_plans(profile: Profile, prompt: int, wanted: Mapping[str, Sequence[float]], record: Record) -> dict[str, Any]:
    """Plans by name, one for all speed-ups that choose the same; what was chosen for which goes into the record."""
    plans: dict[str, Any] = {}
    for contender, speedups in wanted.items():
        for speedup in sorted(set(speedups)):
            record.data["chosen"].pop(key := f"{contender} {speedup:g}", None)
            try:
                plan = profile.plan(speedup=speedup, context=prompt, **CONTENDERS[contender])
            except BudgetError as error:
                print(f"{contender}: {error}")
                continue
            described = plan.to_dict()
            name = hashlib.sha256(json_text(described).encode()).hexdigest()[:12]
            skipped, bulk = plan.skipped("bulk"), plan.bulk or Bulk(plan.prefill)
            assert profile.cost is not None
            predicted = profile.cost.speedup(plan, prompt, "prefill")
            plans[name] = plan
            record.data["chosen"][key] = {"contender": contender, "wanted": speedup, "plan": name}
            record.data["plans"][name] = {
                "attention": skipped.attention,
                "ffn": skipped.ffn,
                "head": bulk.head,
                "tail": bulk.tail,
                "windowed": bulk.windowed,
                "window_size": bulk.window_size,
                "compensation": plan.compensation,
                "predicted": predicted,
            }
            n = f"{len(skipped.attention)} attentions and {len(skipped.ffn)} FFNs skipped"
            print(f"{key} x: {n}, {len(bulk.windowed)} windowed to {bulk.window_size}, predicted {predicted:.2f} x")
    return plans


def name_of(item: TextItem | QuestionItem) -> str:
    """An item's id, and a hash of its tokens: those of one id change with the number of items."""
    tokens = np.array(item.tokens if isinstance(item, TextItem) else item.prompt, np.int64)
    return f"{item.id} {hashlib.sha256(tokens.tobytes()).hexdigest()[:8]}"


def measure_texts(llm: AdaSkipLlama, plans: Mapping[str, SkipPlan], pieces: Sequence[TextItem], record: Record) -> None:
    """What each plan does to each piece: seconds to its first token, and means over the tokens behind the prompt.

    The whole model, which all is compared with, takes its turn among a few plans.
    """
    if is_busy(load := load_average()):
        print(f"the load of this machine is {load:.1f}: other programs disturb what is timed", file=sys.stderr)

    def run(plan: SkipPlan | None, tokens: Sequence[int]) -> tuple[float, Any]:
        llm.set_plan(plan)
        time_request(llm, tokens[:N_WARM], 0)
        seconds = time_request(llm, tokens[:-N_BEHIND], 0).first_token_s
        return seconds, llm.logits_behind(tokens[-N_BEHIND:])[:-1]

    for index, piece in enumerate(pieces):
        name, targets = name_of(piece), np.array(piece.tokens[1 - N_BEHIND :])
        left = [plan for plan in plans if name not in record.of("text", plan, {})]
        for group in (left[begin : begin + N_GROUP] for begin in range(0, len(left), N_GROUP)):
            took = {}
            for turn in in_turn(1 + len(group), index):
                plan = (WHOLE, *group)[turn]
                took[plan] = run(plans.get(plan), piece.tokens)
            whole_s, whole = took.pop(WHOLE)
            loss, best = losses(whole, targets), whole.argmax(axis=1)
            for plan, (seconds, own) in took.items():
                record.of("text", plan, {})[name] = {
                    "seconds": [seconds, whole_s],
                    "loss": float((losses(own, targets) - loss).mean()),
                    "agreement": float((own.argmax(axis=1) == best).mean()),
                    "kl": float(kl_divergences(whole, own).mean()),
                }
            record.save()
            told = ", ".join(f"{seconds:.2f}" for seconds, _ in took.values())
            print(f"text {index + 1} of {len(pieces)}, {piece.id}: {told} s, whole {whole_s:.2f} s", flush=True)


def measure_passkeys(
    llm: AdaSkipLlama, plans: Mapping[str, SkipPlan], items: Sequence[QuestionItem], record: Record
) -> None:
    """Whether each plan finds each pass key; the whole model is asked for what one of them misses."""
    for index, item in enumerate(items, 1):
        name, start = name_of(item), time.monotonic()
        for plan in (*plans, WHOLE):
            found = record.of("passkeys", plan, {})
            missed = any(record.of("passkeys", each, {}).get(name) == 0 for each in plans)
            if name not in found and (plan != WHOLE or missed):
                llm.set_plan(plans.get(plan))
                found[name] = float(finds_answer(llm, item))
                record.save()
        print(f"pass key {index} of {len(items)}, {time.monotonic() - start:.0f} s", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Measure what is not in the file yet."""
    profile = Profile.load(args.profile)
    if profile.cost is None:
        raise SystemExit("the profile has no cost model; run `adaskip-cpp calibrate MODEL --cost-only -o PROFILE`")
    n = args.threads or physical_cores()
    # Behind a prompt come the tokens judged, or an answer to a pass key.
    common: dict[str, Any] = {"n_threads": n, "n_threads_batch": n, "flash_attn": args.flash_attn, "verbose": False}
    llm = AdaSkipLlama(args.model, n_ctx=args.prompt + N_BEHIND + 8, n_gpu_layers=-1, **common)
    profile.model.check(llm.model_info, "the profile", args.model)
    settings = cost_settings(llm)
    if note := profile.cost.settings.note(settings):
        print(note)
    origin = {
        "model": Path(args.model).name,
        "fingerprint": llm.model_info.fingerprint,
        "profile": hashlib.sha256(args.profile.read_bytes()).hexdigest(),
        "prompt": args.prompt,
        "settings": asdict(settings),
        "version": version("adaskip-cpp"),
    }
    record = Record(args.output, origin, resume=not args.fresh)
    record.data["name"] = args.name or re.sub(r"[-.]gguf$", "", origin["model"])
    wanted = dict.fromkeys(CONTENDERS, args.others) | {PROMPT_MODE: args.speedups + args.passkeys}
    plans = make_plans(profile, args.prompt, wanted, record)
    pieces = cut_pieces(llm, args.pieces, args.prompt + N_BEHIND)
    record.data["pieces"] = [name_of(piece) for piece in pieces]
    record.save()
    parts = args.part or PARTS
    if "text" in parts:
        measure_texts(llm, plans, pieces, record)
    if "passkeys" in parts and args.passkeys:
        texts = unseen_texts()
        prose = SEPARATOR.join(text for kind in texts if kind != "sources" for text in texts[kind].values())
        items = synthetic_items(
            llm, prose, tasks=("passkey",), lengths=(args.prompt,), depths=DEPTHS, n_per=args.keys_per_depth
        )
        record.data["keys"] = [name_of(item) for item in items]
        asked = {record.data["chosen"].get(f"{PROMPT_MODE} {speedup:g}", {}).get("plan") for speedup in args.passkeys}
        measure_passkeys(llm, {name: plan for name, plan in plans.items() if name in asked}, items, record)
    llm.close()
    print(table(record.data))


def figures(data: dict[str, Any], plan: str) -> dict[str, Interval]:
    """Mean quality over the pieces of the last run that a plan was measured on, and its speed on them."""
    per_piece = data["text"].get(plan, {})
    rows = [per_piece[name] for name in data["pieces"] if name in per_piece]
    found = {name: mean_interval([row[name] for row in rows]) for name in ("loss", "agreement", "kl") if rows}
    if rows:
        own, whole = zip(*(row["seconds"] for row in rows), strict=True)
        found["speed"] = ratio_interval(whole, own)
    return found


def table(data: dict[str, Any]) -> str:
    """The results of one file as Markdown."""
    settings, prompt, by_whole = data["origin"]["settings"], data["origin"]["prompt"], data["passkeys"].get(WHOLE, {})
    kinds = [name.split("/")[0] for name in data["pieces"]]
    texts = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in dict.fromkeys(kinds))
    whole = [row["seconds"][1] for rows in data["text"].values() for row in rows.values()]
    flash = "flash attention" if settings["flash_attention"] else "no flash attention"
    lines = [
        f"### {data['name']}, {prompt:,} tokens\n",
        f"{settings['cpu']}, {settings['n_threads']} threads, llama-cpp-python {settings['llama_cpp_python']}, "
        f"adaskip-cpp {data['origin']['version']}, n_batch {settings['n_batch']}, n_ubatch {settings['n_ubatch']}, "
        f"KV {settings['type_k']}, {flash}. {N_BEHIND} tokens behind each of {len(kinds)} prompts ({texts}), each "
        f"a round in turn; whole model {f'{statistics.median(whole):.2f} s' if whole else '-'}.\n",
        "| | predicted | skipped: attentions, FFNs; windowed | time to first token | added loss | agreement | KL "
        "| pass keys |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(CONTENDERS)
    for row in sorted(data["chosen"].values(), key=lambda row: (order.index(row["contender"]), row["wanted"])):
        plan, values = data["plans"][row["plan"]], figures(data, row["plan"])
        own = data["passkeys"].get(row["plan"], {})
        n_found = sum(own.get(name, 0) >= 1 for name in data["keys"])
        lost = [name for name in data["keys"] if own.get(name) == 0]
        complete = data["keys"] and all(name in own for name in data["keys"]) and all(name in by_whole for name in lost)
        n_lost = sum(by_whole.get(name, 0) >= 1 for name in lost)
        cells = [
            row["contender"],
            f"{plan['predicted']:.2f}",
            f"{len(plan['attention'])}, {len(plan['ffn'])}; {len({*plan['windowed']} - {*plan['attention']})}",
            _told(values.get("speed"), 2),
            _told(values.get("loss"), 3),
            _told(values.get("agreement"), 2, ends=False),
            _told(values.get("kl"), 3, ends=False),
            f"{n_found} of {len(data['keys'])}, {n_lost} lost" if complete else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _told(figure: Interval | None, digits: int, *, ends: bool = True) -> str:
    if figure is None:
        return ""
    value = f"{figure.value:.{digits}f}"
    return f"{value} ({figure.low:.{digits}f} to {figure.high:.{digits}f})" if ends else value


def plot(every: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw added loss against speed, a panel per file, three in a row."""
    n_columns = min(len(every), 3)
    n_rows = -(-len(every) // n_columns)
    size = {"width_in": 3.0 * n_columns + 0.5, "height_in": 2.6 * n_rows + 0.5}
    fig, panels = plots.panels(n_rows, n_columns, **size, sharey=True)
    handles: dict[str, Any] = {}
    lowest, highest = 0.0, 0.1
    for axes, data in itertools.zip_longest(panels, every):
        if data is None:
            axes.set_visible(False)
            continue
        fastest = 1.0
        handles["whole model"] = axes.plot([1.0], [0.0], **plots.STRATEGY["full"].points, zorder=4)[0]
        for contender, look in zip(CONTENDERS, LOOKS, strict=True):
            chosen = [row["plan"] for row in data["chosen"].values() if row["contender"] == contender]
            values = [figures(data, plan) for plan in dict.fromkeys(chosen)]
            values = sorted((each for each in values if len(each) == 4), key=lambda each: each["speed"].value)
            if not values:
                continue
            x, y = ([each[name] for each in values] for name in ("speed", "loss"))
            ends = [[[each.value - each.low for each in of], [each.high - each.value for each in of]] for of in (x, y)]
            at = [each.value for each in x], [each.value for each in y]
            bars: dict[str, Any] = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.6}
            axes.errorbar(*at, xerr=ends[0], yerr=ends[1], ecolor=look.colour, **bars)
            handles[contender] = axes.plot(*at, **look.line)[0]
            lowest, highest, fastest = min(lowest, *at[1]), max(highest, *at[1]), max(fastest, *at[0])
        axes.set_xlim(0.95, fastest + 0.1)  # by the points: a round that was disturbed makes a bar that dwarfs them
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_yticks([0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plots.title(axes, f"{data['name']}, {data['origin']['prompt']:,} tokens")
        axes.set_xlabel("first token, times as fast")
    panels[0].set_ylim(lowest - 0.01, 1.3 * highest)
    for axes in panels[::n_columns]:
        axes.set_ylabel("added loss, nats per token")
    plots.legend(
        fig, handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=2 * n_columns - 1
    )
    with tempfile.TemporaryDirectory() as folder:
        plots.save(fig, folder, "prompt")
        write_atomically(path, Path(folder, "prompt.svg").read_bytes())


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    each.add_argument("model")
    each.add_argument("profile", type=Path)
    each.add_argument("-o", "--output", type=Path, required=True)
    each.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    each.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    each.add_argument("--speedups", type=float, nargs="*", default=[1.1, 1.25, 1.4, 1.5, 1.6, 1.8, 2.0, 2.5])
    each.add_argument("--others", type=float, nargs="*", default=[1.1, 1.25, 1.5, 2.0], help="of the other contenders")
    each.add_argument("--passkeys", type=float, nargs="*", default=[1.25, 1.4], help="speed-ups of the prompt mode")
    each.add_argument("--keys-per-depth", type=int, default=3)
    each.add_argument("--pieces", type=int, default=2, help="of each kind of text")
    each.add_argument("--threads", type=int, help="all physical cores by default")
    each.add_argument("--flash-attn", action="store_true")
    each.add_argument("--name", help="of the model, for the table and the picture")
    each.add_argument("--fresh", action="store_true", help="measure everything again")
    for command in ("table", "plot"):
        each = commands.add_parser(command)
        each.add_argument("files", type=Path, nargs="+")
    each.add_argument("-o", "--output", type=Path, default=Path("docs/prompt.svg"))
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
        return
    every = [json.loads(path.read_text()) for path in args.files]
    if args.command == "plot":
        plot(every, args.output)
    else:
        print("\n".join(map(table, every)))


if __name__ == "__main__":
    main()
