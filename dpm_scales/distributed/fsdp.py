"""FSDP: every process holds a slice of the weights, of their gradients, of the optimiser's state and of the average.

A network is cut by its blocks (its children that have children, lists of them one by one): a block's weights are
gathered when it is computed, and given up after it; what is left, the first and the last layer, goes with the network.
Each tensor is sliced along its first dimension. Slices, sums of gradients and messages are float32, as with DDP;
``trainer.precision=bf16-mixed`` casts inside of the operations alone.

Files are whole: models and checkpoints of one device, of DDP and of FSDP are the same, and go on as any of them. A
checkpoint is gathered tensor by tensor, into the memory of the first process's machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

FSDP = "fsdp"
"""The name of the strategy in configs."""


class ShardedStrategy(DDPStrategy):
    """Lightning's processes and their meeting as for DDP, with the module's network sliced over all of them.

    Checkpoints are read before the network is sliced, on the CPU, so that those of other strategies do as well.
    """

    def model_to_device(self) -> None:
        """Slices, and buffers, which every process has."""
        module: Any = self.lightning_module
        shard(module, module.parts.denoiser.network, self.root_device)

    def configure_ddp(self) -> None:
        """Nothing is wrapped."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole, in the first process; empty in the others."""
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole, in the first process; empty in the others."""
        return whole(getattr(optimizer, "optimizer", optimizer).state_dict(), self.is_global_zero)

    def teardown(self) -> None:
        """Slices stay where they are: a tensor of a mesh of GPUs has no place on the CPU."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold slices of this module: computing it is then a matter of all of them, at the same time."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(module: nn.Module, network: nn.Module, device: torch.device) -> None:
    """Slice a module's network over all processes, in place, and move the rest of the module to `device`.

    Args:
        module: on the CPU, with the same shapes in all processes; its values become the first process's.
        network: in it; holds all of its parameters.
        device: of this process; the process group must be there.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach().to(device).contiguous()
        distributed.broadcast(value, 0)
        tensor.detach().copy_(value)
    if any(p.ndim == 4 and not p.is_contiguous() for p in network.parameters()):
        # slices are contiguous, and the operations take the format of either operand
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()
        network.register_forward_pre_hook(_channels_last)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in _blocks(network):
        _slice(block, mesh)
    _slice(network, mesh)
    module.to(device)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Children that have children, lists of them one by one."""
    found: list[nn.Module] = []
    for child in network.children():
        found += child if isinstance(child, nn.ModuleList) else [child]
    return [block for block in found if any(True for _ in block.children())]


def _slice(module: nn.Module, mesh: DeviceMesh) -> None:
    # resharded also at the root, so that between steps all parameters are slices
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _channels_last(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a tensor, or all of it if it is not sliced; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients in place to a total norm of at most `limit`, and return the norm they had, ``()``.

    Called by all ranks where the parameters are sharded. Does not wait for the device.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    # for distributed tensors torch would otherwise choose one operation, planned on the host, for each of them
    foreach = True if any(isinstance(gradient, DTensor) for gradient in gradients) else None
    norm = torch.nn.utils.get_total_norm(gradients, foreach=foreach)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach)
    return norm


def whole(state: Any, keep: bool = True) -> Any:
    """Nested containers with the slices of all processes put together, on the CPU; to be called by all of them.

    Args:
        state: dictionaries and lists of tensors and plain values, with the same structure in all processes.
        keep: whether this process needs the result; without, it is empty where tensors would be.
    """
    if isinstance(state, dict):
        kept = {key: whole(value, keep) for key, value in state.items()}
        return {key: value for key, value in kept.items() if keep or not isinstance(state[key], Tensor)}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if not isinstance(state, DTensor):
        return state.detach() if isinstance(state, Tensor) else state
    gathered = state.full_tensor().detach()
    # a copy: what the slices are padded by must not go into the file
    return gathered.cpu().clone() if keep else None


def like_parameters(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Hook before `Optimizer.load_state_dict`: a whole state as slices of, and in the memory format of the parameters.

    A checkpoint does not depend on either, and an operation over all parameters at a time needs both.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    loaded = {
        number: {name: _like(value, owners[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": loaded}


def _like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.contiguous(), mesh, placements, src_data_rank=None)
    return torch.empty_like(parameter, device=value.device, dtype=value.dtype).copy_(value)
