"""The peer: the same training step in PyTorch, with Hugging Face's SwinModel and plain losses.

Made of what one would take from the shelf: SwinModel, `torch.nn` heads, `torch.optim.AdamW`, all
logits in memory. It is timed on the views of our own step and does not have to cut them. As in our
backbone, windows and shifts are those of 224 px (`always_partition`), so both compute the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from esvit_jax.bench.step import Workload, augmentation, compile_step, step_parts
from esvit_jax.bench.timing import Timing, time_in_turns
from esvit_jax.config import ConfigDict
from esvit_jax.errors import UserError

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import SwinConfig, SwinModel
except ImportError as error:
    raise UserError("the peer needs torch: pip install 'esvit_jax[torch]'") from error


class Comparison(NamedTuple):
    """Seconds of a task, ours and the peer's, and the former over the latter."""

    ours: float
    peer: float
    ratio: float


class PeerSpeed(NamedTuple):
    """The peer's step with the device to itself.

    Attributes:
      step: seconds.
      images_per_second: at the median.
      peak_bytes: that PyTorch held at most; None on a CPU, where it does not say.
    """

    step: Timing
    images_per_second: float
    peak_bytes: int | None


def bench_peer(work: Workload, rounds: int, compiled: bool) -> dict[str, Comparison]:
    """Times three tasks, in turns with our own: one device's share of the batch.

    Args:
      work: our step.
      rounds: timings, of which the median is given.
      compiled: whether the peer goes through `torch.compile`.

    Returns:
      By task: `backbone` (forward and backward on all views), `gradients` (teacher, student, heads,
      losses, gradients) and `step` (the same, then clipping, AdamW, teacher and centers; ours also
      cuts the views).

    Raises:
      UserError: there is more than one device.
    """
    device = peer_device()
    calls = _our_calls(work) | _peer_calls(work, device, compiled)
    times = time_in_turns(calls, rounds)
    results = {}
    for task in ("backbone", "gradients", "step"):
        ours, theirs = (times[f"{who} {task}"].median for who in ("ours", "peer"))
        results[task] = Comparison(ours, theirs, ours / theirs)
    return results


def bench_peer_alone(work: Workload, rounds: int, compiled: bool) -> PeerSpeed:
    """Times the peer's `step` by itself, so that it has all of the device's memory.

    Takes and raises what `bench_peer` does.
    """
    device = peer_device()
    step = _peer_calls(work, device, compiled)["peer step"]
    timing = time_in_turns({"step": step}, rounds)["step"]
    cuda = device.type == "cuda"
    return PeerSpeed(
        step=timing,
        images_per_second=work.config.batch_size / timing.median,
        peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
    )


def peer_device() -> torch.device:
    """PyTorch's name for the one device that jax uses, set to compute float32 as jax does.

    Raises:
      UserError: there is more than one, or PyTorch does not see it.
    """
    if jax.device_count() > 1:
        raise UserError(f"the peer runs on one device, and there are {jax.device_count()}")
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"jax runs on {jax.devices()[0].device_kind}, which this torch does not see; "
            "JAX_PLATFORMS=cpu compares both on the CPU"
        )
    torch.set_float32_matmul_precision("high")  # TF32, as jax's products of float32 on a GPU
    return torch.device("cuda")


def _our_calls(work: Workload) -> dict[str, Callable[[], Any]]:
    parts, backbone = step_parts(work), work.recipe.model.backbone
    views = parts.augmentation()
    params = jax.device_put(work.state.params["backbone"])

    @jax.jit
    def backbone_gradients(params, views):
        def loss_of(params):
            stacks = [views[name] for name in ("global", "local") if len(views[name])]
            stacks = [rearrange(stack, "v b h w c -> (v b) h w c") for stack in stacks]
            shapes = [(len(stack), backbone.num_draws) for stack in stacks]
            drawn = [jax.random.uniform(jax.random.key(1), shape) for shape in shapes]
            outputs = [
                backbone.forward(params, stack, drawn=numbers)
                for stack, numbers in zip(stacks, drawn, strict=True)
            ]
            return sum(jnp.mean(out.view_features**2) for out in outputs)

        return jax.grad(loss_of)(params)

    return {
        "ours backbone": lambda: backbone_gradients(params, views),
        "ours gradients": parts.gradients,
        "ours step": compile_step(work)[1],
    }


def _peer_calls(work: Workload, device: Any, compiled: bool) -> dict[str, Callable[[], Any]]:
    peer = Peer(work, device, compiled)
    views = to_torch(augmentation(work)(), device)

    def synchronised(task: Callable[[Any], Any]) -> Callable[[], None]:
        def call():
            task(views)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return call

    return {
        "peer backbone": synchronised(peer.backbone_gradients),
        "peer gradients": synchronised(peer.gradients),
        "peer step": synchronised(peer.step),
    }


def to_torch(views: dict[str, jax.Array], device: Any) -> list[Any]:
    """Stacks of views [v, b, h, w, 3] as tensors [v, b, 3, h, w]; none for no local views."""
    stacks = [np.asarray(views[name]) for name in ("global", "local") if len(views[name])]
    return [
        torch.from_numpy(rearrange(x, "v b h w c -> v b c h w").copy()).to(device) for x in stacks
    ]


class Head(nn.Module):
    """Three linears, L2 normalisation, weight-normalised prototypes: all logits."""

    def __init__(self, dim: int, config: ConfigDict):
        super().__init__()
        hidden, bottleneck = config.hidden_dim, config.bottleneck_dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.weight_g = nn.Parameter(torch.ones(config.num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.randn(config.num_prototypes, bottleneck))

    def forward(self, features):
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(F.normalize(self.mlp(features), dim=-1), weight)


class Network(nn.Module):
    """SwinModel and a head for views and one for regions, if there are any."""

    def __init__(self, config: ConfigDict, backbone: Any, compiled: bool):
        super().__init__()
        swin = SwinModel(swin_config(backbone))
        size = backbone.image_size
        with torch.no_grad():  # SwinModel fixes windows and shifts by the first image it sees
            swin(torch.zeros(1, 3, size, size))
        self.swin = swin
        # Both sizes of views get programs of their own, as in jax.
        self.run = torch.compile(swin, dynamic=False) if compiled else swin
        heads = ["view", "region"] if config.loss.region else ["view"]
        self.heads = nn.ModuleDict(
            {head: Head(backbone.num_features, config.head) for head in heads}
        )

    def forward(self, stacks):
        """A pair for each stack: {"view": logits [v, b, k], "region": [v, b, n, k]}, and the
        backbone's region features [v, b, n, d]."""
        results = []
        for stack in stacks:
            out = self.run(stack.flatten(0, 1), always_partition=True)
            regions = out.last_hidden_state.unflatten(0, stack.shape[:2])
            inputs = {"view": out.pooler_output.unflatten(0, stack.shape[:2]), "region": regions}
            logits = {name: head(inputs[name]) for name, head in self.heads.items()}
            results.append((logits, regions))
        return results


def swin_config(backbone: Any) -> Any:
    """Hugging Face's config of a backbone of ours."""
    return SwinConfig(
        image_size=backbone.image_size, patch_size=backbone.patch_size,
        embed_dim=backbone.embed_dim, depths=list(backbone.depths),
        num_heads=list(backbone.num_heads), window_size=backbone.window_size,
        mlp_ratio=backbone.mlp_ratio, drop_path_rate=backbone.drop_path_rate,
        layer_norm_eps=1e-6,
    )  # fmt: skip


class Peer:
    """Student, teacher, centers and optimiser in PyTorch."""

    def __init__(self, work: Workload, device: Any, compiled: bool):
        config = work.config
        self.device, self.clip_norm = device, config.optimizer.clip_norm
        self.student_temp = config.loss.student_temp
        self.teacher_temp = float(work.recipe.schedules["teacher_temp"](0))
        self.center_momentum = config.loss.center_momentum
        weight = config.loss.region_weight
        self.weights = (
            {"view": 1 - weight, "region": weight} if config.loss.region else {"view": 1.0}
        )
        self.teacher_momentum = config.optimizer.teacher_momentum
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"
        )
        self.student = Network(config, work.recipe.model.backbone, compiled).to(device)
        self.teacher = Network(config, work.recipe.model.backbone, compiled).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.centers = {
            head: torch.zeros(config.head.num_prototypes, device=device)
            for head in self.student.heads
        }
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=1e-6, weight_decay=config.optimizer.weight_decay
        )

    def backbone_gradients(self, stacks: list[Any]) -> None:
        """Forward and backward of SwinModel alone, on all views."""
        self.optimizer.zero_grad()
        with self.autocast():
            outputs = [self.student.run(x.flatten(0, 1), always_partition=True) for x in stacks]
            loss: Any = sum(out.pooler_output.square().mean() for out in outputs)
        loss.backward()

    def gradients(self, stacks: list[Any]) -> tuple[Any, dict[str, Any]]:
        """Teacher, student, losses, backward; returns the loss and the teacher's logits."""
        self.optimizer.zero_grad()
        with self.autocast():
            with torch.no_grad():
                teacher_logits, teacher_features = self.teacher(stacks[:1])[0]
            student = self.student(stacks)
        loss: Any = sum(
            weight * self._loss(head, student, teacher_logits[head].float(), teacher_features)
            for head, weight in self.weights.items()
        )
        loss.backward()
        return loss, teacher_logits

    def _loss(self, head, student, teacher_logits, teacher_features):
        probs = F.softmax((teacher_logits - self.centers[head]) / self.teacher_temp, dim=-1)
        total, pairs, first = 0.0, 0, 0
        for logits, features in student:
            log_probs = F.log_softmax(logits[head].float() / self.student_temp, dim=-1)
            for s in range(len(features)):
                for t in range(2):
                    if first + s == t:
                        continue
                    targets = probs[t]
                    if head == "region":
                        targets = matched(targets, features[s], teacher_features[t])
                    total = total - (targets * log_probs[s]).sum(dim=-1).mean()
                    pairs += 1
            first += len(features)
        return total / pairs

    def step(self, stacks: list[Any]) -> None:
        """Gradients, clipping tensor by tensor, AdamW, teacher and centers."""
        _, teacher_logits = self.gradients(stacks)
        for p in self.student.parameters():
            if p.grad is not None:
                nn.utils.clip_grad_norm_(p, self.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.teacher.parameters()), list(self.student.parameters()),
                1 - self.teacher_momentum,
            )  # fmt: skip
            for head, logits in teacher_logits.items():
                mean = logits.float().flatten(0, -2).mean(0)
                self.centers[head].lerp_(mean, 1 - self.center_momentum)


def matched(targets, student_features, teacher_features):
    """For each student region the targets [b, n, k] of the most similar teacher region."""
    with torch.no_grad():
        student = F.normalize(student_features.float(), dim=-1)
        teacher = F.normalize(teacher_features.float(), dim=-1)
        matches = (student @ teacher.transpose(-1, -2)).argmax(dim=-1)
    return targets.gather(1, matches[..., None].expand(-1, -1, targets.shape[-1]))
