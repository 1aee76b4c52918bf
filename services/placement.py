"""Turn what a stage asks for into a placement group and actor groups, or say at once why the cluster cannot give it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from services.actor_group import ActorGroup, ActorSpec
from services.errors import ResourceError

PLACEMENT_TIMEOUT_S = 120.0


@contextmanager
def actor_groups(specs: Sequence[ActorSpec], job: str) -> Iterator[list[ActorGroup]]:
    """Reserve one bundle per actor, spawn the groups, and end every actor when the block ends, however it ends.

    Bundles are reserved together, but for those of elastic groups, which are given back one by one.

    Raises:
        ResourceError: the cluster does not hold the bundles, or they did not become free within 120 s.
    """
    bundles = [_bundle(spec) for spec in specs for _ in range(spec.count)]
    _check_total(specs, bundles)
    fixed = [_bundle(spec) for spec in specs if not spec.elastic for _ in range(spec.count)]
    name = f"{job}-{'-'.join(spec.role for spec in specs)}"
    gang = placement_group(fixed, strategy="PACK", name=name) if fixed else None
    single = {spec.role: [reserve_member(spec) for _ in range(spec.count)] for spec in specs if spec.elastic}
    placements = [*([gang] if gang else []), *(placement for own in single.values() for placement in own)]
    groups: list[ActorGroup] = []
    try:
        deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
        if not all(placement.wait(max(0.0, deadline - time.monotonic())) for placement in placements):
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            raise ResourceError(
                f"expected {_describe(specs)} to become free within {PLACEMENT_TIMEOUT_S:.0f} s, "
                f"the cluster has {free} left; stop other jobs or ask for less"
            )
        first_bundle = 0
        for spec in specs:
            groups.append(ActorGroup(spec, None if spec.elastic else gang, first_bundle))
            for placement in single.get(spec.role, []):
                groups[-1].add(placement)
            first_bundle += 0 if spec.elastic else spec.count
        yield groups
    finally:
        for group in groups:
            group.kill()
        for placement in placements:
            remove_placement_group(placement)


def reserve_member(spec: ActorSpec) -> PlacementGroup:
    """Ask for the bundle of one member of an elastic group, without waiting; an actor in it starts when there is room.

    Raises:
        ResourceError: the cluster does not hold such a bundle.
    """
    bundle = _bundle(spec)
    _check_total([replace(spec, count=1)], [bundle])
    placement: PlacementGroup = placement_group([bundle])
    return placement


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
