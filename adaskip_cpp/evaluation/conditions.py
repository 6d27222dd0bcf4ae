"""What was measured with what: the settings on which results depend, and the same for people."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..files import content_hash
from ..planning.profile import Profile
from .evaluate import Work


def evaluation_settings(llm: AdaSkipLlama, profile: Profile | None, work: Work) -> dict[str, Any]:
    """Return plain JSON values on which results depend: with others, a new evaluation begins."""
    return {
        "model": asdict(llm.model_info),
        "profile": None if profile is None else content_hash(profile),
        **work.to_settings(),
        "machine": asdict(cost_settings(llm)),
        "package": metadata.version("adaskip-cpp"),
    }


def configuration(
    model: str, profile: Profile | None, work: Work, settings: Mapping[str, Any], words: Mapping[str, str]
) -> dict[str, str]:
    machine, info = settings["machine"], settings["model"]
    layers = machine["n_gpu_layers"]
    lines = {
        "Model": f"{os.path.basename(model)} ({info['architecture']}, {info['n_layer']} layers, "
        f"{os.path.getsize(model) / 1e6:,.0f} MB, fingerprint {info['fingerprint'][:12]})",
    }
    if profile is not None:
        read = f"{profile.n_requests} requests, {profile.n_tokens:,} tokens of {profile.corpus or 'unknown text'}"
        lines["Profile"] = read + (f", {profile.created}" if profile.created else "")
    if (frontier := next((each.frontier for each in work.contenders if each.frontier), None)) is not None:
        n = len(frontier.points)
        lines["Promises"] = f"for each prompt the fastest of {n} plans that loses no more nats per token at its length"
    lines |= words
    if work.speed_prompt:
        lines["Speed"] = (
            f"{work.n_rounds} rounds of a prompt of {len(work.speed_prompt):,} tokens and {work.n_continuation} more, "
            "all contenders in turn, the order reversed every second round"
        )
    return {
        **lines,
        "Machine": f"{machine['cpu']}; {machine['n_threads']} threads; devices: {', '.join(machine['devices'])}; "
        f"layers on a GPU: {'all that fit' if layers < 0 else layers}",
        "Evaluation": f"KV cache {machine['type_k']} and {machine['type_v']}, flash attention "
        f"{'on' if machine['flash_attention'] else 'off'}, batches of up to {machine['n_ubatch']} tokens, weights "
        f"on the CPU {'repacked' if machine['repack'] else 'as they are in the file'}",
        "Versions": f"adaskip-cpp {settings['package']}, llama-cpp-python {machine['llama_cpp_python']}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }
