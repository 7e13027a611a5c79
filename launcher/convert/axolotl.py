"""Converts axolotl's settings. Its batch sizes count packs with ``sample_packing``, and rows without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.convert import axolotl_data, axolotl_grpo, common
from launcher.convert.draft import Draft, as_mapping, as_number, is_number
from trainer.recipe.tasks import TASKS

HINDRANCES = {
    "process_reward_model": "rewards for steps of an answer; task reward rates complete answers",
    "gptq": "a base model in GPTQ; muster takes unquantised ones, or bitsandbytes' NF4",
    "processor_type": "a model of images or sound; muster trains on text",
    "diffusion": "a model that diffuses tokens; muster trains causal language models",
    "ebft": f"another objective; {common.TASKS_ARE}",
    "use_eaft": "another loss; task sft has cross entropy",
    "model_quantization_config": "a base model in another quantisation; muster takes unquantised ones, or "
    "bitsandbytes' NF4",
    "relora": "merges and starts again during training; muster trains one adapter",
    "dpo_use_weighting": "another loss (WPO), which weighs pairs by their likelihood; muster has those of dpo.loss",
    "dpo_norm_loss": "another loss, of likelihoods per token; dpo.loss ipo and task simpo have such likelihoods",
    "use_onebitllms": "a base model with ternary weights; muster takes unquantised ones, or bitsandbytes' NF4",
}
CURVES = "every step's metrics are kept, and sent to the trackers"
KERNELS = "the same result by other kernels"
IDLE = {
    "logging_steps": CURVES,
    "include_t*": CURVES,
    "wandb_*": "a recipe has W&B's project, entity and mode; W&B reads its other variables itself",
    "use_wandb": "tracking names the trackers",
    "mlflow_*": "a recipe has MLflow's server and experiment; MLflow reads its other variables itself",
    "use_mlflow": "tracking names the trackers",
    "swanlab_*": "there is no tracker swanlab",
    "use_swanlab": "there is no tracker swanlab",
    "trackio_*": "there is no tracker trackio",
    "use_otel_metrics": "metrics are in the run's storage",
    "otel_*": "metrics are in the run's storage",
    "model_type": "the base model's config.json decides it",
    "tokenizer_type": "the base model's files decide it",
    "tokenizer_use_fast": "the base model's files decide it",
    "is_*": "the base model's config.json decides it",
    "dataset_prepared_path": "prepared data are in the storage, by fingerprint",
    "dataset_processes": "muster prepare takes as many as there are",
    "dataset_num_proc": "muster prepare takes as many as there are",
    "dataloader_*": "the reader is muster's own",
    "skip_prepare_dataset": "data are always prepared once",
    "push_dataset_to_hub": "prepared data stay in the storage",
    "hf_use_auth_token": "HF_TOKEN is used",
    "resume_from_checkpoint": "the same command resumes",
    "auto_resume_from_checkpoints": "the same command resumes",
    "save_only_model": "checkpoints always contain what a resume needs",
    "save_safetensors": "always",
    "save_first_step": "checkpoint.every_steps decides it",
    "hub_*": "muster push sends the result",
    "attention": KERNELS,
    "attn_implementation": KERNELS,
    "flash_attention": KERNELS,
    "flash_attn_*": KERNELS,
    "sdp_attention": KERNELS,
    "xformers_attention": KERNELS,
    "flex_*": KERNELS,
    "eager_attention": KERNELS,
    "dpo_use_liger_kernel": KERNELS,
    "dpo_use_logits_to_keep": KERNELS,
    "dpo_padding_free": KERNELS,
    "dpo_generate_during_eval": "samples and generative_eval generate texts",
    "lora_fan_in_fan_out": "peft finds it out by itself",
    "lora_on_cpu": "each rank loads what it keeps",
    "qlora_sharded_model_loading": "each rank loads what it keeps",
    "merge_method": "muster merge",
    "fsdp_*": "a matter of the strategy",
    "batch_size": "gradient_accumulation_steps comes first",
    "num_labels": "a reward is one number",
    "use_ray": "the driver runs on Ray",
    "resources_per_worker": "resources.gpus_per_worker is 1",
    "sample_packing_*": "the packs are planned for the whole epoch",
    "eval_sample_packing": "evaluation packs as training does",
    "pad_to_sequence_len": "padding has no effect on the result",
    "group_by_length": "packs hold samples of any length",
    "pretrain_multipack_attn": "samples of a pack never see each other",
    "shuffle_merged_datasets": "the order is random and different in each epoch",
    "streaming*": "data are streamed once they are prepared",
    "eval_batch_size": "evaluation takes training.micro_batch",
    "tf32": "depends on the GPU",
    "torch_compile*": KERNELS,
    "lora_mlp_kernel": KERNELS,
    "lora_qkv_kernel": KERNELS,
    "lora_o_kernel": KERNELS,
    "use_kernels": KERNELS,
    "liger_*": KERNELS,
    "use_scattermoe": KERNELS,
    "use_sonicmoe": KERNELS,
    "experts_implementation": KERNELS,
    "fused_attn_kernel": KERNELS,
    "gemma4_hybrid_attn_impl": KERNELS,
    "tiled_mlp_*": "tiles are counted in tokens, compute.tile_tokens",
    "cut_cross_entropy": "logits are computed in chunks, at the targets only",
    "chunked_cross_entropy*": "logits are computed in chunks, at the targets only",
    "gradient_checkpointing_kwargs": "the same result",
    "activation_offloading": "has no effect without gradient_checkpointing",
    "remove_unused_columns": "a format reads its own columns",
    "ddp*": "a matter of the strategy",
    "device_map": "the strategy places the model",
    "low_cpu_mem_usage": "each rank loads what it keeps",
    "experimental_skip_move_to_device": "each rank loads what it keeps",
    "local_rank": "the driver gives ranks",
    "strict": "a recipe is always strict",
    "debug": "does not change the result",
    "test_value": "does not change the result",
    "torchdistx_path": "a library for an optimizer",
    "loss_watchdog_*": "a loss that is not finite stops the run; there is no other threshold",
}
BETAS = {"dpo": ("dpo_beta",), "kto": (), "orpo": ("orpo_alpha",), "simpo": ()}
"""The tasks that learn preferences, each with its own names of beta."""
LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm")
ATTENTION = ("attention", "attn_implementation", "flash_attention", "flex_attention", "sdp_attention")
PLUGINS = ("liger", "cut_cross_entropy", "kernels", "spectrum", "swanlab")
"""Plugins that change how a result is computed or reported, but not the result."""


def convert(settings: dict[str, Any], file: Path, workers: int | None) -> Draft:
    draft = Draft(settings)
    draft.hinder_where(HINDRANCES)
    common.place(draft, "output_dir", "./model-out")
    draft.move("seed", "seed")
    _task(draft)
    _model(draft)
    _adapter(draft)
    axolotl_data.data(draft)
    _strategy(draft, file)
    _training(draft, workers)
    common.optimizer(draft, "optimizer", "adamw_torch_fused")
    if "learning_rate" not in draft.settings:
        draft.hinder("learning_rate", "is missing, and axolotl has no default for it")
    _schedule(draft)
    _saving(draft)
    _plugins(draft)
    common.attention(draft, *ATTENTION)
    _trackers(draft)
    if draft.take("shuffle_merged_datasets") is False:
        draft.lose("shuffle_merged_datasets", "false: the order is random and different in each epoch")
    return draft.finish(IDLE)


def _task(draft: Draft) -> None:
    kind = str(draft.take("rl", ""))
    task = "dpo" if kind == "ipo" else kind
    if task in BETAS:
        draft.put("task", task, "rl")
        _preferences(draft, task)
    elif kind == "grpo":
        axolotl_grpo.task(draft)
    elif kind:
        draft.hinder("rl", f"{kind} has no task; {common.TASKS_ARE}")
    if draft.is_on("reward_model"):
        draft.put("task", "reward", "reward_model")
    common.noise_and_smoothing(draft)


def _preferences(draft: Draft, task: str) -> None:
    trl = draft.part("trl", as_mapping(draft.take("trl")))
    for part, key in ((trl, "beta"), (draft, "rl_beta"), *((draft, key) for key in BETAS[task])):
        beta = part.number(key)
        if beta is not None and task not in draft.recipe:
            part.put(f"{task}.beta", float(beta), key)
    if "trl.beta" in draft.used:
        draft.use(f"{task}.beta", "trl")
    trl.finish({})
    if TASKS[task].stores_reference and draft.is_on("precompute_ref_log_probs"):
        draft.put(f"{task}.precompute_reference", True, "precompute_ref_log_probs")
    if task == "dpo":
        _dpo(draft)
    elif task == "kto":
        common.weights_of_answers(draft, "kto_desirable_weight", "kto_undesirable_weight")
    elif task == "simpo":
        _simpo(draft)


def _dpo(draft: Draft) -> None:
    """Sets the loss of a pair. trl adds up several losses; a recipe has one, and rpo_alpha for trl's loss sft."""
    ipo = draft.take("rl") == "ipo"
    losses = ["ipo"] if ipo else draft.names("dpo_loss_type") or ["sigmoid"]
    given = draft.take("dpo_loss_weights") or [1.0] * len(losses)
    numbers = [as_number(weight) for weight in given] if isinstance(given, list) else []
    weights = dict(zip(losses, numbers, strict=False))
    alpha = weights.pop("sft", draft.number("rpo_alpha") or 0.0)
    if len(losses) != len(numbers) or list(weights.values()) != [1] or not is_number(alpha):
        message = f"{', '.join(losses)} with the weights {given}; a recipe has one loss of weight 1, and sft beside it"
        draft.hinder("dpo_loss_type", message)
        return
    common.dpo_loss(draft, *weights, "rl" if ipo else "dpo_loss_type")
    draft.use("dpo.loss", "dpo_loss_weights")
    if alpha:
        draft.put("dpo.rpo_alpha", float(alpha), "rpo_alpha")


def _simpo(draft: Draft) -> None:
    """Sets what trl's defaults decide, which differ from muster's."""
    if "simpo" not in draft.recipe:
        draft.put("simpo.beta", 0.1)
        draft.decisions.append("simpo.beta 0.1 is trl's default if no rl_beta is given")
    draft.put("simpo.gamma", float(draft.number("simpo_gamma", 0.5)), "simpo_gamma")
    draft.put("simpo.cpo_alpha", float(draft.number("cpo_alpha", 1.0)), "cpo_alpha")
    if "cpo_alpha" not in draft.settings:
        draft.decisions.append("simpo.cpo_alpha 1.0 is trl's default if no cpo_alpha is given")


def _model(draft: Draft) -> None:
    if not draft.is_on("base_model"):
        draft.hinder("base_model", "is missing: nothing is trained here")
    common.refuse_quantised(draft, "base_model")
    base = draft.take("base_model", "")
    draft.put("model.path", base, "base_model")
    draft.move("revision_of_model", "model.revision")
    for key in ("base_model_config", "tokenizer_config"):
        if draft.take(key) == base:
            draft.use("model.path", key)
    _precision(draft)
    if draft.is_on("trust_remote_code"):
        draft.put("model.trust_remote_code", True, "trust_remote_code")
    if draft.take("adapter") == "qlora" or draft.is_on("load_in_4bit"):
        draft.put("model.quantization", "nf4", "load_in_4bit")
        draft.pass_over("load_in_8bit", "4 bits come first")
    elif draft.is_on("load_in_8bit"):
        draft.put("model.quantization", "int8", "load_in_8bit")


def _precision(draft: Draft) -> None:
    """Sets model.dtype. bf16 is on by default, unless it is switched off or replaced by fp16."""
    automatic = draft.take("bf16", None if "bf16" in draft.empty else "auto") == "auto"
    if draft.is_on("bfloat16") or (draft.is_on("bf16") and not automatic) or (automatic and not draft.is_on("fp16")):
        dtype = "bfloat16"
    elif draft.is_on("fp16") or draft.is_on("float16") or draft.is_on("load_in_8bit"):
        dtype = "float16"
    else:
        dtype = "float32"
    if automatic and "bf16" not in draft.settings and dtype == "bfloat16":
        draft.decisions.append("dtype bfloat16 is axolotl's default if no precision is given")
    draft.put("model.dtype", dtype, "bf16", "bfloat16", "fp16", "float16")
    for key in ("torch_dtype", "float32"):
        draft.pass_over(key, "bf16 and fp16 decide")


def _adapter(draft: Draft) -> None:
    kind = draft.take("adapter")
    if not kind:
        draft.put("adapter.method", "none", "adapter")
        for key in [key for key in draft.settings if key.startswith(("lora_", "peft_", "loraplus_"))]:
            draft.pass_over(key, "there is no adapter")
        if draft.is_on("unfrozen_parameters"):
            draft.hinder(
                "unfrozen_parameters", "trains a part of the base model; muster trains an adapter, or all of it"
            )
        return
    if kind not in ("lora", "qlora"):
        draft.hinder("adapter", f"{kind} is not lora or qlora; muster matrix lists the methods")
    draft.put("adapter.method", _method(draft), "adapter")
    for key, name in (("lora_r", "rank"), ("lora_alpha", "alpha")):
        draft.move(key, f"adapter.{name}")
    draft.put("adapter.dropout", float(draft.number("lora_dropout", 0.0)), "lora_dropout")
    _targets(draft)
    if draft.is_on("lora_modules_to_save"):
        draft.put("adapter.modules_to_save", draft.take("lora_modules_to_save"), "lora_modules_to_save")
    tokens = draft.take("peft_trainable_token_indices")
    if isinstance(tokens, list) and tokens:
        draft.put("adapter.trainable_tokens", tokens, "peft_trainable_token_indices")
    elif tokens:
        draft.lose("peft_trainable_token_indices", "by layer; adapter.trainable_tokens takes a list of numbers")
    _initial(draft)
    if draft.is_on("unfrozen_parameters"):
        draft.lose(
            "unfrozen_parameters",
            f"NOT TRAINED: {draft.take('unfrozen_parameters')}, weights of the base model that axolotl trains beside "
            "the adapter; the recipe trains the adapter alone. adapter.modules_to_save names modules to train too",
        )


def _targets(draft: Draft) -> None:
    targets, path = draft.take("lora_target_modules"), "adapter.target_modules"
    if not draft.is_on("lora_target_linear") and targets and targets not in ("all-linear", ["all-linear"]):
        draft.put(path, targets, "lora_target_modules")
        return
    draft.put(path, "all-linear", "lora_target_linear")
    named = draft.names("lora_target_modules") if targets else []
    if any("head" in name or "embed" in name for name in named):
        draft.lose("lora_target_modules", f"{', '.join(named)} with all linear layers; all-linear takes no head")
    elif targets:
        draft.pass_over("lora_target_modules", "all linear layers are taken")
    elif not draft.is_on("lora_target_linear"):
        draft.decisions.append("target_modules all-linear, because the file names none")


def _method(draft: Draft) -> str:
    start = str(draft.take("peft_init_lora_weights", ""))
    keys = {
        "dora": draft.is_on("peft_use_dora") and "peft_use_dora",
        "loraplus": draft.is_on("loraplus_lr_ratio") and "loraplus_lr_ratio",
        "rslora": draft.is_on("peft_use_rslora") and "peft_use_rslora",
        "pissa": start.startswith("pissa") and "peft_init_lora_weights",
        "olora": start == "olora" and "peft_init_lora_weights",
    }
    return common.one_method(draft, {method: key for method, key in keys.items() if key})


def _initial(draft: Draft) -> None:
    start = draft.take("peft_init_lora_weights")
    if start is True:
        draft.pass_over("peft_init_lora_weights", "lora starts as in its paper")
    elif start and not str(start).startswith(("pissa", "olora")):
        draft.lose("peft_init_lora_weights", f"{start}; lora starts as in its paper")
    common.begin_from(draft, "lora_model_dir")
    if draft.is_on("peft"):
        draft.lose("peft", "LoftQ's initial values; adapter.method pissa also has some for 4 bits")


def _strategy(draft: Draft, file: Path) -> None:
    keys = ("fsdp", "fsdp_config", "fsdp_version", "dp_shard_size")
    settings = as_mapping(draft.take("fsdp_config"))
    sharded = any(draft.is_on(key) for key in keys[:3]) or draft.number("dp_shard_size", 1) > 1
    if draft.is_on("deepspeed"):
        common.deepspeed(draft, "deepspeed", file)
        for key in keys[:3]:
            draft.pass_over(key, "deepspeed comes first")
    elif sharded:
        draft.put("strategy.kind", "fsdp", *keys)
        if settings.get("offload_params") or settings.get("fsdp_offload_params"):
            draft.put("strategy.offload", True)
        if settings.get("reshard_after_forward", settings.get("fsdp_reshard_after_forward")) is False:
            draft.put("strategy.reshard_after_forward", False)
    else:
        draft.put("strategy.kind", "ddp")
    whole = "workers divide the data and, under fsdp and zero3, the weights; no layer is split"
    by_hand = "set strategy.context_parallel, and resources.workers to a multiple of it"
    lost = {"tensor_parallel_size": whole, "expert_parallel_size": whole}
    for key, reason in (lost | {"context_parallel_size": by_hand, "sequence_parallel_degree": by_hand}).items():
        if draft.number(key, 1) > 1:
            draft.lose(key, reason)
        else:
            draft.pass_over(key, "splits nothing")


def _training(draft: Draft, workers: int | None) -> None:
    micro = max(1, draft.number("micro_batch_size", 1))
    per_gpu = draft.number("batch_size")
    accumulation = draft.number("gradient_accumulation_steps", per_gpu // micro if per_gpu else 1)
    shards = draft.number("dp_shard_size", 1) * draft.number("dp_replicate_size", 1)
    named = draft.number("ray_num_workers") or draft.number("gpu_count") or (shards if shards > 1 else None)
    common.batches(draft, micro, max(1, accumulation), workers, named)
    if draft.recipe.get("task") == "grpo":
        axolotl_grpo.prompts(draft)
    draft.use("training.micro_batch", "micro_batch_size")
    draft.use("training.global_batch", "gradient_accumulation_steps")
    if "gradient_accumulation_steps" not in draft.settings:
        draft.use("training.global_batch", "batch_size")
    draft.use("resources.workers", "ray_num_workers", "gpu_count", "dp_shard_size", "dp_replicate_size")
    replicas = draft.number("dp_replicate_size", 1)
    if draft.recipe["strategy"]["kind"] == "fsdp" and replicas > 1:
        if draft.recipe["resources"]["workers"] % replicas:
            draft.lose(
                "dp_replicate_size", "the workers cannot be divided into so many replicas; set strategy.replicas"
            )
        else:
            draft.put("strategy.replicas", replicas, "dp_replicate_size")
    common.length(draft, "num_epochs", 1)
    recompute = as_mapping(draft.take("fsdp_config")).get("activation_checkpointing")
    if draft.is_on("gradient_checkpointing") or recompute:
        draft.put("training.gradient_checkpointing", True, "gradient_checkpointing")
        common.recomputation(draft, "gradient_checkpointing")
        if draft.is_on("activation_offloading"):
            draft.put("compute.offload_activations", True, "activation_offloading")
    if draft.is_on("tiled_mlp"):
        draft.put("compute.tile_tokens", 4096, "tiled_mlp")
    common.clipping(draft)


def _schedule(draft: Draft) -> None:
    if "adam_epsilon" in draft.settings:
        draft.pass_over("adam_eps", "adam_epsilon comes first")
    elif draft.number("adam_eps") is not None:
        draft.put("optimizer.eps", float(draft.number("adam_eps")), "adam_eps")
    if draft.number("warmup_steps") is None and draft.number("warmup_ratio") is None:
        _usual_warmup(draft)
    common.schedule(draft, "lr_scheduler", "cosine", steps_first=True)


def _usual_warmup(draft: Draft) -> None:
    """Sets axolotl's default warm-up, 3 % of the steps and 100 at most, if neither steps nor a ratio are given."""
    if draft.take("lr_scheduler") == "constant":
        return
    steps = draft.recipe["training"].get("steps")
    if steps:
        draft.put("schedule.warmup_steps", min(int(0.03 * steps), 100))
    else:
        draft.put("schedule.warmup_ratio", 0.03)
    draft.decisions.append("a warm-up of 3 % (in axolotl 100 steps at most) is axolotl's default if none is given")


def _saving(draft: Draft) -> None:
    default = "checkpoint.every_steps counts steps: 100 by default"
    common.every(draft, "save_steps", "checkpoint.every_steps", default)
    draft.pass_over("save_strategy", default)
    common.rates(draft)
    common.kept(draft)
    seldom = "training.eval_every counts steps; without it, evaluation runs after the last step"
    if common.has_evaluation(draft):
        common.every(draft, "eval_steps", "training.eval_every", seldom)
    else:
        draft.pass_over("eval_steps", "there are no evaluation data")
    for key in ("eval_strategy", "evaluation_strategy"):
        draft.pass_over(key, seldom)
    common.comparisons(draft, "early_stopping_patience")
    metrics = ", ".join(draft.names("eval_causal_lm_metrics")) or "sacrebleu, comet, ter and chrf"
    common.answers(draft, "do_causal_lm_eval", "eval_max_new_tokens", 128, metrics)
    draft.decide("eval_causal_lm_metrics", "generative_eval.metric has metrics of its own")
    if "eval_max_new_tokens" not in draft.used:
        draft.pass_over("eval_max_new_tokens", "no answers are generated")


def _plugins(draft: Draft) -> None:
    named = draft.names("plugins")
    other = [plugin for plugin in named if not any(f".{known}." in plugin for known in PLUGINS)]
    if any("diffusion" in plugin for plugin in other):
        draft.hinder("plugins", "a model that diffuses tokens; muster trains causal language models")
    elif other:
        draft.lose("plugins", f"without counterpart: {', '.join(other)}")
    elif any(".liger." in plugin for plugin in named):
        common.liger(draft, "plugins", *LIGER)
    elif named:
        draft.pass_over("plugins", KERNELS)


def _trackers(draft: Draft) -> None:
    """Sets tracking. W&B is on if a project is named and W&B is not switched off."""
    wanted = {}
    if draft.is_on("wandb_project") and draft.take("use_wandb", True) and draft.take("wandb_mode") != "disabled":
        wanted["wandb"] = "wandb_project"
        for key, path in (("wandb_project", "project"), ("wandb_entity", "entity")):
            if draft.is_on(key):
                draft.put(f"wandb.{path}", draft.take(key), key)
        if draft.take("wandb_mode") == "offline":
            draft.put("wandb.mode", "offline", "wandb_mode")
    if draft.is_on("use_tensorboard"):
        wanted["tensorboard"] = "use_tensorboard"
    if draft.is_on("mlflow_tracking_uri"):
        wanted["mlflow"] = "mlflow_tracking_uri"
        draft.put("mlflow.uri", draft.take("mlflow_tracking_uri"), "mlflow_tracking_uri")
        if draft.is_on("mlflow_experiment_name"):
            draft.put("mlflow.experiment", draft.take("mlflow_experiment_name"), "mlflow_experiment_name")
    common.trackers(draft, wanted)
