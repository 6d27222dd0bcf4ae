"""What a benchmark found: its tables, its pictures, and the configuration that they hold for."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.report import megabytes
from ..measuring.cores import BUSY, load_average
from .table import FULL, PHASES, STOCK, BenchTimes, Row, verdict

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.llama import AdaSkipLlama
    from ..intervals import Interval
    from .bench import BenchResult

__all__ = ["configuration", "plot", "print_report", "seconds"]

_TITLES = {"prefill": "Time to first token", "decode": "Time per token"}


def configuration(llm: AdaSkipLlama) -> dict[str, Any]:
    """Return what the times depend on and a loaded model tells, as plain JSON values."""
    from gguf import LlamaFileType

    file_type = llm.metadata.get("general.file_type", "")
    try:
        quantisation = LlamaFileType(int(file_type)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        quantisation = "unknown"
    load = load_average()
    return {
        "model": llm.metadata.get("general.name") or os.path.basename(llm.model_path),
        "file": os.path.basename(llm.model_path),
        "architecture": llm.model_info.architecture,
        "fingerprint": llm.model_info.fingerprint,
        "n_layer": llm.n_layer,
        "file_bytes": os.path.getsize(llm.model_path),
        "quantisation": quantisation,
        "adaskip_cpp": metadata.version("adaskip-cpp"),
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "load_average": round(load, 2),
        "busy": load > BUSY,
    }


def seconds(value: float) -> str:
    """``12.3 ms`` or ``1.23 s``, to three digits."""
    return f"{value:.3g} s" if value >= 100 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


# --- tables -----------------------------------------------------------------------------------------------------------


def print_report(out: Console, result: BenchResult, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Print the tables and the configuration."""
    if not out.is_terminal:
        out.width = max(out.width, 100)
    if not rows:
        out.print("No round was complete; nothing is known.")
    for phase in PHASES:
        of_phase = [row for row in rows if row.phase == phase]
        for context in sorted({row.context for row in of_phase}):
            _print_phase(out, [row for row in of_phase if row.context == context])
    if result.usage:
        _print_usage(out, result)
    _print_configuration(out, result, about)


def _print_phase(out: Console, rows: Sequence[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    references = [name for name in (STOCK, FULL) if any(name in row.against for row in rows)]
    with_ideal = any(row.of_ideal is not None for row in rows)
    first = rows[0]
    n_rounds = f"{first.n_rounds} round{'s' if first.n_rounds > 1 else ''}"
    title = f"{_TITLES[first.phase]}, prompt of {first.context:,} tokens, {n_rounds}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("median\n(quartiles)", justify="right", no_wrap=True)
    for name in references:
        table.add_column(f"against {name}\n(95% interval)", no_wrap=True)
    if with_ideal:
        table.add_column("ideal", justify="right")
        table.add_column("of the ideal\n(95% interval)", justify="right", no_wrap=True)
    for row in rows:
        cells = [row.contender, f"{seconds(row.median_s)}\n({_range(row.low_s, row.high_s)})"]
        cells += [_two_lines(verdict(row.against[name])) if name in row.against else "" for name in references]
        if with_ideal:
            cells.append("" if row.ideal is None else f"{row.ideal.value:.2f} x")
            cells.append("" if row.of_ideal is None else _percent(row.of_ideal))
        table.add_row(*cells)
    out.print(table)


def _range(low: float, high: float) -> str:
    first, last = seconds(low).split(), seconds(high).split()
    return f"{first[0]} to {' '.join(last)}" if first[1] == last[1] else f"{' '.join(first)} to {' '.join(last)}"


def _two_lines(text: str) -> str:
    return text.replace(" (", "\n(").replace(", ", ",\n")  # the words stay together, the interval goes below


def _percent(interval: Interval) -> str:
    ends = f"\n({interval.low * 100:.1f} to {interval.high:.1%})" if math.isfinite(interval.low) else ""
    return f"{interval.value:.1%}{ends}"


def _print_usage(out: Console, result: BenchResult) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Memory and graphs", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("peak memory", "KV", "nodes, prefill", "nodes, decode", "graphs built", "reused"):
        table.add_column(name, justify="right")
    for name in result.times.contenders:
        usage = result.usage.get(name)
        if usage is not None:
            sizes = [None if size is None else megabytes(size) for size in (usage.peak_bytes, usage.kv_bytes)]
            counts = (result.nodes_prefill.get(name), usage.nodes, usage.graphs_built, usage.graphs_reused)
            cells = sizes + [None if count is None else f"{count:,}" for count in counts]
            table.add_row(name, *(cell or "not told" for cell in cells))
    out.print(table)


def _print_configuration(out: Console, result: BenchResult, about: dict[str, Any]) -> None:
    settings, machine = result.settings, result.machine
    lines = [
        f"{about['model']} ({about['architecture']}, {about['n_layer']} layers, {about['quantisation']}, "
        f"{megabytes(about['file_bytes'])})",
    ]
    if machine:
        n_threads = f"{settings.n_threads} thread{'s' if settings.n_threads > 1 else ''}"
        devices = [device for device in machine["devices"] if device != machine["cpu"]]
        layers = {-1: "all", 0: "no"}.get(machine["n_gpu_layers"], str(machine["n_gpu_layers"]))
        offloaded = f", {layers} layers offloaded to: {', '.join(devices)}" if devices else ", no other device"
        lines += [
            f"{machine['cpu']}, {n_threads}{offloaded}",
            f"batch {machine['n_batch']}, ubatch {machine['n_ubatch']}, flash attention "
            f"{'on' if machine['flash_attention'] else 'off'}, KV {machine['type_k']}/{machine['type_v']}",
        ]
    lines.append(
        f"adaskip-cpp {about['adaskip_cpp']}, llama-cpp-python {about['llama_cpp_python']}, "
        f"Python {about['python']}, {about['os']}"
    )
    for name, plan in result.plans.items():
        lines.append(
            f"{name}: {plan.prefill.n_skip} of {2 * plan.n_layer} sublayers skipped in prefill "
            f"({len(plan.prefill.attention)} attention, {len(plan.prefill.ffn)} FFN), {plan.decode.n_skip} in decode; "
            f"compensation {plan.compensation}"
        )
    lines.append(
        "Every contender in a process of its own, a new one each round, in turn, in reverse every second round; "
        f"{settings.n_decode} tokens decoded behind each prompt; load average before {about['load_average']:.2f}."
    )
    out.print("\n".join(lines), style="dim", soft_wrap=True)


# --- pictures ---------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], times: BenchTimes, target: str) -> list[Path]:
    """Draw times and ratios, and return the files written: PNG and SVG of each.

    Args:
        rows: of :func:`adaskip_cpp.bench.table.table`.
        times: what they come from.
        target: a folder, or a path whose last part begins the files' names.

    Raises:
        PackageMissingError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    from ..pictures import plots

    folder, stem = _target(target)
    written = plots.save(_draw_times(rows, times), folder, f"{stem}-times")
    if any(row.against for row in rows):
        written += plots.save(_draw_ratios(rows, times), folder, f"{stem}-ratios")
    return written


def _target(target: str) -> tuple[str, str]:
    if target.endswith(("/", os.sep)) or os.path.isdir(target):
        return target, "bench"
    folder, name = os.path.split(target)
    return folder or ".", name.removesuffix(".png").removesuffix(".svg")


def _draw_times(rows: Sequence[Row], times: BenchTimes) -> Any:
    from ..pictures import plots

    fig, axes = plots.panels(1, 2, width_in=6.5, height_in=3.2)
    for axis, phase in zip(axes, PHASES, strict=True):
        for index, name in enumerate(times.contenders):
            own = [row for row in rows if row.phase == phase and row.contender == name]
            unit = 1.0 if phase == "prefill" else 1e3
            middle = [row.median_s * unit for row in own]
            spread = [
                [(row.median_s - row.low_s) * unit for row in own],
                [(row.high_s - row.median_s) * unit for row in own],
            ]
            axis.errorbar([row.context for row in own], middle, yerr=spread, label=name, capsize=2, **_look(index).line)
        _context_axis(axis, [row.context for row in rows])
        axis.set_ylim(bottom=0)
        axis.set_ylabel("seconds" if phase == "prefill" else "milliseconds")
        plots.title(axis, _TITLES[phase])
    _legend(fig, axes[0])
    return fig


def _draw_ratios(rows: Sequence[Row], times: BenchTimes) -> Any:
    from ..pictures import plots

    reference = STOCK if STOCK in times.contenders else FULL
    fig, axes = plots.panels(1, 2, width_in=6.5, height_in=3.2, sharey=True)
    contexts = sorted({row.context for row in rows})
    names = [
        name for name in times.contenders if any(name == row.contender and reference in row.against for row in rows)
    ]
    for axis, phase in zip(axes, PHASES, strict=True):
        axis.axhline(1.0, color=plots.INK, linewidth=0.8)
        ideal: list[tuple[float, float]] = []
        for index, name in enumerate(names):
            offset = 0.7 * ((index + 0.5) / len(names) - 0.5)
            own = [row for row in rows if row.phase == phase and row.contender == name and reference in row.against]
            x = [contexts.index(row.context) + offset for row in own]
            against = [row.against[reference] for row in own]
            ends = [[max(i.value - i.low, 0) for i in against], [max(i.high - i.value, 0) for i in against]]
            look = _look(times.contenders.index(name))
            axis.errorbar(x, [i.value for i in against], yerr=ends, label=name, capsize=2.5, **look.points)
            ideal += [(place, row.ideal.value) for place, row in zip(x, own, strict=True) if row.ideal is not None]
        if ideal:
            bar: dict[str, Any] = {"marker": "_", "color": plots.INK, "markersize": 11, "linestyle": "none"}
            axis.plot(*zip(*ideal, strict=True), label="ideal, against no plan", **bar)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axis.set_xlim(-0.6, len(contexts) - 0.4)
        axis.set_xlabel("tokens of the prompt")
        plots.title(axis, _TITLES[phase])
    axes[0].set_ylabel(f"times as fast as {reference}")
    _legend(fig, axes[0])
    return fig


def _legend(fig: Any, axis: Any) -> None:
    """Below the panels: contenders of any number hide no point there."""
    from ..pictures import plots

    handles, labels = axis.get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4),
        frameon=False,
        fontsize=plots.LEGEND_PT,
        labelcolor=plots.INK,
        handlelength=3.0,
    )


def _look(index: int) -> Any:
    from ..pictures import plots

    return plots.OTHERS[index % len(plots.OTHERS)]


def _context_axis(axis: Any, contexts: Sequence[int]) -> None:
    ticks = sorted(set(contexts))
    axis.set_xscale("log", base=2)
    axis.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axis.set_xticks(ticks, [f"{context:,}" for context in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens of the prompt")
