"""Converts axolotl's settings of ``rl: grpo``: those of trl, in its section ``trl``, and of servers, in ``vllm``."""

from __future__ import annotations

import re

from launcher.convert.draft import Draft, as_mapping, is_number
from trainer.recipe.sections.rollouts.losses import GRPO_LOSSES

LOSSES = ("grpo", "dr_grpo", "dapo", "cispo")
"""trl's names of losses that muster has by the same name."""
FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.([A-Za-z_]\w*)")
PYTHON = "/opt/vllm/bin/python"
DRAWN = "texts are drawn from the model's own probabilities, which the loss assumes"
IDLE = {
    "log_completions": "an event has two texts of each step",
    "num_completions_to_print": "an event has two texts of each step",
    "use_liger_loss": "the same result by other kernels",
    "ref_model_*": "has no effect without sync_ref_model",
    "vllm_*": "has no effect without use_vllm, or belongs to servers of trl",
    "use_bias_correction_kl": "the divergence always has the importance ratio as a factor",
}


def task(draft: Draft) -> None:
    draft.put("task", "grpo", "rl")
    trl = draft.part("trl", as_mapping(draft.take("trl")))
    draft.use("grpo", "trl")
    _loss(trl)
    for part, key in ((draft, "rl_beta"), (trl, "beta")):
        if part.number(key) is not None:
            part.put("grpo.kl_coef", float(part.number(key)), key)
    _rewards(trl)
    _texts(trl)
    _engine(draft, trl)
    trl.finish(IDLE)


def prompts(draft: Draft) -> None:
    """Changes the batch of a step, which counts texts in axolotl, into prompts. A micro-batch counts texts in both, and
    may not be larger than the step's prompts here."""
    training, group = draft.recipe["training"], draft.recipe["grpo"]["group_size"]
    texts = training["global_batch"]
    training["global_batch"] = max(1, texts // group)
    training["micro_batch"] = min(training["micro_batch"], training["global_batch"])
    draft.decisions.append(
        f"global_batch {training['global_batch']} counts prompts: {texts} texts a step, {group} for each prompt"
    )


def _loss(trl: Draft) -> None:
    kind = str(trl.take("loss_type", "dapo"))
    if "loss_type" not in trl.settings:
        trl.decisions.append("grpo.loss dapo is trl's default if no loss_type is given")
    loss = "gspo" if trl.take("importance_sampling_level") == "sequence" else kind
    if loss == "gspo" and kind != "grpo":
        trl.lose("loss_type", f"{kind} with ratios of complete texts; gspo's mean is over texts")
    elif kind == "bnpo":
        loss = "dapo"
        trl.lose("loss_type", "bnpo: its mean over the tokens of a micro-batch; dapo's is over those of an update")
    elif kind not in LOSSES:
        trl.hinder("loss_type", f"{kind} is no loss of task grpo; {', '.join(GRPO_LOSSES.names())} are")
        return
    trl.put("grpo.loss", loss, "loss_type", "importance_sampling_level")
    _limits(trl, loss)
    scale = trl.take("scale_rewards", True)
    scale = scale if isinstance(scale, str) else "group" if scale else "none"
    trl.put("grpo.scale_rewards", scale, "scale_rewards")
    if trl.is_on("mask_truncated_completions"):
        trl.put("grpo.overlong_filter", True, "mask_truncated_completions")


def _limits(trl: Draft, loss: str) -> None:
    """Sets the limits, which are the same above and below in trl unless both are given. That of cispo is the largest
    ratio itself."""
    low = float(trl.number("epsilon", 0.2))
    high = trl.number("epsilon_high")
    if loss != "cispo":
        trl.put("grpo.clip_low", low, "epsilon")
        trl.put("grpo.clip_high", low if high is None else float(high), "epsilon_high")
    elif high is not None and high > 1:
        trl.put("grpo.clip_high", float(high) - 1.0, "epsilon_high")
        trl.pass_over("epsilon", "cispo has no lower limit")
    else:
        trl.lose("epsilon_high", "cispo needs a largest ratio above 1; grpo.clip_high is the default, 4 above 1")


def _rewards(trl: Draft) -> None:
    names = trl.names("reward_funcs")
    if not names:
        trl.hinder("reward_funcs", "is missing: a recipe needs a reward")
    weights = trl.take("reward_weights") or [1.0] * len(names)
    if not isinstance(weights, list) or not all(map(is_number, weights)) or len(weights) != len(names):
        trl.hinder("reward_weights", f"{weights} for {len(names)} rewards")
        return
    functions = []
    for name, weight in zip(names, weights, strict=True):
        found = FUNCTION.fullmatch(name)
        if found:
            module, function = found.groups()
            file = module if "." in module else f"{module}.py"
            functions.append({"function": f"{file}:{function}", "weight": float(weight)})
        elif "model" in trl.recipe["grpo"].get("reward", {}):
            trl.lose("reward_funcs", f"{name}: a recipe has one reward model")
        else:
            trl.put("grpo.reward.model", name, "reward_funcs")
            trl.put("grpo.reward.model_weight", float(weight), "reward_weights")
    if functions:
        trl.put("grpo.reward.functions", functions, "reward_funcs", "reward_weights")
        trl.decisions.append(
            "reward functions are called with three lists of texts: prompts, completions and references (the answers "
            "in the data); trl passes turns, and columns by their names, so look at their arguments"
        )


def _texts(trl: Draft) -> None:
    trl.put("grpo.group_size", int(trl.number("num_generations", 8)), "num_generations")
    trl.put("grpo.max_new_tokens", int(trl.number("max_completion_length", 512)), "max_completion_length")
    trl.put("grpo.epochs", int(trl.number("num_iterations", 1)), "num_iterations")
    for key in ("temperature", "top_p"):
        if trl.number(key) is not None:
            trl.put(f"grpo.{key}", float(trl.number(key)), key)
    for key, neutral in (("top_k", -1), ("min_p", 0), ("repetition_penalty", 1)):
        if trl.number(key) == neutral:
            trl.pass_over(key, DRAWN)
        elif trl.is_on(key):
            trl.lose(key, DRAWN)
    if trl.is_on("sync_ref_model"):
        trl.lose("sync_ref_model", "the reference is the model with its adapter off, in every step")
    if trl.is_on("rollout_func"):
        trl.hinder("rollout_func", "texts by code of one's own; a recipe has the engines of rollout.engine")
    if trl.take("multi_objective_aggregation") == "sum_then_normalize":
        trl.pass_over("multi_objective_aggregation", "rewards are always added up first")


def _engine(draft: Draft, trl: Draft) -> None:
    vllm = draft.part("vllm", as_mapping(draft.take("vllm")))
    if not trl.is_on("use_vllm"):
        draft.pass_over("vllm", "has no effect without trl.use_vllm")
        return
    if not draft.take("adapter"):
        trl.lose("use_vllm", "servers load adapters only, and here is none: the model in training writes the texts")
        draft.pass_over("vllm", "there are no servers")
        return
    trl.put("rollout.engine", "vllm", "use_vllm")
    if trl.take("vllm_mode") == "colocate":
        _own_servers(trl, vllm)
    else:
        _given_servers(draft, trl)
    if trl.is_on("async_prefetch"):
        depth = int(trl.number("prefetch_depth", 1) or 1)
        trl.put("rollout.max_staleness", depth, "async_prefetch", "prefetch_depth")
    _importance(trl)


def _own_servers(trl: Draft, vllm: Draft) -> None:
    trl.put("rollout.vllm.python", PYTHON, "vllm_mode")
    trl.decisions.append(f"rollout.vllm.python {PYTHON} is a guess: name the Python of an environment that has vLLM")
    vllm.put("rollout.vllm.gpu_memory_utilization", float(vllm.number("gpu_memory_utilization", 0.3)))
    vllm.use("rollout.vllm.gpu_memory_utilization", "gpu_memory_utilization")
    vllm.put("rollout.vllm.tensor_parallel", int(vllm.number("tensor_parallel_size", 1)), "tensor_parallel_size")
    vllm.finish({"max_model_len": "follows from the data and max_new_tokens", "dtype": "model.dtype", "device": "CUDA"})


def _given_servers(draft: Draft, trl: Draft) -> None:
    host, port = str(trl.take("vllm_server_host", "0.0.0.0")), trl.number("vllm_server_port", 8000)
    host = "127.0.0.1" if host == "0.0.0.0" else host
    trl.put("rollout.addresses", [f"http://{host}:{port}"], "vllm_server_host", "vllm_server_port", "vllm_mode")
    trl.decisions.append(
        "rollout.addresses: start `vllm serve` there, not axolotl's vllm-serve; docs/rollouts.md has its flags"
    )
    draft.pass_over("vllm", "the server's own settings; docs/rollouts.md has the flags of vllm serve")


def _importance(trl: Draft) -> None:
    mode, cap = trl.take("vllm_importance_sampling_mode"), trl.number("vllm_importance_sampling_cap")
    if trl.take("vllm_importance_sampling_correction") is False:
        trl.put("rollout.importance_cap", None, "vllm_importance_sampling_correction")
        return
    trl.use("rollout.importance_cap", "vllm_importance_sampling_correction")
    if mode == "token_truncate":
        trl.put("rollout.importance_cap", float(3.0 if cap is None else cap), "vllm_importance_sampling_cap")
        trl.use("rollout.importance_cap", "vllm_importance_sampling_mode")
        return
    limits = "a recipe limits the weight of each token, rollout.importance_cap"
    trl.lose("vllm_importance_sampling_mode", f"{mode or 'sequence_mask, by which trl leaves texts out'}; {limits}")
    if cap is not None:
        trl.lose("vllm_importance_sampling_cap", f"{cap:g}: of {mode or 'sequence_mask'}; {limits}")
