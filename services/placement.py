"""Turn what a stage asks for into a placement group and actor groups, or say at once why the cluster cannot give it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from services.actor_group import ActorGroup, ActorSpec
from services.errors import ResourceError

PLACEMENT_TIMEOUT_S = 120.0


@contextmanager
def actor_groups(specs: Sequence[ActorSpec], job: str) -> Iterator[list[ActorGroup]]:
    """Reserve one bundle per actor, spawn the groups, and end every actor when the block ends, however it ends.

    Raises:
        ResourceError: the cluster does not hold the bundles, or they did not become free within 120 s.
    """
    bundles = [_bundle(spec) for spec in specs for _ in range(spec.count)]
    _check_total(specs, bundles)
    placement = placement_group(bundles, strategy="PACK", name=f"{job}-{'-'.join(spec.role for spec in specs)}")
    groups: list[ActorGroup] = []
    try:
        if not placement.wait(PLACEMENT_TIMEOUT_S):
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            raise ResourceError(
                f"expected {_describe(specs)} to become free within {PLACEMENT_TIMEOUT_S:.0f} s, "
                f"the cluster has {free} left; stop other jobs or ask for less"
            )
        first_bundle = 0
        for spec in specs:
            groups.append(ActorGroup(spec, placement, first_bundle))
            first_bundle += spec.count
        yield groups
    finally:
        for group in groups:
            group.kill()
        remove_placement_group(placement)


def _bundle(spec: ActorSpec) -> dict[str, float]:
    return {"CPU": spec.cpus} | ({"GPU": float(spec.gpus)} if spec.gpus else {})


def _check_total(specs: Sequence[ActorSpec], bundles: Sequence[dict[str, float]]) -> None:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind in ("CPU", "GPU"):
        asked = sum(bundle.get(kind, 0.0) for bundle in bundles)
        if asked > total.get(kind, 0.0) + 1e-9:
            raise ResourceError(
                f"expected at most {total.get(kind, 0.0):g} {kind} in the cluster, the stage asks for {asked:g} "
                f"({_describe(specs)}); lower workers or {kind.lower()}s_per_worker, or add nodes"
            )


def _describe(specs: Sequence[ActorSpec]) -> str:
    return ", ".join(f"{spec.count} {spec.role} x {_bundle(spec)}" for spec in specs)
