"""rpc-servers of llama.cpp: what travels, and what cannot be used.

That devices of servers compute the same is in test_backends.py.
"""

import os
import socket
from dataclasses import replace

import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.rpc_server import bytes_travelled
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan, add_rpc_server
from adaskip_cpp.engine.binding import lib
from adaskip_cpp.engine.rpc import supports_rpc
from adaskip_cpp.errors import RPCServerError

without_rpc = pytest.mark.skipif(supports_rpc(), reason="ggml was built with RPC")
with_rpc = pytest.mark.skipif(not supports_rpc(), reason="ggml was built without RPC")


@without_rpc
def test_a_ggml_without_rpc_is_told_and_how_to_have_one_with_it() -> None:
    with pytest.raises(RPCServerError, match="GGML_RPC=ON"):
        add_rpc_server("127.0.0.1:50052")


@with_rpc
@pytest.mark.parametrize(
    "endpoint", ["", "nowhere", "127.0.0.1:", "127.0.0.1:1", "no.such.host.invalid:5", "a:b", "\0"]
)
def test_where_no_server_is_an_error_says_what_to_do(endpoint: str) -> None:
    """ggml would abort."""
    with pytest.raises(RPCServerError, match=r"host:port$"):
        add_rpc_server(endpoint)


@with_rpc
def test_a_server_that_is_added_again_is_there_once(rpc_servers: list[str]) -> None:
    """ggml would list its devices twice; and a server that holds a model of this process answers no other."""
    n = lib.ggml_backend_dev_count()
    for endpoint in rpc_servers:
        add_rpc_server(endpoint)
    assert lib.ggml_backend_dev_count() == n


@with_rpc
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks the server")
def test_another_kind_of_server_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        if os.fork() == 0:
            client, _ = server.accept()
            client.recv(64)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            os._exit(0)
        with pytest.raises(RPCServerError, match=r"host:port$"):
            add_rpc_server(endpoint)


def test_a_plan_adds_nothing_to_what_travels(rpc_servers: list[str], open_tiny: Open) -> None:
    """Bytes to and from both servers, of a prompt and of tokens of the answer; what is skipped is not described.

    Of the two together: which tokens have outputs is an input of the last layer, and may move to the server before. A
    prompt with a bulk is read in up to two more pieces, its head and its tail, each of which has a graph of its own.
    """
    llm = open_tiny(n_gpu_layers=-1, n_ctx=256)

    def travelled() -> np.ndarray:
        return np.sum([bytes_travelled(endpoint) for endpoint in rpc_servers], axis=0)

    def of(plan: SkipPlan | None) -> list[np.ndarray]:
        llm.set_plan(plan)
        found = []
        for _ in range(2):  # a plan's vectors travel once, when it is set or first used
            llm.reset()
            seen = [travelled()]
            for piece in (tokens(60), [5], [6]):
                llm.eval(piece)
                seen.append(travelled())
            found = list(np.diff(seen, axis=0))
        return found

    whole = of(None)
    assert all(received > 4 * llm.n_vocab() for _, received in whole), "logits travel"
    _, of_a_new_graph, _ = whole
    for plan in (
        SkipPlan.manual(llm.n_layer, attention=[0, 2], ffn=[1]),
        SkipPlan.manual(llm.n_layer, ffn=[0, 1, 2], phase="decode"),
        SkipPlan.manual(llm.n_layer, attention=[1, 2], ffn=[1, 2], phase="bulk"),
    ):
        more = 2 * of_a_new_graph if plan.bulk is not None else 0
        for n_whole, n_plan in zip([whole[0] + more, *whole[1:]], of(plan), strict=True):
            assert (n_plan <= n_whole).all(), (n_plan, n_whole, plan)


@pytest.mark.parametrize("what", ["vectors", "context"])
def test_what_is_freed_between_two_evaluations_ends_nothing(what: str, rpc_servers: list[str], open_tiny: Open) -> None:
    """A server forgets its last graph with every buffer that it frees; asked for it again, it hangs up, ggml aborts."""
    llm = open_tiny(n_gpu_layers=-1)
    if what == "vectors":
        skipped = SkipPlan.manual(llm.n_layer, ffn=[1], phase="decode")
        bias = np.ones((llm.n_layer, 2, llm.n_embd()), np.float32)
        llm.set_plan(replace(skipped, decode=replace(skipped.decode, bias=bias)))
    passes = []
    for _ in range(2):
        llm.reset()
        llm.eval(tokens(9))
        passes.append(llm.scores[: llm.n_tokens].copy())
        if what == "vectors":
            llm.set_plan(None)
        else:
            open_tiny(n_gpu_layers=-1).close()
    np.testing.assert_array_equal(*passes)
