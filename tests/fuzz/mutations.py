"""Ways to spoil a valid file: as a text of bytes, as the JSON in it, as something that is no file at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

PAYLOAD = "__import__('os').system('touch {canary}')"
"""Creates a file in the canary folder where a text is executed."""


@dataclass(frozen=True)
class Raw:
    """A token that is written as it is, since no value of Python gives it."""

    text: str
    name: str


def values(canary: str) -> list[Any]:
    """What is put in the place of a value."""
    payload = PAYLOAD.format(canary=canary)
    return [
        None, True, False, -1, 0, 1, 2, 1.5, -0.0, 1e-320, 2**31, 2**63 - 1, 2**63, 2**64, 10**30,
        Raw("1e400", "1e400"), Raw("-1e400", "-1e400"), Raw("NaN", "NaN"), Raw("-Infinity", "-Infinity"),
        Raw("9" * 5000, "a number of 5,000 digits"), Raw("[" * 100_000, "100,000 brackets"),
        Raw("[" * 900 + "]" * 900, "900 lists in one another"), Raw('"\\ud800"', "half a surrogate pair"),
        "", "x", "1", "nan", "none", "a\nb", "\0", "\x1b]0;pwned\x07", "é" * 3, "x" * 70_000, "../../../etc/passwd",
        "/dev/zero", payload, f"{{{payload}}}", f"own.py:{payload}", "<script>alert(1)</script>", "digits", "linear",
        [], {}, [[]], [None], [1, 2, 3], ["a"], [0] * 5000, {"a": 1}, {"__class__": "os.system"}, [[1], [2, 3]],
    ]  # fmt: skip


def shown(value: Any) -> str:
    """A value as the list of cases names it."""
    text = value.name if isinstance(value, Raw) else repr(value)
    return text if len(text) < 100 else f"{text[:60]}... ({len(text)} characters)"


def dumped(document: Any) -> str:
    """JSON with its `Raw` tokens in their places."""
    raws: list[str] = []

    def placeholder(raw: Raw) -> str:
        raws.append(raw.text)
        return f"@raw{len(raws) - 1}@"

    text = json.dumps(document, default=placeholder)
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text


def _descend(document: Any, draw: Draw) -> tuple[Any, Any, str]:
    """A container inside the document, a key of it, and the way there in words."""
    node, way = document, ""
    while True:
        key = draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else draw(st.integers(0, len(node) - 1))
        way += f".{key}" if isinstance(node, dict) else f"[{key}]"
        below = node[key]
        if not isinstance(below, dict | list) or not below or draw(st.integers(0, 3)) == 0:
            return node, key, way
        node = below


def change_json(document: Any, draw: Draw, canary: str) -> tuple[Any, str]:
    """The document with a value of it changed, and what was done. The document is changed in place."""
    if not document or not isinstance(document, dict | list):
        return document, "nothing to change"
    node, key, way = _descend(document, draw)
    old = node[key]
    numeric = isinstance(old, int | float) and not isinstance(old, bool)
    actions = ["replace"] * 8 + ["delete", "add"] + (["scale"] * 4 if numeric else [])
    actions += ["rename"] if isinstance(node, dict) else []
    actions += ["cut", "double", "swap"] * 2 if isinstance(old, list) and old else []
    actions += ["longer"] if isinstance(old, str) else []
    action = draw(st.sampled_from(actions))
    if action == "replace":
        new = draw(st.sampled_from(values(canary)))
        node[key] = new
        return document, f"{way.lstrip('.')}: {shown(old)} -> {shown(new)}"
    if action == "scale":
        factor = draw(st.sampled_from([-1, 1000, 10**12, 1.5]))
        node[key] = old * factor
        return document, f"{way.lstrip('.')}: {shown(old)} x {factor}"
    if action == "delete":
        del node[key]
    elif action == "add":
        new = draw(st.sampled_from(values(canary)))
        if isinstance(node, dict):
            node["version" if draw(st.booleans()) else "added"] = new
        else:
            node.insert(key, new)
        return document, f"add {shown(new)} beside {way.lstrip('.')}"
    elif action == "rename":
        node[f"{key}s"] = node.pop(key)
    elif action == "cut":
        node[key] = old[: len(old) // 2]
    elif action == "double":
        node[key] = old + old
    elif action == "swap":
        node[key] = old[::-1]
    elif action == "longer":
        node[key] = old + draw(st.sampled_from(["x", " ", "(", "')", "\0", ", a=1"]))
    return document, f"{action} {way.lstrip('.')}"


def change_bytes(content: bytes, draw: Draw) -> tuple[bytes, str]:
    """The bytes with some of them changed, and what was done."""
    place = draw(st.integers(0, 9999)) * len(content) // 10_000  # no draw depends on a length, which may change
    action = draw(
        st.sampled_from(
            ["cut", "cut", "flip", "flip", "flip", "drop", "insert", "empty", "mark", "utf-16", "latin", "zero", "crlf",
             "twice", "brackets", "zeros after"]
        )
    )  # fmt: skip
    if action == "cut":
        return content[:place], f"cut to {place} of {len(content)} bytes"
    if action == "flip":
        bit = draw(st.integers(0, 7))
        changed = bytearray(content or b"\0")
        changed[min(place, len(changed) - 1)] ^= 1 << bit
        return bytes(changed), f"bit {bit} of byte {place} flipped ({content[max(0, place - 12) : place + 12]!r})"
    if action == "drop":
        length = draw(st.integers(1, 40))
        return content[:place] + content[place + length :], f"{length} bytes from {place} dropped"
    if action == "insert":
        new = draw(
            st.sampled_from([b"\xff", b"\xc3\x28", b"}", b"]", b'"', b",", b"\n", b"\n\n{}\n", b"[" * 5000, b"null"])
        )
        return content[:place] + new + content[place:], f"{new[:20]!r} put in at {place}"
    named = {
        "empty": b"",
        "mark": b"\xef\xbb\xbf" + content,
        "latin": content[:place] + b"\xe9" + content[place:],
        "zero": content[:place] + b"\0" + content[place:],
        "crlf": content.replace(b"\n", b"\r\n"),
        "twice": content + content,
        "brackets": b"[" * 200_000,
        "zeros after": content + bytes(50_000),
    }
    if action == "utf-16":
        return content.decode("latin-1").encode("utf-16"), "in UTF-16"
    return named[action], action


def change_kind(path: Path, draw: Draw) -> str:
    """The file replaced by something else, or gone; returns what was done."""
    action = draw(st.sampled_from(["gone", "folder", "pipe", "device", "circle", "nothing", "huge"]))
    path.unlink()
    if action == "folder":
        path.mkdir()
    elif action == "pipe":
        os.mkfifo(path)
    elif action == "device":
        path.symlink_to("/dev/zero")
    elif action == "circle":
        path.symlink_to(path.name)
    elif action == "nothing":
        path.symlink_to("nowhere")
    elif action == "huge":
        with path.open("wb") as file:
            file.truncate(2**42)  # takes no place on the disk
    return f"{path.name} is {action}"


def damage(path: Path, draw: Draw, canary: str) -> str:
    """Spoils a file of JSON, of lines of JSON, or of any bytes; returns what was done."""
    way = draw(st.integers(0, 19))
    if way == 0:
        return change_kind(path, draw)
    content = path.read_bytes()
    if way <= 4 or path.suffix not in (".json", ".jsonl"):
        changed, words = change_bytes(content, draw)
        path.write_bytes(changed)
        return f"{path.name}: {words}"
    if path.suffix == ".json":
        document, words = change_json(json.loads(content), draw, canary)
        path.write_text(dumped(document))
        return f"{path.name}: {words}"
    return f"{path.name}: {_damage_lines(path, content, draw, canary)}"


def _damage_lines(path: Path, content: bytes, draw: Draw, canary: str) -> str:
    lines = content.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    action = draw(st.sampled_from(["change"] * 10 + ["twice", "gone", "up", "other", "first only"]))
    words = f"line {at + 1}: {action}"
    if action == "change":
        document, changed = change_json(json.loads(lines[at]), draw, canary)
        lines[at], words = dumped(document), f"line {at + 1}: {changed}"
    elif action == "twice":
        lines.insert(at, lines[at])
    elif action == "gone":
        del lines[at]
    elif action == "up":
        lines.insert(0, lines.pop(at) if at else lines.pop())
    elif action == "other":
        new = draw(st.sampled_from(["{}", "[]", "null", "1", '"x"', "", "{" * 5000, '{"checks": []}', '{"kind": 1}']))
        lines[at], words = new, f"line {at + 1} is {new[:20]}"
    elif action == "first only":
        lines = lines[:1]
    path.write_text("".join(f"{line}\n" for line in lines))
    return words
