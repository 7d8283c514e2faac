"""Weights of other code: read with nothing executed, put in their places, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustmoe import cli
from robustmoe.errors import UserError
from robustmoe.models import build_model
from robustmoe.training import load_model
from robustmoe.weights import LAYOUTS, import_run, load_weights
from robustmoe.weights.exporting import written
from robustmoe.weights.pairs import after, repeated, reshaped, split, stacked, turned
from robustmoe.weights.reading import read_groups

SPEC = "vit_moe(size=tiny, width=8, depth=2, heads=2, patch=4, experts=2, k=1, placement=(1,))"


def model(seed: int = 0) -> nn.Module:
    return build_model(SPEC, 10, (1, 8, 8), seed=seed)


def weights(prefix: str = "") -> dict[str, Tensor]:
    state = {name: value for name, value in model(seed=7).state_dict().items() if not name.startswith("normalise.")}
    return {prefix + name: value.clone() for name, value in state.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------------------ containers


@pytest.mark.parametrize(
    "content, said",
    [
        (weights, ""),
        (lambda: weights("module."), "a.pth.tar, under 'module.':"),
        (lambda: weights("_orig_mod."), "a.pth.tar:"),
        (lambda: weights("module._orig_mod."), "under 'module.':"),
        (lambda: {"state_dict": weights("module."), "epoch": 3, "best": 0.5}, "under 'state_dict/module.':"),
        (lambda: {"model": weights("model."), "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}, "'model/model.'"),
        (lambda: {"run": {"net": weights()}, "other": torch.zeros(2)}, "under 'run/net/':"),
        (lambda: {**weights(), "head.num_batches_tracked": torch.zeros(())}, ""),
    ],
    ids=["bare", "DataParallel", "compiled", "both", "state_dict", "beside an optimizer", "nested", "counts"],
)  # fmt: skip
def test_weights_are_recognised_wherever_they_lie(tmp_path: Path, content: Callable[[], Any], said: str) -> None:
    network = model()
    loaded = load_weights(network, saved(tmp_path / "a.pth.tar", content()))
    assert said in str(loaded)
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights().items())
    assert not loaded.stayed


def test_of_an_average_and_the_weights_neither_is_taken_unasked(tmp_path: Path) -> None:
    averaged = {name: value + 1 for name, value in weights().items()}
    file = saved(tmp_path / "a.pt", {"model": weights(), "model_ema": averaged})
    network = model()
    with pytest.raises(UserError, match=r"several groups that fit: 'model', 'model_ema'; say which"):
        load_weights(network, file)
    assert torch.equal(network.state_dict()["network.norm.bias"], model().state_dict()["network.norm.bias"])
    load_weights(network, file, group="model_ema")
    assert torch.equal(network.state_dict()["network.norm.bias"], averaged["network.norm.bias"])
    with pytest.raises(UserError, match=r"no group 'model_em'; did you mean 'model_ema'"):
        load_weights(network, file, group="model_em")
    same = saved(tmp_path / "b.pt", {"model": weights(), "copy": weights()})
    load_weights(network, same)  # equal numbers: nothing to choose


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda w: w.pop("network.norm.bias"), "1 of the tensors wanted are missing, such as 'network.norm.bias'"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 of the file's are left over, such as 'extra'"),
        (lambda w: w.update({"network.norm.bias": torch.zeros(9)}),
         "'network.norm.bias' of shape (9,) gives (9,), the model's 'network.norm.bias' is (8,)"),
        (lambda w: w.update({"network.norm.bias": torch.zeros(8, dtype=torch.int8)}), "is of torch.int8, the model's"),
    ],
    ids=["missing", "left over", "shape", "dtype"],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_changes_nothing(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    changed = weights()
    change(changed)
    file, network = saved(tmp_path / "a.pt", changed), model()
    with pytest.raises(UserError) as error:
        load_weights(network, file)
    assert said in str(error.value)
    assert "nearest to the layout 'own'" in str(error.value)
    before = model().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    wrong = "gives" in said or "int8" in said
    if wrong:
        with pytest.raises(UserError):
            load_weights(network, file, layout="own", partial=True)
    else:
        assert said.rpartition("such as ")[2] in str(load_weights(network, file, layout="own", partial=True))


def test_no_name_stands_for_two_tensors(tmp_path: Path) -> None:
    both = {**weights(), "_orig_mod.network.norm.bias": torch.ones(8)}
    with pytest.raises(UserError, match=r"1 of the file's are left over, such as '_orig_mod.network.norm.bias'"):
        load_weights(model(), saved(tmp_path / "a.pt", both))


def test_another_architecture_is_one_line(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pt", {"conv.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="has no tensor that any layout has for this model"):
        load_weights(model(), file)
    with pytest.raises(UserError, match=r"there is no layout 'owm'; did you mean 'own'"):
        load_weights(model(), file, layout="owm")


# ------------------------------------------------------------------------------------------------ formats


def nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = tree
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value.numpy()
    return tree


def flax_bytes(tree: Any) -> bytes:
    """What flax.serialization.msgpack_serialize writes (its ndarray: extension 1 of shape, dtype's name, bytes)."""

    def packed(value: Any) -> Any:
        assert isinstance(value, np.ndarray)
        content = msgspec.msgpack.encode([list(value.shape), value.dtype.name, value.tobytes()])
        return msgspec.msgpack.Ext(1, content)

    return msgspec.msgpack.encode(tree, enc_hook=packed)


FLAT = {"params/a/kernel": torch.arange(6.0).reshape(2, 3), "params/b": torch.ones(2, dtype=torch.float64)}


def test_npz_and_flax_files_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{name: value.numpy() for name, value in FLAT.items()})
    tree = {"params": {"a": {"kernel": FLAT["params/a/kernel"].numpy()}, "b": FLAT["params/b"].numpy()}, "step": 3}
    (tmp_path / "a.msgpack").write_bytes(flax_bytes(tree))
    chunks = {"0": np.arange(4.0, dtype=np.float32), "1": np.arange(4.0, 6.0, dtype=np.float32)}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks}
    (tmp_path / "big.msgpack").write_bytes(flax_bytes({"params": {"a": {"kernel": chunked}, "b": tree["params"]["b"]}}))
    for name in ("a.npz", "a.msgpack", "big.msgpack"):
        groups = read_groups(tmp_path / name)
        assert groups[""].keys() == FLAT.keys(), name
        assert all(torch.equal(groups[""][key], value) for key, value in FLAT.items()), name
        assert groups["params"]["b"].dtype == torch.float64


VMOE = Path(__file__).parent / "golden" / "vmoe"
SMALL = (
    "vit_moe(tiny, patch=4, experts=4, k=2, placement=(1,), width=16, depth=3, heads=4, mlp_ratio=2, gelu=tanh, "
    "pre_logits=12)"
)


@pytest.mark.parametrize(
    "name, allowed", [("params.msgpack", 1e-5), ("small_chunks_7.index", 1e-5), ("bf16.index", 0.05)]
)
def test_files_of_vmoe_answer_as_there(name: str, allowed: float) -> None:
    """`allowed`, of the logits' deviation: bfloat16 has 8 bits."""
    network = build_model(SMALL, 10, (3, 16, 16))
    load_weights(network, VMOE / name)
    with np.load(VMOE / "expected.npz") as expected:
        images, logits = (torch.from_numpy(expected[key]) for key in ("images", "logits"))
    with torch.no_grad():
        answered = network(images.permute(0, 3, 1, 2) / 2 + 0.5)
    assert (answered - logits).abs().max() <= allowed * logits.std()


def test_a_sharded_file_holds_what_the_plain_file_does() -> None:
    plain, sharded = read_groups(VMOE / "params.msgpack")[""], read_groups(VMOE / "small_chunks_7.index")["params"]
    half = read_groups(VMOE / "bf16.index")[""]
    assert plain.keys() == sharded.keys() == half.keys()
    for name, value in plain.items():
        assert torch.equal(value, sharded[name])
        assert torch.equal(value.bfloat16(), half[name])


def test_shards_that_are_missing_or_damaged_are_one_line(tmp_path: Path) -> None:
    for file in VMOE.glob("small_chunks_7.*"):
        shutil.copy(file, tmp_path)
    index, shard = tmp_path / "small_chunks_7.index", tmp_path / "small_chunks_7.data-00001-of-00003"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"small_chunks_7.data-00001-of-00003 is damaged"):
        read_groups(index)
    shutil.copy(tmp_path / "small_chunks_7.data-00000-of-00003", shard)
    with pytest.raises(UserError, match=r"is not whole: \d+ of its \d+ numbers are in the files"):
        read_groups(index)
    shard.unlink()
    with pytest.raises(UserError, match=r"1 of its 3 data files are missing, such as small_chunks_7.data-00001"):
        read_groups(index)
    shutil.copy(VMOE / "params.msgpack", index)
    with pytest.raises(UserError, match=r"is no index of a sharded checkpoint"):
        read_groups(index)


def test_files_of_swin_moes_processes_are_joined_along_the_experts(tmp_path: Path) -> None:
    """As Swin-Transformer's utils_moe.py writes them (SAVE_MASTER off): experts by rank, the rest once."""
    experts = torch.arange(8.0).reshape(4, 2)
    for rank in range(2):
        part = {"layers.2.mlp._moe_layer.experts.batched_fc1_w": experts[2 * rank : 2 * rank + 2]}
        saved(tmp_path / f"ckpt.pth.rank{rank}", {"model": part})
    saved(tmp_path / "ckpt.pth.master", {"model": {"norm.weight": torch.ones(2)}})
    for name in ("ckpt.pth.master", "ckpt.pth.rank0"):
        tensors = read_groups(tmp_path / name)[""]
        assert torch.equal(tensors["layers.2.mlp._moe_layer.experts.batched_fc1_w"], experts)
        assert torch.equal(tensors["norm.weight"], torch.ones(2))
    (tmp_path / "ckpt.pth.rank0").unlink()
    with pytest.raises(UserError, match=r"the files of the processes are not whole"):
        read_groups(tmp_path / "ckpt.pth.master")


# ------------------------------------------------------------------------------------------------ hostile and damaged


class Hostile:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    for content in (Hostile(marker), {"state_dict": weights(), "config": Hostile(marker)}):
        file = saved(tmp_path / "a.pth", content)
        with pytest.raises(UserError, match=r"is a pickle that holds .*; loading it could run code, so it was not"):
            load_weights(model(), file)
    array = np.array([Hostile(marker)], dtype=object)
    np.savez(tmp_path / "a.npz", a=array)
    with pytest.raises(UserError, match=r"damaged \(it holds objects"):
        load_weights(model(), tmp_path / "a.npz")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pt", "npz", "msgpack", "safetensors"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_a_truncated_file_is_one_line(tmp_path: Path, kind: str, share: float) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"a.{kind}"
    if kind == "pt":
        saved(file, weights())
    elif kind == "npz":
        np.savez(file, **{name: value.numpy() for name, value in weights().items()})
    elif kind == "msgpack":
        file.write_bytes(flax_bytes(nested(weights())))
    else:
        save_file(weights(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="damaged"):
        load_weights(model(), file)


@pytest.mark.parametrize("content", [b"", b"hello, these are no weights", b"\x80", b"\x81\xa1a\xc1", b"PK\x03\x04"])
def test_a_file_of_something_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError):
        load_weights(model(), tmp_path / "a.bin")
    with pytest.raises(UserError, match="no such file"):
        load_weights(model(), tmp_path / "none.pt")
    with pytest.raises(UserError, match="this is a folder; expected a file of weights"):
        load_weights(model(), tmp_path)


# ------------------------------------------------------------------------------------------------ turns


@pytest.mark.parametrize(
    "pair, given, expected",
    [
        (turned("a", "b", 1, 0), [torch.arange(6).reshape(2, 3)], [torch.tensor([[0, 3], [1, 4], [2, 5]])]),
        (turned("a", "b", 3, 2, 0, 1), [torch.arange(24).reshape(1, 2, 3, 4)],
         [torch.tensor(np.arange(24).reshape(1, 2, 3, 4).transpose(3, 2, 0, 1))]),
        (reshaped("a", "b", (2, 3), (6,)), [torch.arange(6).reshape(2, 3)], [torch.arange(6)]),
        (split("a", ["b", "c"]), [torch.arange(4)], [torch.tensor([0, 1]), torch.tensor([2, 3])]),
        (stacked(["a", "b"], "c"), [torch.tensor([1]), torch.tensor([2])], [torch.tensor([[1], [2]])]),
        (repeated(["a", "b"], "c"), [torch.tensor([1]), torch.tensor([1])], [torch.tensor([1])]),
        (after(turned("a", "b", 1, 0), lambda t: [t[0] + 1], lambda t: [t[0] - 1], "moved"),
         [torch.tensor([[1, 2]])], [torch.tensor([[2], [3]])]),
    ],
    ids=["transposed", "HWIO", "reshaped", "split", "stacked", "repeated", "after"],
)  # fmt: skip
def test_turns_and_their_ways_back(pair: Any, given: list[Tensor], expected: list[Tensor]) -> None:
    read = pair.read(given)
    assert len(read) == len(expected)
    assert all(torch.equal(value, wanted) for value, wanted in zip(read, expected))
    assert all(torch.equal(value, wanted) for value, wanted in zip(pair.write(read), given))


def test_turns_refuse_what_they_cannot() -> None:
    with pytest.raises(ValueError, match="copies of one tensor there, but differ"):
        repeated(["a", "b"], "c").read([torch.zeros(1), torch.ones(1)])
    with pytest.raises(ValueError, match="cannot be cut into 2 equal pieces"):
        split("a", ["b", "c"]).read([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"it has shape \(2, 2\), expected \(4, 1\)"):
        reshaped("a", "b", (4, 1), (4,)).read([torch.zeros(2, 2)])


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("inputs, mean, std", [("raw", 0.0, 1.0), ("centred", 0.5, 0.5)])
def test_an_imported_run_answers_as_its_weights(tmp_path: Path, inputs: str, mean: float, std: float) -> None:
    file = saved(tmp_path / "a.pt", weights())
    folder, loaded, _ = import_run(file, SPEC, data="digits", inputs=inputs, out=tmp_path / "run")
    expected = build_model(SPEC, 10, (1, 8, 8), (mean,), (std,), seed=7)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(load_model(folder)(x), expected(x))
    config = json.loads((folder / "config.json").read_text())
    assert (config["mean"], config["std"], config["data"]) == ([mean], [std], "digits")
    assert config["imported"]["layout"] == loaded.fit.layout == "own"
    with pytest.raises(UserError, match="choose another"):
        import_run(file, SPEC, data="digits", out=folder)


def test_weights_of_ours_bring_their_own_normalisation(tmp_path: Path) -> None:
    ours = build_model(SPEC, 10, (1, 8, 8), (0.3,), (0.2,), seed=7)
    file = saved(tmp_path / "a.pt", ours.state_dict())
    folder = import_run(file, SPEC, classes=10, image_shape=(1, 8, 8), out=tmp_path / "run").folder
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(load_model(folder)(x), ours(x))
    assert json.loads((folder / "config.json").read_text())["mean"] == pytest.approx([0.3])


def test_the_verb_says_what_went_where_and_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.pth.tar", {"state_dict": weights("module.")})
    assert cli.main(["import", "a.pth.tar", "--as", SPEC, "--data", "digits", "--inputs", "raw"]) == 0
    said = capsys.readouterr().out
    assert "layout own, 35 tensors" in said.replace(str(len(weights())), "35")
    assert "next: robustmoe audit runs/a" in said
    assert cli.main(["evaluate", "runs/a", "--attack", "fgsm(linf(0.1))", "--limit", "4", "--curve", "none"]) == 0
    for wrong, line in (
        (["a.pth.tar", "--data", "digits"], "does not say which model it is of; expected --as"),
        (["a.pth.tar", "--as", SPEC], "expected either --data, or both of --classes"),
        (["a.pth.tar", "--as", SPEC, "--data", "digits", "--classes", "10"], "expected either --data, or both"),
        (["a.pth.tar", "--as", SPEC, "--classes", "10"], "expected either --data, or both"),
        (["a.pth.tar", "--as", SPEC, "--classes", "10", "--image-shape", "8,8"], "channels, height and width"),
        (["a.pth.tar", "--as", SPEC, "--classes", "1", "--image-shape", "1,8,8"], "classes must be at least 2"),
        (["a.pth.tar", "--as", SPEC, "--classes", "10", "--image-shape", "1,8,8", "--out", "b"], "or --inputs raw"),
    ):
        capsys.readouterr()
        if "--image-shape" in wrong and "--out" in wrong:
            wrong = [*wrong, "--inputs", "data"]
        assert cli.main(["import", *wrong]) == 2
        assert line in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what no tensor tells


@pytest.mark.parametrize(
    "spec, layout, said",
    [
        (SPEC, "vmoe", "that code computes gelu=tanh, this model gelu=exact"),
        (SPEC, "own", "heads=2, k=1, gating=vmoe, choice=token, capacity=None"),
        ("vit(4, 8, 1, 2, gelu=tanh)", "torchvision", "that code computes gelu=exact, this model gelu=tanh"),
        ("preact_resnet(18, 4, shortcut=raw, last_norm=False)", "robustbench", "this model has raw"),
        ("block_moe(resnet18(width=4), experts=2, k=2, router=gap_fc)", "kastel", "their sum plus 1e-5"),
        ("ensemble(resnet18(width=4), experts=2, router=linear, gate=hard)", "timl", "k=1, gate=hard"),
        ("resnet18(width=4)", "optml", ""),
    ],
)
def test_what_no_tensor_shows_is_noted(tmp_path: Path, spec: str, layout: str, said: str) -> None:
    network = build_model(spec, 10, (3, 8, 8))
    report = str(load_weights(network, saved(tmp_path / "a.pt", written(network, layout)), layout=layout))
    assert said in report
    assert ("note: " in report) == bool(said)


def test_where_nothing_fits_the_option_that_the_code_wants_is_named(tmp_path: Path) -> None:
    theirs = build_model("pathway(wide_resnet(10, 1, released=True), experts=2)", 10, (3, 8, 8))
    file = saved(tmp_path / "a.pt", written(theirs, "optml"))
    with pytest.raises(UserError, match=r"optml: a routed WRN of that code is wide_resnet\(..., released=True\)"):
        load_weights(build_model("pathway(wide_resnet(10, 1), experts=2)", 10, (3, 8, 8)), file)


def test_heads_that_a_flax_file_has_are_those_of_the_model(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pt", written(model(), "vmoe"))
    with pytest.raises(UserError, match="it has 2 heads, and the model's attention 4"):
        load_weights(build_model(SPEC.replace("heads=2", "heads=4"), 10, (1, 8, 8)), file)


@pytest.mark.parametrize("options", ["classifier=map", "classifier=gap", "positions=sincos2d", "qk_norm=True"])
def test_torchvision_has_no_such_transformer(options: str) -> None:
    assert LAYOUTS["torchvision"].pairs(build_model(f"vit(4, 8, 1, 2, {options})", 10, (3, 8, 8))) == []
