"""The adapter methods: the settings that each one takes, with their best known defaults and the source of these.

A recipe that leaves a setting out gets the method's default. A setting that a method does not list has no effect on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.recipe.rules.refusal import Refusal, on_sharded, that_generates, with_adapter_off, with_head
from trainer.registry import Choice, Registry


@dataclass(frozen=True)
class MethodRow(Choice):
    """A method's row.

    ``what``: one line for the reference. ``settings``: recipe field to default. ``lr``: the first peak learning rate to
    try (AdamW, batches of a few dozen samples). ``source``: the origin of the defaults. ``merges``: `muster merge` can
    add it to the base model. ``plain_lora``: it is saved as plain LoRA of so many times its rank, which other programs
    load; 0: it is not. ``shares_base``: peft supports a second LoRA adapter on the same model. ``own_vectors``:
    trained vectors that are not of the text and take part in its attention: virtual tokens before each sample
    (``tokens``), keys and values in the layers (``keys``), or it is not known before the inputs are (``unknown``).
    ``residual``: it subtracts its initial values from the base model's weights, and what is left is frozen (and
    quantised). ``spans_run``: it has a schedule over all of the run's steps. ``refuses``: what it does not work with,
    besides what its other facts exclude."""

    what: str
    settings: Mapping[str, Any]
    lr: float
    source: str
    merges: bool = True
    plain_lora: int = 0
    shares_base: bool = False
    own_vectors: Literal["none", "tokens", "keys", "unknown"] = "none"
    residual: bool = False
    spans_run: bool = False
    refuses: tuple[Refusal, ...] = ()

    @property
    def takes_several(self) -> bool:
        """True if adapters of several runs can be on one model: each adds a product, and leaves the model as it is."""
        return self.plain_lora == 1

    @property
    def inserts_tokens(self) -> bool:
        """True if it inserts its own tokens between those of the samples."""
        return self.own_vectors in ("tokens", "keys")


MODULES = {"modules_to_save": ()}
TOKENS = {**MODULES, "trainable_tokens": ()}
LORA = {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear", "bias": "none", **TOKENS}
WITH_EXPERTS = {**LORA, "experts": True}

PACKED_SHAPE = Refusal(
    "peft mistakes the shape of a packed 4-bit weight for that of the layer",
    quantization=("nf4",),
)

METHODS = Registry(
    "adapter method",
    {
        "lora": MethodRow(
            "trainer.adapters.lora:Lora",
            "adds a low-rank product to each target",
            WITH_EXPERTS,
            2e-4,
            "arXiv:2106.09685; all linear layers and this rate: QLoRA, arXiv:2305.14314, section 4",
            plain_lora=1,
            shares_base=True,
        ),
        "rslora": MethodRow(
            "trainer.adapters.lora:RsLora",
            "LoRA scaled by alpha / √rank, so that high ranks still learn",
            {**WITH_EXPERTS, "rank": 64, "alpha": 16},
            1e-4,
            "arXiv:2312.03732: gains show at high ranks; alpha 16 keeps the step of LoRA with alpha = 2 rank",
            plain_lora=1,
            shares_base=True,
        ),
        "dora": MethodRow(
            "trainer.adapters.lora:Dora",
            "LoRA that trains each row's magnitude apart from its direction: closer to full fine-tuning, slower",
            LORA,
            1e-4,
            "arXiv:2402.09353, appendix A.2: rank 16, alpha 32, 1e-4 to 2e-4",
            shares_base=True,
            refuses=(
                Refusal(
                    "bitsandbytes splits int8 weights in the first forward, and dora has to read them",
                    quantization=("int8",),
                ),
            ),
        ),
        "pissa": MethodRow(
            "trainer.adapters.pissa:Pissa",
            "LoRA on the principal singular vectors of each weight; the rest is frozen (and quantised): learns faster",
            {**LORA, "alpha": 16, "dropout": 0.0},
            2e-5,
            "arXiv:2404.02948, section 5: alpha = rank, no dropout, 2e-5",
            plain_lora=2,
            residual=True,
        ),
        "olora": MethodRow(
            "trainer.adapters.pissa:Olora",
            "LoRA that starts from the orthonormal basis of each weight's QR decomposition",
            {**LORA, "alpha": 16, "dropout": 0.05},
            1e-4,
            "arXiv:2406.01775, section 4: alpha 16, dropout 0.05; rate between LoRA's and PiSSA's",
            plain_lora=2,
            residual=True,
        ),
        "loraplus": MethodRow(
            "trainer.adapters.lora:LoraPlus",
            "LoRA whose B learns faster than A by `lr_ratio`",
            {**WITH_EXPERTS, "lr_ratio": 16.0},
            5e-5,
            "arXiv:2402.12354, section 5: ratio 16, with A at a rate below LoRA's",
            plain_lora=1,
            shares_base=True,
        ),
        "adalora": MethodRow(
            "trainer.adapters.adalora:AdaLora",
            "shares a falling budget of ranks out between the layers: starts at `rank`, ends at `target_rank` on "
            "average",
            {
                **{**LORA, "rank": 12, "target_rank": 8},
                **{"prune_start": 0.1, "prune_end": 0.7, "prune_every": 10, "orthogonality": 0.5},
            },
            1e-3,
            "arXiv:2303.10512, appendix C: initial budget 1.5 times the target, pruning from a tenth to about two "
            "thirds of the steps, 5e-4 to 2e-3; orthogonality 0.5 as in peft",
            spans_run=True,
            refuses=(
                Refusal(
                    "adalora plans its ranks for one update in each step, and the task takes several",
                    task=that_generates,
                ),
                Refusal(
                    "adalora compares the gradients of whole matrices between all layers",
                    strategy=on_sharded,
                ),
            ),
        ),
        "ia3": MethodRow(
            "trainer.adapters.ia3_vera:IA3",
            "scales keys, values and feed-forward activations: the fewest parameters",
            {"target_modules": None, **MODULES},
            3e-3,
            "arXiv:2205.05638, section 3.3: 3e-3; peft's targets for the architecture",
        ),
        "vera": MethodRow(
            "trainer.adapters.ia3_vera:Vera",
            "trains two vectors per target around random matrices that all targets share",
            {"rank": 256, "dropout": 0.0, "target_modules": "all-linear", "bias": "none", **MODULES},
            1e-2,
            "arXiv:2310.11454, section 4: rank 256 for models of 7B; ten to a hundred times LoRA's rate",
        ),
        "oft": MethodRow(
            "trainer.adapters.oft:Oft",
            "turns each weight by a block-diagonal rotation",
            {"block_size": 32, "dropout": 0.0, "target_modules": "all-linear", "bias": "none", **MODULES},
            4e-4,
            "arXiv:2506.19847, section 5: block size 32, 1e-4 to 8e-4",
        ),
        "boft": MethodRow(
            "trainer.adapters.oft:Boft",
            "turns each weight by a product of sparse rotations; slow",
            {
                **{"block_size": 4, "butterfly_factors": 1, "dropout": 0.0},
                **{"target_modules": "all-linear", "bias": "none", **MODULES},
            },
            4e-4,
            "arXiv:2311.06243 for the form; block size 4 and one factor as in peft",
        ),
        "loha": MethodRow(
            "trainer.adapters.lycoris:LoHa",
            "adds the entry-wise product of two low-rank products: rank r² for the parameters of 2r",
            {"rank": 8, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", **MODULES},
            5e-4,
            "arXiv:2309.14859, section 5: half of LoRA's rank for the same size, alpha at most the rank",
            refuses=(PACKED_SHAPE,),
        ),
        "lokr": MethodRow(
            "trainer.adapters.lycoris:LoKr",
            "adds a Kronecker product: very few parameters, full rank",
            {"rank": 8, "alpha": 8, "factor": -1, "dropout": 0.0, "target_modules": "all-linear", **MODULES},
            2e-3,
            "arXiv:2309.14859, section 5; the split nearest to the square root as in peft",
            refuses=(PACKED_SHAPE,),
        ),
        "prefix": MethodRow(
            "trainer.adapters.prompts:Prefix",
            "trains keys and values before the text, in every layer",
            {"virtual_tokens": 20, "encoder_hidden": None, **MODULES},
            1e-2,
            "arXiv:2101.00190: 10 to 200 tokens by task; a higher rate than LoRA's, since nothing but the prefix "
            "learns",
            merges=False,
            own_vectors="keys",
        ),
        "prompt": MethodRow(
            "trainer.adapters.prompts:PromptTuning",
            "trains embeddings before the text: a few thousand parameters",
            {"virtual_tokens": 20, **MODULES},
            3e-1,
            "arXiv:2104.08691, section 3: 20 tokens and more gain little, drawn from the vocabulary; rate 0.3",
            merges=False,
            own_vectors="tokens",
        ),
        "p_tuning": MethodRow(
            "trainer.adapters.prompts:PTuning",
            "trains embeddings before the text through an MLP",
            {"virtual_tokens": 20, "encoder_hidden": 128, **MODULES},
            1e-3,
            "arXiv:2103.10385 for the form; 20 tokens and a hidden size of 128 as in peft's examples",
            merges=False,
            own_vectors="tokens",
        ),
        "adaption_prompt": MethodRow(
            "trainer.adapters.adaption_prompt:AdaptionPrompt",
            "lets the top layers attend to trained vectors through a gate that starts shut",
            {"virtual_tokens": 10, "layers": None},
            9e-3,
            "arXiv:2303.16199, section 4: 10 vectors in the top 30 of 32 layers, 9e-3",
            merges=False,
            own_vectors="keys",
            refuses=(Refusal("peft saves no head with an adaption_prompt", task=with_head),),
        ),
        "peft": MethodRow(
            "trainer.adapters.peft_generic:ByName",
            "any other method of the installed peft, by its own name and fields: `{peft: MISS, r: 8}`; checked with "
            "the inputs",
            {"target_modules": "all-linear", **MODULES},
            2e-4,
            "peft's defaults; LoRA's rate as a first value",
            own_vectors="unknown",
        ),
        "none": MethodRow(
            "trainer.adapters.full:Full",
            "trains every weight",
            {},
            2e-5,
            "",
            refuses=(
                Refusal(
                    "quantised weights cannot be trained, and adapter.method none trains all of them",
                    quantization=("nf4", "int8"),
                ),
                Refusal(
                    "the reference is the model with its adapter off, and adapter.method none has no adapter",
                    task=with_adapter_off,
                ),
            ),
        ),
    },
    group="muster.methods",
    held=MethodRow("", "a plug-in's", {}, 2e-4, "", own_vectors="unknown"),
)


def methods_with(setting: str) -> list[str]:
    """Returns the methods on which a setting has an effect."""
    return [name for name, method in METHODS.items() if setting in method.settings]
