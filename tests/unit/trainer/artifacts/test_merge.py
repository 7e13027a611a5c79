"""Merging and describing: the same logits before and after, and nothing kept that is not what it should be."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.artifacts.merge as merging
from tests.support.models import random_model
from tests.support.saved import adapter_of, trained
from tests.support.tasks import make_encoder, task_recipe, write_task_data
from tests.support.training import run_of, train_here, write_pairs
from trainer.artifacts import ArtifactRef
from trainer.artifacts.combine import Mix
from trainer.artifacts.inspect import describe
from trainer.artifacts.merge import combine, merge
from trainer.checkpoint.artifact_info import ArtifactInfo
from trainer.errors import CorruptObject, InputError, StorageError, UsageError
from trainer.model.placement import model_bytes
from trainer.recipe import Recipe
from trainer.run import layout

IDS = torch.tensor([[5, 9, 100, 7, 33]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    write_pairs(folder / "data" / "a.jsonl", 60)
    write_task_data(folder, "classification")
    return folder


def of(recipe: Recipe) -> ArtifactRef:
    return ArtifactRef(run=run_of(recipe).url)


@torch.no_grad()
def plain_logits(model: Path, adapter: Path | None = None, kind: str = "CausalLM", **settings: Any) -> torch.Tensor:
    import transformers
    from peft import PeftModel

    auto = getattr(transformers, f"AutoModelFor{kind}")
    loaded: Any = auto.from_pretrained(model, dtype=torch.float32, **settings)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    found: torch.Tensor = loaded.eval()(input_ids=IDS).logits
    return found


TOKENS: dict[str, Any] = {"adapter": {"method": "lora", "rank": 4, "trainable_tokens": [5, 9]}}
MORE_THAN_FILES = ("adalora", "oft", "tokens-too")
"""Parts of these are made from the base's weights, or computed."""
METHODS: list[tuple[str, dict[str, Any]]] = [
    *((m, {}) for m in ("lora", "dora", "pissa", "adalora", "ia3", "vera", "oft", "loha", "lokr")),
    ("lora-nf4", {"model.quantization": "nf4"}),
    ("tokens-too", TOKENS),
    ("heads-too", {"adapter": {"method": "lora", "rank": 4, "modules_to_save": ["lm_head"]}}),
]


SPREAD = [(*one, False) for one in METHODS] + [(*one, True) for one in METHODS if one[0] not in MORE_THAN_FILES]


@pytest.mark.parametrize(("name", "changes", "spread"), SPREAD)
def test_the_merged_model_is_base_and_adapter(
    name: str, changes: dict[str, Any], spread: bool, tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    adapter = {} if "adapter" in changes else {"adapter": {"method": name.removesuffix("-nf4")}}
    recipe = trained(f"each-{name}", tiny_model, folder, **{**adapter, **changes})
    base = sorted(f.name for f in tiny_model.iterdir())
    limits = {"cpu": model_bytes(recipe.model, tiny_model) // 2} if spread else None
    done = merge(of(recipe), tmp_path / "out", limits=limits)
    found, wanted = plain_logits(tmp_path / "out"), plain_logits(tiny_model, adapter_of(recipe))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, plain_logits(tiny_model), atol=1e-3)
    assert done.difference < 1e-5
    assert base == sorted(f.name for f in tiny_model.iterdir()), "the base is left alone"
    told = describe(str(tmp_path / "out"))
    assert (told.kind, told.whole, told.facts["generates"]) == ("model", True, True)
    assert "merged into" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", MORE_THAN_FILES)
def test_what_a_file_does_not_hold_cannot_be_spread(name: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained(f"each-{name}", tiny_model, folder, **{"adapter": {"method": name}, **dict(METHODS)[name]})
    with pytest.raises(InputError, match="its adapter has weights that its file lacks"):
        merge(of(recipe), tmp_path / "out", limits={"cpu": model_bytes(recipe.model, tiny_model) // 2})


def test_in_bfloat16_the_sum_is_rounded_once(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained("lora", tiny_model, folder)
    done = merge(of(recipe), tmp_path / "out", dtype="bfloat16")
    assert 1e-5 < done.difference < 2e-2
    assert describe(str(tmp_path / "out")).dtypes.keys() == {"bfloat16"}


def test_a_classifier_keeps_its_head(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    encoder = make_encoder(tmp_path / "encoder")
    few = {"training.steps": 3, "checkpoint.every_steps": 3, "training.eval_every": None, "optimizer.lr": 2e-2}
    recipe = task_recipe("classification", "merge", encoder, folder, adapter={"method": "lora", "dropout": 0.0}, **few)
    assert train_here(recipe) == "succeeded"
    merge(of(recipe), tmp_path / "out")
    config = AutoConfig.from_pretrained(adapter_of(recipe))
    wanted = plain_logits(
        encoder, adapter_of(recipe), "SequenceClassification", config=config, ignore_mismatched_sizes=True
    )
    assert torch.allclose(plain_logits(tmp_path / "out", kind="SequenceClassification"), wanted, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label[0] == "bread"


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning", "adaption_prompt"])
def test_vectors_before_the_text_cannot_be_merged(method: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained(f"m-{method.replace('_', '-')}", tiny_model, folder, adapter={"method": method})
    with pytest.raises(UsageError, match=f"{method} trains vectors before the text"):
        merge(of(recipe), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_what_cannot_be_merged_is_said(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    full = trained("full", tiny_model, folder, adapter={"method": "none"})
    with pytest.raises(UsageError, match="is a whole model already"):
        merge(of(full), tmp_path / "out")
    lora = trained("lora", tiny_model, folder)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("kept")
    with pytest.raises(UsageError, match="is there already: name a new folder"):
        merge(of(lora), tmp_path / "there")
    assert (tmp_path / "there" / "mine").read_text() == "kept"
    with pytest.raises(UsageError, match="is no folder of this machine"):
        merge(of(lora), Path("s3://bucket/merged"))
    both = ArtifactRef.of(None, [f"a={adapter_of(lora)}", f"b={adapter_of(lora)}"], None)
    with pytest.raises(UsageError, match="say which of a, b to merge, or how much of each, by --use"):
        merge(both, tmp_path / "out")


def test_a_merge_that_went_wrong_leaves_nothing(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trained("lora", tiny_model, folder)
    write = merging._write

    def wrong(target: Path, *rest: Any) -> None:
        from safetensors.torch import load_file, save_file

        write(target, *rest)
        some = load_file(target / "model.safetensors")
        name = next(n for n in some if "q_proj" in n)
        save_file({**some, name: some[name] * 1.01}, target / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merging, "_write", wrong)
    with pytest.raises(CorruptObject, match=r"logits differ from the adapter's by .*: nothing was kept"):
        merge(of(recipe), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = trained("lora", tiny_model, folder)
    monkeypatch.setattr(merging, "_write", full)
    with pytest.raises(StorageError, match=r"was not written, and nothing is left of it: .*No space left on device"):
        merge(of(recipe), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_combination_is_an_adapter_of_its_own(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    a, b = trained("lora", tiny_model, folder), trained("lora-2", tiny_model, folder, seed=2)
    both, mix = ArtifactRef.of(None, [f"a={adapter_of(a)}", f"b={adapter_of(b)}"], None), Mix.of("a=0.5,b=0.5")
    combine(both, tmp_path / "mix", mix)
    merge(both, tmp_path / "merged", mix=mix)
    assert torch.allclose(plain_logits(tiny_model, tmp_path / "mix"), plain_logits(tmp_path / "merged"), atol=1e-4)
    assert ArtifactInfo.read(tmp_path / "mix") == ArtifactInfo.of(a), "as its parents were held"
    combine(of(a), tmp_path / "alone", Mix.of("default"))
    assert torch.equal(plain_logits(tiny_model, tmp_path / "alone"), plain_logits(tiny_model, adapter_of(a)))
    told = describe(str(tmp_path / "mix"))
    assert (told.whole, told.settings["r"]) == (True, 4 + 4)


def test_an_adapter_is_described(tiny_model: Path, folder: Path) -> None:
    recipe = trained("dora-nf4", tiny_model, folder, adapter={"method": "dora"}, **{"model.quantization": "nf4"})
    run, adapter = describe(run_of(recipe).url), describe(str(adapter_of(recipe)))
    assert (adapter.kind, adapter.method, adapter.whole, adapter.problems) == ("adapter", "dora", True, [])
    assert adapter.base == {
        "path": str(tiny_model), "revision": "main", "dtype": "float32", "quantization": "nf4",
    }  # fmt: skip
    assert run.facts == {"step": 3}
    assert {**vars(run), "facts": {}} == {**vars(adapter), "facts": {}}
    size = (adapter_of(recipe) / "adapter_model.safetensors").stat().st_size
    assert adapter.files["adapter_model.safetensors"] == size
    assert adapter.bytes == 4 * adapter.parameters < size


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "vera", "oft", "prefix", "prompt", "p_tuning"])
def test_every_whole_adapter_is_found_whole(method: str, tiny_model: Path, folder: Path) -> None:
    name = method.replace("_", "-")
    recipe = trained(
        name if method in ("lora", "dora") else f"m-{name}", tiny_model, folder, adapter={"method": method}
    )
    told = describe(str(adapter_of(recipe)))
    assert (told.problems, told.facts) == ([], {})


DAMAGE = {
    "truncated": "cannot be read, it is torn",
    "missing": "1 tensors are missing",
    "foreign": "1 tensors are foreign",
    "shape": "do not fit the base",
    "nan": "holds values that are not finite",
    "gone": "adapter_model.safetensors is missing",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_described_as_such(damage: str, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter_of(trained("lora", tiny_model, folder)), broken)
    weights = broken / "adapter_model.safetensors"
    tensors = load_file(weights)
    first, *rest = sorted(tensors)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    else:
        changed = {
            "missing": {name: tensors[name] for name in rest},
            "foreign": {**tensors, "extra": torch.ones(2)},
            "shape": {**tensors, first: torch.ones(3, 3)},
            "nan": {**tensors, first: tensors[first] * float("nan")},
        }[damage]
        save_file(changed, weights, {"format": "pt"})
    told = describe(str(broken))
    assert not told.whole
    assert DAMAGE[damage] in told.problems[0]


def test_a_run_is_held_against_its_commit(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    recipe = trained("lora", tiny_model, folder)
    run = tmp_path / "run"
    shutil.copytree(run_of(recipe).url, run)
    card = run / layout.ADAPTER / "README.md"
    card.write_text(card.read_text() + "changed")
    assert describe(str(run)).problems == ["README.md is not what was committed"]
    shutil.rmtree(run / layout.COMMITS)
    with pytest.raises(InputError, match="has no final adapter yet"):
        describe(str(run))
    with pytest.raises(InputError, match="name the folder of one"):
        describe(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "nan"])
def test_a_damaged_model_is_described_as_such(damage: str, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        name = next(n for n in tensors if "norm" in n)
        save_file({**tensors, name: tensors[name] * float("nan")}, weights, {"format": "pt"})
    told = describe(str(broken))
    assert told.problems
    assert ("is torn" if damage == "truncated" else "not finite") in told.problems[0]
    assert json.loads(json.dumps(told.to_json()))["whole"] is False


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_what_is_not_merged_tensor_by_tensor_is_refused(
    changes: dict[str, Any], tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    name = f"tied-{next(iter(changes)).replace('_', '-')}"
    recipe = trained(name, base, folder, adapter={"method": "lora", "rank": 4, **changes})
    with pytest.raises(InputError, match="does not fit in memory, and the adapter"):
        merge(of(recipe), tmp_path / "parts", limits={"cpu": model_bytes(recipe.model, base) // 2})
    merge(of(recipe), tmp_path / "whole")


@pytest.fixture(scope="module")
def tied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with embeddings that are its head too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path_factory.mktemp("tied")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    return base


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r"(model\.embed_tokens|.*\.q_proj)"])
def test_an_adapter_on_a_tied_weight_is_merged_into_one_of_the_two(
    targets: Any, tied: Path, folder: Path, tmp_path: Path
) -> None:
    name = f"tied-{'head' if isinstance(targets, list) else 'embeddings'}"
    adapter = {"method": "lora", "rank": 4, "target_modules": targets}
    recipe = trained(name, tied, folder, adapter=adapter, **{"data.packing": False})
    want = plain_logits(tied, adapter_of(recipe))
    merge(of(recipe), tmp_path / "merged")
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert float((plain_logits(tmp_path / "merged") - want).norm() / want.norm()) < 1e-5
    assert float((plain_logits(tied) - want).norm() / want.norm()) > 1e-3, "the adapter has learnt something"


def test_layers_that_share_a_weight_and_have_adapters_of_their_own_are_not_merged(
    tiny_model: Path, folder: Path
) -> None:
    from transformers import ZambaConfig

    config = ZambaConfig(
        vocab_size=384, hidden_size=32, attention_hidden_size=64, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, n_mamba_heads=2, mamba_d_state=8, attn_layer_period=2,
        attn_layer_offset=1, layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"],
    )  # fmt: skip
    model = random_model(config, folder / "shared", tiny_model)
    recipe = trained("shared-blocks", model, folder, **{"data.packing": False, "adapter.target_modules": ["q_proj"]})
    with pytest.raises(UsageError, match="are one weight in the base model, and each has an adapter of its own"):
        merge(of(recipe), folder / "out")


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_tied_head_is_not_taken_apart(method: str, tied: Path, folder: Path) -> None:
    adapter = {"method": method, "rank": 4, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(InputError, match="shares its weight with the embeddings: leave the head out"):
        trained(f"tied-{method}", tied, folder, adapter=adapter)


def test_no_code_of_a_base_runs_to_describe_an_adapter(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "conf.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    shutil.copytree(adapter_of(trained("lora", tiny_model, folder)), adapter)
    told = json.loads((adapter / "muster.json").read_text())
    told["model"]["path"] = str(base)
    (adapter / "muster.json").write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "not compared with its base" in describe(str(adapter)).facts
    assert not (tmp_path / "ran").exists()


def test_brackets_in_what_is_told_are_no_markup(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from launcher.monitor.tables import described_table

    told = describe(str(tiny_model))
    told.facts["text"] = "[INST] say [/INST] [qv]_proj"
    Console(width=120).print(described_table(told))
    assert "[INST] say [/INST] [qv]_proj" in capsys.readouterr().out


def test_a_token_with_another_expert_is_no_wrong_sum_of_a_mixture() -> None:
    draw = torch.Generator().manual_seed(3)
    before = [torch.randn(1, 5, 8, generator=draw), torch.randn(1, 4, 8, generator=draw)]
    one = [logits.clone() for logits in before]
    one[0][:, -1] += 1.0
    every = [logits + 1.0 for logits in before]
    assert merging._difference(before, one, mixture=True) == 0.0
    assert merging._difference(before, every, mixture=True) > 0.3
    assert merging._difference(before, one, mixture=False) > 0.1
    zero = [torch.zeros(1, 3)]
    assert merging._difference(zero, [torch.ones(1, 3)], mixture=False) == pytest.approx(3**0.5)
