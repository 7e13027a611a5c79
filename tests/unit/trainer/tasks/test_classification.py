"""Classification: its loss by hand, its metrics beside scikit-learn's, and the head on bases of all kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from transformers import T5Config, T5ForSequenceClassification

from launcher.driver.preflight import check_model
from tests.support.looping import bench
from tests.support.models import CPU, built
from tests.support.tasks import LABELS, make_encoder, task_recipe, write_task_data
from tests.support.training import run_of, train_here
from trainer.data import Batch
from trainer.data.loading.collate import collate
from trainer.data.sample import Sample
from trainer.errors import InputError
from trainer.model import Head, build
from trainer.recipe import Recipe
from trainer.run import layout
from trainer.tasks.classification import averages, counts
from trainer.tasks.sequences import SequenceOutputs

TEXTS = (5, 9, 3)
NUMBERS = (1, 3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification")
    write_task_data(folder, "classification")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"), num_labels=2)


def texts(types: bool = False) -> Batch:
    draw = np.random.Generator(np.random.PCG64(3))
    packs = []
    for length, label in zip(TEXTS, NUMBERS, strict=True):
        tokens, target = draw.integers(4, 190, length).astype(np.int32), np.arange(length) == length - 1
        kinds = (np.arange(length) > length // 2).astype(np.int8) if types else None
        packs.append([Sample(tokens, target, label=label, token_types=kinds)])
    return collate(0, packs, ["0:0/0", "0:0/1", "0:0/2"])


@pytest.mark.parametrize("base", ["tiny_model", "encoder"])
def test_the_loss_is_the_weighted_sum_of_each_texts_own(base: str, folder: Path, request: Any) -> None:
    """Every text alone, without pads, through the plain forward: -w(y) log softmax(z)[y], by hand."""
    path = request.getfixturevalue(base)
    recipe = task_recipe("classification", f"hand-{base}", path, folder, **{"adapter.dropout": 0.0})
    with bench(recipe) as b:
        batch = texts(types=base == "encoder")
        b.model.eval()
        loss, sums = b.task.loss(b.model, batch, CPU)
        wanted, predicted = 0.0, []
        for row, (length, label) in enumerate(zip(TEXTS, NUMBERS, strict=True)):
            ids: dict[str, Any] = {"input_ids": torch.from_numpy(batch.input_ids[row, :length])[None]}
            if batch.token_types is not None:
                ids["token_type_ids"] = torch.from_numpy(batch.token_types[row, :length])[None]
            z = b.model(**ids).logits[0].detach()
            predicted.append(int(z.argmax()))
            weight = 2.0 if LABELS[label] == "ferry" else 1.0
            wanted -= weight * float(z[label] - torch.log(torch.exp(z).sum()))
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        assert sums["actual"].tolist() == [0, 2, 0, 1]
        assert sums["predicted"].tolist() == [predicted.count(n) for n in range(4)]


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("seed", range(6))
def test_metrics_are_scikit_learns_added_up_over_any_batches(average: str, seed: int) -> None:
    draw = np.random.Generator(np.random.PCG64(seed))
    labels = 5
    # Labels that are never right, or never predicted, or neither, are where averages differ.
    actual = draw.choice([0, 1, 3][: 1 + seed % 3], 40)
    predicted = np.where(draw.random(40) < 0.5, actual, draw.choice([0, 2], 40))
    total: dict[str, torch.Tensor] = {}
    for part in np.array_split(np.arange(40), 1 + seed):
        for name, value in counts(torch.from_numpy(predicted[part]), torch.from_numpy(actual[part]), labels).items():
            total[name] = total.get(name, torch.zeros(labels)) + value
    precision, recall, f1, _ = precision_recall_fscore_support(actual, predicted, average=average, zero_division=0)
    assert averages(total, average) == pytest.approx({"f1": f1, "precision": precision, "recall": recall})
    assert float(total["right"].sum() / total["actual"].sum()) == pytest.approx(accuracy_score(actual, predicted))


def evaluation_of(recipe: Recipe) -> dict[str, float]:
    with bench(recipe) as b:
        b.loop().evaluate(0)
        return b.evaluations[0]


def test_an_evaluation_reports_every_metric_and_not_the_micro_batch(tiny_model: Path, folder: Path) -> None:
    rows = [
        evaluation_of(task_recipe("classification", f"eval-{n}", tiny_model, folder, **{"training.micro_batch": n}))
        for n in (1, 4)
    ]
    for row in rows:
        row.pop("eval_s")
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert {"eval_loss", "eval_accuracy", "eval_f1", "eval_precision", "eval_recall"} <= rows[0].keys()


def test_evaluation_data_are_held_to_the_labels_of_the_training_data(tiny_model: Path, folder: Path) -> None:
    """By themselves, evaluation data with fewer labels would number them otherwise."""
    eval_rows = folder / "classification" / "few.jsonl"
    eval_rows.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in LABELS[2:]))
    source = [{"path": str(eval_rows), "format": "classification"}]
    with bench(task_recipe("classification", "few", tiny_model, folder, **{"data.eval": source})) as b:
        assert b.data.eval is not None
        assert b.data.eval.spec.labels == b.data.train.spec.labels == LABELS
    eval_rows.write_text(json.dumps({"text": "x", "label": "mountain"}) + "\n")
    with (
        pytest.raises(InputError, match="'mountain' is neither one of"),
        bench(task_recipe("classification", "other", tiny_model, folder, **{"data.eval": source})),
    ):
        pass


def test_a_weight_for_a_label_that_is_not_there_is_refused(tiny_model: Path, folder: Path) -> None:
    recipe = task_recipe(
        "classification", "typo", tiny_model, folder, **{"classification.class_weights": {"fery": 2.0}}
    )
    with pytest.raises(InputError, match=r"class_weights names the label 'fery', and those .* are bread, ferry"):
        train_here(recipe)


def based(path: Path, tmp_path: Path, **changes: Any) -> Recipe:
    return task_recipe("classification", "base", path, tmp_path, **changes)


def built_head(recipe: Recipe, labels: int = 3, seed: int = 5) -> Any:
    head = Head(tuple(f"label {n}" for n in range(labels)), seed)
    return build(recipe.model, Path(recipe.model.path), CPU, full=False, checkpointing=False, head=head).model


@pytest.mark.parametrize("base", ["tiny_model", "encoder"])
def test_a_head_that_the_base_lacks_is_drawn_by_seed_and_name(base: str, tmp_path: Path, request: Any) -> None:
    recipe = based(request.getfixturevalue(base), tmp_path)
    torch.manual_seed(1)
    one = built_head(recipe)
    torch.manual_seed(2)
    two, other = built_head(recipe), built_head(recipe, seed=6)
    name = "score" if base == "tiny_model" else "classifier"
    assert [n for n, p in one.named_parameters() if p.requires_grad and n.startswith(name)]
    for (n, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (one, two, other)), strict=True):
        assert torch.equal(a, b), n
        assert a.requires_grad == n.startswith(name), n
        if n == f"{name}.weight":
            assert not torch.equal(a, c)
            assert 0.01 < a.std().item() < 0.03
    assert one.config.id2label == {0: "label 0", 1: "label 1", 2: "label 2"}
    assert one.config.label2id["label 2"] == 2


def test_a_head_of_the_same_size_is_kept(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(encoder / "model.safetensors")["classifier.weight"]
    assert torch.equal(built_head(based(encoder, tmp_path), labels=2).classifier.weight, stored)


def test_a_pooler_that_the_base_lacks_belongs_to_the_head(tmp_path: Path) -> None:
    recipe = based(make_encoder(tmp_path / "mlm", "ForMaskedLM"), tmp_path)
    trained = {n for n, p in built_head(recipe).named_parameters() if p.requires_grad}
    assert trained == {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    model, adapter = built(recipe, ("a", "b", "c"))
    saved = set(adapter.saved_names(model).values())
    assert "base_model.model.bert.pooler.dense.weight" in saved
    assert not [n for n in saved if "pooler" in n and "lora" in n]


def test_anything_else_that_is_missing_is_refused(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_encoder(tmp_path / "torn")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of a sequence classifier \(bert\.encoder\.layer\.1"):
        built_head(based(folder, tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_may_lie_under_the_name_of_the_output_they_are_tied_to(
    tied: bool, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "tied"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    if tied:
        model = built_head(based(folder, tmp_path))
        assert torch.equal(model.get_input_embeddings().weight, tensors["lm_head.weight"])
    else:
        with pytest.raises(InputError, match=r"lacks 1 weights of a sequence classifier \(model\.embed_tokens"):
            built_head(based(folder, tmp_path))


@pytest.mark.parametrize("base", ["tiny_model", "encoder"])
def test_the_model_is_looked_at_before_a_run(base: str, folder: Path, request: Any) -> None:
    check_model(task_recipe("classification", "looked", request.getfixturevalue(base), folder), pytest.fail)


@pytest.mark.parametrize("base", ["tiny_model", "encoder"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantised_base_the_head_stays_as_it_is(
    base: str, quantization: str, tmp_path: Path, request: Any
) -> None:
    changes = {"model.quantization": quantization, "model.dtype": "bfloat16"}
    recipe = based(request.getfixturevalue(base), tmp_path, **changes)
    model = built_head(recipe)
    head = model.score if base == "tiny_model" else model.classifier
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == torch.float32
    layer = model.model.layers[0].mlp.up_proj if base == "tiny_model" else model.bert.encoder.layer[0].output.dense
    assert type(layer) is not torch.nn.Linear


@pytest.mark.parametrize("base", ["tiny_model", "encoder"])
@pytest.mark.parametrize("targets", ["all-linear", ".*(score|classifier|query|q_proj)"])
def test_no_adapter_is_put_on_a_head(base: str, targets: str, tmp_path: Path, request: Any) -> None:
    model, _ = built(based(request.getfixturevalue(base), tmp_path, **{"adapter.target_modules": targets}), ("a", "b"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lora_A" in n for n in trained)
    assert not [n for n in trained if "lora" in n and ("score" in n or "classifier" in n)]
    assert [n for n in trained if n.endswith("modules_to_save.default.weight")]


@pytest.mark.parametrize("change", [{}, {"model.quantization": "nf4"}, {"adapter.method": "none"}])
def test_a_run_on_an_encoder_leaves_a_classifier_with_its_labels(
    change: dict[str, Any], encoder: Path, folder: Path, tmp_path: Path
) -> None:
    """The published folder, loaded as its card says."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    name = "-".join(str(v) for v in change.values()) or "lora"
    recipe = task_recipe("classification", f"encoder-{name}", encoder, folder, **{"optimizer.lr": 2e-2, **change})
    assert train_here(recipe) == "succeeded"
    published = Path(run_of(recipe).url) / layout.ADAPTER
    config = AutoConfig.from_pretrained(published)
    assert config.id2label == dict(enumerate(LABELS))
    if recipe.adapter.method == "none":
        model = AutoModelForSequenceClassification.from_pretrained(published)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(encoder, config=config, ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(base, published)
    inputs = AutoTokenizer.from_pretrained(published)(["a ferry", "rain fell on"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert model.eval()(**inputs).logits.shape == (2, 4)
    card = (published / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "pipeline_tag: text-classification" in card


def test_a_model_with_an_encoder_and_a_decoder_is_refused_before_a_step() -> None:
    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=96)
    with torch.device("meta"):
        model = T5ForSequenceClassification(config)
    with pytest.raises(
        InputError, match=r"T5ForSequenceClassification has an encoder and a decoder.*another model.path"
    ):
        SequenceOutputs(model)
