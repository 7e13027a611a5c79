"""LLaMA-Factory's settings, as its `llamafactory-cli train` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.convert import common, llamafactory_data
from launcher.convert.draft import OFF, Draft

OTHER_OPTIMIZER = "another optimizer than AdamW, with a learning rate of its own; choose adamw and a rate"
OTHER_LOSS = "another loss; task sft has cross entropy"
HINDRANCES = {
    "use_galore": OTHER_OPTIMIZER,
    "use_apollo": OTHER_OPTIMIZER,
    "use_badam": OTHER_OPTIMIZER,
    "use_adam_mini": OTHER_OPTIMIZER,
    "use_muon": OTHER_OPTIMIZER,
    "use_dft_loss": OTHER_LOSS,
    "use_asft_loss": OTHER_LOSS,
    "use_eaft_loss": OTHER_LOSS,
    "use_llama_pro": "trains added layers of the base; muster trains an adapter, or the whole model",
    "mixture_of_depths": "changes the base's layers; muster trains models as they are",
    "train_from_scratch": "begins without weights; muster fine-tunes",
    "adapter_name_or_path": "goes on from an adapter; merge it (muster merge), and train on the result",
    "tokenized_path": "data that are tokenised already; name the texts, muster prepare tokenises them",
}
OTHER_FILES = {
    "compute_environment": "accelerate's settings, not a training's: they come to strategy and resources in a recipe",
    "export_dir": "settings of a merge: muster merge makes an adapter part of its base",
    "infer_backend": "settings of a conversation: muster chat and muster generate ask a model",
    "train_dataset": "the layout of LLaMA-Factory's v1, which is not read; the layout with stage and dataset is",
}
"""What tells that a file is not one of ``llamafactory-cli train``."""

CURVES = "every step's metrics are kept, and sent to the trackers"
KERNELS = "the same result by other kernels"
READER = "the reader is muster's own"
IDLE = {
    "do_train": "a recipe trains",
    "do_eval": "data.eval is evaluated where it is there",
    "logging_*": CURVES,
    "plot_loss": CURVES,
    "include_*": CURVES,
    "compute_accuracy": "the tasks with pairs report their accuracy",
    "overwrite_*": "a run that is there is resumed; another name starts anew",
    "save_only_model": "checkpoints always hold what resuming needs",
    "save_strategy": "checkpoint.every_steps says when",
    "resume_from_checkpoint": "the same command resumes",
    "preprocessing_*": "muster prepare takes as many processes as there are",
    "dataloader_*": READER,
    "streaming": "data are streamed once they are prepared",
    "buffer_size": READER,
    "data_shared_file_system": READER,
    "ddp_*": "a matter of the strategy",
    "fsdp_transformer_layer_cls_to_wrap": "each decoder layer is a unit of its own",
    "flash_attn": KERNELS,
    "use_unsloth*": KERNELS,
    "enable_liger_kernel": KERNELS,
    "use_v1_kernels": KERNELS,
    "use_reentrant_gc": KERNELS,
    "use_cache": KERNELS,
    "neat_packing": "samples of a pack never see each other",
    "per_device_eval_batch_size": "evaluation takes training.micro_batch",
    "low_cpu_mem_usage": "each rank loads what it keeps",
    "use_fast_tokenizer": "the base's files say it",
    "hf_hub_token": "HF_TOKEN says it",
    "ray_*": "the driver runs on Ray",
    "pissa_convert": "the final adapter of pissa is always one for the unchanged base",
    "pissa_iter": "the method decides how it takes the weights apart",
    "image_*": "a matter of images",
    "video_*": "a matter of videos",
    "audio_*": "a matter of sound",
    "freeze_vision_tower": "a matter of images",
    "freeze_multi_modal_projector": "a matter of images",
    "use_mca": "another engine for the same",
    "use_megatron_bridge": "another engine for the same",
    "kt_*": "another engine for the same",
    "use_kt": "another engine for the same",
    "double_quantization": "nf4 is always quantised twice",
}
SHARED = "layers are never cut in two: workers share out data and, under fsdp and zero3, weights"
TASKS = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "ppo": "ppo"}


def convert(settings: dict[str, Any], file: Path, workers: int | None) -> Draft:
    draft = Draft(settings)
    foreign = [key for key in OTHER_FILES if key in draft.settings]
    if "stage" not in draft.settings and foreign:
        draft.hinder(foreign[0], OTHER_FILES[foreign[0]])
        return draft
    draft.hinder_where(HINDRANCES)
    if draft.take("do_predict") and not draft.settings.get("do_train"):
        draft.hinder("do_predict", "measures and does not train: muster evaluate and muster generate do that")
    common.place(draft, "output_dir", "saves/converted")
    draft.move("seed", "seed")
    _task(draft)
    _model(draft)
    _adapter(draft)
    llamafactory_data.data(draft, file)
    _strategy(draft)
    micro = max(1, draft.number("per_device_train_batch_size", 8))
    named = draft.number("ray_num_workers")
    common.batches(draft, micro, max(1, draft.number("gradient_accumulation_steps", 1)), workers, named)
    common.length(draft, "num_train_epochs", 3)
    if not draft.take("disable_gradient_checkpointing"):
        draft.put("training.gradient_checkpointing", True)
    draft.move("max_grad_norm", "training.max_grad_norm")
    common.optimizer(draft, "optim", "adamw_torch")
    common.schedule(draft, "lr_scheduler_type", "linear")
    _saving(draft)
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "cp_size"):
        if draft.number(key, 1) > 1:
            draft.lose(key, SHARED)
    return draft.finish(IDLE)


def _task(draft: Draft) -> None:
    stage = str(draft.take("stage", "sft"))
    if stage not in TASKS:
        draft.hinder("stage", f"{stage} has no task; the tasks are sft, classification, reward, dpo and ppo")
        return
    draft.put("task", TASKS[stage])
    if stage == "dpo":
        loss = draft.take("pref_loss", "sigmoid")
        if loss != "sigmoid":
            draft.hinder("pref_loss", f"{loss} is not DPO's loss, which is sigmoid")
        draft.put("dpo.beta", float(draft.number("pref_beta", 0.1)))
        if draft.number("dpo_label_smoothing"):
            draft.put("dpo.label_smoothing", float(draft.number("dpo_label_smoothing")))
    elif stage == "ppo":
        draft.put("ppo.reward", {"model": draft.take("reward_model", "")})
        draft.move("ppo_epochs", "ppo.epochs")
        draft.put("ppo.kl_target", float(draft.number("ppo_target", 6.0)))
        if draft.take("ppo_whiten_rewards"):
            draft.put("ppo.whiten_rewards", True)
        draft.move("max_new_tokens", "ppo.max_new_tokens")


def _model(draft: Draft) -> None:
    if not draft.settings.get("model_name_or_path"):
        draft.hinder("model_name_or_path", "is missing: nothing is trained here")
    common.refuse_quantised(draft, "model_name_or_path")
    draft.put("model.path", draft.take("model_name_or_path", ""))
    draft.move("model_revision", "model.revision")
    halves = (("bfloat16", ("bf16", "pure_bf16")), ("float16", ("fp16",)))
    dtypes = [dtype for dtype, keys in halves if draft.any_on(*keys)]
    draft.put("model.dtype", dtypes[0] if dtypes else "float32")
    if draft.take("trust_remote_code"):
        draft.put("model.trust_remote_code", True)
    bits, method = draft.number("quantization_bit"), str(draft.take("quantization_method", "bnb"))
    if bits is None:
        return
    kinds = {4: "nf4", 8: "int8"}
    if method not in ("bnb", "bitsandbytes") or bits not in kinds:
        draft.hinder("quantization_bit", f"{bits} bits by {method}; muster has nf4 and int8 by bitsandbytes")
        return
    draft.put("model.quantization", kinds[bits])
    if draft.take("quantization_type", "nf4") != "nf4":
        draft.lose("quantization_type", "nf4 instead")


def _adapter(draft: Draft) -> None:
    kind = draft.take("finetuning_type", "lora")
    if kind == "full":
        draft.put("adapter.method", "none")
    elif kind == "oft":
        draft.put("adapter", {"method": "oft", "dropout": float(draft.number("module_dropout", 0.0))})
        draft.move("oft_block_size", "adapter.block_size")
        draft.put("adapter.target_modules", _targets(draft.take("oft_target", "all")))
    elif kind == "lora":
        rank = draft.number("lora_rank", 8)
        draft.put("adapter", {"method": _method(draft), "rank": rank, "alpha": draft.number("lora_alpha", 2 * rank)})
        draft.put("adapter.dropout", float(draft.number("lora_dropout", 0.0)))
        draft.put("adapter.target_modules", _targets(draft.take("lora_target", "all")))
        if draft.recipe["adapter"]["method"] == "loraplus":
            draft.put("adapter.lr_ratio", float(draft.number("loraplus_lr_ratio", 16.0)))
    else:
        draft.hinder("finetuning_type", f"{kind}; muster trains an adapter, or with full the whole model")
    extra = draft.take("additional_target")
    if extra and kind in ("lora", "oft"):
        draft.put("adapter.modules_to_save", [name.strip() for name in str(extra).split(",")])


def _method(draft: Draft) -> str:
    asked = {"use_dora": "dora", "pissa_init": "pissa", "loraplus_lr_ratio": "loraplus", "use_rslora": "rslora"}
    found = [method for key, method in asked.items() if draft.take(key) not in OFF]
    if len(found) > 1:
        draft.lose(f"use_{found[1]}", f"beside {found[0]}: a recipe has one method")
    return found[0] if found else "lora"


def _targets(given: Any) -> Any:
    names = [name.strip() for name in str(given).split(",")]
    return "all-linear" if names == ["all"] else names


def _strategy(draft: Draft) -> None:
    given, sharded = draft.take("deepspeed"), draft.take("fsdp")
    config = draft.take("fsdp_config")
    if given:
        common.deepspeed(draft, given)
    elif sharded or config:
        draft.put("strategy.kind", "fsdp")
        if "offload" in str(sharded):
            draft.put("strategy.offload", True)
    else:
        draft.put("strategy.kind", "ddp")


def _saving(draft: Draft) -> None:
    draft.move("save_steps", "checkpoint.every_steps")
    draft.move("save_total_limit", "checkpoint.keep_last")
    steps = draft.number("eval_steps")
    if steps and steps >= 1 and draft.recipe["data"].get("eval"):
        draft.put("training.eval_every", int(steps))
    draft.take("eval_strategy")
    common.trackers(draft, {name: "report_to" for name in draft.names("report_to") if name not in ("none", "all")})
    draft.take("run_name")
    if draft.take("use_swanlab"):
        draft.pass_over("use_swanlab", "there is no tracker swanlab")
