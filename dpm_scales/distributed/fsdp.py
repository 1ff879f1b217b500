"""FSDP: weights, gradients, optimiser state and EMA are sharded over all ranks.

A network is wrapped block by block (its children that have children, items of lists individually): a block's weights
are gathered before it is computed and freed afterwards; the remaining first and last layers are gathered with the
network. Each tensor is sharded along its first dimension. Shards, sums of gradients and messages are float32, as with
DDP; ``trainer.precision=bf16-mixed`` casts only inside operations.

Files hold full tensors: models and checkpoints from one device, DDP and FSDP are the same, and a run resumes with any
of these. A checkpoint is gathered tensor by tensor, into the memory of the first rank's machine.
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
    """A strategy that starts and connects ranks as DDP does, and shards the module's network over them.

    Checkpoints are loaded on the CPU before the network is sharded, so that those of other strategies also fit.
    """

    def model_to_device(self) -> None:
        """Shard the parameters, and move the buffers, which every rank holds in full."""
        module: Any = self.lightning_module
        shard(module, module.parts.denoiser.network, self.root_device)

    def configure_ddp(self) -> None:
        """Do nothing: the network is sharded already, and is not wrapped by DDP."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full state on the first rank, and no tensors on the others."""
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state on the first rank, and no tensors on the others."""
        return whole(getattr(optimizer, "optimizer", optimizer).state_dict(), self.is_global_zero)

    def teardown(self) -> None:
        """Tear down without moving the shards: a tensor on a mesh of GPUs can't be moved to the CPU."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def is_sharded(module: nn.Module) -> bool:
    """Return whether this module is sharded, so that all ranks must compute it at the same time."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def shard(module: nn.Module, network: nn.Module, device: torch.device) -> None:
    """Shard a module's network over all ranks, in place, and move the rest of the module to `device`.

    Args:
        module: a module on the CPU, with the same shapes on all ranks; all get the first rank's values.
        network: the part of the module that holds its parameters, except those of a learned loss weight.
        device: device of this rank; the process group must exist.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach().to(device).contiguous()
        distributed.broadcast(value, 0)
        tensor.detach().copy_(value)
    if any(p.ndim == 4 and not p.is_contiguous() for p in network.parameters()):
        # shards are contiguous, and operations take the memory format of either operand
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()
        network.register_forward_pre_hook(_channels_last)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in _blocks(network):
        _wrap(block, mesh)
    _wrap(network, mesh)
    inside = set(network.modules())
    for part in module.modules():
        if part not in inside and any(True for _ in part.parameters(recurse=False)):
            _wrap(part, mesh)
    module.to(device)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the children that have children, with the items of lists individually."""
    found: list[nn.Module] = []
    for child in network.children():
        found += child if isinstance(child, nn.ModuleList) else [child]
    return [block for block in found if any(True for _ in block.children())]


def _wrap(module: nn.Module, mesh: DeviceMesh) -> None:
    # resharded also at the root, so that all parameters are sharded between steps
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _channels_last(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor if it is not sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients in place to a total norm of at most `limit`, and return their original norm, ``()``.

    All ranks must call it if the parameters are sharded. It does not wait for the device.
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
    """Return nested containers with full tensors on the CPU in place of sharded ones; called by all ranks.

    torch's own `get_optimizer_state_dict` names the optimiser's state by parameter, whereas checkpoints number it.

    Args:
        state: dictionaries and lists of tensors and plain values, with the same structure on all ranks.
        keep: whether this rank needs the result; if not, tensors are left out of it.
    """
    if isinstance(state, dict):
        kept = {key: whole(value, keep) for key, value in state.items()}
        return {key: value for key, value in kept.items() if keep or not isinstance(state[key], Tensor)}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if not isinstance(state, DTensor):
        return state.detach() if isinstance(state, Tensor) else state
    gathered = state.full_tensor().detach()
    # a copy, without the padding of the shards
    return gathered.cpu().clone() if keep else None


def like_parameters(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's full state, sharded and in the memory format of its parameters.

    A hook for `Optimizer.register_load_state_dict_pre_hook`: files depend on neither, the fused optimiser on both.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    loaded = {
        number: {name: like(value, owners[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": loaded}


def like(value: Any, parameter: Tensor) -> Any:
    """Return a full tensor sharded and in the memory format of a parameter; values of another shape unchanged."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.contiguous(), mesh, placements, src_data_rank=None)
    return torch.empty_like(parameter, device=value.device, dtype=value.dtype).copy_(value)
