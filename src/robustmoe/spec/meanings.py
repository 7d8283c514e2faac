"""What a docstring says of each argument. Arguments stand in it as ``name``; what follows ``name``: is of that one, and
else the sentences that it stands in.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from robustmoe.spec.hints import signature_of

COMMON = {
    "threat": "the ball that the changed image stays in, such as linf(8/255), l2(0.5) or l1(12).",
    "seed": "decides every random draw.",
    "steps": "how many steps are made.",
    "restarts": "how often the whole is tried, each time from another start.",
    "attack": "the attack that is made, such as pgd(linf(8/255), steps=10).",
    "backbone": "the network that it is made of, such as resnet18 or wide_resnet(depth=34).",
    "experts": "how many experts a router chooses among.",
    "k": "how many experts each item is sent to.",
    "eps": "the radius of the ball, in pixels of [0, 1], such as 8/255.",
    "val": "the share of the training images that is held out for validation.",
    "label_smoothing": "how much of each label goes to all classes alike.",
    "balance": "the weight of the routers' balance loss; 0 is none.",
    "balance_loss": "which balance loss of the routers.",
    "moves": "the parameters that move: all, the routers alone, or the experts.",
    "mixup": "above 0, images and labels are mixed by shares from Beta(mixup, mixup).",
    "weight_decay": "how much the weights are drawn towards 0.",
    "lr": "the learning rate at the top of the schedule.",
    "scores_are": "what stands at ``logits``: the router's logits, or their probabilities.",
    "objective.loss": "what is climbed: cross-entropy, the margin, or the difference of logits ratio (DLR).",
    "method.loss": "the cross-entropy: of the softmax, or of a sigmoid for each class.",
    "beta": "the weight of the robustness term beside the cross-entropy.",
    "objective": "what is climbed, see robustmoe list objectives.",
    "network": "the kind of network of which each expert is one, such as resnet18.",
    "router": "the network that decides where an image, or a part of it, goes.",
    "ratio": "how wide an expert is, as a share of the dense network's width.",
    "inner": "the network that gets the image.",
    "size": "sides of an image, in pixels.",
    "width": "channels of the stem and the first stage.",
    "patch": "pixels a side of a patch.",
    "model.alpha": "the share of the robust half.",
    "standard": "the model that is accurate on clean images.",
    "robust": "the model that is robust.",
    "stages": "the stages that have experts, 1 being the first.",
    "model": "a model of your own, such as my_file.py:make_model.",
    "view": "what is climbed in the model's place, see robustmoe list views.",
    "run": "a run folder.",
    "method": "the training method that it is added to, such as at(pgd(linf(8/255))).",
    "data": "the data set that it is added to, such as cifar10.",
    "root": "the folder of the data set.",
}
"""What arguments mean that mean the same wherever they stand ("objective.loss": in names of that kind), where a
docstring says nothing of its own, or refers to another.
"""

_ANY_LABEL = re.compile(r"``\w+``(?:,? (?:and|or) ``\w+``|, ``\w+``)*(?:, [^.:`]{0,40}| \([^()`]{0,40}\))?:(?!:)")
_END = re.compile(r"(?<!et al)(?<!\b[A-Z])[.!?](?:''|\"|\))?(?=\s+[A-Z`(\"]|\s*$)")


def paragraphs(doc: str) -> list[str]:
    """Returns the paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", doc) if part.strip()]


def sentences(text: str) -> list[str]:
    """Returns the sentences of a paragraph."""
    parts, start = [], 0
    for end in _END.finditer(text):
        parts.append(text[start : end.end()].strip())
        start = end.end()
    rest = text[start:].strip()
    return [part for part in [*parts, rest] if part]


def first_sentence(doc: str) -> str:
    """Returns what a docstring begins with, whole."""
    return next(iter(sentences(next(iter(paragraphs(doc)), ""))), "")


def docs_of(kind: str, thing: Callable[..., Any]) -> Iterator[str]:
    """Yields the docstrings that may say what an argument of ``thing`` means: its own, those of what it makes and its
    bases, and those that its own refers to.
    """
    made = thing if isinstance(thing, type) else signature_of(thing).return_annotation
    whole = isinstance(thing, type) or kind == "model"  # else what is made is only of the kind's class
    bases = inspect.getmro(made) if isinstance(made, type) and whole else ()
    own = inspect.getdoc(thing) or ""
    module = vars(sys.modules[thing.__module__]) if thing.__module__ in sys.modules else {}
    named = [module.get(name) for name in re.findall(r"(?<!`)`(\w+)`(?!`)", own)]
    for each in (thing, *bases, *named):
        if str(getattr(each, "__module__", "")).startswith("robustmoe.") and getattr(each, "__doc__", None):
            yield inspect.cleandoc(str(each.__doc__))


def meaning(kind: str, thing: Callable[..., Any], name: str) -> str:
    """Returns what the argument ``name`` of ``thing``, one of ``kind``, means; "" where nothing says it."""
    common = COMMON.get(f"{kind}.{name}", COMMON.get(name, ""))
    docs = list(docs_of(kind, thing))
    labelled = next((text for doc in docs if (text := _labelled(doc, name))), "")
    refers = re.match(r"(``\w+``(, | and )?)*:? ?(as|see) ", labelled)
    if refers and common:
        reference = re.sub(r"^(``\w+``(, | and )?)*: ?", "", labelled).rstrip(".;,")
        return common if reference == "as there" else f"{common} ({reference}.)"
    return labelled or common or next((text for doc in docs if (text := _mentioned(doc, name))), "")


_YEAR = r"(?:19|20)\d\d"
_CITED = re.compile(
    rf"[A-Z][\w'-]+(?: and [A-Z][\w'-]+| et al\.),?(?: [A-Z][A-Za-z]+)?,? \(?{_YEAR}|[A-Z][\w'-]+, {_YEAR}"
    r"|arXiv \d{4}\.\d{5}"
)


def cited(thing: Callable[..., Any]) -> list[str]:
    """Returns the papers that the docstring of ``thing`` names, or else that of what it makes or of its module."""
    module = sys.modules.get(thing.__module__)
    made = signature_of(thing).return_annotation if not isinstance(thing, type) else thing
    for doc in (inspect.getdoc(thing), getattr(made, "__doc__", None), module and module.__doc__):
        papers = _CITED.findall(" ".join((doc or "").split()))
        if papers:
            return list(dict.fromkeys(re.sub(r",? \(?(?=\d{4}$)", " ", paper) for paper in papers))
    return []


def _labelled(doc: str, name: str) -> str:
    for paragraph in paragraphs(doc):
        if match := next((m for m in _ANY_LABEL.finditer(paragraph) if f"``{name}``" in m[0]), None):
            following = _ANY_LABEL.search(paragraph, match.end())
            text = paragraph[match.end() : following.start() if following else None].strip()
            head = match[0].rstrip(":")
            return text if head == f"``{name}``" else f"{head}: {text}"
    return ""


def _mentioned(doc: str, name: str) -> str:
    mentions = [s for paragraph in paragraphs(doc) for s in sentences(paragraph) if f"``{name}``" in s]
    return " ".join(mentions)
