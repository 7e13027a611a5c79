"""Words of other trainers, and where a recipe has the same: keys by their names, values by the path of their setting.

The words are those of transformers' Trainer, trl, peft, axolotl, LLaMA-Factory, torchtune and DeepSpeed. The recipe's
messages lead on by this table, and `launcher.convert` reads the values from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.recipe.base import KeyPath


class Here(NamedTuple):
    """The place of another trainer's word in a recipe. ``path``: dotted, empty if a recipe has nothing for it.
    ``value``: the value that the word stands for, if it stands for one. ``note``: a clause about the difference."""

    path: str
    value: Any = None
    note: str = ""

    def __str__(self) -> str:
        if not self.path:
            return f"leave it out: {self.note}"
        value = "" if self.value is None else f": {_plain(self.value)}"
        return f"write {self.path}{value}{f' ({self.note})' if self.note else ''}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _each(names: str, path: str, value: Any = None, note: str = "") -> dict[str, Here]:
    return dict.fromkeys(names.split(), Here(path, value, note))


MICRO = "packs in one forward pass of a GPU; training.global_batch is packs per step, over all GPUs"
GLOBAL = "packs per step over all GPUs; accumulation follows from it, training.micro_batch and the workers"
EVALUATIONS = "evaluations without an improvement, with a metric"
LOGS = "every step's metrics are kept"
SOURCE = "of each source"
STEPS = "a number of steps"

KEYS: Mapping[str, Here] = {
    **_each(
        "base_model model_name_or_path name_or_path model_name model_id pretrained_model_name_or_path", "model.path"
    ),
    **_each("model_path base_model_name_or_path pretrained_model checkpoint_dir", "model.path"),
    **_each("model_revision revision_of_model", "model.revision"),
    **_each("torch_dtype bnb_4bit_compute_dtype precision mixed_precision", "model.dtype"),
    **_each("bf16 bfloat16 pure_bf16", "model.dtype", "bfloat16"),
    **_each("fp16 float16 half", "model.dtype", "float16"),
    **_each("fp32 float32", "model.dtype", "float32"),
    **_each("load_in_4bit use_4bit qlora bnb_4bit_quant_type quantization_config", "model.quantization", "nf4"),
    **_each("load_in_8bit use_8bit", "model.quantization", "int8"),
    **_each("quantization_bit quantize bits", "model.quantization", None, "nf4 for 4 bits, int8 for 8"),
    **_each("double_quantization bnb_4bit_use_double_quant", "", None, "nf4 is always quantised twice"),
    **_each("tokenizer tokenizer_name tokenizer_name_or_path tokenizer_type", "", None, "model.path has the tokenizer"),
    **_each("tokenizer_path use_fast_tokenizer", "", None, "model.path has the tokenizer"),
    **_each("lora_model_dir adapter_name_or_path resume_adapter init_adapter", "adapter.from"),
    **_each("r lora_r lora_rank lora_dim", "adapter.rank"),
    **_each("lora_alpha", "adapter.alpha"),
    **_each("lora_dropout", "adapter.dropout"),
    **_each("lora_target_modules lora_target lora_attn_modules", "adapter.target_modules"),
    **_each("lora_target_linear", "adapter.target_modules", "all-linear"),
    **_each("lora_modules_to_save additional_target", "adapter.modules_to_save"),
    **_each("lora_bias", "adapter.bias"),
    **_each("trainable_token_indices peft_trainable_token_indices", "adapter.trainable_tokens"),
    **_each("loraplus_lr_ratio", "adapter.lr_ratio", None, "with adapter.method: loraplus"),
    **_each("oft_block_size", "adapter.block_size"),
    **_each("num_virtual_tokens", "adapter.virtual_tokens"),
    **_each("use_dora peft_use_dora", "adapter.method", "dora"),
    **_each("use_rslora peft_use_rslora", "adapter.method", "rslora"),
    **_each("pissa_init", "adapter.method", "pissa"),
    **_each("peft_type finetuning_type peft_method", "adapter.method"),
    **_each("init_lora_weights peft_init_lora_weights", "adapter.method", None, "pissa and olora are methods"),
    **_each("lora peft peft_config lora_config", "adapter"),
    **_each("datasets train_file train_dataset dataset_name train_path train_data data_path", "data.train"),
    **_each("data_files train_data_path", "data.train.0.path"),
    **_each("eval_dataset test_datasets validation_file eval_file valid_data val_dataset", "data.eval"),
    **_each("formatting dataset_format", "data.train.0.format", None, SOURCE),
    **_each("val_set_size val_size test_size validation_split eval_split_size", "data.eval_fraction"),
    **_each("max_samples max_train_samples num_samples max_rows", "data.train.0.limit", None, SOURCE),
    **_each("max_seq_length max_seq_len max_length cutoff_len sequence_len seq_length seq_len", "data.sequence_length"),
    **_each("model_max_length block_size_tokens context_length", "data.sequence_length"),
    **_each("sample_packing neat_packing pack packed", "data.packing"),
    **_each("chat_template_jinja chat_template_path conversation_template", "data.chat_template"),
    **_each("train_on_inputs train_on_prompt train_on_input", "", None, "format text trains on every token"),
    **_each("completion_only_loss assistant_only_loss mask_prompt", "", None, "the loss is on answers only"),
    **_each("dataset_text_field text_column field_messages", "data.train.0.columns", None, SOURCE),
    **_each("shuffle shuffle_merged_datasets", "", None, "each epoch has another order, by the recipe's seed"),
    **_each(
        "batch_size per_device_train_batch_size micro_batch_size per_gpu_train_batch_size micro_batch_size_per_gpu",
        *("training.micro_batch", None, MICRO),
    ),
    **_each("train_micro_batch_size_per_gpu device_batch_size local_batch_size", "training.micro_batch", None, MICRO),
    **_each("per_device_eval_batch_size eval_batch_size", "", None, "evaluation takes training.micro_batch"),
    **_each("gradient_accumulation_steps grad_accum grad_accumulation_steps", "training.global_batch", None, GLOBAL),
    **_each("accumulate_grad_batches gradient_accumulation", "training.global_batch", None, GLOBAL),
    **_each("train_batch_size total_batch_size effective_batch_size", "training.global_batch", None, GLOBAL),
    **_each("early_stopping_patience early_stopping_steps", "training.early_stop.patience", None, EVALUATIONS),
    **_each("early_stopping early_stopping_callback", "training.early_stop", None, "metric and patience"),
    **_each("early_stopping_threshold", "training.early_stop.min_delta"),
    **_each("load_best_model_at_end save_best keep_best_model", "checkpoint.keep_best", None, "a metric: eval_loss"),
    **_each("metric_for_best_model", "checkpoint.keep_best"),
    **_each("greater_is_better", "", None, "the metric decides it"),
    **_each("group_by_length remove_unused_columns", "", None, "muster reads and packs the rows in its own way"),
    **_each("dataloader_num_workers dataset_num_proc preprocessing_num_workers", "", None, "muster decides it"),
    **_each("use_cpu no_cuda", "resources.gpus_per_worker", None, "0 for the CPU"),
    **_each("num_train_epochs num_epochs max_epochs n_epochs", "training.epochs"),
    **_each("max_steps num_steps train_steps total_steps max_train_steps", "training.steps"),
    **_each("activation_checkpointing enable_activation_checkpointing", "training.gradient_checkpointing"),
    **_each("use_gradient_checkpointing grad_checkpointing", "training.gradient_checkpointing"),
    **_each("clip_grad_norm gradient_clip_val gradient_clipping grad_clip", "training.max_grad_norm"),
    **_each("eval_steps evals_per_epoch eval_interval", "training.eval_every", None, STEPS),
    **_each("eval_strategy evaluation_strategy do_eval", "training.eval_every", None, STEPS),
    **_each("learning_rate base_lr peak_lr", "optimizer.lr"),
    **_each("optim optimizer_name optimizer_type", "optimizer.name"),
    **_each("adam_beta1 adam_beta2", "optimizer.betas", None, "both in a list, such as [0.9, 0.999]"),
    **_each("adam_epsilon adam_eps epsilon", "optimizer.eps"),
    **_each("wd", "optimizer.weight_decay"),
    **_each("lr_scheduler_type lr_scheduler scheduler scheduler_type lr_schedule", "schedule.name"),
    **_each("num_warmup_steps lr_warmup_steps", "schedule.warmup_steps"),
    **_each("warmup warmup_fraction", "schedule.warmup_ratio"),
    **_each("cosine_min_lr_ratio min_lr_rate", "schedule.min_lr_ratio"),
    **_each("min_lr", "schedule.min_lr_ratio", None, "as a fraction of optimizer.lr"),
    **_each("ddp distributed", "strategy.kind", "ddp"),
    **_each("fsdp fsdp_config fsdp_version", "strategy.kind", "fsdp"),
    **_each("deepspeed_config zero_stage zero_optimization", "strategy.kind", None, "zero2 or zero3"),
    **_each("zero1 zero_1", "strategy.kind", "zero2", "which shards the gradients too"),
    **_each("offload_params fsdp_offload_params cpu_offload", "strategy.offload"),
    **_each("fsdp_reshard_after_forward", "strategy.reshard_after_forward"),
    **_each("flash_attention use_flash_attention use_flash_attention_2 flash_attn", "compute.attention", "flash"),
    **_each("flash_attn_2 use_flash_attn", "compute.attention", "flash"),
    **_each("sdp_attention", "compute.attention", "sdpa"),
    **_each("flex_attention", "compute.attention", "flex"),
    **_each("attn_implementation", "compute.attention"),
    **_each("use_liger_kernel enable_liger_kernel use_liger liger", "compute.kernels", "liger"),
    **_each("torch_compile compile_model", "compute.compile", True),
    **_each("world_size num_gpus n_gpus nproc_per_node num_processes num_workers n_gpu gpus", "resources.workers"),
    **_each("output_dir save_dir out_dir save_path", "storage", None, "the folder of all runs; name is the run's own"),
    **_each("run_name wandb_name experiment_name", "name"),
    **_each("save_steps saves_per_epoch save_interval save_every", "checkpoint.every_steps", None, STEPS),
    **_each("save_strategy checkpoint_every", "checkpoint.every_steps", None, STEPS),
    **_each("save_total_limit keep_checkpoints max_checkpoints", "checkpoint.keep_last"),
    **_each("resume_from_checkpoint auto_resume_from_checkpoints", "", None, "the same command resumes the run"),
    **_each("overwrite_output_dir", "", None, "the same name resumes a run, another one starts a new run"),
    **_each("report_to logger log_with", "tracking"),
    **_each("wandb_project", "wandb.project", None, "with tracking: [wandb]"),
    **_each("wandb_entity", "wandb.entity", None, "with tracking: [wandb]"),
    **_each("logging_steps logging_strategy log_every_n_steps logging_dir", "", None, LOGS),
    **_each("random_seed data_seed", "seed"),
    **_each("stage rl", "task"),
    **_each("pref_beta rl_beta dpo_beta", "dpo.beta", None, "with task: dpo"),
    **_each("orpo_alpha", "orpo.beta", None, "with task: orpo"),
    **_each("simpo_gamma", "simpo.gamma", None, "with task: simpo"),
    **_each("pref_ftx", "simpo.cpo_alpha", None, "with task: simpo"),
    **_each("neftune_noise_alpha", "sft.neftune_alpha"),
    **_each("label_smoothing_factor", "sft.label_smoothing"),
    **_each("hub_model_id push_to_hub hub_token", "", None, "muster push sends the result"),
}
"""Names of other trainers' settings. A recipe's own keys are not here: a message names their place by itself."""

OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(["adamw_hf", "adamw_torch_xla", "adamw_anyprecision"], "adamw"),
    "adamw_apex_fused": "adamw_fused",
    "paged_lion_32bit": "lion",
}
SCHEDULES: Mapping[str, str] = {
    **dict.fromkeys(["cosine_with_min_lr", "cosine_with_restarts", "cosine_warmup_with_min_lr"], "cosine"),
    "cosine_annealing": "cosine",
    "cosine_decay": "cosine",
    "linear_decay": "linear",
}
CHAT_TEMPLATES: Mapping[str, str] = {
    **dict.fromkeys(("qwen", "qwen2", "qwen_25", "qwen2.5"), "chatml"),
    **dict.fromkeys(("llama-3", "llama3_1", "llama3.1", "llama3_2"), "llama3"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma_2", "gemma_3"), "gemma"),
    **dict.fromkeys(("mistral_v2v3", "mistral_small"), "mistral"),
    **dict.fromkeys(("phi_3", "phi3", "phi_35"), "phi"),
    **dict.fromkeys(("deepseek3", "deepseek_v3"), "deepseek"),
    **dict.fromkeys(("glm4_moe", "glm_4_5"), "glm"),
}
"""The names of axolotl and LLaMA-Factory, and the name of muster's template of that form. LLaMA-Factory's deepseek is
the form of DeepSeek's first models, which muster does not have."""

NF4 = "with model.quantization: nf4"
ALPACA = "in Alpaca's own prompt; add as: chat for the chat template"
VALUES: Mapping[str, Mapping[str, Here]] = {
    "adapter.method": {
        "qlora": Here("adapter.method", "lora", NF4),
        "qdora": Here("adapter.method", "dora", NF4),
        "qpissa": Here("adapter.method", "pissa", NF4),
        **_each("full fft full_finetune full_finetuning", "adapter.method", "none", "which trains every weight"),
        **_each("lora+ lora_plus", "adapter.method", "loraplus"),
        **_each("rs_lora", "adapter.method", "rslora"),
        **_each("prompt_tuning", "adapter.method", "prompt"),
        **_each("prefix_tuning", "adapter.method", "prefix"),
        **_each("ptuning p-tuning", "adapter.method", "p_tuning"),
    },
    "adapter.target_modules": _each("all", "adapter.target_modules", "all-linear"),
    "model.quantization": {
        **_each("4 4bit 4-bit int4 fp4 bnb_4bit load_in_4bit bitsandbytes bnb qlora", "model.quantization", "nf4"),
        **_each("8 8bit 8-bit bnb_8bit load_in_8bit", "model.quantization", "int8"),
        **_each("16 16bit False", "model.quantization", "none"),
    },
    "model.dtype": {
        **_each("bf16", "model.dtype", "bfloat16"),
        **_each("fp16 half", "model.dtype", "float16"),
        **_each("fp32 float", "model.dtype", "float32"),
    },
    "task": {
        **_each("pt pretrain pretraining cpt", "task", "sft", "with format: text in data.train"),
        **_each("finetune supervised instruction_tuning", "task", "sft"),
        **_each("rm reward_modeling reward_model", "task", "reward"),
        **_each("sequence_classification text_classification cls", "task", "classification"),
    },
    "data.train.0.format": {
        "alpaca": Here("format", "instruction", ALPACA),
        **_each("chat conversation conversations conversational chat_template", "format", "messages"),
        **_each("raw pretrain pretraining", "format", "text"),
        **_each("prompt_completion prompt-completion input_output", "format", "completion"),
        **_each("dpo pairs ranking", "format", "preference"),
    },
    "data.chat_template": {name: Here("data.chat_template", ours) for name, ours in CHAT_TEMPLATES.items()},
    "optimizer.name": {name: Here("optimizer.name", ours) for name, ours in OPTIMIZERS.items()},
    "schedule.name": {name: Here("schedule.name", ours) for name, ours in SCHEDULES.items()},
    "strategy.kind": {
        **_each("zero1 zero_1 deepspeed_zero1", "strategy.kind", "zero2", "which shards the gradients too"),
        **_each("zero_2 deepspeed_zero2", "strategy.kind", "zero2"),
        **_each("zero_3 deepspeed_zero3", "strategy.kind", "zero3"),
        **_each("deepspeed", "strategy.kind", None, "zero2 or zero3"),
        **_each("fsdp2 fsdp1 full_shard", "strategy.kind", "fsdp"),
        **_each("zero0 dp ddp_spawn none no_shard", "strategy.kind", "ddp"),
    },
    "compute.attention": {
        **_each("flash_attention_2 flash_attention flash_attn fa2 flash_attention_3", "compute.attention", "flash"),
        **_each("flex_attention", "compute.attention", "flex"),
        **_each("eager sdp sdp_attention xformers", "compute.attention", "sdpa"),
    },
}
"""Values of other trainers, by the setting that they are written in. Index 0 stands for any entry of a list."""


def of_key(key: str | int, on: bool = True) -> str | None:
    """Returns the clause that leads on from another trainer's setting; None for any other key. ``on``: it is not
    switched off."""
    said = KEYS.get(str(key).lower())
    if said is not None and said.value is not None and not on:
        return f"leave it out: without {said.path}: {_plain(said.value)} it is off"
    return None if said is None else str(said)


def place_of(key: str | int) -> str:
    """Returns the dotted path of another trainer's setting in a recipe; empty for any other key."""
    said = KEYS.get(str(key).lower())
    return said.path if said else ""


def of_value(path: KeyPath, value: Any) -> str | None:
    """Returns the clause that leads on from another trainer's value at this path; None for any other value."""
    if not isinstance(value, str | int):
        return None
    named = ".".join("0" if isinstance(key, int) else key for key in path).replace("data.eval.", "data.train.")
    said = VALUES.get(named, {}).get(str(value)) or VALUES.get(named, {}).get(str(value).lower())
    return None if said is None else str(said)
