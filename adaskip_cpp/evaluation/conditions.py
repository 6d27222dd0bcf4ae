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


def evaluation_settings(llm: AdaSkipLlama, profile: Profile, work: Work) -> dict[str, Any]:
    """Return plain JSON values on which results depend: with others, a new evaluation begins."""
    machine = asdict(cost_settings(llm))
    return {
        "model": asdict(llm.model_info),
        "profile": content_hash(profile),
        **work.to_settings(),
        # Batch sizes follow the context, which follows the work.
        "machine": {name: value for name, value in machine.items() if name not in ("n_batch", "n_ubatch")},
        "package": metadata.version("adaskip-cpp"),
    }


def configuration(
    model: str, profile: Profile, work: Work, settings: Mapping[str, Any], words: Mapping[str, str]
) -> dict[str, str]:
    machine, info = settings["machine"], settings["model"]
    layers = machine["n_gpu_layers"]
    lines = {
        "Model": f"{os.path.basename(model)} ({info['architecture']}, {info['n_layer']} layers, "
        f"{os.path.getsize(model) / 1e6:,.0f} MB, fingerprint {info['fingerprint'][:12]})",
        "Profile": f"{profile.n_requests} requests, {profile.n_tokens:,} tokens of {profile.corpus or 'unknown text'}"
        + (f", {profile.created}" if profile.created else ""),
        **words,
    }
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
        f"{'on' if machine['flash_attention'] else 'off'}, batches of up to 512 tokens",
        "Versions": f"adaskip-cpp {settings['package']}, llama-cpp-python {machine['llama_cpp_python']}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }
