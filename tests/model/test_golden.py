"""The published code's numbers come out: features, logits, losses, gradients and three optimizer steps, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import published
from benchmarks.baseline import model as baseline
from multitrain.config import LossConfig, ModelConfig
from multitrain.loss import MultiDatasetLoss, informative_loss
from multitrain.loss.total import Terms
from multitrain.model import MultiTrain
from multitrain.model.heads import MlpHead

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
        self.values: dict[str, Any] = published.values(folder, name)
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


FILES = [
    pytest.param((folder, name), id=f"{size}-{name}")
    for size, folder in (("small", published.SMALL), ("whole", published.WHOLE))
    for name in published.models(folder)
]
"""Of the folder that ships, and of the developers' where it is there."""


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(*request.param)


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


@pytest.mark.parametrize("case", ["train_hard", "train_mixup", "train_cutmix"])
def test_training_losses_and_gradients_are_the_published_ones(golden: Golden, case: str) -> None:
    model, expected = golden.model().train(), golden.values[case]
    out = model.outputs(golden.clips(case))
    logits = {**out.logits, **{f"{a}_{b}": z for (a, b), z in out.projected.items()}}
    assert set(logits) == set(expected["logits"]) or (case != "train_hard" and not expected["logits"])
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


# -- the joint model without its backbone ------------------------------------------------------------------------------


class Joint:
    """Published features, logits and embeddings of the joint model: leaves, whose gradients the loss gives."""

    def __init__(self) -> None:
        self.datasets = CASES["tiny_multi"][1]
        self.values = published.values(published.SMALL, "tiny_multi")
        self.hard = self.values["train_hard"]
        held = {k: v.clone().requires_grad_() for k, v in self.hard["logits"].items()}
        self.logits = {d: held[d] for d in self.datasets}
        self.projected = {(a, b): held[f"{a}_{b}"] for a in self.datasets for b in self.datasets if a != b}
        self.expanded = self.hard["inf_feature"].clone().requires_grad_()

    def terms(self) -> Terms:
        ids = torch.tensor(self.values["sample_dataset"])
        return MultiDatasetLoss(self.datasets, LossConfig())(self, self.values["labels"], ids)  # type: ignore[arg-type]

    def agrees(self, name: str, gradient: Tensor) -> None:
        """The first entries of a gradient [≤ 8] are the published ones."""
        expected = self.hard["grad"][name][: len(gradient)]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture
def joint() -> Joint:
    return Joint()


def test_the_joint_models_loss_is_the_published_one(joint: Joint) -> None:
    terms, expected = joint.terms(), joint.hard
    assert terms.classification.item() == pytest.approx(expected["loss_ce"], rel=1e-6)
    assert terms.projection.item() == pytest.approx(expected["loss_proj"], rel=1e-6)
    assert terms.informative.item() == pytest.approx(expected["inf_raw"], rel=1e-6)
    assert terms.total.item() == pytest.approx(expected["loss_total"], rel=1e-6)


def test_projections_are_the_published_ones_and_have_their_gradients(joint: Joint) -> None:
    joint.terms().total.backward()
    for (a, b), projected in joint.projected.items():
        rows = joint.values["parts"][f"rows.{a}_{b}"]
        close(joint.logits[a].detach() @ rows.T, projected.detach()[:, : len(rows)])
        gradient = projected.grad.T @ joint.logits[a].detach()
        name = f"head.cross_dataset_heads.{a}_{b}.weight"
        joint.agrees(name, gradient.flatten()[:8])
        assert gradient.norm().item() == pytest.approx(joint.hard["grad_norm"][name], rel=1e-5)


def _hidden(joint: Joint, name: str) -> Tensor:
    """The first hidden units of an MLP, by the module that the model has."""
    weight, bias = (joint.values["parts"][f"{name}.fc1.{p}"] for p in ("weight", "bias"))
    head = MlpHead(weight.shape[1], len(bias), 2, 0.0, False, "kinetics")
    seen: list[Tensor] = []
    head.fc2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        head.fc1.weight.copy_(weight)
        head.fc1.bias.copy_(bias)
        head(joint.values["eval_feature"])
    return seen[0]


def test_hidden_layers_are_the_published_ones_by_the_gradients_that_they_make(joint: Joint) -> None:
    joint.terms().total.backward()
    for a in joint.datasets:
        of_logits = joint.logits[a].grad[:, : published.CLASSES].clone()
        for b in (b for b in joint.datasets if b != a):
            of_logits += joint.projected[a, b].grad @ joint.values["parts"][f"columns.{a}_{b}"]
        joint.agrees(f"head.heads.{a}.fc2.weight", of_logits[:, 0] @ _hidden(joint, f"head.heads.{a}"))
        joint.agrees(f"head.heads.{a}.fc2.bias", of_logits.sum(0))
    joint.agrees("expander.fc2.weight", joint.expanded.grad[:, 0] @ _hidden(joint, "expander"))


def test_the_folder_that_ships_is_small_and_holds_no_file_of_the_whole_one() -> None:
    files = [p for p in published.SMALL.rglob("*") if p.is_file()]
    assert 1_000_000 < sum(p.stat().st_size for p in files) < 2_000_000
    if not published.WHOLE.is_dir():
        return
    whole = {p.stat().st_size: p for p in published.WHOLE.rglob("*") if p.is_file()}
    assert not [
        p for p in files if p.stat().st_size in whole and p.read_bytes() == whole[p.stat().st_size].read_bytes()
    ]
    again = published.values(published.WHOLE, "data")
    small = published.values(published.SMALL, "data")
    assert torch.equal(again["spatial"]["x"], small["spatial"]["x"])
    theirs = published.values(published.WHOLE, "tiny_multi")["input"]
    torch.testing.assert_close(published.values(published.SMALL, "tiny_multi")["input"], theirs, rtol=1e-6, atol=1e-6)
