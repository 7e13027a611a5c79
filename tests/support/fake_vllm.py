"""A server with vLLM's interface on a tiny model: real adapters, real sampling with seeds, real log-probabilities, and
faults on demand."""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from trainer.inference.dialects import DIALECTS, EngineDialect

BASE = "base"


@dataclass
class Faults:
    """``statuses``: of the next answers, before anything is done; ``hang``: requests wait until it is cleared;
    ``drips``: an answer comes byte by byte, and never ends; ``model``: named by every completion; ``choices``: how many
    texts a completion has; ``without``: fields that its texts lack; ``short``: log-probabilities left out at the end;
    ``ended``: the finish reasons of the next texts; ``raw``: log-probabilities of the model's own distribution;
    ``shortest``: no text gets longer; ``load``: the answer to loading an adapter; ``fixed``: takes no adapters."""

    statuses: list[int] = field(default_factory=list)
    hang: threading.Event | None = None
    drips: bool = False
    model: str | None = None
    choices: int = 1
    without: tuple[str, ...] = ()
    short: int = 0
    ended: list[str] = field(default_factory=list)
    raw: bool = False
    shortest: int | None = None
    load: tuple[int, str] | None = None
    fixed: bool = False


class FakeVLLM:
    """``requests``: path and body of each one, in the order of their arrival."""

    def __init__(
        self,
        model: Path,
        *,
        api_key: str | None = None,
        dialect: EngineDialect = DIALECTS["vllm"],
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.base = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.api_key, self.dialect, self.faults = api_key, dialect, Faults()
        self.requests: list[tuple[str, Any]] = []
        self.most_at_once = 0
        self._at_once, self._counting = 0, threading.Lock()
        self._computing = threading.Lock()
        self._models: dict[str, tuple[str, Any]] = {}
        self._server: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = port or probe.getsockname()[1]
        self.host, self.address = host, f"http://{host}:{self.port}"

    def start(self) -> None:
        fake = self

        class Handler(_Handler):
            server_of = fake

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server((self.host, self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """Ends as by SIGKILL: connections break, and adapters are forgotten."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for held in list(self._open):
            try:
                held.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.forget()

    def forget(self) -> None:
        self._models.clear()

    def completions(self) -> list[Any]:
        return [body for path, body in self.requests if path == "/v1/completions"]

    def count(self, change: int) -> None:
        with self._counting:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/v1/models" and method == "GET":
            cards = [{"id": BASE, "root": "/the/base", "parent": None, "max_model_len": 512}]
            return 200, {
                "data": [*cards, *({"id": n, "root": f, "parent": BASE} for n, (f, _) in self._models.items())]
            }
        if path in (self.dialect.load, self.dialect.unload) and not self.faults.fixed:
            if method == "GET":
                return 405, {"detail": "Method Not Allowed"}
            return (self._load if path == self.dialect.load else self._unload)(body)
        if path == "/v1/completions" and method == "POST":
            return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _load(self, body: Any) -> tuple[int, Any]:
        from peft import PeftModel

        name, folder = body["lora_name"], body["lora_path"]
        if self.faults.load is not None:
            return _refusal(*self.faults.load)
        if name in self._models:
            return _refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(folder) / "adapter_config.json").exists():
            return _refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        self._models[name] = folder, PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: Any) -> tuple[int, Any]:
        if self._models.pop(body["lora_name"], None) is None:
            return _refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"

    def _complete(self, body: Any) -> tuple[int, Any]:
        name = body["model"]
        named = {BASE: self.base, **{self.dialect.model(BASE, n): model for n, (_, model) in self._models.items()}}
        if name not in named:
            return _refusal(404, f"The model `{name}` does not exist.")
        if not all(0 <= token < self.base.config.vocab_size for token in body["prompt"]):
            return _refusal(400, "Token id is out of vocabulary")
        if not 0 <= body["temperature"] <= 2:
            return _refusal(400, f"temperature must be in [0, 2], got {body['temperature']}.")
        with self._computing:
            choice = self._choice(named[name], body)
        if self.faults.ended:
            choice["finish_reason"] = self.faults.ended.pop(0)
        choice = {key: value for key, value in choice.items() if key not in self.faults.without}
        return 200, {"model": self.faults.model or name, "choices": [choice] * self.faults.choices}

    @torch.no_grad()
    def _choice(self, model: Any, body: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"])
        tokens: list[int] = []
        logps: list[float] = []
        tops: list[dict[str, float]] = []
        ended, text = "length", ""
        ends = {self.tokenizer.eos_token_id, *body["stop_token_ids"]}
        while len(tokens) < min(body["max_tokens"], self.faults.shortest or body["max_tokens"]) and ended == "length":
            logits = model(input_ids=torch.tensor([body["prompt"] + tokens])).logits[0, -1].float()
            logp = _log_distribution(logits, body["temperature"], body["top_p"])
            greedy = body["temperature"] == 0.0
            token = int(logp.argmax() if greedy else torch.multinomial(logp.exp(), 1, generator=generator))
            told = logits.log_softmax(-1) if self.faults.raw else logp
            tokens.append(token)
            logps.append(float(told[token]))
            tops.append({"top": float(told.max())})
            text = self.tokenizer.decode(tokens, skip_special_tokens=body["skip_special_tokens"])
            cut = [text.index(stop) for stop in body["stop"] if stop in text]
            text = text[: min(cut)] if cut else text
            ended = "stop" if cut or token in ends else "length"
        kept = len(logps) - self.faults.short
        return {
            "text": text,
            "finish_reason": ended,
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": logps[:kept], "top_logprobs": tops},
        }


class _Handler(BaseHTTPRequestHandler):
    server_of: FakeVLLM

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, method: str) -> None:
        fake = self.server_of
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        fake.requests.append((self.path, body))
        fake._open.add(self.connection)
        fake.count(1)
        try:
            self._send(*self._answer(method, body))
        except OSError:
            self.close_connection = True
        finally:
            fake.count(-1)
            fake._open.discard(self.connection)

    def _answer(self, method: str, body: Any) -> tuple[int, Any]:
        fake = self.server_of
        if fake.faults.hang is not None:
            fake.faults.hang.wait()
        if fake.faults.statuses:
            return _refusal(fake.faults.statuses.pop(0), "injected")
        guarded = fake.api_key is not None and self.path.startswith("/v1")
        if guarded and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            return 401, {"error": "Unauthorized"}
        return fake.answer(method, self.path, body)

    def _send(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        if self.server_of.faults.drips:
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            pause = threading.Event()
            while not pause.wait(0.05):
                self.wfile.write(b" ")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _log_distribution(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    if temperature == 0.0:
        return logits.log_softmax(-1)
    logits = logits / temperature
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    left_out = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(left_out.scatter(0, order, left_out), -torch.inf).log_softmax(-1)


def _refusal(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Refused", "param": None, "code": status}}


@contextmanager
def serving(*fakes: FakeVLLM) -> Iterator[None]:
    for fake in fakes:
        fake.start()
    try:
        yield
    finally:
        for fake in fakes:
            if fake.faults.hang is not None:
                fake.faults.hang.set()
            fake.die()


def save_adapter(model: Path, folder: Path, seed: int, rank: int = 8, scale: float = 0.1) -> Path:
    """Saves a LoRA adapter of the model with random weights, which change what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return folder
