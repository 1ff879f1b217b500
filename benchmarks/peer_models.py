"""Define the libraries that `benchmarks.peers` compares, each trained and sampled as in its documentation or example.

| peer | network | optimiser | samples |
|---|---|---|---|
| `dpm_scales`, grey | `network=small` | `experiment=fast` | `sampler=auto` and 10 evaluations of DPM-Solver++(2M) |
| `dpm_scales`, colour | `network=fine` | `experiment=fast_photos` | 10 and 20 evaluations of DPM-Solver++(2M) |
| `lucidrains` | `Unet(12, dim_mults=(1, 2, 4, 8))` | Adam at 8e-5, EMA 0.995 every 10 steps | 250 steps of DDIM |
| `diffusers` | `UNet2DModel`, three levels of 32, 64, 64 | AdamW at 1e-4, cosine, warm-up, EMA | 50 steps of DDIM |
| `torchcfm` | `UNetModel(num_channels=32, num_res_blocks=1)` | Adam at 1e-3 | `dopri5`, tolerances 1e-4 |
| `azula` | `UNet` of 26, 52, 104 channels, two blocks each | Adam at 3e-4 | 64 steps of DDIM |

The settings are those of lucidrains' README, the script `train_unconditional.py` of diffusers, and the MNIST notebooks
of torchcfm and azula, but for diffusers' samples: its script draws by 1000 steps of DDPM, an hour of a CPU for a few
hundred images, so the default of its `DDIMPipeline` stands in. Widths are changed to give each network about 1.4 to 1.6
M parameters, and ours 0.9 M for colour images; the batch is the same for all; flips, which would turn digits into their
mirror images, are left out. With `large`, networks have 35 to 38 M parameters: `network=ddpm` with embeddings of 256,
lucidrains' `Unet(64)`, diffusers' of `google/ddpm-cifar10-32`, that of torchcfm's example of CIFAR-10, azula's with
channels 128, 256, 256, 256. A library is imported when its peer is built, so that the time of a cold start contains it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peer_base import Peer
from benchmarks.peer_ours import Ours


class Lucidrains(Peer):
    """denoising-diffusion-pytorch."""

    package, sampler, clip = "denoising-diffusion-pytorch", "DDIM, 250", 1.0

    def build(self) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        channels, size, _ = self.shape
        network = Unet(self._of(8, 12, 64), dim_mults=(1, 2) if self.small else (1, 2, 4, 8), channels=channels)
        steps = (8, 4) if self.small else (1000, 250)
        diffusion = GaussianDiffusion(network, image_size=size, timesteps=steps[0], sampling_timesteps=steps[1])
        self.diffusion = diffusion.to(self.images.device)
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.average = EMA(self.diffusion, beta=0.995, update_every=10)

    def loss(self, x: Tensor) -> Tensor:
        found: Tensor = self.diffusion(x)
        return found

    def after_step(self) -> None:
        self.average.update()

    def inputs(self) -> tuple[Any, ...]:
        return self.images[:1].float(), torch.zeros(1, device=self.images.device)

    def generate(self, number: int) -> Tensor:
        self.average.ema_model.eval()
        images: Tensor = self.average.ema_model.sample(batch_size=number)
        return images


class Diffusers(Peer):
    """diffusers: UNet2DModel and DDPM, sampled by DDIM."""

    package, sampler, clip = "diffusers", "DDIM, 50", 1.0
    epochs, warmup = 100, 500

    def build(self) -> None:
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        channels, size, _ = self.shape
        widths: tuple[int, ...] = self._of((32, 32), (32, 64, 64), (128, 256, 256, 256))
        attends = [level == (1 if self.large else len(widths) - 2) for level in range(len(widths))]
        self.network = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1 if self.small else 2,
            block_out_channels=widths,
            down_block_types=tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attends),
            up_block_types=tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
        ).to(self.images.device)
        self.scheduler = DDPMScheduler(num_train_timesteps=4 if self.small else 1000)
        self.pipeline, self.sampling = DDIMPipeline, DDIMScheduler.from_config(self.scheduler.config)
        parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        total = self.epochs * -(-len(self.images) // self.batch_size)
        self.rates = get_cosine_schedule_with_warmup(self.optimizer, self.warmup, total)
        self.average = EMAModel(
            parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, model_cls=UNet2DModel
        )

    def loss(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        noise = torch.randn_like(x)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(x),), device=x.device)
        prediction = self.network(self.scheduler.add_noise(x, noise, t), t).sample
        return F.mse_loss(prediction, noise)

    def after_step(self) -> None:
        self.rates.step()
        self.average.step(self.network.parameters())

    def inputs(self) -> tuple[Any, ...]:
        return self.images[:1].float(), torch.zeros(1, dtype=torch.long, device=self.images.device)

    def generate(self, number: int) -> Tensor:
        network = copy.deepcopy(self.network).eval()
        self.average.copy_to(network.parameters())
        pipeline = self.pipeline(unet=network, scheduler=self.sampling)
        pipeline.set_progress_bar_config(disable=True)
        steps, generator = 2 if self.small else 50, torch.Generator().manual_seed(self.seed)
        found = pipeline(number, generator, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(found).permute(0, 3, 1, 2)


class TorchCFM(Peer):
    """torchcfm: flow matching with optimal transport within a batch."""

    package, sampler = "torchcfm", "dopri5, 1e-4"

    def build(self) -> None:
        from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
        from torchcfm.models.unet import UNetModel
        from torchdiffeq import odeint

        multiples = self._of([1, 1], None, [1, 2, 2, 2])
        options: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1}
        if self.large:  # its example of CIFAR-10
            options = {"num_channels": 128, "num_res_blocks": 2, "dropout": 0.1, "num_heads": 4}
            options |= {"num_head_channels": 64, "attention_resolutions": "16"}
        network = UNetModel(self.shape, channel_mult=multiples, **options)
        self.network = network.to(self.images.device)
        self.optimizer = torch.optim.Adam(self.network.parameters())
        self.matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
        self.solve = odeint

    def loss(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        t, x_t, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return torch.mean((self.network(t, x_t) - velocity) ** 2)

    def inputs(self) -> tuple[Any, ...]:
        return torch.zeros(1, device=self.images.device), self.images[:1].float()

    def generate(self, number: int) -> Tensor:
        self.network.eval()
        x = torch.randn(number, *self.shape, device=self.images.device)
        ends = torch.linspace(0, 1, 2, device=x.device)
        tolerance = 1e-1 if self.small else 1e-4
        path = self.solve(lambda t, x: self.network(t, x), x, ends, method="dopri5", atol=tolerance, rtol=tolerance)
        images: Tensor = (path[-1] + 1) / 2
        return images


class Azula(Peer):
    """azula."""

    package, sampler = "azula", "DDIM, 64"

    def build(self) -> None:
        from azula.denoise import KarrasDenoiser
        from azula.nn.unet import UNet
        from azula.noise import VPSchedule
        from azula.sample import DDIMSampler

        channels = self.shape[0]
        large: Any = ((128, 256, 256, 256), (2, 2, 3, 3), 512)
        widths, blocks, features = self._of(((8, 16), (1, 1), 16), ((26, 52, 104), (2, 2, 2), 64), large)

        class Conditioned(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unet = UNet(channels, channels, hid_channels=widths, hid_blocks=blocks, mod_features=features)
                linear = torch.nn.Linear
                self.embedding = torch.nn.Sequential(linear(1, features), torch.nn.SiLU(), linear(features, features))

            def forward(self, x_t: Tensor, level: Tensor) -> Tensor:
                level = level.expand(x_t.shape[0])
                found: Tensor = self.unet(x_t, self.embedding(level[..., None]))
                return found

        self.denoiser = KarrasDenoiser(Conditioned(), VPSchedule()).to(self.images.device)
        self.network = self.denoiser.backbone
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=3e-4)
        self.solver = DDIMSampler

    def loss(self, x: Tensor) -> Tensor:
        found: Tensor = self.denoiser.loss(2 * x - 1, torch.rand(len(x), device=x.device))
        return found

    def inputs(self) -> tuple[Any, ...]:
        return self.images[:1].float(), torch.zeros(1, device=self.images.device)

    def generate(self, number: int) -> Tensor:
        sampler = self.solver(self.denoiser.eval(), steps=2 if self.small else 64, silent=True)
        sampler = sampler.to(self.images.device) if isinstance(sampler, torch.nn.Module) else sampler
        x: Tensor = sampler(sampler.init((number, *self.shape), device=self.images.device))
        return (x + 1) / 2


PEERS: dict[str, type[Peer]] = {
    "dpm_scales": Ours,
    "lucidrains": Lucidrains,
    "diffusers": Diffusers,
    "torchcfm": TorchCFM,
    "azula": Azula,
}
