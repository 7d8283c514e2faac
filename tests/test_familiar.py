"""Words that people know from other tools are answered by what is written here in their place."""

from __future__ import annotations

import shlex

import pytest

import robustmoe as rm
from robustmoe import spec
from robustmoe.cli import main
from robustmoe.errors import UserError
from robustmoe.flags import flags_of, parse
from robustmoe.options import EvaluateOptions, read
from robustmoe.spec import familiar
from robustmoe.verbs import VERBS

KINDS = {
    "optimizer": "optimizer", "schedule": "schedule", "threat": "threat", "certifier": "certifier", "attack": "attack",
    "method": "method", "model": "model", "augment": "augment", "val-attack": "attack",
}  # fmt: skip
GIVEN = {
    "opt": "adamw", "sched": "cosine", "attack": "fgsm(linf(0.1))", "adv": "fgsm(linf(0.1))", "arch": "vgg16",
    **dict.fromkeys(("batch", "num_epochs", "n", "steps", "restarts", "experts"), "8"),
}  # fmt: skip


@pytest.mark.parametrize(
    "command, said",
    [
        ("train x --lr 0.1", "unknown option '--lr'; write --optimizer \"sgd(lr=0.1)\""),
        ("train x --lr=0.1", 'write --optimizer "sgd(lr=0.1)"'),
        ("train x --learning_rate 0.1", 'write --optimizer "sgd(lr=0.1)"'),
        ("train x --eps 8/255", 'write --method "at(pgd(linf(8/255)))"'),
        ("train x --arch resnet18", "write --model resnet18"),
        ("train x -a resnet18", "write --model resnet18"),
        ("train x --workers 4", "leave it out"),
        ("train x -j 4", "leave it out"),
        ("train x --num-epochs 3", "write --epochs 3"),
        ("train x -b 32", "write --batch-size 32"),
        ("train x --gpu 0", "write --device cuda"),
        ("train x --save o", "write --out o"),
        ("train x --amp", "write --precision bf16"),
        ("train --config x.toml", "robustmoe train FILE.toml"),
        ("train x --wandb", "robustmoe track RUN --to wandb"),
        ("evaluate x --epsilon 0.1", 'write --attack "pgd(linf(0.1))"'),
        ("evaluate x --n-iter 50", 'write --attack "pgd(linf(8/255), steps=50)"'),
        ("evaluate x --norm Linf", 'write --attack "pgd(linf(8/255))"'),
        ("evaluate --checkpoint a.pt", "a run folder stands without a flag"),
        ("evaluate x --fp16", "write --precision fast"),
        ("evaluate x --n_examples 1000", "write --limit 1000"),
        ("audit x --eps 0.1", 'write --threat "linf(0.1)"'),
        ("certify x --sigma 0.5", 'write --certifier "smoothing(sigma=0.5)"'),
        ("certify x --eps 0.1", 'write --certifier "bounds(linf(0.1))"'),
        ("evaluate x --lr 0.1", "known: --"),
    ],
)
def test_an_option_of_other_tools_is_answered(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_what_is_offered_is_taken(verb: str) -> None:
    """Every answer is a flag of the verb, and its text can be built."""
    flags = {flag.name for flag in flags_of(VERBS[verb]) if not flag.positional}
    places = [flag.option.lower() for flag in flags_of(VERBS[verb]) if flag.required]
    for words, _ in familiar._MEANT:
        said = familiar.option(words[0], GIVEN.get(words[0], "0.5"), flags, "flag")
        if words[0] in flags or said is None or not said.startswith("write "):
            continue
        written = shlex.split(said.removeprefix("write "))
        if verb != "import":  # which needs --data beside it
            parse(verb, VERBS[verb], [*places, *written])
        kind = KINDS.get(written[0][2:])
        if kind is not None:
            spec.build(written[1], kind)


@pytest.mark.parametrize(
    "text, kind, said",
    [
        ("pgd(eps=0.1)", "attack", "'pgd' has no argument 'eps'; the ball is an argument of its own: pgd(linf(0.1))"),
        ("pgd(linf(0.1), epsilon=0.1)", "attack", "pgd(linf(0.1))"),
        ("pgd(linf(0.1), iters=3)", "attack", "here it is 'steps': pgd(steps=3)"),
        ("pgd(norm='L2')", "attack", "pgd(linf(8/255) or l2(0.5))"),
        ("linf(epsilon=0.1)", "threat", "here it is 'eps': linf(eps=0.1)"),
        ("pgd(linf(0.1), alpha=2/255)", "attack", "here it is 'step_size': pgd(step_size=2/255)"),
        ("pathway(resnet18, num_experts=4)", "model", "here it is 'experts': pathway(experts=4)"),
        ("vit(patch_size=4)", "model", "here it is 'patch': vit(patch=4)"),
        ("sgd(learning_rate=1)", "optimizer", "here it is 'lr': sgd(lr=1)"),
        ("sgd(wd=1)", "optimizer", "here it is 'weight_decay': sgd(weight_decay=1)"),
        ("pgd(linf(0.1), foo=1)", "attack", "known: keep, objective"),
    ],
)
def test_an_argument_of_other_tools_is_answered(text: str, kind: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        spec.build(text, kind)
    assert said in str(error.value)


def test_in_python_too() -> None:
    with pytest.raises(UserError, match=r'unknown argument \'eps\'; write attacks="pgd\(linf\(0\.1\)\)"'):
        read(EvaluateOptions, {"eps": 0.1})
    with pytest.raises(UserError, match=r'unknown field \'lr\'; write optimizer="sgd\(lr=0\.1\)"'):
        rm.train("digits_hard_moe", lr=0.1)
    with pytest.raises(UserError, match=r'unknown field \'arch\'; write model="vgg16"'):
        rm.load_recipe("digits_hard_moe", arch="vgg16")
