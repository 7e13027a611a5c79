"""What was saved, in use: found without a recipe, loaded as plain peft does, wherever there is room for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.saved import adapter_of, trained
from tests.support.tasks import make_encoder, task_recipe, write_task_data
from tests.support.training import run_of, train_here, write_pairs
from trainer.artifacts import Artifact, ArtifactRef, Generator, Sampling, base_files, find, load, tokenizer_of
from trainer.artifacts.combine import Mix, mixed
from trainer.errors import InputError, UsageError
from trainer.model.placement import Placement, model_bytes, placement_for
from trainer.recipe import Recipe
from trainer.run import layout

CPU = torch.device("cpu")
PROMPTS = ["Q1: a ferry crosses the sound? ", "Q2: who? ", "Rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_pairs(folder / "data" / "a.jsonl", 60)
    write_task_data(folder, "classification")
    return folder


def named(**recipes: Recipe) -> ArtifactRef:
    return ArtifactRef.of(None, [f"{name}={adapter_of(recipe)}" for name, recipe in recipes.items()], None)


def here(subject: Artifact) -> Any:
    return load(subject, Placement.on(CPU), subject.classes)


def logits(model: Any, ids: Sequence[int] = (5, 9, 100, 7, 33)) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits
    return found


def plainly(model: Path, *adapters: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return (PeftModel.from_pretrained(base, adapters[0]) if adapters else base).eval()


def test_an_adapter_says_what_it_was_trained_on(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained("qlora", tiny_model, folder, **{"model.quantization": "nf4", "model.dtype": "bfloat16"})
    told = find(ArtifactRef.of(None, [str(adapter_of(recipe))], None), tmp_path / "a")
    assert (told.section, told.task, told.method) == (recipe.model, "sft", "lora")
    assert told.origin
    assert told.origin.format == "completion"
    checkpoint = next(iter(sorted(Path(run_of(recipe).url, layout.CHECKPOINTS).iterdir())))
    assert find(ArtifactRef.of(None, [str(checkpoint)], None), tmp_path / "b").section == recipe.model
    bare = tmp_path / "bare"
    shutil.copytree(adapter_of(recipe), bare)
    (bare / "muster.json").unlink()
    by_peft = find(ArtifactRef.of(None, [str(bare)], None), tmp_path / "c")
    assert (by_peft.section.path, by_peft.section.quantization) == (str(tiny_model), "none")
    assert by_peft.section.dtype == "float32", "as the base lies in its files"


def test_code_of_a_base_runs_only_when_somebody_says_so(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained("plain", tiny_model, folder)
    trusting = tmp_path / "trusting"
    shutil.copytree(adapter_of(recipe), trusting)
    told = json.loads((trusting / "muster.json").read_text())
    told["model"]["trust_remote_code"] = True
    (trusting / "muster.json").write_text(json.dumps(told))
    assert not find(ArtifactRef.of(None, [str(trusting)], None), tmp_path / "a").section.trust_remote_code


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "lokr", "pissa", "none"])
def test_it_computes_what_plain_peft_does(method: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained(f"plainly-{method}", tiny_model, folder, adapter={"method": method})
    found = logits(here(find(ArtifactRef(run=run_of(recipe).url), tmp_path)))
    saved = str(adapter_of(recipe))
    wanted = logits(plainly(Path(saved)) if method == "none" else plainly(tiny_model, saved))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, logits(plainly(tiny_model)), atol=1e-2), "it has learnt something"


def test_several_adapters_each_by_its_name(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    a, b = trained("plain", tiny_model, folder), trained("other", tiny_model, folder, seed=3)
    model = here(find(named(a=a, b=b), tmp_path))
    for name, recipe in (("a", a), ("b", b)):
        assert mixed(model, Mix.of(name)) == name
        assert torch.allclose(logits(model), logits(plainly(tiny_model, str(adapter_of(recipe)))), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_weights_add_the_adapters_up(method: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """The combined delta is the weighted sum of the adapters' own."""
    adapter = {"method": method, "rank": 4, "alpha": 8, "dropout": 0.5}
    a, b = (trained(f"{method}-{n}", tiny_model, folder, seed=n, adapter=adapter) for n in (1, 2))
    model = here(find(named(a=a, b=b), tmp_path))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted = 0.7 * layer.get_delta_weight("a") - 0.2 * layer.get_delta_weight("b")
    name = mixed(model, Mix.of("a=0.7,b=-0.2"))
    assert torch.allclose(layer.get_delta_weight(name), wanted, atol=1e-5)
    assert torch.equal(logits(model), logits(model)), "nothing is dropped"
    assert model.peft_config["a"].use_rslora is (method == "rslora"), "they are as they were"


def test_what_cannot_be_mixed_is_said(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    dora = {"method": "dora", "rank": 4}
    a, b = (trained(f"dora-{n}", tiny_model, folder, seed=n, adapter=dora) for n in (1, 2))
    model = here(find(named(a=a, b=b), tmp_path))
    with pytest.raises(UsageError, match="only plain LoRA"):
        mixed(model, Mix.of("a=0.5,b=0.5"))
    with pytest.raises(UsageError, match="'c' is none of the adapters a, b"):
        mixed(model, Mix.of("c"))
    for use in ("a=0.5,b", "a=x", ""):
        with pytest.raises(UsageError, match="neither the name of an adapter nor weights"):
            Mix.of(use)
    with pytest.raises(UsageError, match="is not one of: cat, linear"):
        Mix.of("a=1,b=1", "sum")
    with pytest.raises(UsageError, match="say --density"):
        Mix.of("a=1,b=1", "ties")


def test_adapters_that_are_loaded_together_share_a_base(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    plain = trained("plain", tiny_model, folder)
    other = trained("qlora", tiny_model, folder, **{"model.quantization": "nf4", "model.dtype": "bfloat16"})
    with pytest.raises(InputError, match="adapters that are loaded together share a base"):
        find(named(a=plain, b=other), tmp_path / "a")
    full = trained("full", tiny_model, folder, adapter={"method": "none"})
    with pytest.raises(UsageError, match="is a whole model: name adapters, or it alone"):
        find(named(a=plain, b=full), tmp_path / "b")
    with pytest.raises(UsageError, match="need names of their own"):
        ArtifactRef.of(None, ["x", "y"], None)
    with pytest.raises(UsageError, match="one of --run RUN_URI, --adapter URI, --model PATH"):
        ArtifactRef.of("run", ["x"], None)
    s3 = ArtifactRef.of(None, ["s3://bucket/a=b"], None)
    assert s3.adapters == (("default", "s3://bucket/a=b"),), "an equals sign in an address is no name"


def test_an_adapter_on_another_base_is_refused(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    from launcher.quickstart.model import LlamaShape, make_model

    recipe = trained("plain", tiny_model, folder)
    shape = LlamaShape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocabulary=384, positions=512)
    other = make_model(tmp_path / "other", shape, ["some text of a few words"], seed=1)
    subject = find(ArtifactRef.of(None, [str(adapter_of(recipe))], None), tmp_path / "a")
    moved = replace(subject, section=subject.section.model_copy(update={"path": str(other)}))
    with pytest.raises(InputError, match="the adapter does not fit the base"):
        here(moved)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_adapter_is_refused(damage: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe, broken = trained("plain", tiny_model, folder), tmp_path / "broken"
    shutil.copytree(adapter_of(recipe), broken)
    weights = broken / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        some = load_file(weights)
        save_file({name: some[name] for name in sorted(some)[1:]}, weights, {"format": "pt"})
    with pytest.raises(InputError, match="the adapter does not fit the base"):
        here(find(ArtifactRef.of(None, [str(broken)], None), tmp_path / "a"))


@pytest.mark.parametrize("method", ["lora", "dora", "none"])
def test_what_does_not_fit_in_memory_computes_the_same(
    method: str, tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = trained(f"plainly-{method}", tiny_model, folder, adapter={"method": method})
    subject = find(ArtifactRef(run=run_of(recipe).url), tmp_path)
    size = model_bytes(subject.section, base_files(subject))
    files = {f.name: f.stat().st_mtime_ns for f in base_files(subject).iterdir()}
    with placement_for(subject.section, base_files(subject), {"cpu": size // 2}) as placement:
        assert placement.disk
        spread = load(subject, placement, None)
        assert "disk" in spread.hf_device_map.values()
        whole = here(subject)
        assert torch.allclose(logits(spread), logits(whole), atol=1e-6)
        texts = [Generator(m, tokenizer_of(subject), CPU, 2).answers(PROMPTS, 6) for m in (spread, whole)]
    assert texts[0] == texts[1]
    assert files == {f.name: f.stat().st_mtime_ns for f in base_files(subject).iterdir()}, "the base is left alone"


def test_a_quantised_base_cannot_lie_on_the_disk(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained("qlora", tiny_model, folder, **{"model.quantization": "nf4", "model.dtype": "bfloat16"})
    section = find(ArtifactRef(run=run_of(recipe).url), tmp_path).section
    with (
        pytest.raises(InputError, match="use --quantization none"),
        placement_for(section, tiny_model, {"cpu": 1000}),
    ):
        pass


def test_a_classifiers_outputs_are_known_by_their_names(folder: Path, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    few = {"training.steps": 2, "checkpoint.every_steps": 2, "training.eval_every": None}
    recipe = task_recipe("classification", "named", encoder, folder, adapter={"method": "ia3"}, **few)
    assert train_here(recipe) == "succeeded"
    subject = find(ArtifactRef.of(None, [str(adapter_of(recipe))], None), tmp_path / "a")
    assert subject.classes == ("bread", "ferry", "hills", "lighthouse")
    assert logits(here(subject)).shape == (1, 4)


def test_what_is_drawn_depends_on_the_seed(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    subject = find(ArtifactRef(model=str(tiny_model)), tmp_path)

    def drawn(seed: int, sampling: Sampling) -> list[str]:
        torch.manual_seed(seed)
        return Generator(here(subject), tokenizer_of(subject), CPU, 4, sampling).answers(PROMPTS, 8)

    warm = Sampling(temperature=1.0)
    assert drawn(1, warm) == drawn(1, warm)
    assert drawn(1, warm) != drawn(2, warm)
    assert drawn(1, Sampling(temperature=1.0, top_p=1e-6)) == drawn(2, Sampling()), "the likeliest token alone is left"


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_stream_says_what_an_answer_holds(method: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained(f"streamed-{method}", tiny_model, folder, adapter={"method": method})
    subject = find(ArtifactRef(run=run_of(recipe).url), tmp_path)
    writer = Generator(here(subject), tokenizer_of(subject), CPU, 4)
    pieces: list[str] = []
    assert writer.stream(PROMPTS[0], 8, pieces.append) == "".join(pieces)
    assert [writer.stream(p, 8, pieces.append) for p in PROMPTS] == writer.answers(PROMPTS, 8)


def test_a_prompt_that_leaves_little_room_is_answered_as_far_as_it_goes(tiny_model: Path, tmp_path: Path) -> None:
    subject = find(ArtifactRef(model=str(tiny_model)), tmp_path)
    writer = Generator(here(subject), tokenizer_of(subject), CPU, 4)
    assert writer.positions == 512
    told: list[int] = []
    writer._with_cache = lambda rows, most, *rest: told.append((len(rows[0]), most)) or [""] * len(rows)  # type: ignore
    writer.answers([[5] * 500, [5] * 3, [5] * 400, [5] * 4], 300)
    assert told == [(256, 256), (256, 256), (4, 300)], "half of the positions are the prompt's at most"


def test_a_combination_has_a_name_that_nobody_can_give(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    a, b = trained("plain", tiny_model, folder), trained("other", tiny_model, folder, seed=3)
    model = here(find(named(combined=a, b=b), tmp_path))
    assert mixed(model, Mix.of("combined=0.5,b=0.25")) not in ("combined", "b")


def test_what_is_trained_whole_beside_adapters_is_not_dropped(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    beside = {"method": "lora", "rank": 4, "modules_to_save": ["lm_head"]}
    a, b = trained("head-too", tiny_model, folder, adapter=beside), trained("plain", tiny_model, folder)
    model = here(find(named(a=a, b=b), tmp_path))
    with pytest.raises(UsageError, match="trained whole cannot be combined"):
        mixed(model, Mix.of("a=0.5,b=0.5"))


def test_nothing_but_the_likeliest_token_decides(tiny_model: Path, tmp_path: Path) -> None:
    """The base's authors may have penalties of their own."""
    strict = tmp_path / "strict"
    shutil.copytree(tiny_model, strict)
    told = json.loads((strict / "generation_config.json").read_text())
    (strict / "generation_config.json").write_text(json.dumps({**told, "repetition_penalty": 5.0, "min_new_tokens": 9}))
    texts = []
    for model in (tiny_model, strict):
        subject = find(ArtifactRef(model=str(model)), tmp_path / model.name)
        texts.append(Generator(here(subject), tokenizer_of(subject), CPU, 4).answers(PROMPTS, 12))
    assert texts[0] == texts[1]


def test_a_checkpoint_of_a_model_that_is_trained_whole_can_be_asked(
    tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    """Its tokenizer is that of its run's base: only what is final has one beside it."""
    steps = {"training.steps": 4, "checkpoint.every_steps": 2}
    recipe = trained("full-checkpoints", tiny_model, folder, adapter={"method": "none"}, **steps)
    checkpoints = [f for f in Path(run_of(recipe).url, layout.CHECKPOINTS).iterdir() if not (f / "README.md").exists()]
    subject = find(ArtifactRef.of(None, [str(checkpoints[0])], None), tmp_path)
    assert Generator(here(subject), tokenizer_of(subject), CPU, 4).answers(PROMPTS, 3)


def test_an_address_with_an_equals_sign_in_it_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert ArtifactRef.of(None, ["lr=1"], None).adapters == (("default", "lr=1"),)
