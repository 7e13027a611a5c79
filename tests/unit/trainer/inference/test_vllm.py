"""The client and the server with a real vLLM, on a CPU: `make night` with MUSTER_TEST_VLLM, a Python that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launcher.quickstart.corpus import pretraining_texts
from launcher.quickstart.model import LlamaShape, make_model
from tests.support.fake_vllm import save_adapter
from tests.support.waiting import tail, wait_for
from trainer.errors import InputError
from trainer.inference.client import EngineClient
from trainer.inference.patience import Bounds
from trainer.inference.sampling import EngineText, SamplingSettings
from trainer.inference.server import BASE, VLLMServer

PYTHON = os.environ.get("MUSTER_TEST_VLLM", "")
TEMPERATURE = 0.7
SETTINGS = SamplingSettings(24, temperature=TEMPERATURE)
PROMPTS = [[1, 5 + i // 4, 9, 40 + i // 4] for i in range(32)]  # groups of four texts
SEEDS = list(range(32))
pytestmark = [
    pytest.mark.night,
    pytest.mark.skipif(not PYTHON, reason="MUSTER_TEST_VLLM does not name a Python that has vLLM"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM on a CPU gets ready with a head_dim of 16, and ends at the first text.
    shape = LlamaShape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=384, positions=512)
    folder = make_model(tmp_path_factory.mktemp("vllm") / "model", shape, pretraining_texts(seed=3, count=200), seed=3)
    # vLLM would take these for every request that does not say otherwise.
    taken = {"do_sample": True, "top_k": 3, "repetition_penalty": 1.3, "max_new_tokens": 5, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(taken))
    return folder


@pytest.fixture(scope="module")
def adapters(model: Path) -> list[str]:
    # Wide weights: an untrained model's distribution is flat, and every text would have the same log-probabilities.
    return [str(save_adapter(model, model.parent / f"adapter{seed}", seed, scale=0.4)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[VLLMServer]:
    made = VLLMServer(
        PYTHON, model, lora_rank=8, dtype="float32", max_model_len=128, device="cpu", adapters=2,
        log=model.parent / "vllm.log",
    )  # fmt: skip
    began = time.monotonic()
    made.start()
    made.wait_ready(900)
    print(f"\nvLLM is ready after {time.monotonic() - began:.1f} s")
    yield made
    made.close()


def client_of(server: VLLMServer, settings: SamplingSettings = SETTINGS) -> EngineClient:
    return EngineClient([server.address], settings, base=BASE, api_key=server.api_key, bounds=Bounds(patience_s=60))


def model_of(base: Path, adapter: str | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def recomputed(model: Any, prompt: list[int], text: EngineText, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text.tokens])).logits[0, len(prompt) - 1 : -1].float()
    found: torch.Tensor = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(text.tokens)[:, None])[:, 0]
    return found


def differences(model: Any, texts: Sequence[EngineText]) -> torch.Tensor:
    pairs = zip(PROMPTS, texts, strict=True)
    return torch.cat([torch.tensor(t.logps) - recomputed(model, p, t, TEMPERATURE) for p, t in pairs]).abs()


def test_texts_and_log_probabilities(server: VLLMServer, model: Path, adapters: list[str]) -> None:
    client = client_of(server)
    client.check()
    client.load("a", adapters[0])
    client.load("b", adapters[1])
    assert client.adapters() == {server.address: {"a": adapters[0], "b": adapters[1]}}
    written = {}
    for name, folder, other in (("a", *adapters), ("b", *adapters[::-1]), (BASE, None, adapters[0])):
        began = time.monotonic()
        texts = written[name] = client.write(PROMPTS, SEEDS, name)
        took_s = time.monotonic() - began
        off, wrong = (differences(model_of(model, one), texts) for one in (folder, other))
        print(f"\n{name}: {len(off)} tokens in {took_s:.1f} s; their log-probabilities differ by {off.mean():.1e} on")
        print(f"average, {off.max():.1e} at most, and from another adapter's by {wrong.mean():.1e}")
        assert off.mean() < 1e-4
        assert wrong.mean() > 1e-2
        assert {text.adapter for text in texts} == {name}
        assert any(len(text.tokens) == SETTINGS.max_tokens for text in texts)
        for text in texts:
            assert text.finished == (text.tokens[-1] == 2)
    assert [t.tokens for t in written["a"]] != [t.tokens for t in written["b"]]
    assert len({tuple(text.tokens) for text in written["a"][:4]}) == 4  # a group's texts differ
    again = client.write(PROMPTS, SEEDS, "a")
    same = sum(x.tokens == y.tokens for x, y in zip(written["a"], again, strict=True))
    print(f"\n{same} of {len(again)} texts are the same when written again")


def test_greedy_texts_are_those_of_transformers(server: VLLMServer, model: Path, adapters: list[str]) -> None:
    client = client_of(server, SamplingSettings(24, temperature=0.0))
    client.load("a", adapters[0])
    reference = model_of(model, adapters[0])
    for prompt, text in zip(PROMPTS[::4], client.write(PROMPTS[::4], SEEDS[::4], "a"), strict=True):
        expected = list(prompt)
        for _ in range(len(text.tokens)):
            with torch.no_grad():
                expected.append(int(reference(torch.tensor([expected])).logits[0, -1].argmax()))
        assert prompt + text.tokens == expected


def test_the_end_token_a_stop_string_and_top_p(server: VLLMServer, model: Path) -> None:
    (long,) = client_of(server).write([PROMPTS[0]], [3], BASE)
    end = long.tokens[4]
    (ended,) = client_of(server, SamplingSettings(24, TEMPERATURE, stop_token_ids=(end,))).write(
        [PROMPTS[0]], [3], BASE
    )
    assert (ended.finished, ended.tokens) == (True, long.tokens[: long.tokens.index(end) + 1])
    stop = long.text[6]
    (ended,) = client_of(server, SamplingSettings(24, TEMPERATURE, stop=(stop,))).write([PROMPTS[0]], [3], BASE)
    assert (ended.finished, ended.text) == (True, long.text[: long.text.index(stop)])
    assert ended.tokens == long.tokens[: len(ended.tokens)]
    (narrow,) = client_of(server, SamplingSettings(24, TEMPERATURE, top_p=0.5)).write([PROMPTS[0]], [3], BASE)
    reference = recomputed(model_of(model, None), PROMPTS[0], narrow, TEMPERATURE)
    assert (torch.tensor(narrow.logps) > reference + 0.3).all()  # of the set that was drawn from: about log 2 more


def test_what_vllm_refuses(server: VLLMServer, model: Path) -> None:
    with pytest.raises(InputError, match="Token id 100000 is out of vocabulary"):
        client_of(server).write([[100_000]], [0], BASE)
    # vLLM shortens such a text without a word.
    with pytest.raises(InputError, match="ended a text after 8 tokens for its length, and 24 were asked for"):
        client_of(server).write([[5] * 120], [0], BASE)
    with pytest.raises(InputError, match="rank 32 is greater than max_lora_rank 8"):
        client_of(server).load("c", str(save_adapter(model, model.parent / "wide", 3, rank=32)))
    with pytest.raises(InputError, match="401"):
        EngineClient([server.address], SETTINGS, api_key="another").check()


def test_a_server_that_was_killed_is_started_again_and_gets_its_adapter(
    server: VLLMServer, adapters: list[str]
) -> None:
    client = EngineClient([server.address], SETTINGS, base=BASE, api_key=server.api_key, watch=server.revive)
    client.load("a", adapters[0])
    before = client.write(PROMPTS[:4], SEEDS[:4], "a")
    family = family_of(server)
    assert any("EngineCore" in title(process) for process in family)
    assert not any(server.api_key in title(process) for process in family)
    api = next(process for process in family if "api_server" in title(process))
    began = time.monotonic()
    api.kill()
    wait_for(lambda: not server.alive, "the death is seen", 60)
    assert not any(process.is_running() for process in family)
    print(f"\nnothing is left {time.monotonic() - began:.1f} s after the server was killed")
    assert [text.tokens for text in client.write(PROMPTS[:4], SEEDS[:4], "a")] == [text.tokens for text in before]
    print(f"the texts are there again after {time.monotonic() - began:.1f} s")
    assert server.api_key not in server.log.read_text()


@pytest.mark.parametrize("killed", ["parent", "parent and guard"])
def test_nothing_is_left_of_a_server_whose_parent_was_killed(model: Path, tmp_path: Path, killed: str) -> None:
    program = f"""
import sys, time
from pathlib import Path
from trainer.inference.server import VLLMServer
server = VLLMServer({PYTHON!r}, {str(model)!r}, lora_rank=8, dtype="float32", max_model_len=128, device="cpu",
                    log=Path({str(tmp_path / "log")!r}))
server.start()
server.wait_ready(900)
print("ready", flush=True)
time.sleep(3600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n", tail(tmp_path / "log")
    family = psutil.Process(parent.pid).children(recursive=True)
    (guard,) = psutil.Process(parent.pid).children()
    began = time.monotonic()
    parent.kill()
    if killed == "parent and guard":
        guard.kill()
    parent.wait()
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "all is gone", 60)
    print(f"\n{len(family)} processes are gone {time.monotonic() - began:.1f} s after the kill of the {killed}")


def family_of(server: VLLMServer) -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
