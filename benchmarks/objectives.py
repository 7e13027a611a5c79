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
from dataclasses import dataclass, field, replace
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


GROUPS = {"group_size": 4, "max_new_tokens": 10, "epochs": 2}


def _grpo(loss: str, ours: dict[str, Any] | None = None, *, of_servers: bool = False, **theirs: Any) -> Objective:
    reward = {"reward": {"function": "tests.support.rewards:share_of_vowels"}}
    shared = {"num_generations": 4, "max_completion_length": 10, "num_iterations": 2, "epsilon": 0.2}
    settings = {**shared, "loss_type": loss, "use_vllm": of_servers, **theirs}
    return Objective("grpo", {"loss": loss, **GROUPS, **reward, **(ours or {})}, "grpo", settings, samples=3)


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
    "grpo/grpo": _grpo("grpo"),
    "grpo/grpo, kl_coef": _grpo("grpo", {"kl_coef": 0.3}, beta=0.3),
    "grpo/grpo, importance_cap": _grpo("grpo", of_servers=True, vllm_importance_sampling_mode="token_truncate"),
    "grpo/dr_grpo": _grpo("dr_grpo"),
    "grpo/dapo": _grpo("dapo", epsilon_high=0.28),
    "grpo/dapo, entropy_coef": _grpo("dapo", {"entropy_coef": 0.1}, epsilon_high=0.28, entropy_coef=0.1),
    "grpo/gspo": _grpo(
        "gspo",
        {"clip_low": 0.05, "clip_high": 0.06},
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon=0.05,
        epsilon_high=0.06,
    ),
    "grpo/cispo": _grpo("cispo", {"clip_high": 0.3}, epsilon_high=1.3),
    "grpo/rloo": replace(_grpo("rloo"), theirs="rloo", settings={"num_generations": 4, "epsilon": 0.2}),
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
        elif objective.task in ("sft", "distill", "grpo"):
            rows.append({"prompt": prompt, "completion": good})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORMATS = {"kto": "unpaired_preference", "sft": "completion", "distill": "completion", "grpo": "completion"}
NOISE = 0.15
"""Of log-probabilities: some ratios are then past their limits."""


def rollouts_of(task: Any, model: Any, batch: Any, kl_coef: float) -> tuple[Any, int]:
    """Returns a micro-batch of texts that the model writes, and the number that its loss is divided by. Their former
    log-probabilities, the reference's and a server's are the model's, moved at random."""
    import numpy as np
    import torch

    from trainer.tasks.rollouts.rollout import PromptCompletionBatch

    device, random = torch.device("cpu"), np.random.default_rng(3)
    task._grpo = task._grpo.model_copy(update={"kl_coef": kl_coef})
    writer, request = task._writer, task._request([batch], 1)
    (rollouts,) = writer.finish(model, device, request, writer.begin(model, device, request))
    for rollout in rollouts:
        texts = PromptCompletionBatch.of_rollouts([rollout], 0)
        logps = task._policy.score_tokens(model, texts, device).logps.double().numpy()
        rollout.logps, rollout.reference, rollout.sampled = (
            logps + random.normal(0.0, NOISE, logps.shape) for _ in range(3)
        )
    experience = task.experience(rollouts)
    every = np.arange(len(rollouts))
    return experience.micro_batch(every, 0), experience.units(every)


def arrays_of_rollouts(batch: Any) -> dict[str, Any]:
    return {
        "input_ids": batch.texts.input_ids, "position_ids": batch.texts.position_ids, "targets": batch.texts.targets,
        **{name: getattr(batch, name) for name in ("advantages", "logps", "reference", "sampled")},
    }  # fmt: skip


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
    # Without an adapter no recipe has a reference: the rollouts get one below.
    section = {name: value for name, value in objective.section.items() if name != "kl_coef"}
    changes: dict[str, Any] = {
        "task": objective.task,
        objective.task: section | teacher,
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
        units = b.task.loss_units(batch)
        with torch.no_grad():
            if objective.task == "grpo":
                task: Any = b.task
                batch, units = rollouts_of(task, b.model, batch, objective.section.get("kl_coef", 0.0))
                task._writer.engine.reproducible = not objective.settings.get("use_vllm", False)
            elif b.task.prepares_steps:
                b.task.prepare_step(b.model, [batch], strategy.world.device, 1)
        b.model.train()
        loss = b.task.loss(b.model, batch, strategy.world.device).loss_sum / units
        loss.backward()
        if objective.task == "grpo":
            np.savez(folder / "batch.npz", **arrays_of_rollouts(batch))
        else:
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


def completions(side: Theirs) -> dict[str, Any]:
    """Returns the inputs of trl's losses of rollouts: prompts padded on the left, completions on the right."""
    import torch

    ids, _, targets = side.tensors()
    lengths = targets.sum(-1)
    starts = targets.argmax(-1)
    width, before = int(lengths.max()), int(starts.max())

    def text_rows(name: str) -> Any:
        rows = torch.zeros(len(ids), width)
        for row, part in zip(rows, torch.from_numpy(side.batch[name]).split(lengths.tolist()), strict=True):
            row[: len(part)] = part
        return rows

    prompts, prompt_mask = (torch.zeros(len(ids), before, dtype=torch.long) for _ in range(2))
    answers, answer_mask = (torch.zeros(len(ids), width, dtype=torch.long) for _ in range(2))
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        prompts[n, before - start :], prompt_mask[n, before - start :] = ids[n, :start], 1
        answers[n, :length], answer_mask[n, :length] = ids[n, start : start + length], 1
    old = text_rows("logps")
    return {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": answers, "completion_mask": answer_mask,
        "advantages": text_rows("advantages")[:, 0], "old_per_token_logps": old, "old_logps": old.sum(-1),
        "ref_per_token_logps": text_rows("reference"), "num_items_in_batch": answer_mask.sum(),
        "importance_sampling_ratio": (old - text_rows("sampled")).exp().clamp(max=2.0),
    }  # fmt: skip


def nothing(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def grpo(side: Theirs, settings: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return of_rollouts(side, GRPOTrainer, GRPOConfig, settings)


def rloo(side: Theirs, settings: dict[str, Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    return of_rollouts(side, RLOOTrainer, RLOOConfig, settings)


def of_rollouts(side: Theirs, trainer_class: Any, config: Any, settings: dict[str, Any]) -> Any:
    from datasets import Dataset

    inputs, of_servers = completions(side), settings.get("use_vllm", False)
    arguments = config(
        output_dir=str(side.folder / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        per_device_train_batch_size=len(inputs["prompt_ids"]), gradient_checkpointing=False, disable_dropout=True,
        **{name: value for name, value in settings.items() if name != "use_vllm"},
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a "}])
    trainer = trainer_class(
        model=side.policy, args=arguments, reward_funcs=nothing, train_dataset=rows, processing_class=side.tokenizer
    )
    trainer.use_vllm, trainer.current_gradient_accumulation_steps = of_servers, 1
    return trainer._compute_loss(trainer.model.train(), inputs)


THEIRS: dict[str, Callable[[Theirs, dict[str, Any]], Any]] = {
    one.__name__: one for one in (dpo, kto, orpo, simpo, distill, sft, grpo, rloo)
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
