"""Files of weights that claim what is not there, name what they should not, or unpack without end: one line each."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from robustmoe.errors import UserError
from robustmoe.weights import load_weights
from robustmoe.weights.reading import read_groups
from test_weights import model, saved, weights

ARRAY = msgspec.msgpack.Ext(1, msgspec.msgpack.encode([[2], "float32", bytes(8)]))
SHARD = "__msgpack_array_chunk_a87ca2__"


def extension(code: int, *content: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(list(content)))


@pytest.mark.parametrize(
    "value",
    [
        extension(1, [-1], "float32", bytes(8)),
        extension(1, [2**62, 2**62], "float32", bytes(8)),
        extension(1, [1], "bfloat16", 2**40),
        extension(1, [1], "O", bytes(8)),
        extension(8, b"", [], [0]),
        {"__msgpack_chunked_array__": True},
        {"__msgpack_chunked_array__": True, "shape": {"0": 5}, "chunks": {"0": ARRAY}},
        {"__msgpack_chunked_array__": True, "shape": [2], "chunks": {"0": "text"}},
        {"a/b": ARRAY, "a": {"b": ARRAY}},
    ],
    ids=["-1", "overflow", "huge", "objects", "place", "chunks", "size", "text", "twice"],
)
def test_a_flax_file_that_makes_no_sense_is_one_line(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.msgpack").write_bytes(msgspec.msgpack.encode({"w": value}))
    with pytest.raises(UserError, match=r"a.msgpack is damaged \("):
        read_groups(tmp_path / "a.msgpack")


def test_flax_values_that_are_no_arrays_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.msgpack").write_bytes(msgspec.msgpack.encode({"w": ARRAY, "n": msgspec.msgpack.Ext(100, b"abc")}))
    assert list(read_groups(tmp_path / "a.msgpack")[""]) == ["w"]


@pytest.mark.parametrize(
    "count, shape, shards, key, said",
    [
        (10**12, [2], [0], "0", r"1 of its 1000000000000 data files are missing"),
        (1, [10**12], [0], "0", r"its arrays are of 4,000,000,000,000 bytes, its data files hold \d\d"),
        (1, [2**62, 2**62], [0], "0", r"is not whole: its arrays are of"),
        (1, [-2], [0], "0", r"a.index is damaged"),
        (-1, [2], [0], "0", r"a.index is damaged"),
        ("x", [2], [0], "0", r"a.index is damaged"),
        (1, [2], [-1], "0", r"a.index is damaged"),
        (1, [2], ["../b"], "0", r"a.index is damaged"),
        (1, [2], [0], "-1", r"a.data-00000-of-00001 is damaged"),
        (1, [2], [0], "x", r"a.data-00000-of-00001 is damaged"),
        (1, [2], [0], "9", r"a.data-00000-of-00001 is damaged"),
    ],
)
def test_an_index_that_claims_what_is_not_there_is_one_line(
    tmp_path: Path, count: Any, shape: list[int], shards: list[Any], key: str, said: str
) -> None:
    place = extension(8, msgspec.msgpack.encode([shape, "float32"]), [], shards)
    (tmp_path / "a.index").write_bytes(msgspec.msgpack.encode({"shard_count": count, "index": {"w": place}}))
    pieces = {SHARD: True, key: [[[ARRAY], [extension(5, 0, 2, None)]]]}
    (tmp_path / "a.data-00000-of-00001").write_bytes(msgspec.msgpack.encode(pieces))
    with pytest.raises(UserError, match=said):
        read_groups(tmp_path / "a.index")


def test_what_no_piece_writes_is_no_number(tmp_path: Path) -> None:
    """Two pieces at one place leave another without numbers; as many as there should be are in the file."""
    place = extension(8, msgspec.msgpack.encode([[4], "float32"]), [], [0])
    (tmp_path / "a.index").write_bytes(msgspec.msgpack.encode({"shard_count": 1, "index": {"w": place}}))
    pieces = {SHARD: True, "0": [[[ARRAY], [extension(5, 0, 2, None)]]] * 2}
    (tmp_path / "a.data-00000-of-00001").write_bytes(msgspec.msgpack.encode(pieces))
    assert read_groups(tmp_path / "a.index")[""]["w"].isnan().tolist() == [False, False, True, True]


def npz(path: Path, *members: tuple[str, bytes], packed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def npy(shape: str, content: bytes = bytes(8), dtype: str = "'<f4'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "members",
    [
        [("a.npy", npy("(10000000000000,)"))],
        [("a.npy", npy("(99999999999999999999999999,)"))],
        [("a.npy", npy("(-1,)"))],
        [("a.npy", npy("(2,)", dtype="'|O'"))],
        [("a.npy", npy("(1,)", bytes(16), "'<f16'"))],
        [("a.npy", npy("(" * 5000))],
        [("a.npy", b"text")],
        [("a.npy", npy("(2,)")), ("a.npy", npy("(2,)"))],
        [("a/b.npy", npy("(2,)")), ("a.npy", npy("(2,)"))],
    ],
    ids=["huge", "overflow", "-1", "objects", "long double", "nested", "no array", "twice", "inside"],
)
def test_an_npz_that_makes_no_sense_is_one_line(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    with pytest.raises(UserError, match=r"a.npz is damaged \("):
        read_groups(npz(tmp_path / "a.npz", *members))


def test_a_file_that_unpacks_to_far_more_than_it_is_stays_packed(tmp_path: Path) -> None:
    content = bytes(40_000_000)
    for name, member in (("a.npz", ("a.npy", npy("(10000000,)", content))), ("a.pt", ("a/data.pkl", content))):
        with pytest.raises(UserError, match=r"would unpack to 40,000,\d\d\d bytes, more than 100 times its size"):
            read_groups(npz(tmp_path / name, member, packed=True))
    small = npz(tmp_path / "b.npz", ("a.npy", npy("(1000000,)", bytes(4_000_000))), packed=True)
    assert not read_groups(small)[""]["a"].any()


def test_mappings_that_name_themselves_or_each_other_end(tmp_path: Path) -> None:
    itself: dict[str, Any] = {"w": torch.ones(1)}
    itself["again"] = itself
    assert list(read_groups(saved(tmp_path / "a.pt", itself))) == [""]
    many: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(40):
        many = {"x": many, "y": many}
    with pytest.raises(UserError, match="holds more than 100,000 mappings"):
        read_groups(saved(tmp_path / "a.pt", many))


def test_pieces_of_processes_that_cannot_be_joined_are_one_line(tmp_path: Path) -> None:
    for rank in range(2):
        saved(tmp_path / f"[a].pth.rank{rank}", {"model": {"x.experts.w": torch.ones(1, 2 + rank)}})
    (tmp_path / "[a].pth.rankx").write_bytes(b"")
    with pytest.raises(UserError, match=r"pieces of 'x.experts.w' cannot be joined"):
        read_groups(tmp_path / "[a].pth.rank0")


@pytest.mark.parametrize(
    "value, said",
    [
        (torch.full((8,), torch.nan), "holds numbers that are not finite"),
        (torch.full((8,), 1e300, dtype=torch.float64), "holds numbers that are not finite in torch.float32"),
        (torch.zeros(8).to_sparse(), "is sparse, quantised, nested or without numbers"),
        (torch.zeros(8, device="meta"), "is sparse, quantised, nested or without numbers"),
        (torch.zeros(1).expand(8), "stands for 8 numbers, of which few are stored"),
        (torch.zeros(8, dtype=torch.complex64), "is of torch.complex64"),
    ],
    ids=["NaN", "too large", "sparse", "meta", "view", "complex"],
)
def test_tensors_that_are_no_weights_are_one_line(tmp_path: Path, value: Tensor, said: str) -> None:
    file = saved(tmp_path / "a.pt", {**weights(), "network.norm.bias": value})
    with pytest.raises(UserError, match=said):
        load_weights(model(), file)
