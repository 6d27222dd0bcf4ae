"""Programs that people have, against a real server process: Simon Willison's llm, lm-evaluation-harness."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.expected import log_probabilities
from oracles.served import Server, serving

from adaskip_cpp import AdaSkipLlama

pytestmark = pytest.mark.slow

CONTEXT, CHOICES = "the to of an re in er", (" he on", " th a to", " t of in the")


@pytest.fixture(scope="module")
def server(served_model: Path, served_plan: Path) -> Iterator[Server]:
    with serving(served_model, "--plan", str(served_plan), "--ctx", "1024") as running:
        yield running


def test_llm_asks_through_an_openai_compatible_entry(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    entry = f"- model_id: tiny\n  model_name: tiny\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for streaming in ((), ("--no-stream",)):
        words = "-m llm prompt -m tiny the -o max_tokens 20 --key any"
        command = [sys.executable, *words.split()]
        done = subprocess.run([*command, *streaming], env=environment, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr.decode()


def test_lm_eval_reads_loglikelihoods(server: Server, served_model: Path, tmp_path: Path) -> None:
    """Against the logits of AdaSkipLlama: a prompt whose own logits are read runs whole, whatever the plan."""
    pytest.importorskip("lm_eval")
    rows: list[Any] = [{"context": f"{CONTEXT} {word}", "choices": CHOICES, "gold": 0} for word in ("a", "the", "on")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        "task: tiny_task\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ntarget_delimiter: ''\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "tiny_task", "--log_samples"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--model_args"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command.append(f"model=tiny,base_url={server.url}/v1/completions,num_concurrent=1,max_length=512")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    llm = AdaSkipLlama(str(served_model), n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for line, row in zip(samples.read_text().splitlines(), rows, strict=True):
        for (found, _), choice in zip(json.loads(line)["filtered_resps"], CHOICES, strict=True):
            texts = row["context"].encode(), (row["context"] + choice).encode()
            context, whole = (llm.tokenize(each, add_bos=False) for each in texts)
            assert whole[: len(context)] == context
            llm.reset()
            llm.eval(whole)
            each = log_probabilities(llm.scores[len(context) - 1 : len(whole) - 1])
            said = each[np.arange(len(each)), whole[len(context) :]]
            assert float(found) == pytest.approx(said.sum(), abs=1e-2)
    llm.close()
