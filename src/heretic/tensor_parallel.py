"""Tensor parallelism: one copy of a model over the processes of a `torchrun`, by transformers' own plan for the model's type.

Rank 0 is the run: it reads the settings, asks the study, prints and writes. The other ranks follow: they make every call that computes with
the model (`together`) with the same arguments, so that the collective operations inside meet. What a call decides on the way follows from
logits that are equal on all ranks, since each is reduced once and handed to all. What does not, such as free memory, is `agreed` on.

Edits need nothing of their own: a rowwise linear module reduces its output within its forward pass, and a hook behind it sees the whole.
"""

import functools
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import HereticError, ModelError, TeamError, UsageError
from .launch import rank, world_size
from .utils import SilentProgress, is_out_of_memory

P = ParamSpec("P")
R = TypeVar("R")

# Followers wait for as long as somebody reads the menu.
PATIENCE = timedelta(days=365)


class _Team:
    """The processes: how rank 0 tells the others what to do, and what they do it with."""

    def __init__(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        self.group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)  # apart from the model's, whose patience is minutes
        self.depth = 0
        self.is_broken = False
        self.objects: dict[str, Any] = {}

    def name_of(self, obj: Any) -> str | None:
        """The name of what every rank has of its own; None for everything else."""
        return next((name for name, known in self.objects.items() if known is obj), None)

    def send(self, order: tuple[Any, ...]) -> None:
        file = io.BytesIO()
        _Pickler(file, self).dump(order)
        dist.broadcast_object_list([file.getvalue()], src=0, group=self.group)

    def receive(self) -> Any:
        content: list[bytes] = [b""]
        dist.broadcast_object_list(content, src=0, group=self.group)
        return _Unpickler(io.BytesIO(content[0]), self).load()


class _Pickler(pickle.Pickler):
    """Names what every rank has of its own: the model, its evaluators, and who is shown progress and text."""

    def __init__(self, file: io.BytesIO, team: _Team) -> None:
        super().__init__(file)
        self.team = team

    def persistent_id(self, obj: Any) -> str | None:
        if hasattr(obj, "task") and hasattr(obj, "warning"):
            return "Progress"
        if hasattr(obj, "on_finalized_text"):
            return "TextStreamer"
        return self.team.name_of(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, team: _Team) -> None:
        super().__init__(file)
        self.team = team

    def persistent_load(self, name: str) -> Any:
        return self.team.objects[name]


@functools.cache
def _join() -> _Team:
    """The team of this process, which it joins once."""
    return _Team()


def _joined() -> _Team | None:
    return _join() if _join.cache_info().currsize else None


def together(method: Callable[P, R]) -> Callable[P, R]:
    """A method, or `__init__`, of `Model` or `Evaluator` that every rank calls when rank 0 does. Its arguments can be pickled.

    Raises `TeamError` where it fails on rank 0 for a reason that the others need not share.
    """

    @functools.wraps(method)
    def call(*args: P.args, **named: P.kwargs) -> R:
        team = _joined()
        if team is None or rank() or team.depth:
            return method(*args, **named)
        this: Any = args[0]
        prefix = getattr(team.objects.get("Model"), "response_prefix", "")
        name = type(this).__name__ if method.__name__ == "__init__" else team.name_of(this)
        team.send((name, method.__name__, args[1:], named, prefix))
        team.depth += 1
        try:
            return method(*args, **named)
        except HereticError:  # the same on every rank
            raise
        except BaseException as error:
            team.is_broken = True
            if not isinstance(error, Exception):
                raise
            raise TeamError(f"The model's processes are out of step after {type(error).__name__}: {error}") from error
        finally:
            team.depth -= 1

    return call


def agreed(value: int) -> int:
    """The smallest of what the ranks found, where there are several: called by all of them at the same place."""
    team = _joined()
    if team is None:
        return value
    smallest = torch.tensor(value)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=team.group)
    return int(smallest)


def can_back_off(error: BaseException) -> bool:
    """Whether to try again with less: the device lacks memory, and no other rank goes on meanwhile."""
    return world_size() == 1 and is_out_of_memory(error)


def whole(tensor: Tensor) -> Tensor:
    """A weight that is spread over the ranks, put together; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def beginning(tensor: Tensor) -> Tensor | None:
    """What rank 0 has of a weight: all of it, or where it is spread, its first rows or columns; None where they lie otherwise."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    if any(type(placement) not in (Replicate, Shard) for placement in placements):
        return None
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def lead(settings: Any, model_name: str | None) -> None:
    """On rank 0, before a model is loaded: have the others load it too. Raises `UsageError` for settings that cannot go with it."""
    if world_size() == 1 or rank():
        return
    for name, given in [
        ("--workers", settings.workers is not None),
        ("--quantization", settings.quantization != "none"),
        ("--device-map", settings.device_map != "auto"),
        ("--max-memory", settings.max_memory is not None),
        ("--evaluate-model", settings.evaluate_model is not None),
    ]:
        if given:
            raise UsageError(f"{name} cannot be used under torchrun, which spreads one copy of the model over its processes.")
    _join().send(("load", settings, model_name))


def parallel_arguments(config: Any) -> dict[str, Any]:
    """What transformers is told to spread a model over the ranks. Raises `ModelError` where it has no plan for the type."""
    from transformers.distributed.configuration_utils import DistributedConfig

    if getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) is None:
        raise ModelError(f"transformers has no tensor-parallel plan for {config.model_type}: run it without torchrun, on --device-map auto")
    return {"distributed_config": DistributedConfig(tp_size=world_size(), tp_plan="auto")}


def register(this: Any, role: str = "") -> None:
    """Make the model, or the evaluator of a role, known as the one that orders speak of."""
    team = _joined()
    if team is not None:
        team.objects[f"{type(this).__name__} {role}".rstrip()] = this


def dismiss() -> None:
    """On rank 0, at the end: the others may leave."""
    team = _join()
    if not team.is_broken:
        team.send(("over",))
        dist.destroy_process_group()


def follow() -> int:
    """Be a rank other than 0: do what rank 0 does with the model, until it is over. Returns the exit code."""
    import signal

    from .evaluator import Evaluator
    from .loading.libraries import prepare_libraries
    from .loading.load import load_model
    from .loading.source import model_source
    from .model import Model
    from .session.stages import measure_completeness

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    prepare_libraries(False)
    team = _join()
    team.objects |= {"Progress": SilentProgress(), "TextStreamer": None}
    while True:
        order = team.receive()
        try:
            match order:
                case ("over",):
                    dist.destroy_process_group()
                    return 0
                case ("load", settings, model_name):
                    model = Model(load_model(settings, model_source(settings, model_name), SilentProgress()), settings)
                    measure_completeness(model)
                case ("Evaluator", "__init__", args, named, prefix):
                    model.response_prefix = prefix
                    Evaluator(*args, **named)
                case (name, method, args, named, prefix):
                    model.response_prefix = prefix
                    result = getattr(team.objects[name], method)(*args, **named)
                    if isinstance(result, Iterator):
                        for _ in result:
                            pass
        except HereticError:
            continue  # as on rank 0, which tells it
        except Exception as error:
            print(f"Error: process {rank()} of {world_size()}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
