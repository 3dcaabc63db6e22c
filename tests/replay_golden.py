"""Replays arrays computed by the published implementation with this library's own functions.

    python tests/replay_golden.py tests/data/swin_nano_w7.npz [--json]

Prints how far each array is from ours: relative L2 norm, `max_*` over tensors, `traj_loss` the
largest relative error of a step, `*_wrong` numbers of choices. An analysis file is told by its
arrays; the file with the weights lies beside it.
"""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import PyTree

from esvit_jax import optim, parallel, steps
from esvit_jax.interop.names import family_of, recognise
from esvit_jax.interop.names.published import params_from_state_dict, state_dict_from_params
from esvit_jax.models import EsViT, ViT
from esvit_jax.models.batch_norm import AXIS
from esvit_jax.state import TrainState, create_state

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def relative_error(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    ours, theirs = (np.asarray(x, np.float64).ravel() for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


def build_model(golden: Any, **fields: Any) -> EsViT:
    """The network of a file; `fields` replace those of `EsViT` (dtype).

    Names tell the family, and shapes what `esvit convert` takes from them; the file's config tells
    what they cannot.
    """
    config = json.loads(str(golden["config"]))
    backbone_class, family, named = recognise(tensors(golden, "student/"))
    backbone: Any = backbone_class
    known = family.infer(named, config["img_size"]).fields
    if "num_heads" in known and "num_heads" in config:
        known["num_heads"] = tuple(config["num_heads"])
    if "window_size" in known and "window_size" in config:
        known["window_size"] = config["window_size"]
    return EsViT(
        backbone(**known, **fields),
        num_prototypes=config["out_dim"],
        hidden_dim=config["head_hidden_dim"],
        bottleneck_dim=config["head_bottleneck_dim"],
        norm_last_layer=config["norm_last_layer"],
        **fields,
    )


def tensors(golden: Any, prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, by the rest of their names."""
    return {k[len(prefix) :]: golden[k] for k in golden.files if k.startswith(prefix)}


def normalize(view: np.ndarray) -> np.ndarray:
    """uint8 -> f32, with the ImageNet constants."""
    return ((view / 255.0 - MEAN) / STD).astype(np.float32)


def given_views(keys: object, batch: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """In place of the augmentation: the batch holds the views already, images first."""
    return {name: rearrange(x, "b v ... -> v b ...") for name, x in batch.items()}


def views_batch(views: list[np.ndarray]) -> dict[str, np.ndarray]:
    """uint8 views, globals first, as a batch [b, v, h, w, 3] of floats."""
    views = [normalize(v) for v in views]
    size = views[0].shape[1]
    local = np.stack(views[2:], 1) if views[2:] else np.zeros((len(views[0]), 0, size, size, 3))
    return {"global": np.stack(views[:2], 1), "local": local.astype(np.float32)}


def trajectory_views(config: dict[str, Any], it: int) -> list[np.ndarray]:
    """The uint8 views of trajectory step `it`."""
    r = np.random.default_rng(1000 + it)
    b = config["batch"]
    sizes = [config["global_size"]] * 2 + [config["local_size"]] * config["local_crops"]
    base = r.integers(0, 256, (b, 8, 8, 3))
    views = []
    for size in sizes:
        v = np.clip(base + r.integers(-24, 25, (b, 8, 8, 3)), 0, 255).astype(np.uint8)
        views.append(v.repeat(size // 8, axis=1).repeat(size // 8, axis=2))
    return views


def table(values: Sequence[float]) -> optim.Schedule:
    """A schedule read from one value a step."""
    array = jnp.asarray(values, jnp.float32)
    return lambda step: array[step]


def keep_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The same chain, with the last gradients in front of its state, which is a tuple."""

    def init(params: PyTree) -> PyTree:
        return (jax.tree.map(jnp.zeros_like, params), *cast(tuple, optimizer.init(params)))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        new_updates, new_state = optimizer.update(updates, state[1:], params, **extra)
        return new_updates, (updates, *cast(tuple, new_state))

    return optax.GradientTransformationExtraArgs(init, update)


class Replay:
    """One golden file, and the library's functions set up for it.

    The trajectory's steps and the single step, which comes last in all schedules, are taken by one
    compiled function.

    Attributes:
      path: of the file.
      parallel_mode, devices: layout of the step.
      copies: times the batch is repeated, which leaves all means as they are.
      prototype_chunk, dtype, accum_steps: of the step.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        parallel_mode: str = "pmap",
        prototype_chunk: int = 0,
        devices: int = 1,
        copies: int = 1,
        dtype: str = "float32",
        accum_steps: int = 1,
    ):
        self.golden = np.load(path)
        self.config = json.loads(str(self.golden["config"]))
        self.dtype = jnp.dtype(dtype)
        self.model = build_model(self.golden, dtype=self.dtype)
        self.family = family_of(self.model.backbone)
        self.prototype_chunk, self.accum_steps = prototype_chunk, accum_steps
        self.copies = copies
        self.count = len(self.golden["traj/loss"]) if "traj/loss" in self.golden.files else 0
        self.optimizer, self.step = self.build(parallel_mode, jax.devices()[:devices])

    def build(self, mode, devices) -> tuple[Any, Any]:
        """The library's optimiser with the golden schedules, and the step on these devices."""
        golden = self.golden
        temps, steps_per_epoch = [], 0
        if self.count:
            steps_per_epoch = self.count // len(golden["traj/teacher_temp"])
            temps = golden["traj/teacher_temp"].repeat(steps_per_epoch)

        def schedule(name, last):
            return table([*(golden[f"traj/{name}"] if self.count else []), last])

        optimizer = keep_gradients(
            optim.build_optimizer(
                name="adamw",
                learning_rate=schedule("lr", 1e-3),
                weight_decay=schedule("wd", 0.04),
                teacher_momentum=schedule("momentum", 0.99),
                clip_norm=self.config["clip_grad"],
                freeze_prototypes_steps=steps_per_epoch,
                norm_last_layer=self.config["norm_last_layer"],
            )
        )
        temp = golden["teacher_temp_schedule"][int(golden["epoch"])]
        step = functools.partial(
            steps.train_step,
            model=self.model,
            optimizer=optimizer,
            make_views=given_views,
            teacher_temp=table([*temps, temp]),
            options=steps.StepOptions(
                student_temp=0.1,
                center_momentum=0.9,
                seed=0,
                accum_steps=self.accum_steps,
                prototype_chunk=self.prototype_chunk,
                dtype=self.dtype,
            ),
        )
        lifted = parallel.on_all_devices(step, mode, devices=devices)

        def on_shards(state, batch):
            shards = {
                name: rearrange(
                    np.concatenate([x] * self.copies), "(d b) ... -> d b ...", d=len(devices)
                )
                for name, x in batch.items()
            }
            return lifted(state, shards)[:2]

        return optimizer, on_shards

    def batch(self) -> dict[str, np.ndarray]:
        """The views of the single step."""
        count = 2 + self.config["local_crops"]
        return views_batch([self.golden[f"crops/{i}"] for i in range(count)])

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below a prefix, by the names of our params."""
        return self.family.weights(self.family.published_names(tensors(self.golden, prefix)))

    def params(self, name: str) -> dict[str, Any]:
        """Of "student" or "teacher"."""
        return params_from_state_dict(self.tensors(f"{name}/"))

    def error(self, ours: Any, name: str) -> float | None:
        """Relative error to an array of the file; None where it has none."""
        return relative_error(ours, self.golden[name]) if name in self.golden.files else None

    def outputs(self) -> dict[str, float | None]:
        """Forward errors of student and teacher."""
        golden, model = self.golden, self.model
        views = given_views(None, self.batch())
        stacks = [views["global"], views["local"]] if len(views["local"]) else [views["global"]]
        errors = {}
        for name, stack in (("student", stacks), ("teacher", stacks[:1])):
            # In training, of which one device is a batch norm's whole axis.
            forward = jax.vmap(model.forward_training, None, None, axis_size=1, axis_name=AXIS)
            out, _ = jax.jit(forward)(self.params(name), stack)

            def rows(stacks):
                return np.concatenate(
                    [rearrange(np.asarray(x), "... d -> (...) d") for x in stacks]
                )

            def logits(head):
                return rows(head.vectors) @ head.prototypes.T

            errors[f"{name}_cls"] = relative_error(
                logits(out.heads["view"]), golden[f"{name}_out/cls"]
            )
            errors[f"{name}_region"] = relative_error(
                logits(out.heads["region"]), golden[f"{name}_out/region"]
            )
            if name == "student":
                errors["student_feat"] = relative_error(
                    rows(out.region_features), golden["student_out/feat"]
                )
        return errors

    def stepped(self) -> tuple[TrainState, dict[str, Any]]:
        """The state after the single step, with its gradients in front of `opt_state`; scalars."""
        golden = self.golden
        student, teacher = self.params("student"), self.params("teacher")
        centers = {"view": golden["center"][0], "region": golden["center_grid"][0]}
        state = create_state(self.model, self.optimizer, student)
        state = dataclasses.replace(
            state,
            step=jnp.asarray(self.count, jnp.int32),
            opt_state=(*state.opt_state[:-1], optim.TeacherState(teacher)),
            centers=centers,
        )
        return self.step(state, self.batch())

    def one_step(self) -> dict[str, float | None]:
        """Errors of losses, centers, gradients, and params after one update."""
        state, scalars = self.stepped()
        gradients = state.opt_state[0]
        return {
            "view_loss": self.error(scalars["view_loss"], "view_loss"),
            "loss": self.error(scalars["loss"], "loss"),
            "center": self.error(state.centers["view"], "center_after"),
            "center_grid": self.error(state.centers["region"], "center_grid_after"),
            "max_grad": max_error(gradients, self.tensors("grad/")),
            "max_student_after": max_error(state.params, self.tensors("student_after/")),
            "max_teacher_after": max_error(state.teacher, self.tensors("teacher_after/")),
        }

    def features(self) -> dict[str, float | None]:
        """Errors of what the teacher's backbone returns for the first global view."""
        golden, backbone = self.golden, self.model.backbone
        outputs = ("attention",) if backbone.blocks else ()
        out = jax.jit(functools.partial(backbone.forward, outputs=outputs))(
            self.params("teacher")["backbone"], normalize(golden["crops/0"])
        )
        attention = [
            relative_error(
                weights[0, : golden[f"attention/{i}"].shape[0]], golden[f"attention/{i}"]
            )
            for i, weights in enumerate(out.attention)
            if f"attention/{i}" in golden.files
        ]
        pooled, regions = out.view_features, out.region_features
        if isinstance(backbone, ViT):  # whose files have all tokens of two images there
            regions = rearrange(regions, "b h w d -> b (h w) d")
            tokens = np.concatenate([pooled[:2, None], regions[:2]], axis=1)
            pooled, regions = tokens[0], tokens[-1]
        return {
            "pooled": self.error(pooled, "pooled"),
            "regions": self.error(regions, "regions"),
            "last4_features": self.error(
                np.concatenate(out.block_means[-4:], axis=-1), "last4_features"
            ),
            "max_attention": max(attention) if attention else None,
        }

    def trajectory(self) -> dict[str, float | None]:
        """Errors over the whole run of `traj_steps` updates."""
        golden = self.golden
        if not self.count:
            return {"traj_loss": None, "traj_center": None, "max_traj_norm": None}
        student = self.params("student")
        state: TrainState = create_state(self.model, self.optimizer, student)
        losses = []
        for it in range(self.count):
            state, scalars = self.step(state, views_batch(trajectory_views(self.config, it)))
            losses.append(float(scalars["loss"]))
        norms = []
        for kind in ("param", "buffer"):
            if f"traj/{kind}_names" not in golden.files:
                continue
            names = [str(name) for name in golden[f"traj/{kind}_names"]]
            for name, params in (("student", state.params), ("teacher", state.teacher)):
                theirs = golden[f"traj/{name}_{'buffer_' * (kind == 'buffer')}norms"]
                theirs = {name: np.asarray(x) for name, x in zip(names, theirs, strict=True)}
                theirs = self.family.published_names(theirs)
                ours = state_dict_from_params(params)
                norms += [
                    relative_error(np.linalg.norm(ours[parameter].astype(np.float64)), norm)
                    for parameter, norm in theirs.items()
                ]
        relative = np.abs(np.array(losses) / golden["traj/loss"] - 1)
        centers = np.concatenate([golden["traj/center"][0], golden["traj/center_grid"][0]])
        return {
            "traj_loss": float(relative.max()),
            "traj_center": relative_error(
                np.concatenate([state.centers["view"], state.centers["region"]]), centers
            ),
            "max_traj_norm": max(norms),
        }

    def errors(self) -> dict[str, float | None]:
        """All of them, by name."""
        return self.outputs() | self.one_step() | self.features() | self.trajectory()


# Biases that have a key's among their equal parts: how many these are, and which is the key's.
WITH_KEYS = {".qkv.bias": (3, 1), ".kv.bias": (2, 0)}


def max_error(params: Any, theirs: dict[str, np.ndarray]) -> float:
    """The largest relative error of a tensor; every name must be there.

    A key's bias adds the same to all logits of a query. Its gradient is 0 but for rounding, which
    AdamW makes steps of: keys' parts of biases may differ by the learning rate, and do not count.
    """
    ours = state_dict_from_params(params)
    errors = []
    for name, value in theirs.items():
        found = ours[name]
        for ending, (count, keys) in WITH_KEYS.items():
            if name.endswith(ending):
                parts = [np.split(x, count) for x in (value, found)]
                key, own_key = (x.pop(keys) for x in parts)
                errors.append(0.0 if np.abs(own_key - key).max() <= 1e-3 else np.inf)
                value, found = map(np.concatenate, parts)
        errors.append(relative_error(found, value))
    return max(errors)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    if "view1" in np.load(arguments.file).files:
        from replay_analysis import AnalysisReplay as Replayed  # which stands on this file
    else:
        Replayed = Replay
    errors = Replayed(arguments.file).errors()
    for name, error in errors.items():
        words = "-" if error is None else str(error) if isinstance(error, int) else f"{error:.2e}"
        print(f"{name:>20}  {words}")
    if arguments.json:
        print(json.dumps(errors))


if __name__ == "__main__":
    main()
