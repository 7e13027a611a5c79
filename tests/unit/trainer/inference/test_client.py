"""The client against a fake server that samples for real."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_vllm import BASE, FakeVLLM, Faults, save_adapter, serving
from tests.support.waiting import wait_for
from trainer.errors import EngineFailed, InputError
from trainer.inference.client import EngineClient
from trainer.inference.dialects import DIALECTS
from trainer.inference.exchange import Address
from trainer.inference.patience import Bounds
from trainer.inference.sampling import EngineText, SamplingSettings
from trainer.run.failure import FailureKind

QUICK = Bounds(connect_s=2, answer_s=60, patience_s=1.0, first_wait_s=0.05, longest_wait_s=0.2, files_s=0.3)
PROMPTS = [[1, 5 + i, 9, 40 + i] for i in range(12)]
SEEDS = list(range(12))
SETTINGS = SamplingSettings(8, temperature=0.7, top_p=0.9)
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [str(save_adapter(tiny_model, folder / str(seed), seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def made(tiny_model: Path) -> FakeVLLM:
    return FakeVLLM(tiny_model, api_key=KEY)


@pytest.fixture
def fake(made: FakeVLLM) -> Iterator[FakeVLLM]:
    made.faults, made.requests, made.most_at_once = Faults(), [], 0
    with serving(made):
        yield made


def client_of(*fakes: FakeVLLM, settings: SamplingSettings = SETTINGS, **others: Any) -> EngineClient:
    return EngineClient([f.address for f in fakes], settings, **{"api_key": KEY, "bounds": QUICK, **others})


def recomputed(fake: FakeVLLM, folder: str | None, prompt: list[int], text: EngineText, temperature: float) -> Any:
    """Log-probabilities of the text's tokens, from one forward pass of transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(fake.base.config._name_or_path)
    model = PeftModel.from_pretrained(model, folder) if folder else model
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + text.tokens])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(text.tokens)[:, None])[:, 0]


def test_texts_are_those_of_their_adapter_in_the_prompts_order(fake: FakeVLLM, adapters: list[str]) -> None:
    client = client_of(fake, settings=SamplingSettings(8, temperature=0.7))
    client.check()
    for name, folder in zip("ab", adapters, strict=True):
        client.load(name, folder)
    assert client.adapters() == {fake.address: {"a": adapters[0], "b": adapters[1]}}
    written = {name: client.write(PROMPTS, SEEDS, name) for name in ("a", "b", BASE)}
    assert written["a"] == client.write(PROMPTS, SEEDS, "a")
    assert written["a"] != written["b"] != written[BASE]
    for name, folder in (("a", adapters[0]), ("b", adapters[1]), (BASE, None)):
        for prompt, text in zip(PROMPTS, written[name], strict=True):
            assert (text.adapter, text.server) == (name, fake.address)
            expected = recomputed(fake, folder, prompt, text, 0.7)
            torch.testing.assert_close(torch.tensor(text.logps), expected, atol=1e-4, rtol=0)


def test_a_text_depends_on_its_seed(fake: FakeVLLM) -> None:
    client = client_of(fake, settings=SamplingSettings(16))
    texts = client.write([PROMPTS[0]] * 4, [1, 2, 3, 1], BASE)
    assert texts[0] == texts[3]
    assert len({tuple(text.tokens) for text in texts}) == 3


def test_prompts_are_divided_and_several_are_in_flight(tiny_model: Path, fake: FakeVLLM) -> None:
    other = FakeVLLM(tiny_model, api_key=KEY)
    # Nothing is answered before as many requests as may be in flight have come.
    other.faults.hang = fake.faults.hang = gate = threading.Event()
    found: list[EngineText] = []
    with serving(other):
        client = client_of(fake, other, in_flight=3, base=BASE)
        writer = threading.Thread(target=lambda: found.extend(client.write(PROMPTS, SEEDS, BASE)))
        writer.start()
        wait_for(lambda: fake.most_at_once + other.most_at_once >= 6, "6 requests in flight", 60)
        assert fake.most_at_once == other.most_at_once == 3
        gate.set()
        writer.join(60)
    assert [text.server for text in found] == [fake.address] * 6 + [other.address] * 6
    assert sorted(body["prompt"] for body in other.completions()) == PROMPTS[6:]
    fake.faults.hang = None
    assert [text.tokens for text in found] == [text.tokens for text in client_of(fake).write(PROMPTS, SEEDS, BASE)]


def test_the_token_that_ends_a_text_is_in_it(fake: FakeVLLM) -> None:
    (long,) = client_of(fake, settings=SamplingSettings(12)).write([PROMPTS[0]], [3], BASE)
    assert (long.finished, len(long.tokens)) == (False, 12)
    end = long.tokens[4]
    (ended,) = client_of(fake, settings=SamplingSettings(12, stop_token_ids=(end,))).write([PROMPTS[0]], [3], BASE)
    assert ended.finished
    assert ended.tokens == long.tokens[: long.tokens.index(end) + 1]
    assert ended.logps == long.logps[: len(ended.tokens)]


def test_a_stop_string_ends_a_text_and_is_not_in_its_words(fake: FakeVLLM) -> None:
    (long,) = client_of(fake, settings=SamplingSettings(12)).write([PROMPTS[0]], [3], BASE)
    stop = long.text[5]
    (ended,) = client_of(fake, settings=SamplingSettings(12, stop=(stop,))).write([PROMPTS[0]], [3], BASE)
    assert ended.finished
    assert ended.text == long.text[: long.text.index(stop)]
    assert ended.tokens == long.tokens[: len(ended.tokens)]
    assert stop in fake.tokenizer.decode(ended.tokens)


def test_nothing_is_left_to_the_models_generation_config(fake: FakeVLLM) -> None:
    client_of(fake).write(PROMPTS[:1], [0], BASE)
    (body,) = fake.completions()
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {key: body[key] for key in neutral} == neutral


def test_loading_again_and_unloading_twice_is_fine(fake: FakeVLLM, adapters: list[str]) -> None:
    client = client_of(fake)
    for _ in range(2):
        client.load("a", adapters[0])
    assert sum(path == "/v1/load_lora_adapter" and body is not None for path, body in fake.requests) == 1
    for _ in range(2):
        client.unload("a")
    assert client.adapters() == {fake.address: {}}


def test_a_name_stands_for_one_folder(fake: FakeVLLM, adapters: list[str]) -> None:
    client_of(fake).load("a", adapters[0])
    with pytest.raises(InputError, match=r"has an adapter a from .* is another; give it a name of its own"):
        client_of(fake).load("a", adapters[1])


def test_an_adapter_that_the_server_lost_is_loaded_again(fake: FakeVLLM, adapters: list[str]) -> None:
    client = client_of(fake)
    client.load("a", adapters[0])
    before = client.write(PROMPTS, SEEDS, "a")
    fake.forget()
    assert client.write(PROMPTS, SEEDS, "a") == before
    assert sum(path == "/v1/load_lora_adapter" for path, _ in fake.requests) == 2


def test_a_server_that_comes_back_is_waited_for(fake: FakeVLLM, adapters: list[str]) -> None:
    client = client_of(fake, bounds=Bounds(connect_s=2, patience_s=60, first_wait_s=0.05, longest_wait_s=0.2))
    client.load("a", adapters[0])
    before = client.write(PROMPTS, SEEDS, "a")
    fake.die()
    threading.Timer(0.5, fake.start).start()
    assert client.write(PROMPTS, SEEDS, "a") == before


def test_a_server_that_dies_amid_texts_is_waited_for(fake: FakeVLLM) -> None:
    client = client_of(fake, bounds=Bounds(connect_s=2, patience_s=60, first_wait_s=0.05, longest_wait_s=0.2))
    before = client.write(PROMPTS, SEEDS, BASE)
    fake.faults.hang = gate = threading.Event()
    asked = len(fake.requests)

    def die() -> None:
        wait_for(lambda: len(fake.requests) >= asked + len(PROMPTS), "all requests", 60)
        fake.die()
        fake.faults.hang = None
        gate.set()
        fake.start()

    threading.Thread(target=die).start()
    assert client.write(PROMPTS, SEEDS, BASE) == before


def test_a_server_of_ours_is_started_again_by_the_watch(fake: FakeVLLM, adapters: list[str]) -> None:
    started = []

    def watch() -> bool:
        if started:
            return False
        started.append(True)
        fake.start()
        return True

    client = client_of(fake, watch=watch, in_flight=1)
    client.load("a", adapters[0])
    before = client.write(PROMPTS, SEEDS, "a")
    fake.die()
    assert client.write(PROMPTS, SEEDS, "a") == before
    assert started


def test_a_watch_without_hope_ends_the_attempts(fake: FakeVLLM) -> None:
    def watch() -> bool:
        raise EngineFailed("the server has ended for good")

    fake.faults.statuses = [500] * 100
    with pytest.raises(EngineFailed, match="for good"):
        client_of(fake, watch=watch, bounds=Bounds()).adapters()
    assert len(fake.requests) == 1


def test_temporary_failures_are_retried(fake: FakeVLLM) -> None:
    client = client_of(fake, bounds=Bounds(patience_s=60, first_wait_s=0.01, longest_wait_s=0.02))
    before = client.write(PROMPTS[:1], [0], BASE)
    fake.faults.statuses = [500, 503, 429]
    assert client.write(PROMPTS[:1], [0], BASE) == before
    assert len(fake.completions()) == 5


def test_an_aborted_text_is_written_again(fake: FakeVLLM) -> None:
    fake.faults.ended = ["abort"]
    assert client_of(fake).write(PROMPTS[:1], [0], BASE)
    fake.faults.ended = ["abort"] * 4
    with pytest.raises(EngineFailed, match="4 times it answered with a text that was ended for the reason 'abort'"):
        client_of(fake).write(PROMPTS[:1], [0], BASE)


def test_a_failure_that_stays_names_the_server_the_request_and_what_came(fake: FakeVLLM) -> None:
    client = client_of(fake)
    client.write(PROMPTS[:1], [0], BASE)
    fake.faults.statuses = [500] * 1000
    began = time.monotonic()
    with pytest.raises(EngineFailed) as raised:
        client.write(PROMPTS, SEEDS, BASE)
    assert time.monotonic() - began < 30
    for part in (fake.address, "did not write a text with base", "500: injected", "attempts within"):
        assert part in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    kind = FailureKind.of(raised.value)
    assert not kind.fatal  # another attempt of the run may succeed
    assert kind.own


def test_nobody_listens(fake: FakeVLLM) -> None:
    fake.die()
    try:
        with pytest.raises(EngineFailed, match=r"did not list its models: .* the last one with ConnectionRefusedError"):
            client_of(fake).check()
    finally:
        fake.start()


@pytest.mark.parametrize("fault", ["silent", "dripping"])
def test_an_answer_that_never_ends_is_given_up(fake: FakeVLLM, fault: str) -> None:
    bounds = Bounds(connect_s=0.5, answer_s=0.5, patience_s=0.5, first_wait_s=0.05)
    if fault == "silent":
        fake.faults.hang = threading.Event()
    else:
        fake.faults.drips = True
    began = time.monotonic()
    with pytest.raises(EngineFailed, match=r"no (complete )?answer within 0.5 s"):
        client_of(fake, bounds=bounds).adapters()
    assert time.monotonic() - began < 20


def test_a_connection_that_is_never_accepted_is_given_up() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # they fill the queue, so that no further one is answered
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        bounds = Bounds(connect_s=0.5, answer_s=60, patience_s=0.2)
        with pytest.raises(EngineFailed, match=r"no connection within 0.5 s"):
            EngineClient([f"http://127.0.0.1:{address[1]}"], SETTINGS, bounds=bounds).adapters()
        for one in waiting:
            one.close()


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ({"model": "other"}, EngineFailed, "was asked for a text of base and answered with one of other"),
        ({"choices": 2}, EngineFailed, "it has 2 texts, and 1 was asked for"),
        ({"choices": 0}, EngineFailed, "it has 0 texts"),
        ({"short": 1}, EngineFailed, "8 tokens with 7 log-probabilities"),
        ({"without": ("token_ids",)}, InputError, "returns no token ids"),
        ({"without": ("logprobs",)}, InputError, "returns no log-probabilities"),
        ({"shortest": 3}, InputError, "ended a text after 3 tokens for its length, and 8 were asked for"),
    ],
)
def test_answers_that_cannot_be_used(fake: FakeVLLM, fault: Any, error: type[Exception], words: str) -> None:
    for name, value in fault.items():
        setattr(fake.faults, name, value)
    with pytest.raises(error, match=words):
        client_of(fake).write(PROMPTS[:1], [0], BASE)


def test_a_refusal_has_the_servers_words(fake: FakeVLLM, adapters: list[str]) -> None:
    with pytest.raises(InputError, match="refuses to write a text with base: 400: Token id is out of vocabulary"):
        client_of(fake).write([[10_000]], [0], BASE)
    with pytest.raises(InputError, match=r"temperature must be in \[0, 2\], got 3"):
        client_of(fake, settings=SamplingSettings(8, temperature=3.0)).write(PROMPTS[:1], [0], BASE)
    with pytest.raises(InputError, match="404: The model `never` does not exist"):
        client_of(fake).write(PROMPTS[:1], [0], "never")
    with pytest.raises(InputError, match=r"refuses to load the adapter a from /nowhere: 404: .*No adapter found"):
        client_of(fake).load("a", "/nowhere")
    fake.faults.load = 500, "LoRA rank 64 is greater than max_lora_rank 16."
    with pytest.raises(InputError, match="500: LoRA rank 64 is greater than max_lora_rank 16"):
        client_of(fake).load("a", adapters[0])


def test_files_that_a_server_sees_late_are_waited_for(fake: FakeVLLM, adapters: list[str], tmp_path: Path) -> None:
    late = tmp_path / "late"
    threading.Timer(0.5, lambda: late.symlink_to(adapters[0])).start()
    client_of(fake, bounds=Bounds(first_wait_s=0.05, files_s=60)).load("late", str(late))
    assert "late" in client_of(fake).adapters()[fake.address]


def test_the_key_is_needed_and_shown_nowhere(fake: FakeVLLM) -> None:
    with pytest.raises(InputError, match="401") as raised:
        client_of(fake, api_key="another-key-0123456789").check()
    assert "another-key" not in str(raised.value)


def test_the_check_finds_what_a_server_lacks(fake: FakeVLLM) -> None:
    client_of(fake).check()
    with pytest.raises(InputError, match=r"serves base, and the base model 'llama' is needed"):
        client_of(fake, base="llama").check()
    fake.faults.without = ("token_ids",)
    with pytest.raises(InputError, match="returns no token ids"):
        client_of(fake).check()
    fake.faults.without = ()
    fake.faults.fixed = True
    with pytest.raises(InputError, match="start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        client_of(fake).check()


def test_the_check_finds_log_probabilities_of_another_distribution(fake: FakeVLLM) -> None:
    fake.faults.raw = True
    with pytest.raises(InputError, match="--logprobs-mode processed_logprobs"):
        client_of(fake).check()
    client_of(fake, settings=SamplingSettings(8)).check()  # at temperature 1 both are the same


def test_an_engine_with_other_paths_and_names(tiny_model: Path, adapters: list[str]) -> None:
    other = FakeVLLM(tiny_model, dialect=DIALECTS["sglang"])
    with serving(other):
        client = client_of(other, engine="sglang", api_key=None)
        client.check()
        client.load("a", adapters[0])
        (text,) = client.write(PROMPTS[:1], [0], "a")
        assert (text.adapter, other.completions()[-1]["model"]) == ("a", "base:a")
        client.unload("a")
        assert client.adapters() == {other.address: {}}


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://h", "http://", "http://u:p@h:1", "http://h:port", "h"])
def test_addresses(address: str) -> None:
    with pytest.raises(InputError, match="write http://host:port"):
        EngineClient([address], SETTINGS)


def test_addresses_that_are_right() -> None:
    for address in ("http://h:1", "https://h", "http://[::1]:8000", "http://h:1/prefix"):
        assert str(Address.of(address)) == address
    assert str(Address.of("http://h:1/v1/")) == "http://h:1"
    with pytest.raises(InputError, match="no inference server is named"):
        EngineClient([], SETTINGS)
