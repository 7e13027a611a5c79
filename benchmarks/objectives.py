"""Losses and gradients against trl's, for the same model and the same micro-batch, in float32 on the CPU.

    .venv/bin/python benchmarks/objectives.py [--only dpo/ipo kto …]

A small Llama with random weights is the reference, or the teacher; the model that learns is the same one with every
weight moved. muster writes, for each objective, a micro-batch of its own data path, the mean loss, and the gradient of
every parameter. trl, as installed from the package index into an environment of its own, computes its loss of the same
tokens and its gradients, and prints the largest differences: of the loss (over the loss where that is above 1), and of
any element of a gradient over the largest element of all gradients. The exit code is 1 if one of them is above 1e-5.

trl's ORPO counts the prompt's tokens in its SFT term, where the paper has the answer's: its rows have no prompt. trl's
SFT terms of DPO, ORPO and SimPO are means over the tokens of a micro-batch, muster's are means over the pairs of each
pair's mean: those objectives have one pair.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.environments import NotInstalled, home, python_of  # noqa: E402

LIMIT = 1e-5
LENGTH = 64
MOVE = 0.05
WORDS = ["a", "ferry", "crosses", "the", "sound", "while", "rain", "falls", "on", "the", "hills", "and", "who", "waits"]


@dataclass(frozen=True)
class Objective:
    """``task``, ``section``: muster's. ``theirs``: the name of the function here that computes trl's loss, and its
    settings. ``samples``: of the micro-batch. ``prompts``: rows have a prompt."""

    task: str
    section: dict[str, Any]
    theirs: str
    settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 4
    prompts: bool = True


KTO = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}


def _dpo(loss: str, trl: str | None = None, **more: Any) -> Objective:
    settings = {"loss_type": [trl or loss], **{k: v for k, v in more.items() if k != "rpo_alpha"}}
    return Objective("dpo", {"loss": loss, "beta": 0.3, **more}, "dpo", {"beta": 0.3, **settings})


def _simpo(samples: int = 4, **more: Any) -> Objective:
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0, **more}
    return Objective("simpo", {"beta": 2.0, "gamma": 0.7, **more}, "simpo", settings, samples)


def _distill(loss: str, beta: float) -> Objective:
    return Objective("distill", {"loss": loss, "temperature": 2.0}, "distill", {"beta": beta, "temperature": 2.0})


OBJECTIVES: dict[str, Objective] = {
    "dpo/sigmoid": _dpo("sigmoid"),
    "dpo/ipo": _dpo("ipo"),
    "dpo/hinge": _dpo("hinge"),
    "dpo/robust": _dpo("robust", label_smoothing=0.2),
    "dpo/sppo": _dpo("sppo", "sppo_hard"),
    "dpo/apo_zero": _dpo("apo_zero"),
    "dpo/apo_down": _dpo("apo_down"),
    "dpo/discopop": _dpo("discopop", discopop_tau=0.2),
    "dpo/sigmoid, ld_alpha": _dpo("sigmoid", ld_alpha=0.4),
    "dpo/sigmoid, rpo_alpha": Objective(
        "dpo",
        {"beta": 0.3, "rpo_alpha": 0.5},
        "dpo",
        {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        samples=1,
    ),
    "kto": Objective("kto", KTO, "kto", KTO),
    "orpo": Objective("orpo", {"beta": 0.3}, "orpo", {"beta": 0.3}, samples=1, prompts=False),
    "simpo": _simpo(),
    "simpo, label_smoothing": _simpo(label_smoothing=0.2),
    "simpo, cpo_alpha": _simpo(samples=1, cpo_alpha=0.5),
    "distill/forward_kl": _distill("forward_kl", 0.0),
    "distill/reverse_kl": _distill("reverse_kl", 1.0),
    "distill/jsd": _distill("jsd", 0.5),
    "sft": Objective("sft", {}, "sft"),
    "sft, label_smoothing": Objective("sft", {"label_smoothing": 0.1}, "sft", {"label_smoothing_factor": 0.1}),
}


def write_rows(folder: Path, objective: Objective) -> Path:
    """Writes rows of differing lengths."""
    rows = []
    for i in range(12):
        prompt = f"{' '.join(WORDS[i : i + 3])}? " if objective.prompts else ""
        good, bad = (" ".join(WORDS[(i * k) % 7 : (i * k) % 7 + 2 + (i + k) % 4]) for k in (1, 2))
        if objective.task == "kto":
            rows.append({"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)})
        elif objective.task in ("sft", "distill"):
            rows.append({"prompt": prompt, "completion": good})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORMATS = {"kto": "unpaired_preference", "sft": "completion", "distill": "completion"}


def muster(folder: Path, name: str) -> None:
    """Writes ``batch.npz``, and ``ours.safetensors`` with the gradients and the loss."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    from tests.support.looping import bench
    from tests.support.training import small_recipe
    from trainer.strategies import Strategy

    objective, base = OBJECTIVES[name], folder.parent / "base"
    teacher = {"teacher": str(base)} if objective.task == "distill" else {}
    changes: dict[str, Any] = {
        "task": objective.task,
        objective.task: objective.section | teacher,
        "adapter": {"method": "none"},
        "data.train": [
            {"path": str(write_rows(folder, objective)), "format": FORMATS.get(objective.task, "preference")}
        ],
        "data.packing": False,
        "training.micro_batch": objective.samples,
        "training.global_batch": objective.samples,
    }
    with bench(small_recipe("objective", base, folder, **changes)) as b:
        strategy: Strategy = b.strategy
        b.model.load_state_dict(load_file(folder.parent / "policy" / "model.safetensors"), strict=False)
        b.model.eval()
        (batch,) = next(b.stream.prefetch(b.stream.start(), 0, 1)).batches
        if b.task.prepares_steps:
            with torch.no_grad():
                b.task.prepare_step(b.model, [batch], strategy.world.device, 1)
        b.model.train()
        loss = b.task.loss(b.model, batch, strategy.world.device).loss_sum / b.task.loss_units(batch)
        loss.backward()
        arrays = {"": batch, **({"unrelated_": batch.unrelated} if batch.unrelated else {})}
        kept = {
            prefix + field: getattr(one, field)
            for prefix, one in arrays.items()
            for field in ("input_ids", "position_ids", "targets")
        }
        np.savez(folder / "batch.npz", desirable=batch.desirable, pairs=batch.pairs, **kept)
        gradients = {n: p.grad for n, p in b.model.named_parameters() if p.grad is not None}
        save_file({"loss": loss.detach(), **gradients}, folder / "ours.safetensors")


class Theirs:
    """trl's side: the model that learns, the other model, and the micro-batch."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.folder = folder

        def model(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(folder.parent / name, dtype=torch.float32)

        self.policy, self.base = model("policy"), model("base")
        self.tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.batch = dict(np.load(folder / "batch.npz"))

    def tensors(self, prefix: str = "") -> tuple[Any, Any, Any]:
        """Returns the tokens, the mask of tokens without pads, and that of the answers [B, L]."""
        import torch

        ids, positions, targets = (
            torch.from_numpy(self.batch[prefix + name]) for name in ("input_ids", "position_ids", "targets")
        )
        columns = torch.arange(ids.shape[1])
        lengths = positions.max(-1, keepdim=True).values
        return ids, (columns <= lengths).long(), targets.long()

    def labelled(self) -> dict[str, Any]:
        """Returns the inputs of a trainer that takes the answers as ``labels``."""
        ids, mask, answers = self.tensors()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(answers.bool(), -100)}

    def sides(self) -> dict[str, Any]:
        """Returns `labelled` with chosen and rejected answers apart."""
        halves = {name: tensor.chunk(2) for name, tensor in self.labelled().items()}
        return {
            f"{side}_{name}": half
            for name, both in halves.items()
            for side, half in zip(("chosen", "rejected"), both, strict=True)
        }

    def arguments(self, kind: Any, **settings: Any) -> Any:
        size = len(self.batch["input_ids"])
        return kind(
            output_dir=str(self.folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            per_device_train_batch_size=size, max_length=LENGTH, gradient_checkpointing=False, **settings,
        )  # fmt: skip

    def made(self, kind: Any, arguments: Any, rows: list[dict[str, Any]], **more: Any) -> Any:
        from datasets import Dataset

        given = {"model": self.policy, "args": arguments, "processing_class": self.tokenizer, **more}
        return kind(train_dataset=Dataset.from_list(rows), **given)


PAIRS = [{"prompt": "a ", "chosen": "b", "rejected": "c"}]


def dpo(side: Theirs, settings: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    trainer = side.made(DPOTrainer, side.arguments(DPOConfig, **settings), PAIRS, ref_model=side.base)
    ids, mask, answers = side.tensors()
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}
    return trainer._compute_loss(trainer.model.train(), inputs, False)


def kto(side: Theirs, settings: dict[str, Any]) -> Any:
    import torch
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": "a ", "completion": "b", "label": True}, {"prompt": "b ", "completion": "c", "label": False}]
    trainer = side.made(KTOTrainer, side.arguments(KTOConfig, **settings), rows, ref_model=side.base)
    (ids, mask, answers), (kl_ids, kl_mask, kl_answers) = side.tensors(), side.tensors("unrelated_")
    inputs = {
        **{"input_ids": ids, "attention_mask": mask, "completion_mask": answers},
        **{"KL_input_ids": kl_ids, "KL_attention_mask": kl_mask, "KL_completion_mask": kl_answers},
        "label": torch.from_numpy(side.batch["desirable"]),
    }
    return trainer._compute_loss(trainer.model.train(), inputs, False)


def orpo(side: Theirs, settings: dict[str, Any]) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = side.made(ORPOTrainer, side.arguments(ORPOConfig, **settings), PAIRS)
    return trainer.compute_loss(trainer.model.train(), side.sides())


def simpo(side: Theirs, settings: dict[str, Any]) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = side.made(CPOTrainer, side.arguments(CPOConfig, **settings), PAIRS)
    return trainer.compute_loss(trainer.model.train(), side.sides())


def distill(side: Theirs, settings: dict[str, Any]) -> Any:
    import torch
    from trl.experimental.gkd import GKDTrainer

    inputs = side.labelled()
    labels = inputs.pop("labels")[:, 1:]
    student = side.policy(**inputs).logits[:, :-1]
    with torch.no_grad():
        teacher = side.base(**inputs).logits[:, :-1]
    targets = (labels != -100).sum()
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, num_items_in_batch=targets, **settings)


def sft(side: Theirs, settings: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "a ", "completion": "b"}]
    trainer = side.made(SFTTrainer, side.arguments(SFTConfig, **settings), rows)
    return trainer.compute_loss(trainer.model.train(), side.labelled())


THEIRS: dict[str, Callable[[Theirs, dict[str, Any]], Any]] = {
    one.__name__: one for one in (dpo, kto, orpo, simpo, distill, sft)
}


def trl(folder: Path, name: str) -> None:
    """Prints the differences from ``ours.safetensors``."""
    import torch
    from safetensors.torch import load_file

    objective, side, ours = OBJECTIVES[name], Theirs(folder), load_file(folder / "ours.safetensors")
    loss = THEIRS[objective.theirs](side, objective.settings)
    loss.backward()
    theirs = {n: p.grad for n, p in side.policy.named_parameters() if p.grad is not None}
    if theirs.keys() != ours.keys() - {"loss"}:
        raise SystemExit(f"other gradients: {sorted(theirs.keys() ^ (ours.keys() - {'loss'}))[:3]}")
    # torch's maximum of anything and NaN is NaN, Python's is not.
    largest = float(torch.stack([gradient.abs().max() for gradient in theirs.values()]).max())
    apart = float(torch.stack([(theirs[n] - ours[n]).abs().max() for n in theirs]).max())
    of_loss = abs(float(loss - ours["loss"])) / max(1.0, abs(float(loss)))
    print(json.dumps({"loss": float(loss), "of_loss": of_loss, "of_gradient": apart / largest}))


def write_models(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from launcher.quickstart.prepare import prepare_base

    prepare_base(folder / "tokenizer", steps=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name in ("base", "policy"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * MOVE)


def run(python: str, side: str, folder: Path, name: str) -> str:
    """Returns the last line that one side prints, in a process of its own."""
    command = [python, "-W", "ignore", __file__, "--side", side, "--folder", str(folder), "--only", name]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {side} failed:\n{done.stderr[-3000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--environments", type=Path, default=home(), help="where trl's environment is kept")
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="OBJECTIVE")
    parser.add_argument("--side", choices=("muster", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return {"muster": muster, "trl": trl}[options.side](options.folder, *options.only)
    try:
        python = python_of("trl", options.environments)
    except NotInstalled as reason:
        parser.error(str(reason))
    missed = []
    print("| objective | loss | difference of the loss | of a gradient |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="muster-objectives-") as place:
        write_models(Path(place))
        for number, name in enumerate(options.only):
            folder = Path(place, str(number))
            folder.mkdir()
            run(sys.executable, "muster", folder, name)
            found = json.loads(run(python, "trl", folder, name))
            if not (found["of_loss"] <= LIMIT and found["of_gradient"] <= LIMIT):
                missed.append(name)
            print(f"| {name} | {found['loss']:.5f} | {found['of_loss']:.1e} | {found['of_gradient']:.1e} |", flush=True)
    if missed:
        raise SystemExit(f"not within {LIMIT:g}: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
