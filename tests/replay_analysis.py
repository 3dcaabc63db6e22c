"""Replays what the published implementation finds in pairs of views: see `replay_golden`."""

import functools
import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
from einops import rearrange
from replay_golden import build_model, normalize, relative_error, tensors

from esvit_jax.analyze.attention import entropy, head_entropy, mass_mask, window_tokens
from esvit_jax.evaluate.correspondence import correspond, score_mirrored
from esvit_jax.interop.names.published import params_from_state_dict
from esvit_jax.models.backbone import BackboneOutput


class AnalysisReplay:
    """One analysis file: what the teacher of a weights file beside it makes of pairs of views.

    A choice counts as wrong only where the file's own margin is above `MARGIN`.
    """

    MARGIN = 1e-4

    def __init__(self, path: str | os.PathLike):
        self.golden = np.load(path)
        self.config = json.loads(str(self.golden["config"]))
        weights = np.load(Path(path).parent / self.config["weights"])
        self.backbone = build_model(weights).backbone
        state = tensors(weights, f"{self.config['network']}/")
        self.params = params_from_state_dict(state)["backbone"]

    def errors(self) -> dict[str, float | int]:
        """Relative errors, and numbers of wrong choices, by name."""
        forward = jax.jit(functools.partial(self.backbone.forward, outputs=("attention",)))
        first, second = (forward(self.params, normalize(self.golden[f"view{i}"])) for i in (1, 2))
        return self.pairs(first.region_features, second.region_features) | self.attention(first)

    def pairs(self, first: jax.Array, second: jax.Array) -> dict[str, float | int]:
        """Of correspondence."""
        golden, (_, height, width, _) = self.golden, first.shape
        features = [rearrange(x, "b h w d -> b (h w) d") for x in (first, second)]
        found = correspond(*features)
        score = score_mirrored(found, (height, width), self.config["counted_pairs"])
        clear = golden["match_margin"] > self.MARGIN
        # A rank is clear where both neighbours in the order are far from it.
        falling = -np.sort(-golden["match_similarity"], axis=1)
        gaps = np.pad(falling[:, :-1] - falling[:, 1:], ((0, 0), (1, 0)), constant_values=1.0)
        count = golden["top"].shape[1]
        distinct = (gaps[:, :count] > self.MARGIN) & (gaps[:, 1 : count + 1] > self.MARGIN)
        return {
            "features": relative_error(
                np.stack(features), [golden["features1"], golden["features2"]]
            ),
            "similarity": relative_error(found.similarity, golden["similarity"]),
            "accuracy": relative_error(score.accuracy, golden["accuracy"]),
            "distance": relative_error(
                self.config["cell_pixels"] * score.distance, golden["distance"]
            ),
            "cutoff_similarity": relative_error(
                score.cutoff_similarity, golden["cutoff_similarity"]
            ),
            "match_wrong": int(np.sum((np.asarray(found.match) != golden["match"]) & clear)),
            "top_wrong": int(
                np.sum((np.asarray(found.top)[:, :count] != golden["top"]) & distinct)
            ),
        }

    def attention(self, out: BackboneOutput) -> dict[str, float | int]:
        """Of entropies, attention rows and masks."""
        golden, config = self.golden, self.config
        entropies, ours_all, theirs, theirs_all = [], [], [], []
        for layer, (weights, block) in enumerate(
            zip(out.attention, self.backbone.blocks, strict=True)
        ):
            height, width = out.stage_maps[block.stage].shape[1:3]
            tokens = window_tokens(height, width, block)
            # The public code looks at the first window alone, and at its first queries.
            first = entropy(weights[:, 0, :, : config["entropy_queries"]])
            entropies.append(np.asarray(first).mean(-1).ravel())
            ours_all.append(np.asarray(head_entropy(weights, tokens)).ravel())
            theirs.append(golden[f"entropy/{layer}"].ravel())
            theirs_all.append(golden[f"entropy_all/{layer}"].ravel())

        rows, their_rows, wrong = [], [], 0
        image, mass = config["vis_image"], config["mask_mass"]
        for layer, query in itertools.product(config["vis_layers"], config["vis_queries"]):
            name = f"vis/{layer}/{query}"
            row = np.asarray(out.attention[layer])[image, 0, :, query]
            rows.append(row.ravel())
            their_rows.append(golden[f"{name}/attention"].ravel())
            unclear = mass_mask(row, mass - self.MARGIN) ^ mass_mask(row, mass + self.MARGIN)
            wrong += int(np.sum((mass_mask(row, mass) != golden[f"{name}/mask"]) & ~unclear))
        join = np.concatenate
        return {
            "entropy": relative_error(join(entropies), join(theirs)),
            "entropy_all": relative_error(join(ours_all), join(theirs_all)),
            "attention": relative_error(join(rows), join(their_rows)),
            "mask_wrong": wrong,
        }
