"""Checks of what a technique does, so that a mistake in one is an error that names the technique and the hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.io.names import some
from fgvc.reparam.plain import HOOKS
from fgvc.techniques.api import Batch, Output, Technique, View

DEEPEST = 4  # containers and objects in one another that are searched for modules


@contextmanager
def naming(kind: str, where: str) -> Iterator[None]:
    """Name a technique, and `where` in it, in every error that is raised within: in an FgvcError's message, else in a note."""
    try:
        yield
    except Exception as error:
        name = f"techniques.{kind}"
        if name in str(error):
            raise
        if type(error) is FgvcError:
            raise FgvcError(f"{name}, {where}: {error}") from error
        error.add_note(f"in {name}, {where}")
        raise


def call(kind: str, hook: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a technique's hook; errors name both. Raises FgvcError where on_sample or mixes returns what can't be."""
    with naming(kind, f"hook {hook}"):
        result = method(*arguments)
    if hook == "on_sample" and not (
        isinstance(result, np.ndarray) and result.dtype == np.uint8 and result.shape[2:] == (3,)
    ):
        raise FgvcError(f"techniques.{kind}: on_sample returned {_shown(result)}; return the image, (H,W,3) uint8")
    if hook == "mixes" and not (isinstance(result, int | float) and 0 <= result <= 1):
        raise FgvcError(
            f"techniques.{kind}: mixes returned {_shown(result)}; return a share of the steps, from 0 to 1, such as "
            "settings.share(progress)"
        )
    return result


def require_described(kind: str, technique: Technique) -> None:
    """Raise FgvcError where what a technique says of its terms can't be."""
    if not isinstance(technique.measures, tuple | list):
        raise FgvcError(
            f"techniques.{kind}: `measures` is {_shown(technique.measures)}; give a tuple of names: ('accuracy',)"
        )
    if not isinstance(technique.weights, Mapping):
        raise FgvcError(
            f"techniques.{kind}: `weights` is {_shown(technique.weights)}; give a dictionary, term -> weight"
        )
    for name, weight in technique.weights.items():
        if not isinstance(weight, int | float | tuple):
            raise FgvcError(
                f"techniques.{kind}: the weight of {name!r} is {_shown(weight)}; give a number, or a Scheduled setting"
            )


class Outputs(dict[str, Output]):
    """Outputs of a step's views by name. Raises FgvcError for a view that had no forward."""

    def __missing__(self, name: str) -> Output:
        raise FgvcError(f"no view {name!r}; there are {', '.join(self)}; a view of weight 0 has no forward")


class NetParts:
    """Modules, parameters, buffers, functions and hooks of a net, as they were at some time."""

    def __init__(self, net: nn.Module) -> None:
        self._net, self._before = net, _parts(net)

    def require_same(self, kind: str, replaced: set[str]) -> None:
        """Raise FgvcError where a technique has changed the net otherwise than by putting others in the place of the modules
        `replaced`, by their names."""
        now, changes = _parts(self._net), []
        for path, what in dict.fromkeys([*self._before, *now]):
            old, new = self._before.get((path, what)), now.get((path, what))
            if old is not new and not any(f"{path}.".startswith(f"{name}.") for name in replaced):
                kind_of = type(old if new is None else new).__name__
                change = "is new" if old is None else "is gone" if new is None else "is another one"
                changes.append(f"{path or 'the network'}{what and f': {what}'} ({kind_of}) {change}")
        if changes:
            raise FgvcError(
                f"techniques.{kind}: its setup changed the network itself, so that no plain model could be taken from it: "
                f"{some(changes, 3)}. Add modules by plan.add, beside the network; replace convolutions by plan.replace; watch "
                "and change outputs by plan.hook and plan.gate"
            )


def _parts(net: nn.Module) -> dict[tuple[str, str], object]:
    """By the name of a module or tensor, and what it is of a module: "" for itself."""
    named = chain(
        net.named_modules(remove_duplicate=False),
        net.named_parameters(remove_duplicate=False),
        net.named_buffers(remove_duplicate=False),
    )
    parts: dict[tuple[str, str], object] = {(name, ""): value for name, value in named}
    for name, module in net.named_modules():
        parts |= {(name, key): value for key, value in vars(module).items() if callable(value)}
        for attribute, what in HOOKS.items():
            parts |= {(name, f"{what} {key}"): hook for key, hook in getattr(module, attribute).items()}
    return parts


def require_added(kind: str, technique: Technique, trained: nn.Module, *, in_step: bool = False) -> None:
    """Raise FgvcError where a technique, or its class, keeps a weight that is none of the module `trained`, the net and its
    branches. `in_step`: a tensor that requires a gradient may be one of the step's own by then, such as a perturbation."""
    trained_ids = {id(value) for value in chain(trained.parameters(), trained.buffers())}
    kept: dict[str, Any] = {}
    for base in reversed(type(technique).__mro__):
        kept |= {name: value for name, value in vars(base).items() if isinstance(value, nn.Module | Tensor | list | dict)}
    learns = nn.Parameter if in_step else Tensor
    attributes = (kept | vars(technique)).items()
    for name, tensor in chain.from_iterable(_weights(f"self.{name}", value, DEEPEST, learns) for name, value in attributes):
        if id(tensor) not in trained_ids:
            raise FgvcError(
                f"techniques.{kind}: {name} is kept in the technique, where it is not trained, moved or saved. Add its module by "
                'plan.add("name", module) in setup, and call it by ctx.branches["name"]; one that is not to learn gets '
                "requires_grad_(False)"
            )


def _weights(name: str, value: Any, depth: int, learns: type[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights in an object, its attributes and its containers: parameters and buffers of modules, and tensors of the type
    `learns` that require a gradient."""
    if isinstance(value, nn.Module):
        yield from ((f"{name}.{key}", tensor) for key, tensor in chain(value.named_parameters(), value.named_buffers()))
    elif isinstance(value, Tensor):
        if isinstance(value, learns) and value.requires_grad and value.is_leaf:
            yield name, value
    elif depth and isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _weights(f"{name}[{key!r}]", inner, depth - 1, learns)
    elif depth and isinstance(value, list | tuple | set):
        for number, inner in enumerate(value):
            yield from _weights(f"{name}[{number}]", inner, depth - 1, learns)
    elif depth and not callable(value):
        for key, inner in getattr(value, "__dict__", {}).items():
            yield from _weights(f"{name}.{key}", inner, depth - 1, learns)


def require_gated(kind: str, module: str, output: object, before: Tensor) -> Tensor:
    """Return the output that a gate gave. Raises FgvcError where it has not the shape of the one that the gate was given."""
    if not isinstance(output, Tensor) or output.shape != before.shape:
        raise FgvcError(f"techniques.{kind}: its gate at {module} returned {_shown(output)} for {_shown(before)}")
    return output


def require_batch(kind: str, batch: object, before: Batch) -> Batch:
    """Return the batch that `on_batch` gave. Raises FgvcError where it is none, or not of as many images of that size."""
    if not isinstance(batch, Batch):
        raise FgvcError(
            f"techniques.{kind}: on_batch returned {_shown(batch)}; return a Batch, by dataclasses.replace(batch, x=...)"
        )
    if batch.x.shape != before.x.shape:
        raise FgvcError(f"techniques.{kind}: on_batch returned images {_shown(batch.x)} for {_shown(before.x)}")
    _require_target(f"techniques.{kind}: on_batch", batch.target, len(batch.x))
    return batch


def require_views(kind: str, views: object, batch: Batch) -> list[View]:
    """Return the views that a technique made, under its name, without those of weight 0. Raises FgvcError for one whose images,
    target or weight can't be."""
    if not isinstance(views, list | tuple):
        raise FgvcError(f"techniques.{kind}: its views are {_shown(views)}; return a list of View, [] for none")
    names = set[str]()
    for view in views:
        if not isinstance(view, View):
            raise FgvcError(f"techniques.{kind}: one of its views is {_shown(view)}; make it by View(name, x, target)")
        view.name = view.name if view.name.startswith(f"{kind}.") else f"{kind}.{view.name}"
        where = f"techniques.{kind}: the view {view.name!r}"
        if view.name in names:
            raise FgvcError(f"{where} is there twice; give each a name of its own")
        names.add(view.name)
        if not isinstance(view.weight, int | float) or not view.weight >= 0:
            raise FgvcError(
                f"{where} has the weight {_shown(view.weight)}; give a number of at least 0, by value_at(weight, ctx.progress) "
                "where it is scheduled"
            )
        if not isinstance(view.x, Tensor) or view.x.ndim != 4 or view.x.shape[1] != batch.x.shape[1]:
            raise FgvcError(f"{where} has images {_shown(view.x)}; give a tensor (V,{batch.x.shape[1]},H,W)")
        if view.bn == "shared" and view.x.shape[2:] != batch.x.shape[2:]:
            raise FgvcError(
                f"{where} has images of {tuple(view.x.shape[2:])} pixels and shares the forward of the batch, of "
                f"{tuple(batch.x.shape[2:])}; resize it, or give bn='own'"
            )
        _require_target(where, view.target, len(view.x))
    return [view for view in views if view.weight != 0]


def _require_target(where: str, target: object, count: int) -> None:
    """Raise FgvcError where this is no target of `count` images."""
    pairs: Sequence[Any] = target if isinstance(target, Sequence) and len(target) else [target]
    for pair in pairs:
        fits = (
            isinstance(pair, tuple)
            and len(pair) == 2
            and _is_vector(pair[0], count)
            and not pair[0].is_floating_point()
        )
        if not fits or not (pair[1] is None or _is_vector(pair[1], count)):
            raise FgvcError(
                f"{where} has the target {_shown(target)}; a target is a list of pairs (labels ({count},) int64, weights "
                f"({count},) or None), such as batch.target, or [(batch.labels, None)]"
            )


def _is_vector(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (count,)


def require_terms(kind: str, technique: Technique, terms: object) -> Mapping[str, Tensor]:
    """Return the terms that `losses` gave. Raises FgvcError for one that has no weight and is no measure, or is no scalar."""
    if not isinstance(terms, Mapping):
        raise FgvcError(
            f"techniques.{kind}: losses returned {_shown(terms)}; return a dictionary of terms, {{}} for none"
        )
    for name, term in terms.items():
        if name not in technique.weights and name not in technique.measures:
            raise FgvcError(f"techniques.{kind}: the loss term {name!r} is neither in `weights` nor in `measures`")
        if not isinstance(term, Tensor):
            raise FgvcError(
                f"techniques.{kind}: the loss term {name!r} is {_shown(term)}; give a tensor without dimensions"
            )
        if term.ndim:
            raise FgvcError(f"techniques.{kind}: the loss term {name!r} has shape {tuple(term.shape)}; give a scalar")
    return terms


def _shown(value: object) -> str:
    """A value in a few words: shape and type of a tensor, of others their type or themselves."""
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple) and any(isinstance(inner, Tensor | tuple) for inner in value):
        return f"[{', '.join(_shown(inner) for inner in value)}]"
    return (
        repr(value)
        if value is None or isinstance(value, int | float | str | list | tuple)
        else f"a {type(value).__name__}"
    )
