"""The published code's numbers come out: features, logits, losses, gradients and three optimizer steps, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baseline import model as baseline
from multitrain.config import LossConfig, ModelConfig
from multitrain.loss import MultiDatasetLoss, informative_loss
from multitrain.loss.total import Terms
from multitrain.model import MultiTrain

TINY = {
    "frames": 8,
    "crop": 64,
    "depth": 4,
    "width": 32,
    "stages": (1, 3),
    "kv_stride": 8,
    "drop_path": 0.0,
    "head_dropout": 0.0,
}
CASES = {
    "tiny_multi": (ModelConfig(**TINY), {"kinetics": 400, "mit": 305, "ssv2": 174}, LossConfig()),
    "tiny_k400_32x3": (
        ModelConfig(**TINY, head="linear", projections=False, expander=False),
        {"kinetics": 400},
        LossConfig(projection_weight=0, informative_weight=0),
    ),
}
WITHOUT_GRADIENT = ("norm_k.bias", "expander.fc2.bias")
"""Parameters whose true gradient is zero: a softmax does not see what is added to all keys, and the informative loss, which
centres its embeddings, does not see what is added to all of them."""
TRAINED = [("tiny_multi", "train_hard"), ("tiny_multi", "train_mixup"), ("tiny_multi", "train_cutmix")]
TRAINED += [("tiny_k400_32x3", case) for _, case in TRAINED]


def ours(name: str) -> str:
    """Our name of a published parameter."""
    if name.startswith("head.cross_dataset_heads."):
        source, target = name.split(".")[2].split("_")
        return f"projections.{source}.{target}.weight"
    return name.replace("head.projection.", "heads.kinetics.").replace("head.heads.", "heads.")


class Golden:
    """One published model, ours with its weights, and what the published code computed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.config, self.datasets, self.loss = CASES[name]
        self.values: dict[str, Any] = torch.load(folder / f"{name}.golden.pt", weights_only=False)
        self.state = torch.load(folder / f"{name}.pyth", weights_only=True)["model_state"]
        self.ids = (
            torch.tensor(self.values["sample_dataset"]) if len(self.datasets) > 1 else torch.zeros(6, dtype=torch.int64)
        )

    def model(self) -> MultiTrain:
        model = MultiTrain(self.config, self.datasets)
        model.load_state_dict({ours(name): value for name, value in self.state.items()}, strict=True)
        return model

    def clips(self, case: str) -> Tensor:
        clips = self.values["input"]
        if case == "train_hard":
            return clips
        recipe = self.values[case]
        if recipe["box"] is None:
            return clips * recipe["lam"] + clips.flip(0) * (1 - recipe["lam"])
        y0, y1, x0, x1 = recipe["box"]
        mixed = clips.clone()
        mixed[..., y0:y1, x0:x1] = clips.flip(0)[..., y0:y1, x0:x1]
        return mixed

    def targets(self, case: str) -> dict[str, Tensor]:
        labels = self.values[case].get("labels", self.values.get("labels"))
        return labels if isinstance(labels, dict) else {"kinetics": labels}

    def terms(self, model: MultiTrain, case: str) -> Terms:
        out = model.outputs(self.clips(case))
        return MultiDatasetLoss(self.datasets, self.loss)(out, self.targets(case), self.ids)


@pytest.fixture(scope="module", params=list(CASES))
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return Golden(shared / "golden", request.param)


@pytest.fixture(scope="module")
def goldens(shared: Path) -> dict[str, Golden]:
    return {name: Golden(shared / "golden", name) for name in CASES}


def close(actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """Within `relative` of the largest expected element."""
    error = (actual - expected).abs().max().item()
    assert error <= relative * expected.abs().max().item()


def test_features_logits_probabilities_and_embeddings_are_the_published_ones(golden: Golden) -> None:
    model, values = golden.model().eval(), golden.values
    with torch.no_grad():
        out = model.outputs(values["input"])
        close(out.features, values["eval_feature"])
        for name in golden.datasets:
            close(out.logits[name], values["eval_logits"][name])
            close(model(values["input"])[name], values["eval_probs"][name])
        if out.expanded is not None:
            close(out.expanded, values["eval_inf_feature"])
            close(model.embeddings(values["input"]), values["eval_inf_feature"])


def test_every_block_gives_the_published_tokens(golden: Golden) -> None:
    model, seen = golden.model().eval(), []
    hooks = [m.register_forward_hook(lambda _, __, out: seen.append(out)) for m in (model.patch_embed, *model.blocks)]
    with torch.no_grad():
        model(golden.values["input"])
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(golden.values["eval_blocks"])
    for tokens, (_, shape, mean, std, corner) in zip(seen, golden.values["eval_blocks"]):
        assert list(tokens.shape) == list(shape)
        assert tokens.mean().item() == pytest.approx(mean, abs=1e-6)
        assert tokens.std().item() == pytest.approx(std, rel=1e-5)
        torch.testing.assert_close(tokens[0, :2, :4], corner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "case"), TRAINED)
def test_training_losses_and_gradients_are_the_published_ones(goldens: dict[str, Golden], name: str, case: str) -> None:
    golden = goldens[name]
    model, expected = golden.model().train(), golden.values[case]
    out = model.outputs(golden.clips(case))
    logits = {**out.logits, **{f"{a}_{b}": z for (a, b), z in out.projected.items()}}
    assert set(logits) == set(expected["logits"])
    for key, value in expected["logits"].items():
        close(logits[key], value)
    terms = MultiDatasetLoss(golden.datasets, golden.loss)(out, golden.targets(case), golden.ids)
    assert terms.total.item() == pytest.approx(expected["loss_total"], rel=1e-6)
    if "loss_ce" in expected:
        assert terms.classification.item() == pytest.approx(expected["loss_ce"], rel=1e-6)
        assert terms.projection.item() == pytest.approx(expected["loss_proj"], rel=1e-6)
        assert terms.informative.item() == pytest.approx(expected["inf_raw"], rel=1e-6)
        parts = informative_loss(out.expanded)
        assert parts[1].item() == pytest.approx(expected["inf_std_term"], rel=1e-6)
        assert parts[2].item() == pytest.approx(expected["inf_cov_term"], rel=1e-5)
    terms.total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert set(gradients) == {ours(n) for n in expected["grad"]}
    for key, first in expected["grad"].items():
        gradient = gradients[ours(key)]
        torch.testing.assert_close(gradient.flatten()[: len(first)], first, rtol=1e-5, atol=1e-7)
        assert gradient.norm().item() == pytest.approx(expected["grad_norm"][key], rel=1e-5, abs=1e-8)


def test_three_adamw_steps_end_at_the_published_parameters(golden: Golden) -> None:
    model, values = golden.model().train(), golden.values
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for step in values["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        optimizer.zero_grad()
        loss = golden.terms(model, "train_hard").total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert loss.item() == pytest.approx(step["loss"], rel=1e-6)
        assert norm.item() == pytest.approx(step["pre_clip_norm"], rel=1e-5)
    state = model.state_dict()
    for key, first in values["params_after_steps"].items():
        # Adam divides by the gradient's size: where the true gradient is zero, rounding decides the sign.
        room = 4 * sum(s["lr"] for s in values["steps"]) if key.endswith(WITHOUT_GRADIENT) else 1e-7
        torch.testing.assert_close(state[ours(key)].flatten()[: len(first)], first, rtol=1e-5, atol=room)


def test_the_baseline_of_the_benchmarks_gives_the_published_numbers_too(golden: Golden) -> None:
    model, values = golden.model(), golden.values
    state = {name: p.detach() for name, p in model.named_parameters()}
    out = baseline.outputs(state, golden.config, golden.datasets, values["input"])
    close(out["features"], values["eval_feature"])
    for name in golden.datasets:
        close(out[name], values["eval_logits"][name])
