"""axolotl's settings. A pack is what it calls a batch's sample under ``sample_packing``, and a row without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.convert import axolotl_data, common
from launcher.convert.draft import OFF, Draft

HINDRANCES = {
    "unfrozen_parameters": "trains some of the base's own weights; muster trains an adapter, or all of them",
    "process_reward_model": "rewards for steps of an answer; task reward rates whole ones",
    "gptq": "a base in GPTQ; muster takes unquantised ones, or bitsandbytes' NF4",
    "processor_type": "a model of images or sound; muster trains on text",
    "diffusion": "a model that diffuses tokens; muster trains causal language models",
    "ebft": "another objective; the tasks are sft, classification, reward, dpo and ppo",
    "relora": "merges and starts anew while it trains; muster trains one adapter",
    "use_onebitllms": "a base of ternary weights; muster takes unquantised ones, or bitsandbytes' NF4",
}
CURVES = "every step's metrics are kept, and sent to the trackers"
KERNELS = "the same result by other kernels"
IDLE = {
    "logging_steps": CURVES,
    "include_t*": CURVES,
    "wandb_*": "W&B reads its own environment variables (WANDB_PROJECT, …)",
    "mlflow_*": "MLflow reads its own environment variables (MLFLOW_TRACKING_URI, …)",
    "swanlab_*": "there is no tracker swanlab",
    "use_swanlab": "there is no tracker swanlab",
    "trackio_*": "there is no tracker trackio",
    "use_otel_metrics": "metrics lie in the run's storage",
    "otel_*": "metrics lie in the run's storage",
    "model_type": "the base's config.json says it",
    "tokenizer_type": "the base's files say it",
    "tokenizer_use_fast": "the base's files say it",
    "is_*": "the base's config.json says it",
    "dataset_prepared_path": "prepared data lie in the storage, by fingerprint",
    "dataset_processes": "muster prepare takes as many as there are",
    "dataset_num_proc": "muster prepare takes as many as there are",
    "dataloader_*": "the reader is muster's own",
    "skip_prepare_dataset": "data are always prepared once",
    "push_dataset_to_hub": "prepared data stay in the storage",
    "hf_use_auth_token": "HF_TOKEN says it",
    "resume_from_checkpoint": "the same command resumes",
    "auto_resume_from_checkpoints": "the same command resumes",
    "save_only_model": "checkpoints always hold what resuming needs",
    "save_safetensors": "always",
    "save_first_step": "checkpoint.every_steps says when",
    "hub_*": "muster push sends the result",
    "attn_implementation": KERNELS,
    "flash_attention": KERNELS,
    "flash_attn_*": KERNELS,
    "sdp_attention": KERNELS,
    "xformers_attention": KERNELS,
    "flex_*": KERNELS,
    "eager_attention": KERNELS,
    "sample_packing_*": "the packs are planned for the whole epoch",
    "eval_sample_packing": "evaluation packs as training does",
    "pad_to_sequence_len": "pads count nothing",
    "group_by_length": "packs hold samples of any length",
    "streaming*": "data are streamed once they are prepared",
    "eval_batch_size": "evaluation takes training.micro_batch",
    "tf32": "a matter of the card",
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
    "tiled_mlp*": KERNELS,
    "cut_cross_entropy": "logits are computed in chunks, at the targets alone",
    "chunked_cross_entropy*": "logits are computed in chunks, at the targets alone",
    "gradient_checkpointing_kwargs": "the same result",
    "activation_offloading": "gradient_checkpointing saves memory; muster plan says whether it fits",
    "remove_unused_columns": "a format reads its own columns",
    "ddp*": "a matter of the strategy",
    "device_map": "the strategy places the model",
    "low_cpu_mem_usage": "each rank loads what it keeps",
    "experimental_skip_move_to_device": "each rank loads what it keeps",
    "local_rank": "the driver gives ranks",
    "strict": "a recipe is always strict",
    "debug": "no result",
    "test_value": "no result",
    "torchdistx_path": "an optimizer's library",
    "early_stopping_patience": "a run goes to its last step; muster cancel ends it with a checkpoint",
    "loss_watchdog_*": "a loss that is not finite ends the run; no threshold is set",
}
PLUGINS = ("liger", "cut_cross_entropy", "kernels", "spectrum", "swanlab")
"""Plugins that change how the same is computed or reported."""


def convert(settings: dict[str, Any], file: Path, workers: int | None) -> Draft:
    draft = Draft(settings)
    del file
    draft.hinder_where(HINDRANCES)
    common.place(draft, "output_dir", "./model-out")
    draft.move("seed", "seed")
    _task(draft)
    _model(draft)
    _adapter(draft)
    axolotl_data.data(draft)
    _strategy(draft)
    _training(draft, workers)
    common.optimizer(draft, "optimizer", "adamw_torch_fused")
    if "learning_rate" not in settings:
        draft.hinder("learning_rate", "is missing, and axolotl has no default for it")
    _schedule(draft)
    _saving(draft)
    _plugins(draft)
    common.trackers(draft, _wanted(draft))
    return draft.finish(IDLE)


def _task(draft: Draft) -> None:
    kind = draft.take("rl")
    if kind == "dpo":
        draft.put("task", "dpo")
        beta = draft.number("rl_beta", draft.number("dpo_beta"))
        if beta is not None:
            draft.put("dpo.beta", float(beta))
        smoothing = draft.number("dpo_label_smoothing")
        if smoothing:
            draft.put("dpo.label_smoothing", float(smoothing))
    elif kind:
        draft.hinder("rl", f"{kind} has no task; the tasks are sft, classification, reward, dpo and ppo")
    if draft.take("reward_model"):
        draft.put("task", "reward")
        draft.take("num_labels")


def _model(draft: Draft) -> None:
    if not draft.settings.get("base_model"):
        draft.hinder("base_model", "is missing: nothing is trained here")
    common.refuse_quantised(draft, "base_model")
    base = draft.take("base_model", "")
    draft.put("model.path", base)
    draft.move("revision_of_model", "model.revision")
    for key in ("base_model_config", "tokenizer_config"):
        if draft.settings.get(key) == base:
            draft.take(key)
    halves = {"bfloat16": ("bf16", "bfloat16"), "float16": ("fp16", "float16")}
    dtypes = [dtype for dtype, keys in halves.items() if draft.any_on(*keys)]
    draft.put("model.dtype", dtypes[0] if dtypes else "float32")
    draft.take("float32")
    draft.take("torch_dtype")
    if draft.take("trust_remote_code"):
        draft.put("model.trust_remote_code", True)
    if draft.take("adapter") == "qlora" or draft.take("load_in_4bit"):
        draft.put("model.quantization", "nf4")
    elif draft.take("load_in_8bit"):
        draft.put("model.quantization", "int8")
    draft.take("load_in_4bit")
    draft.take("load_in_8bit")


def _adapter(draft: Draft) -> None:
    kind = draft.take("adapter")
    if not kind:
        draft.put("adapter.method", "none")
        for key in [key for key in draft.settings if key.startswith(("lora_", "peft_", "loraplus_"))]:
            draft.pass_over(key, "there is no adapter")
        return
    if kind not in ("lora", "qlora"):
        draft.hinder("adapter", f"{kind} is not lora or qlora; see muster matrix for the methods that there are")
    draft.put("adapter.method", _method(draft))
    for key, name in (("lora_r", "rank"), ("lora_alpha", "alpha")):
        draft.move(key, f"adapter.{name}")
    draft.put("adapter.dropout", float(draft.number("lora_dropout", 0.0)))
    targets = draft.take("lora_target_modules")
    if draft.take("lora_target_linear") or not targets or targets in ("all-linear", ["all-linear"]):
        draft.put("adapter.target_modules", "all-linear")
        if targets and targets not in ("all-linear", ["all-linear"]):
            draft.pass_over("lora_target_modules", "lora_target_linear takes all linear layers")
    else:
        draft.put("adapter.target_modules", targets)
    if draft.take("lora_modules_to_save"):
        draft.put("adapter.modules_to_save", draft.settings["lora_modules_to_save"])
    tokens = draft.take("peft_trainable_token_indices")
    if isinstance(tokens, list):
        draft.put("adapter.trainable_tokens", tokens)
    elif tokens:
        draft.lose("peft_trainable_token_indices", "by layer; adapter.trainable_tokens takes a list of numbers")
    draft.take("lora_fan_in_fan_out")  # peft finds it out by itself
    _initial(draft)


def _method(draft: Draft) -> str:
    if draft.take("peft_use_dora"):
        return "dora"
    if draft.take("loraplus_lr_ratio"):
        draft.put("adapter.lr_ratio", float(draft.number("loraplus_lr_ratio")))
        return "loraplus"
    if draft.take("peft_use_rslora"):
        return "rslora"
    start = str(draft.take("peft_init_lora_weights", ""))
    return "pissa" if start.startswith("pissa") else "olora" if start == "olora" else "lora"


def _initial(draft: Draft) -> None:
    start = draft.take("peft_init_lora_weights")
    if start not in (None, True) and not str(start).startswith(("pissa", "olora")):
        draft.lose("peft_init_lora_weights", f"{start}; lora begins as its paper says")
    if draft.take("lora_model_dir"):
        draft.hinder("lora_model_dir", "goes on from an adapter; merge it (muster merge), and train on the result")
    if draft.take("peft"):
        draft.lose("peft", "LoftQ's start; adapter.method pissa has one for 4 bits too")


def _strategy(draft: Draft) -> None:
    given = draft.take("deepspeed")
    held = draft.take("fsdp_config")
    settings: dict[str, Any] = held if isinstance(held, dict) else {}
    shards = [bool(held), bool(draft.take("fsdp")), bool(draft.take("fsdp_version"))]
    sharded = any(shards) or draft.number("dp_shard_size", 1) > 1
    if given:
        common.deepspeed(draft, given)
    elif sharded:
        draft.put("strategy.kind", "fsdp")
        if settings.get("offload_params") or settings.get("fsdp_offload_params"):
            draft.put("strategy.offload", True)
        if settings.get("reshard_after_forward", settings.get("fsdp_reshard_after_forward")) is False:
            draft.put("strategy.reshard_after_forward", False)
    else:
        draft.put("strategy.kind", "ddp")
    for key in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size"):
        if draft.number(key, 1) > 1:
            draft.lose(key, "workers share out data and, under fsdp and zero3, weights; no layer is cut in two")


def _training(draft: Draft, workers: int | None) -> None:
    micro = max(1, draft.number("micro_batch_size", 1))
    per_gpu = draft.number("batch_size")
    accumulation = draft.number("gradient_accumulation_steps", per_gpu // micro if per_gpu else 1)
    shards = draft.number("dp_shard_size", 1) * draft.number("dp_replicate_size", 1)
    named = draft.number("ray_num_workers") or draft.number("gpu_count") or (shards if shards > 1 else None)
    draft.take("use_ray")
    common.batches(draft, micro, max(1, accumulation), workers, named)
    common.length(draft, "num_epochs", 1)
    settings: Any = draft.settings.get("fsdp_config")
    recompute = isinstance(settings, dict) and settings.get("activation_checkpointing")
    if draft.take("gradient_checkpointing") not in OFF or recompute:
        draft.put("training.gradient_checkpointing", True)
    draft.move("max_grad_norm", "training.max_grad_norm")


def _schedule(draft: Draft) -> None:
    if draft.number("adam_eps") is not None and "adam_epsilon" not in draft.settings:
        draft.put("optimizer.eps", float(draft.number("adam_eps")))
    if "warmup_steps" not in draft.settings and "warmup_ratio" not in draft.settings:
        draft.put("schedule.warmup_ratio", 0.03)
        draft.decisions.append("warmup_ratio 0.03 is axolotl's own where neither steps nor ratio are given")
    common.schedule(draft, "lr_scheduler", "cosine")


def _saving(draft: Draft) -> None:
    steps = draft.number("save_steps")
    if steps and steps >= 1:
        draft.put("checkpoint.every_steps", int(steps))
    elif draft.take("save_strategy") == "no":
        draft.take("saves_per_epoch")
    elif draft.take("saves_per_epoch"):
        draft.pass_over("saves_per_epoch", "checkpoint.every_steps counts steps: 100 by default")
    draft.move("save_total_limit", "checkpoint.keep_last")
    steps = draft.number("eval_steps")
    if steps and steps >= 1 and draft.recipe["data"].get("eval"):
        draft.put("training.eval_every", int(steps))
    for key in ("evals_per_epoch", "eval_strategy", "evaluation_strategy"):
        if draft.take(key) not in (*OFF, "steps"):
            draft.pass_over(key, "training.eval_every counts steps; without it the end of the run is evaluated")


def _plugins(draft: Draft) -> None:
    other = [plugin for plugin in draft.names("plugins") if not any(f".{known}." in plugin for known in PLUGINS)]
    if any("diffusion" in plugin for plugin in other):
        draft.hinder("plugins", "a model that diffuses tokens; muster trains causal language models")
    elif other:
        draft.lose("plugins", f"of them {', '.join(other)}")


def _wanted(draft: Draft) -> dict[str, str]:
    """By key, the trackers that are asked for; W&B is, where a project is named and it is not switched off."""
    wanted = {}
    if draft.take("wandb_project") and draft.take("use_wandb", True):
        wanted["wandb"] = "wandb_project"
    if draft.take("use_tensorboard"):
        wanted["tensorboard"] = "use_tensorboard"
    if draft.take("mlflow_tracking_uri"):
        wanted["mlflow"] = "mlflow_tracking_uri"
    draft.take("use_wandb")
    return wanted
