"""Words that people know from other tools (timm, RobustBench, torchattacks, scripts with argparse), and what is written
here in their place.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from robustmoe.errors import nearest

LEARNING = ("lr", "learning_rate", "base_lr")
EPS = ("eps", "epsilon", "radius")
STEPS = (
    "steps",
    "n_iter",
    "num_iter",
    "iters",
    "iterations",
    "num_steps",
    "n_steps",
    "nb_iter",
    "attack_steps",
    "pgd_steps",
)
STEP_SIZE = ("step_size", "eps_iter", "eps_step", "alpha", "stepsize", "rel_stepsize")

_MEANT: tuple[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    (LEARNING, (("optimizer", "sgd(lr={})"),)),
    (("wd", "weight_decay"), (("optimizer", "sgd(weight_decay={})"),)),
    (("momentum",), (("optimizer", "sgd(momentum={})"),)),
    (("opt", "optim", "optimiser"), (("optimizer", "{}"),)),
    (("sched", "lr_schedule", "lr_scheduler", "scheduler"), (("schedule", "{}"),)),
    (("warmup", "warmup_epochs"), (("schedule", "cosine(warmup=0.1)"),)),
    (EPS, (("method", "at(pgd(linf({})))"), ("threat", "linf({})"), ("certifiers", "bounds(linf({}))"),
           ("attacks", "pgd(linf({}))"), ("attack", "pgd(linf({}))"))),
    (STEPS, (("method", "at(pgd(linf(8/255), steps={}))"), ("attacks", "pgd(linf(8/255), steps={})"),
             ("attack", "pgd(linf(8/255), steps={})"))),
    (STEP_SIZE, (("method", "at(pgd(linf(8/255), step_size={}))"), ("attacks", "pgd(linf(8/255), step_size={})"),
                 ("attack", "pgd(linf(8/255), step_size={})"))),
    (("restarts", "n_restarts", "num_restarts"), (("attacks", "pgd(linf(8/255), restarts={})"),)),
    (("norm", "lp"), (("method", "at(pgd(linf(8/255)))"), ("threat", "linf(8/255)"),
                      ("certifiers", "bounds(linf(8/255))"), ("attacks", "pgd(linf(8/255))"))),
    (("attack", "adv"), (("method", "at({})"), ("attacks", "{}"))),
    (("arch", "architecture", "model_name", "network", "net", "backbone", "a"), (("model", "{}"), ("as_", "{}"))),
    (("dataset", "data_set", "ds"), (("data", "{}"),)),
    (("data_dir", "data_path", "data_root", "root", "imagenet_dir"), (("data", "folder(root='{}')"),)),
    (("gpu", "gpus", "gpu_id", "cuda"), (("device", "cuda"),)),
    (("batch", "bs", "batchsize", "b", "train_batch_size"), (("batch_size", "{}"),)),
    (("num_epochs", "max_epochs", "n_epochs", "e"), (("epochs", "{}"),)),
    (("n", "num_images", "n_examples", "n_ex", "max_samples", "num_samples", "subset"), (("limit", "{}"),)),
    (("output", "save", "save_dir", "output_dir", "outdir", "log_dir", "save_path", "o"), (("out", "{}"),)),
    (("checkpoint", "ckpt", "weights", "pretrained", "finetune", "initial_checkpoint"), (("init", "{}"),)),
    (("amp", "fp16", "bf16", "half"), (("precision", "bf16"),)),
    (("clip_grad", "grad_clip", "max_norm", "max_grad_norm"), (("clip", "{}"),)),
    (("ema_decay", "model_ema", "model_ema_decay"), (("ema", "{}"),)),
    (("label_smoothing", "smoothing"), (("method", "standard(label_smoothing={})"),)),
    (("mixup",), (("method", "standard(mixup={})"),)),
    (("loss", "criterion", "train_loss"), (("method", "trades(pgd(linf(8/255)))"),)),
    (("beta", "trades_beta"), (("method", "trades(pgd(linf(8/255)), beta={})"),)),
    (("experts", "num_experts", "n_experts"), (("model", "pathway(resnet18, experts={})"),)),
    (("sigma", "noise_sd"), (("certifiers", "smoothing(sigma={})"), ("method", "gaussian(sigma={})"))),
    (("augmentation", "aug", "aa", "auto_augment"), (("augment", "rand_augment(2, 10)"),)),
)  # fmt: skip

_TOLD = {
    (
        "workers",
        "num_workers",
        "j",
    ): "nothing is to be set here: images are read by threads of this process; leave it out",
    ("config", "cfg", "c"): "a recipe stands without a flag: robustmoe train FILE.toml",
    ("checkpoint", "ckpt", "weights", "resume_from"): (
        "a run folder stands without a flag; robustmoe import FILE --as MODEL makes one of other weights"
    ),
    ("num_classes", "nb_classes"): "the data set says it; leave it out",
    ("num_gpus", "nproc", "world_size", "local_rank", "dist", "multi_gpu"): (
        "several processes: torchrun --nproc-per-node=2 -m robustmoe train ..."
    ),
    ("wandb", "tensorboard", "mlflow", "log_wandb", "use_wandb"): "a run is followed by robustmoe track RUN --to wandb",
    ("verbose", "v", "quiet", "q", "print_freq", "log_interval"): "nothing is needed here, leave it out",
    ("norm", "targeted", "n_classes"): "it is part of the attack: robustmoe list attacks, robustmoe list threats",
}

ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(EPS, ("eps", "threat")),
    "norm": ("threat",), "p": ("threat",),
    **dict.fromkeys(STEPS, ("steps",)),
    **dict.fromkeys(STEP_SIZE, ("step_size", "ratio")),
    **dict.fromkeys(LEARNING, ("lr",)),
    "wd": ("weight_decay",), "n_restarts": ("restarts",), "num_restarts": ("restarts",),
    "random_start": ("start",), "rand_init": ("start",), "rs": ("start",),
    "num_experts": ("experts",), "n_experts": ("experts",), "top_k": ("k",), "topk": ("k",),
    "widen_factor": ("width",), "dim": ("width",), "embed_dim": ("width",), "hidden_dim": ("width",),
    "num_filters": ("width",), "layers": ("depth",), "num_layers": ("depth",), "patch_size": ("patch",),
    "num_heads": ("heads",), "drop_rate": ("dropout",), "capacity_factor": ("capacity",), "gating": ("gate",),
    "gate": ("gating",), "criterion": ("loss", "objective"), "loss_fn": ("loss", "objective"),
    "loss": ("objective",), "lambda_": ("beta",), "lam": ("beta",), "n_queries": ("steps",),
    "n_target_classes": ("targets",), "noise_sd": ("sigma",), "path": ("root",), "data_dir": ("root",),
    "img_size": ("size",), "image_size": ("size",), "smoothing": ("label_smoothing",),
    "num_noise_vec": ("n",), "random_seed": ("seed",),
}  # fmt: skip
"""An argument of other tools -> ours, that which a name has first."""


def option(word: str, value: str | None, known: Collection[str], way: Literal["flag", "python"]) -> str | None:
    """Returns what to write in the place of an option ``word`` that people know, where the ``known`` ones have it; None
    where nothing is.
    """
    word = word.lstrip("-").replace("-", "_").lower()
    given = "..." if value is None else value
    for words, ways in _MEANT:
        for name, form in ways if word in words else ():
            if name in known:
                text = "fast" if name == "precision" and "method" not in known else form.replace("{}", given)
                return f"write {_written(name, text, way)}"
    return next((told for words, told in _TOLD.items() if word in words), None)


def unknown(what: str, name: str, value: Any, known: Collection[str]) -> str:
    """Returns what to say of a Python argument or a recipe's field that there is not: what people mean by it, or else
    the names that are near.
    """
    meant = option(name, str(value), known, "python")
    return f"unknown {what} {name!r}; {meant or nearest(name, known)}"


def _written(name: str, text: str, way: str) -> str:
    if way == "python":
        return f'{name}="{text}"'
    flag = name.removesuffix("s") if name in ("attacks", "certifiers") else name.rstrip("_")
    quoted = f'"{text}"' if "(" in text else text
    return f"--{flag.replace('_', '-')} {quoted}"


def argument(name: str, key: str, value: str, known: Collection[str]) -> str | None:
    """Returns what to write in the place of ``key=value`` in a call of ``name``, whose arguments are ``known``; None
    where nothing is.
    """
    meant = next((each for each in ARGUMENTS.get(key, ()) if each in known), None)
    if meant is None:
        return None
    if meant == "threat":
        ball = f"linf({value})" if key in EPS else "linf(8/255) or l2(0.5)"
        return f"the ball is an argument of its own: {name}({ball})"
    return f"here it is {meant!r}: {name}({meant}={value})"
