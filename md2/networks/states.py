"""Loading state dicts so that whatever does not fit is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from shards.errors import InputError

SHOWN = 2
"""Keys that a message names; the rest is counted."""


def load_states(networks: nn.Module, states: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Load child name -> state dict into exactly these children of `networks`.

    Raises:
        InputError: a child or key is missing or extra, or a shape differs; all by name. Nothing is loaded then.
    """
    children = dict(networks.named_children())
    problems = _differences("sub-networks", children, states)
    for name in [name for name in children if name in states]:
        problems += [f"{name}: {problem}" for problem in mismatches(children[name], states[name])]
    if problems:
        raise InputError(f"{where} does not fit the networks: {'; '.join(problems)}")
    for name, child in children.items():
        load_state(child, states[name], where)


def load_state(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load one state dict; a file without batch counters or classifier is whole, since neither is used.

    Raises:
        InputError: a key is missing or extra, or a shape differs; by name. Nothing is loaded then.
    """
    problems = mismatches(network, state)
    if problems:
        raise InputError(f"{where} does not fit: {'; '.join(problems)}")
    network.load_state_dict({**network.state_dict(), **state})


def mismatches(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting: missing and extra keys, then shapes, a phrase each."""
    own = network.state_dict()
    needed = [key for key in own if not _unused(key)]
    problems = _differences("keys", needed, state, optional=own)
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    return problems + ([f"other shapes: {_shown(shapes)}"] if shapes else [])


def _unused(key: str) -> bool:
    return key.endswith("num_batches_tracked") or key.removeprefix("encoder.").startswith("fc.")


def _differences(
    kind: str, needed: Iterable[str], given: Mapping[str, object], optional: Iterable[str] = ()
) -> list[str]:
    needed, allowed = list(needed), {*needed, *optional}
    missing = [key for key in needed if key not in given]
    extra = [key for key in given if key not in allowed]
    found = [f"missing {kind}: {_shown(missing)}"] if missing else []
    return found + ([f"extra {kind}: {_shown(extra)}"] if extra else [])


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
