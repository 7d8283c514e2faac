"""What V-MoE's code and the first ViTs' answer to made weights and images: writes the cases of vision transformers in
tests/golden/fidelity, which tests/test_fidelity.py holds us to.

Wants checkouts of google-research/vmoe (942a78b) and google-research/vision_transformer (c6de1e5), and jax, flax,
ml_collections, jaxopt, optax and ott-jax in an environment of their own (neither torch nor this package is needed):

    python benchmarks/fidelity_vit.py PATH/TO/vmoe PATH/TO/vision_transformer

Soft MoE's dispatch is in bfloat16 in the released code; here it is in float32, which is the one thing that is changed.
"""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from golden_weights import Case, Range, drawn, write_case

PIXELS, PATCH, WIDTH, DEPTH, HEADS, HIDDEN, CLASSES, IMAGES, SEED = 32, 8, 32, 4, 4, 64, 10, 8, 20
TOKENS = (PIXELS // PATCH) ** 2 + 1
LAYERS = (1, 3)
SIZE = f"patch={PATCH}, width={WIDTH}, depth={DEPTH}, heads={HEADS}, mlp_ratio={HIDDEN // WIDTH}, gelu=tanh"
VMOE, VIT = "google-research/vmoe 942a78b", "google-research/vision_transformer c6de1e5"


def bounds(name: str, shape: tuple[int, ...]) -> Range:
    """Sizes at which every layer, GELU and softmax is used beyond its linear part, and routes are no near ties."""
    kind = name.rsplit("/", 1)[-1]
    if name.endswith("Router/scale"):
        return 4.0, 8.0
    if kind == "scale":
        return 0.5, 1.5
    if kind != "kernel":
        return -0.5, 0.5
    inputs = math.prod(shape[:-2]) if name.endswith("/out/kernel") else math.prod(shape[:-1])
    if "/query/" in name or "/key/" in name or "/value/" in name:
        inputs = shape[0]
    elif "/Moe/Mlp/" in name:
        inputs = shape[1]
    size = 2.0 * math.sqrt(3 / inputs)
    return -size, size


def answered(name: str, source: str, layout: str, model: str, net: Any, **call: Any) -> None:
    """Draws weights for their ``net``, lets it answer, and writes the case. ``call``: what its own call takes."""
    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    empty = jnp.zeros((IMAGES, PIXELS, PIXELS, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.PRNGKey(0), empty, **call))["params"]
    flat = {"/".join(key): value.shape for key, value in traverse_util.flatten_dict(shapes).items()}
    half = ((0.5,) * 3, (0.5,) * 3)
    weights = drawn(flat, bounds)
    case = Case(layout, model, source, (3, PIXELS, PIXELS), CLASSES, SEED, IMAGES, half, weights, [], {})
    tree = traverse_util.unflatten_dict({tuple(key.split("/")): value for key, value in case.tensors().items()})
    images = case.images().transpose(0, 2, 3, 1) * 2 - 1
    answer, kept = net.apply(
        {"params": tree}, images, capture_intermediates=is_router, mutable=["intermediates"], **call
    )
    logits = np.asarray(answer[0] if isinstance(answer, tuple) else answer)
    members = len(logits) // IMAGES
    if members > 1:
        from vmoe.evaluate.ensemble import _ensemble_log_mean

        logits = _ensemble_log_mean(logits, members, jax.nn.log_softmax)
    routes = {}
    for block in LAYERS:
        inner = kept.get("intermediates", {}).get("Encoder", {}).get(f"encoderblock_{block}")
        dispatcher = inner and inner["Moe"]["Router"]["__call__"][0][0]
        if dispatcher and hasattr(dispatcher, "dispatch_weights") and dispatcher.dispatch_weights.dtype == bool:
            took = np.asarray(dispatcher.dispatch_weights).any(-1)
            for name_of, own in by_member(f"network.blocks.{block}.mlp", took, members).items():
                routes[name_of] = chosen(own, model)
    fields = {**case.__dict__, "logits": np.asarray(logits).tolist(), "routes": routes}
    path = write_case(name, Case(**fields))
    print(f"{path.name}: logits of deviation {float(np.std(logits)):.3f}, {len(routes)} routers")


def is_router(module: Any, method: str) -> bool:
    return module.name == "Router" and method == "__call__"


def by_member(path: str, took: np.ndarray, members: int) -> dict[str, np.ndarray]:
    """(groups, items, experts): which experts took each item -> by router (images, tokens, experts). Items stand token
    by token, and for each token member by member; experts member by member.
    """
    if members == 1:
        return {f"{path}.router": took.reshape(IMAGES, -1, took.shape[2])}
    each = took.reshape(IMAGES, -1, members, members, took.shape[2] // members)
    assert not any(each[:, :, i, j].any() for i, j in np.ndindex(members, members) if i != j)
    return {f"{path}.members.{i}.router": each[:, :, i, i] for i in range(members)}


def chosen(took: np.ndarray, model: str) -> list[list[list[int]]]:
    """(images, tokens, experts) -> (images, tokens, k): the experts that took each token, -1 for no other."""
    k = took.shape[2] if "choice=expert" in model else int(model.split(" k=")[1][0])
    rows = np.full((*took.shape[:2], k), -1)
    for image, token in np.ndindex(*took.shape[:2]):
        experts = np.flatnonzero(took[image, token])
        rows[image, token, : len(experts)] = experts
    return rows.tolist()


def vmoe(name: str, options: str = "", moe: dict[str, Any] | None = None, **fields: Any) -> None:
    """A VisionTransformerMoe; without ``moe`` it is dense. ``options``: those of our model beside the size."""
    from vmoe.nn.vit_moe import VisionTransformerMoe

    of_encoder = {key: fields.pop(key) for key in ("attention_qk_norm", "position_emb") if key in fields}
    encoder = {"num_layers": DEPTH, "mlp_dim": HIDDEN, "num_heads": HEADS, **of_encoder}
    if moe is not None:
        encoder["moe"] = {"layers": LAYERS, "group_size": TOKENS, **moe}
    fields = {"num_classes": CLASSES, "patch_size": (PATCH, PATCH), "hidden_size": WIDTH, **fields}
    net = VisionTransformerMoe(deterministic=True, encoder=encoder, **fields)
    kind = "vit(" if moe is None else "vit_moe(tiny, placement=(1, 3), "
    answered(f"vmoe_{name}", VMOE, "vmoe", f"{kind}{SIZE}{options and ', '}{options})", net)


def token_choice(name: str, k: int, capacity: float | None, options: str = "", group: int = 1, **given: Any) -> None:
    """4 experts, k an item; a ``capacity`` of None leaves room for all."""
    dispatcher = {"name": "einsum", "capacity_factor": 4 / k if capacity is None else capacity, "batch_priority": False}
    router = {"num_selected_experts": k, "dispatcher": {**dispatcher, "capacity_multiple_of": 1, **given}}
    ours = f"experts=4, k={k}{options and ', '}{options}"
    if capacity is not None:
        ours += f", capacity={capacity}, group={group}"
    vmoe(name, ours, {"num_experts": 4, "group_size": group * TOKENS, "router": router})


def expert_choice(name: str, capacity: float, group: int, multiple: int) -> None:
    dispatcher = {"name": "einsum", "capacity_factor": capacity, "capacity_multiple_of": multiple}
    router = {"name": "NoisyTopItemsPerExpertRouter", "dispatcher": dispatcher}
    ours = f"experts=4, choice=expert, capacity={capacity}, group={group}, multiple={multiple}"
    vmoe(name, ours, {"num_experts": 4, "group_size": group * TOKENS, "router": router})


def planned(name: str, router: str, options: str, capacity: float, group: int = 1, k: int | None = None) -> None:
    """Balanced by transport; ``k``: of token choice, without it experts choose."""
    dispatcher: dict[str, Any] = {"name": "einsum", "capacity_factor": capacity, "capacity_multiple_of": 1}
    given: dict[str, Any] = {"name": f"vmoe.projects.sparsity_constrained_ot.{router}", "dispatcher": dispatcher}
    if k:
        dispatcher["batch_priority"] = False
        given["num_selected_experts"] = k
    ours = f"experts=4, {f'k={k}' if k else 'choice=expert'}, {options}, capacity={capacity}, group={group}"
    vmoe(name, ours, {"num_experts": 4, "group_size": group * TOKENS, "router": given})


def soft(name: str, slots: int, tokens: int = TOKENS, options: str = "", **fields: Any) -> None:
    router = {
        "name": "vmoe.projects.soft_moe.router.SoftRouter",
        "num_slots": slots,
        "compute_similarity_metrics": False,
    }
    moe = {"num_experts": 4, "group_size": tokens, "router": router}
    vmoe(name, f"experts=4, choice=slots, slots={slots}{options and ', '}{options}", moe, **fields)


def ensemble(name: str, members: int, k: int, capacity: float, group: int = 1) -> None:
    """Partly shared ensembles: their members' logits become the log of the mean probability by their own function."""
    from vmoe.nn.vit_moe_ensemble import VisionTransformerMoeEnsemble

    dispatcher = {"name": "einsum", "capacity_factor": capacity, "capacity_multiple_of": 1, "batch_priority": False}
    router = {"num_selected_experts": k, "dispatcher": dispatcher}
    moe = {"layers": LAYERS, "ensemble_size": members, "num_experts": 4, "group_size": group * members * TOKENS}
    encoder = {"num_layers": DEPTH, "mlp_dim": HIDDEN, "num_heads": HEADS, "moe": {**moe, "router": router}}
    fields = {"num_classes": CLASSES, "patch_size": (PATCH, PATCH), "hidden_size": WIDTH}
    net = VisionTransformerMoeEnsemble(deterministic=True, encoder=encoder, **fields)
    ours = f"experts=4, k={k}, members={members}, capacity={capacity}, group={group}"
    answered(f"vmoe_{name}", VMOE, "vmoe", f"vit_moe(tiny, placement=(1, 3), {SIZE}, {ours})", net)


def vit(name: str, options: str = "", **fields: Any) -> None:
    """A VisionTransformer of the first ViTs' code."""
    import ml_collections
    from vit_jax.models_vit import VisionTransformer

    transformer = {"num_layers": DEPTH, "mlp_dim": HIDDEN, "num_heads": HEADS}
    patches = ml_collections.ConfigDict({"size": (PATCH, PATCH)})
    net = VisionTransformer(CLASSES, patches, transformer, WIDTH, **fields)
    answered(f"vit_jax_{name}", VIT, "vit_jax", f"vit({SIZE}{options and ', '}{options})", net, train=False)


def moved_ott() -> None:
    """Gives today's ott-jax the place of the Sinkhorn that their code imports."""
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    def solved(geometry: Any, a: Any, b: Any, implicit_differentiation: bool, **settings: Any) -> Any:
        return sinkhorn.Sinkhorn(**settings)(linear_problem.LinearProblem(geometry, a, b))

    core, module = types.ModuleType("ott.core"), types.ModuleType("ott.core.sinkhorn")
    vars(module)["sinkhorn"], vars(core)["sinkhorn"] = solved, module
    sys.modules.update({"ott.core": core, "ott.core.sinkhorn": module})


def main(vmoe_path: str, vit_path: str) -> None:
    sys.path[:0] = [vmoe_path, vit_path]
    from vmoe.projects.soft_moe import router

    moved_ott()
    router.Bfloat16Dispatcher = lambda dispatcher: dispatcher
    vmoe("dense")
    vmoe("pre_logits", "pre_logits=24", representation_size=24)
    vmoe("gap_sincos2d", "classifier=gap, positions=sincos2d", classifier="gap", position_emb={"name": "sincos2d"})
    vmoe("sincos2d", "positions=sincos2d", position_emb={"name": "sincos2d"})
    vmoe("map", "classifier=map, qk_norm=True", classifier="map", attention_qk_norm=True)
    for k in (1, 2, 3):
        token_choice(f"k{k}", k, None)
    token_choice("room", 2, 1.05)
    token_choice("room_priority", 2, 1.0, "order=priority", batch_priority=True)
    token_choice("room_group", 2, 1.5, "multiple=4", 4, capacity_multiple_of=4)
    token_choice(
        "room_group_priority", 1, 1.05, "multiple=4, order=priority", 8, capacity_multiple_of=4, batch_priority=True
    )
    expert_choice("expert", 1.0, 1, 1)
    expert_choice("expert_group", 2.0, 4, 4)
    sparse, kl = "ksparse_projection_routing.KSparseProjectionTransport", "kl_projection_routing.KLProjectionNoisy"
    planned("sparse_plan", f"{sparse}TopExpertsPerItemRouter", "plan=sparse", 1.0, 1, 2)
    planned("sparse_plan_group", f"{sparse}TopExpertsPerItemRouter", "plan=sparse", 1.5, 4, 1)
    planned("sparse_plan_expert", f"{sparse}TopItemsPerExpertRouter", "plan=sparse", 1.0, 4)
    planned("sinkhorn", f"{kl}TopExpertsPerItemRouter", "plan=sinkhorn", 1.0, 4, 2)
    planned("sinkhorn_expert", f"{kl}TopItemsPerExpertRouter", "plan=sinkhorn", 2.0, 1)
    soft("soft", 1)
    soft("soft_slots", 4)
    soft(
        "soft_as_in_its_paper", 2, TOKENS - 1, "classifier=gap, qk_norm=True", classifier="gap", attention_qk_norm=True
    )
    ensemble("ensemble", 2, 1, 2.0)
    ensemble("ensemble_room", 2, 2, 0.75, 4)
    vit("token")
    vit("pre_logits", "pre_logits=24", representation_size=24)
    vit("gap", "classifier=gap", classifier="gap")


if __name__ == "__main__":
    main(*sys.argv[1:])
