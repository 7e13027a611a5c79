"""Converts the settings of LLaMA-Factory's `llamafactory-cli train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.convert import common, llamafactory_data
from launcher.convert.draft import Draft

OTHER_OPTIMIZER = "another optimizer than AdamW, which needs another learning rate; choose adamw and a rate"
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
    "use_llama_pro": "trains layers that it adds to the base model; muster trains an adapter, or the complete model",
    "mixture_of_depths": "changes the base model's layers; muster trains models without such changes",
    "train_from_scratch": "starts without weights; muster fine-tunes",
    "create_new_adapter": "puts a second adapter on the first; merge that one (muster merge), and train on the result",
    "tokenized_path": "data that are already tokenised; name the texts, muster prepare tokenises them",
}
OTHER_FILES = {
    "compute_environment": "settings of accelerate, not of a training; a recipe has strategy and resources instead",
    "export_dir": "settings of a merge; muster merge makes an adapter part of its base model",
    "infer_backend": "settings of a chat; muster chat and muster generate run a model",
    "train_dataset": "the layout of LLaMA-Factory's v1, which is not read; the layout with stage and dataset is",
}
"""Keys that show that a file is not for ``llamafactory-cli train``, each with the reason."""

CURVES = "every step's metrics are kept, and sent to the trackers"
KERNELS = "the same result by other kernels"
READER = "the reader is muster's own"
IDLE = {
    "do_train": "a recipe trains",
    "do_eval": "data.eval is evaluated if it is given",
    "logging_*": CURVES,
    "plot_loss": CURVES,
    "include_*": CURVES,
    "compute_accuracy": "the tasks with pairs report their accuracy",
    "overwrite_cache": "prepared data are in the storage, by fingerprint",
    "overwrite_output_dir": "an existing run is resumed; another name starts a new one",
    "save_only_model": "checkpoints always contain what a resume needs",
    "save_strategy": "checkpoint.every_steps decides it",
    "resume_from_checkpoint": "the same command resumes",
    "preprocessing_*": "muster prepare takes as many processes as there are",
    "dataloader_*": READER,
    "streaming": "data are streamed once they are prepared",
    "buffer_size": READER,
    "data_shared_file_system": READER,
    "double_quantization": "nf4 is always quantised twice",
    "gradient_checkpointing_kwargs": "the same result",
    "ddp_*": "a matter of the strategy",
    "fsdp_transformer_layer_cls_to_wrap": "each decoder layer is a unit of its own",
    "flash_attn": KERNELS,
    "use_unsloth*": KERNELS,
    "use_v1_kernels": KERNELS,
    "use_reentrant_gc": KERNELS,
    "use_cache": KERNELS,
    "per_device_eval_batch_size": "evaluation takes training.micro_batch",
    "low_cpu_mem_usage": "each rank loads what it keeps",
    "use_fast_tokenizer": "the base model's files decide it",
    "hf_hub_token": "HF_TOKEN is used",
    "ray_*": "the driver runs on Ray",
    "pissa_convert": "the final adapter of pissa always fits the unchanged base model",
    "pissa_iter": "the method decides how it decomposes the weights",
    "image_*": "a matter of images",
    "video_*": "a matter of videos",
    "audio_*": "a matter of sound",
    "freeze_vision_tower": "a matter of images",
    "freeze_multi_modal_projector": "a matter of images",
    "use_distributed_optimizer": "a matter of the strategy",
    "overlap_*": "a matter of the strategy",
    "sequence_parallel": "a matter of the strategy",
    "mixed_precision": "model.dtype decides it",
    "export_hf_on_finish": "the final adapter is in the run, and muster merge makes it part of its base model",
    "run_name": "the run is named by the last part of output_dir",
    "use_swanlab": "there is no tracker swanlab",
    "swanlab_*": "there is no tracker swanlab",
    "oft_rank": "oft_block_size comes first",
    "use_mca": "another engine for the same",
    "use_megatron_bridge": "another engine for the same",
    "kt_*": "another engine for the same",
    "use_kt": "another engine for the same",
}
SHARED = "no layer is split: workers divide the data and, under fsdp and zero3, the weights"
CUTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "context_parallel_size",
    "cp_size",
)
OTHERS = {"full": ("lora_", "loraplus_", "oft_"), "oft": ("lora_", "loraplus_"), "lora": ("oft_",)}
"""Kind of fine-tuning to the prefixes of the other kinds' keys."""

TASKS = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
PREFERENCES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
"""The task by ``pref_loss``."""


def convert(settings: dict[str, Any], file: Path, workers: int | None) -> Draft:
    draft = Draft(settings)
    foreign = [key for key in OTHER_FILES if key in draft.settings]
    if "stage" not in draft.settings and foreign:
        draft.hinder(foreign[0], OTHER_FILES[foreign[0]])
        return draft
    draft.hinder_where(HINDRANCES)
    if draft.is_on("do_predict") and not draft.is_on("do_train"):
        draft.hinder("do_predict", "predicts and does not train; muster evaluate and muster generate do that")
    common.place(draft, "output_dir", "saves/converted")
    draft.move("seed", "seed")
    stage = _task(draft)
    _model(draft)
    _adapter(draft)
    llamafactory_data.data(draft, file, stage)
    _strategy(draft, file)
    _training(draft, workers, stage)
    common.optimizer(draft, "optim", "adamw_torch")
    if "learning_rate" not in draft.settings:
        draft.decisions.append("lr 5e-5 is Trainer's default if no learning_rate is given")
    common.schedule(draft, "lr_scheduler_type", "linear")
    _saving(draft)
    for key in CUTS:
        if draft.number(key, 1) > 1:
            draft.lose(key, SHARED)
        else:
            draft.pass_over(key, "splits nothing")
    return draft.finish(IDLE)


def _task(draft: Draft) -> str:
    stage = str(draft.take("stage", "sft"))
    if stage not in TASKS:
        draft.hinder("stage", f"{stage} has no task; {common.TASKS_ARE}")
        return stage
    draft.put("task", TASKS[stage], "stage")
    if stage == "dpo":
        _preferences(draft)
    elif stage == "kto":
        draft.put("kto.beta", float(draft.number("pref_beta", 0.1)), "pref_beta")
        common.weights_of_answers(draft, "kto_chosen_weight", "kto_rejected_weight")
    elif stage == "ppo":
        _ppo(draft)
    common.noise_and_smoothing(draft)
    return stage


def _preferences(draft: Draft) -> None:
    loss = str(draft.take("pref_loss", "sigmoid"))
    if loss not in PREFERENCES:
        draft.hinder("pref_loss", f"{loss} is the loss of no task; {', '.join(PREFERENCES)} are")
        return
    task = PREFERENCES[loss]
    draft.put("task", task, "pref_loss")
    draft.put(f"{task}.beta", float(draft.number("pref_beta", 0.1)), "pref_beta")
    if task == "dpo":
        _dpo(draft, loss)
    elif task == "simpo":
        draft.put("simpo.gamma", float(draft.number("simpo_gamma", 0.5)), "simpo_gamma")
        draft.put("simpo.cpo_alpha", float(draft.number("pref_ftx", 0.0)), "pref_ftx")


def _dpo(draft: Draft, loss: str) -> None:
    common.dpo_loss(draft, loss, "pref_loss")
    if draft.is_on("pref_ftx"):
        draft.put("dpo.rpo_alpha", float(draft.number("pref_ftx", 0.0)), "pref_ftx")
    if "ld_alpha" in draft.settings:
        draft.lose("ld_alpha", "it weighs the tokens of the model alone; dpo.ld_alpha weighs the reference's too")


def _ppo(draft: Draft) -> None:
    """Sets the PPO section, with LLaMA-Factory's defaults where they differ from muster's."""
    draft.put("ppo.reward", {"model": draft.take("reward_model", "")}, "reward_model")
    draft.put("ppo.epochs", draft.number("ppo_epochs", 4), "ppo_epochs")
    draft.put("ppo.kl_coef", 0.2)
    draft.put("ppo.kl_target", float(draft.number("ppo_target", 6.0)), "ppo_target")
    if draft.is_on("ppo_whiten_rewards"):
        draft.put("ppo.whiten_rewards", True, "ppo_whiten_rewards")
    draft.put("ppo.max_new_tokens", draft.number("max_new_tokens", 1024), "max_new_tokens")
    for key in ("temperature", "top_p"):
        draft.move(key, f"ppo.{key}")
    draft.decisions.append(
        "texts are drawn from the model's own probabilities, as PPO assumes; LLaMA-Factory's defaults are temperature "
        "0.95, top_p 0.7 and top_k 50"
    )
    if draft.take("reward_model_type", "lora") != "api":
        draft.pass_over("reward_model_type", "the model at ppo.reward.model decides it")
    else:
        draft.hinder("reward_model_type", "a server rates the texts; ppo.reward.function may call it")


def _model(draft: Draft) -> None:
    if not draft.is_on("model_name_or_path"):
        draft.hinder("model_name_or_path", "is missing: nothing is trained here")
    common.refuse_quantised(draft, "model_name_or_path")
    draft.put("model.path", draft.take("model_name_or_path", ""), "model_name_or_path")
    draft.move("model_revision", "model.revision")
    halves = {"bf16": "bfloat16", "pure_bf16": "bfloat16", "fp16": "float16"}
    dtypes = [dtype for key, dtype in halves.items() if draft.is_on(key)]
    draft.put("model.dtype", dtypes[0] if dtypes else "bfloat16", *halves)
    if not dtypes:
        draft.decisions.append(
            "dtype bfloat16, the type of most base models; without bf16 and fp16, LLaMA-Factory takes the base model's"
        )
    if draft.is_on("pure_bf16"):
        draft.lose("pure_bf16", "trained weights are kept in float32; the rest is computed in bfloat16")
    if draft.is_on("trust_remote_code"):
        draft.put("model.trust_remote_code", True, "trust_remote_code")
    _quantization(draft)


def _quantization(draft: Draft) -> None:
    bits, method = draft.number("quantization_bit"), str(draft.take("quantization_method", "bnb"))
    if not bits:
        for key in ("quantization_method", "quantization_type"):
            draft.pass_over(key, "nothing is quantised")
        return
    kinds = {4: "nf4", 8: "int8"}
    if method not in ("bnb", "bitsandbytes") or bits not in kinds:
        draft.hinder("quantization_bit", f"{bits} bits by {method}; muster has nf4 and int8 by bitsandbytes")
        return
    draft.put("model.quantization", kinds[bits], "quantization_bit", "quantization_method", "quantization_type")
    if draft.take("quantization_type", "nf4") != "nf4":
        draft.lose("quantization_type", "nf4 instead")
    if draft.take("double_quantization") is False and bits == 4:
        draft.lose("double_quantization", "false: nf4 is always quantised twice")


def _adapter(draft: Draft) -> None:
    kind = draft.take("finetuning_type", "lora")
    if kind == "full":
        draft.put("adapter.method", "none", "finetuning_type")
    elif kind == "oft":
        draft.put("adapter.method", "oft", "finetuning_type")
        draft.put("adapter.dropout", float(draft.number("module_dropout", 0.0)), "module_dropout")
        draft.move("oft_block_size", "adapter.block_size")
        draft.put("adapter.target_modules", _targets(draft.take("oft_target", "all")), "oft_target")
    elif kind == "lora":
        flags = {"dora": "use_dora", "pissa": "pissa_init", "loraplus": "loraplus_lr_ratio", "rslora": "use_rslora"}
        method = common.one_method(draft, {method: key for method, key in flags.items() if draft.is_on(key)})
        draft.put("adapter.method", method, "finetuning_type")
        rank = draft.number("lora_rank", 8)
        draft.put("adapter.rank", rank, "lora_rank")
        draft.put("adapter.alpha", draft.number("lora_alpha") or 2 * rank, "lora_alpha")
        draft.put("adapter.dropout", float(draft.number("lora_dropout", 0.0)), "lora_dropout")
        draft.put("adapter.target_modules", _targets(draft.take("lora_target", "all")), "lora_target")
    else:
        draft.hinder("finetuning_type", f"{kind}; muster trains an adapter, or with full the complete model")
    for key in [key for key in draft.settings if key.startswith(OTHERS.get(str(kind), ()))]:
        draft.pass_over(key, f"finetuning_type is {kind}")
    common.begin_from(draft, "adapter_name_or_path")
    extra = draft.take("additional_target")
    if extra and kind in ("lora", "oft"):
        names = [name.strip() for name in str(extra).split(",")]
        draft.put("adapter.modules_to_save", names, "additional_target")


def _targets(given: Any) -> Any:
    names = [name.strip() for name in str(given).split(",")]
    return "all-linear" if names == ["all"] else names


def _strategy(draft: Draft, file: Path) -> None:
    keys = ("fsdp", "fsdp_config")
    if draft.is_on("deepspeed"):
        common.deepspeed(draft, "deepspeed", file)
        for key in keys:
            draft.pass_over(key, "deepspeed comes first")
    elif draft.is_on("fsdp") or draft.is_on("fsdp_config"):
        draft.put("strategy.kind", "fsdp", *keys)
        if "offload" in str(draft.take("fsdp")):
            draft.put("strategy.offload", True)
    else:
        draft.put("strategy.kind", "ddp")


def _training(draft: Draft, workers: int | None, stage: str) -> None:
    micro = max(1, draft.number("per_device_train_batch_size", 8))
    accumulation = max(1, draft.number("gradient_accumulation_steps", 1))
    if stage == "ppo":
        accumulation *= max(1, draft.number("ppo_buffer_size", 1))
        draft.use("training.global_batch", "ppo_buffer_size")
    common.batches(draft, micro, accumulation, workers, draft.number("ray_num_workers"))
    draft.use("training.micro_batch", "per_device_train_batch_size")
    draft.use("training.global_batch", "gradient_accumulation_steps")
    draft.use("resources.workers", "ray_num_workers")
    common.length(draft, "num_train_epochs", 3)
    off = draft.is_on("disable_gradient_checkpointing")
    draft.put("training.gradient_checkpointing", not off, "disable_gradient_checkpointing")
    draft.pass_over("gradient_checkpointing", "it is on unless disable_gradient_checkpointing is set")
    common.clipping(draft)
    common.attention(draft, "flash_attn")
    common.liger(draft, "enable_liger_kernel")


def _saving(draft: Draft) -> None:
    default = "checkpoint.every_steps counts steps: 100 by default"
    common.every(draft, "save_steps", "checkpoint.every_steps", default)
    common.kept(draft)
    seldom = "training.eval_every counts steps; without it, evaluation runs after the last step"
    if common.has_evaluation(draft):
        common.every(draft, "eval_steps", "training.eval_every", seldom)
    for key in ("eval_steps", "eval_strategy"):
        draft.pass_over(key, seldom if common.has_evaluation(draft) else "there are no evaluation data")
    common.answers(draft, "predict_with_generate", "max_new_tokens", 1024, "BLEU-4 and ROUGE")
    common.rates(draft)
    common.comparisons(draft, "early_stopping_steps")
    named = draft.names("report_to")
    common.trackers(draft, {name: "report_to" for name in named if name not in ("none", "all")})
    if "all" in named:
        draft.lose("report_to", "all: name the trackers under tracking")
