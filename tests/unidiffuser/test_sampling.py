"""Tasks, samplers and guidance in a Gaussian world, where every distribution is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unidiffuser.gaussian import IMAGE_AND_TEXT, GaussianWorld
from unidiffuser.modalities import Modality, Part, resized
from unidiffuser.sampling import DETERMINISTIC, SAMPLERS, NoiseSource, sample, slerp
from unidiffuser.schedule import NoiseSchedule
from unidiffuser.solver import DEFAULT_SAMPLER
from unidiffuser.tasks import TASK_NAMES, Task
from unidiffuser.uvit import UViT, UViTConfig

COUNT = 2000
SEEDS = range(COUNT)
LAST = float(NoiseSchedule().alpha_bar[-1])
# One that adds no noise, one that does, and one whose parts have a spread each; all draw every task in the test of these.
ONE_OF_EACH_KIND = ("dpm++2m", "dpm++2m-sde", "analytic-dpm")


@pytest.fixture(scope="module")
def world() -> GaussianWorld:
    return GaussianWorld.random(IMAGE_AND_TEXT)


class OneGenerator(NoiseSource):
    """Noise of all samples from the first one's generator, in a hundredth of the time."""

    def draw(self) -> dict[str, Tensor]:
        return {part.name: torch.randn(len(self.generators), *part.shape, generator=self.generators[0]) for part in self.parts}


@pytest.fixture
def quick_noise(sampler, monkeypatch) -> None:
    """A sampler that adds noise asks for it at every step, which would take minutes from 2000 generators."""
    if sampler not in DETERMINISTIC:
        monkeypatch.setattr("unidiffuser.sampling.NoiseSource", OneGenerator)


def reached(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Where the exact reverse process ends for N(mean, covariance), started from N(0, 1) at the last timestep.

    The schedule does not end in pure noise (alpha_bar = 0.0047), so the start is a little wrong for any sampler. With
    z / a as the state and v = (1 - a^2) / a^2, the flow is z_0 - mean = (C / (C + v))^1/2 (z_T / a - mean).
    """
    v = (1 - LAST) / LAST
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag((values / (values + v)).sqrt()) @ vectors.T
    return mean - root @ mean, root @ root / LAST


def check(drawn: Tensor, mean: Tensor, covariance: Tensor, slack: float = 0.02) -> None:
    """Sample mean and covariance against the truth: 4.5 standard errors, and ``slack`` standard deviations of bias."""
    std = covariance.diag().sqrt()
    error = 4.5 / COUNT**0.5
    assert ((drawn.mean(0) - mean).abs() / std).max() < error + slack
    correlation_error = (drawn.T.cov() - covariance).abs() / (std[:, None] * std)
    assert correlation_error.max() < error * 2**0.5 + 2 * slack


def fixed(world: GaussianWorld, *names: str) -> tuple[dict[str, Tensor], Tensor]:
    """A value of some modalities, the same for all samples: as parts, and as one row of numbers."""
    index = world.index(*names)
    full = world.mean + 1.2 * world.covariance.diag().sqrt()
    parts = {k: v.expand(COUNT, *v.shape[1:]).float() for k, v in world.split(full[None]).items()}
    own = [part.name for modality in world.modalities if modality.name in names for part in modality.parts]
    return {k: parts[k] for k in own}, full[index][None]


def enough(sampler: str, steps: int) -> int:
    """``steps`` of a second-order solver; a first-order one, or one that adds noise, takes three times as many."""
    return 3 * steps if sampler in ("ddim", "dpm++2m-sde", "analytic-dpm") else steps


@pytest.mark.usefixtures("quick_noise")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("task", ["i", "t", "joint", "t2i", "i2t"])
def test_every_task_and_sampler_draws_the_true_distribution(world, sampler, task):
    condition: dict[str, Tensor] = {}
    if task in ("t2i", "i2t"):
        drawn_name, given_name = ("image", "text") if task == "t2i" else ("text", "image")
        condition, value = fixed(world, given_name)
        mean, covariance = world.conditional(drawn_name, given_name, value)
        mean = mean[0]
    else:
        mean, covariance = world.marginal(*{"i": ["image"], "t": ["text"], "joint": ["image", "text"]}[task])
    steps = enough(sampler, 100)
    out = world.flat(sample(world, task, IMAGE_AND_TEXT, COUNT, steps, 0.0, SEEDS, sampler, condition))
    if sampler not in DETERMINISTIC:
        check(out, mean, covariance, slack=0.04)  # with fresh noise at every step the wrong start is soon forgotten
        return
    check(out, *reached(mean, covariance))
    check(out, mean, covariance, slack=0.1)  # the truth itself, with room for the wrong start


@pytest.mark.usefixtures("quick_noise")
@pytest.mark.parametrize("sampler", ONE_OF_EACH_KIND)
@pytest.mark.parametrize(("task", "drawn", "given"), [("t2i", "image", "text"), ("i2t", "text", "image")])
@pytest.mark.parametrize("condition_t", [0, 300, 700, 1000])
def test_noisy_condition_lies_between_conditional_and_marginal(world, sampler, task, drawn, given, condition_t):
    condition, value = fixed(world, given)
    alpha_bar = world.alpha_bar[condition_t]
    mean, covariance = world.conditional(drawn, given, alpha_bar.sqrt() * value, condition_t)
    i, j = world.index(drawn), world.index(given)
    own = alpha_bar * world.covariance[j][:, j] + (1 - alpha_bar) * torch.eye(len(j))
    gain = alpha_bar.sqrt() * world.covariance[i][:, j] @ torch.linalg.inv(own)
    mean, covariance = (mean[0], covariance) if sampler not in DETERMINISTIC else reached(mean[0], covariance)
    steps = enough(sampler, 60)
    out = sample(world, task, IMAGE_AND_TEXT, COUNT, steps, 0.0, SEEDS, sampler, condition, condition_t)
    check(world.flat(out), mean, covariance + (1 - alpha_bar) * gain @ gain.T, slack=0.04)


@pytest.mark.parametrize("condition_t", [100, 300])
def test_every_sample_noises_its_condition_anew(condition_t):
    """Where the given modality tells nearly all, a third or more of the spread of the samples is the condition's noise."""
    world = two_numbers(0.99)
    alpha_bar = world.alpha_bar[condition_t]
    value = torch.full((COUNT, 1), 0.6)
    out = sample(world, "t2i", world.modalities, COUNT, 60, 0.0, SEEDS, condition={"y": value}, condition_t=condition_t)
    mean, covariance = reached(*world.conditional("image", "text", alpha_bar.sqrt() * value[0].double(), condition_t))
    gain = alpha_bar.sqrt() * 0.99 * 0.64 / (alpha_bar * 0.64 + 1 - alpha_bar)
    noise = (1 - alpha_bar) * gain**2
    assert noise > 0.3 * (covariance + noise)
    check(out["x"].double(), mean, covariance + noise)


@pytest.mark.usefixtures("quick_noise")
@pytest.mark.parametrize("sampler", ONE_OF_EACH_KIND)
@pytest.mark.parametrize(("task", "steps_of"), [("i2t2i", ["text", "image"]), ("t2i2t", ["image", "text"])])
def test_chains_draw_each_step_given_the_one_before(world, sampler, task, steps_of):
    condition, value = fixed(world, steps_of[-1])
    out = sample(world, task, IMAGE_AND_TEXT, COUNT, enough(sampler, 60), 0.0, SEEDS, sampler, condition)
    mean, covariance = world.conditional(steps_of[0], steps_of[-1], value)
    name, given = steps_of[-1], steps_of[0]
    i, j = world.index(name), world.index(given)
    gain = world.covariance[i][:, j] @ torch.linalg.inv(world.covariance[j][:, j])
    final_mean, final_covariance = world.conditional(name, given, mean)
    drawn = {p.name: out[p.name] for m in IMAGE_AND_TEXT if m.name == name for p in m.parts}
    assert set(out) == {"latent", "clip", "text"}
    check(world.flat(drawn), final_mean[0], final_covariance + gain @ covariance @ gain.T, slack=0.1)


@pytest.mark.usefixtures("quick_noise")
@pytest.mark.parametrize("sampler", ONE_OF_EACH_KIND)
def test_gibbs_chain_keeps_the_joint_and_forgets_its_start(world, sampler):
    kept = sample(world, "gibbs", IMAGE_AND_TEXT, COUNT, enough(sampler, 60), 0.0, SEEDS, sampler, rounds=2)
    check(world.flat(kept), world.mean, world.covariance, slack=0.1)

    condition, value = fixed(world, "text")
    away = value[0] - world.mean[world.index("text")]
    distances = []
    for rounds in (1, 3):
        out = sample(
            world, "gibbs", IMAGE_AND_TEXT, COUNT, enough(sampler, 40), 0.0, SEEDS, sampler, condition, rounds=rounds
        )  # fmt: skip
        i, j = world.index("image"), world.index("text")
        forth = world.covariance[i][:, j] @ torch.linalg.inv(world.covariance[j][:, j])
        back = world.covariance[j][:, i] @ torch.linalg.inv(world.covariance[i][:, i])
        expected = torch.linalg.matrix_power(back @ forth, rounds) @ away
        found = out["text"].flatten(1).double().mean(0) - world.mean[j]
        std = world.covariance[j][:, j].diag().sqrt()
        assert ((found - expected).abs() / std).max() < 0.2
        distances.append(found.norm())
    assert distances[1] < distances[0]


def two_numbers(correlation: float, std: float = 0.8, means: tuple[float, float] = (0.5, -0.4)) -> GaussianWorld:
    modalities = tuple(Modality(name=n, parts=(Part(name=p, shape=(1,)),)) for n, p in (("image", "x"), ("text", "y")))
    covariance = std**2 * torch.tensor([[1.0, correlation], [correlation, 1.0]])
    return GaussianWorld(modalities, torch.tensor(means), covariance)


def guided(scale: float, c_mean: float, c_var: float, u_mean: float, u_var: float) -> tuple[float, float]:
    """Mean and standard deviation that guidance between two one-dimensional Gaussians ends in, from N(0, 1) at T.

    With X = x / a and V = sigma / a, eps = (1 + s) V (X - c_mean) / (c_var + V^2) - s V (X - u_mean) / (u_var + V^2) and
    dX / dV = eps, which is linear: its integrating factor is (c_var + V^2)^((1 + s) / 2) / (u_var + V^2)^(s / 2).
    """
    last = math.sqrt((1 - LAST) / LAST)
    v = np.linspace(0, last, 200_001)
    factor = (c_var + v**2) ** ((1 + scale) / 2) * (u_var + v**2) ** (-scale / 2)
    push = (1 + scale) * v * c_mean / (c_var + v**2) - scale * v * u_mean / (u_var + v**2)
    return factor[0] * np.trapezoid(push / factor, v), factor[0] / factor[-1] / math.sqrt(LAST)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize(("task", "drawn", "given"), [("t2i", "x", "y"), ("i2t", "y", "x")])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_conditional_guidance_ends_in_the_closed_form(sampler, task, drawn, given, scale):
    world = two_numbers(0.7)
    value = torch.full((COUNT, 1), 0.6)
    names = {"x": "image", "y": "text"}
    mean, covariance = world.conditional(names[drawn], names[given], value[:1].double())
    expected, std = guided(scale, mean.item(), covariance.item(), {"x": 0.5, "y": -0.4}[drawn], 0.64)
    steps = enough(sampler, 200)
    out = sample(world, task, world.modalities, COUNT, steps, scale, SEEDS, sampler, condition={given: value})[drawn]
    assert out.mean().item() == pytest.approx(expected, abs=5 * std / COUNT**0.5 + 0.01)
    assert out.std().item() == pytest.approx(std, rel=0.08)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_joint_guidance_ends_in_the_closed_form(scale):
    """With equal variances the joint decouples into sum and difference, each guided away from the same marginal.

    Along the flow: with fresh noise at every step a guided draw ends in another distribution, which is wider.
    """
    world = two_numbers(0.6)
    out = sample(world, "joint", world.modalities, COUNT, 200, scale, SEEDS, "dpm++2m")
    x, y = out["x"][:, 0], out["y"][:, 0]
    for drawn, mean, sign in (((x + y) / 2**0.5, 0.1, 1), ((x - y) / 2**0.5, 0.9, -1)):
        mean /= 2**0.5
        expected, std = guided(scale, mean, 0.64 * (1 + sign * 0.6), mean, 0.64)
        assert drawn.mean().item() == pytest.approx(expected, abs=5 * std / COUNT**0.5 + 0.01)
        assert drawn.std().item() == pytest.approx(std, rel=0.08)


def test_guidance_interval_saves_the_unconditional_half_outside(world):
    condition, _ = fixed(world, "text")
    condition = {"text": condition["text"][:2]}

    def draw(**settings):
        world.rows_seen = 0
        return sample(world, "t2i", IMAGE_AND_TEXT, 2, 20, 3.0, [1, 2], condition=condition, **settings)["latent"]

    always = draw()
    assert world.rows_seen == 20 * 2 * 2
    middle = draw(guidance_interval=(300, 700))
    assert world.rows_seen == 20 * 2 + 9 * 2  # timesteps 1 + 49.95 k, of which k = 6 .. 14 lie in 300 .. 700
    never = draw(guidance_interval=(0, 0))
    assert world.rows_seen == 20 * 2
    torch.testing.assert_close(draw(guidance_interval=(1, 1000)), always)
    assert not torch.allclose(middle, always) and not torch.allclose(middle, never)


@pytest.mark.parametrize(
    ("task", "draws"),
    # Rows a step with guidance: conditional and unconditional; a joint draw has two unconditional ones.
    [("t2i", [2]), ("joint", [3]), ("i2t2i", [2, 2]), ("t2i2t", [2, 2]), ("gibbs", [3, *[2] * 4])],
)
def test_every_draw_of_a_task_is_guided(world, task, draws):
    condition = {"t2i": "text", "t2i2t": "text", "i2t2i": "image"}.get(task)
    parts = {name: value[:2] for name, value in fixed(world, condition)[0].items()} if condition else {}
    world.rows_seen = 0
    sample(world, task, IMAGE_AND_TEXT, 2, 5, 3.0, [1, 2], condition=parts, rounds=2)
    assert world.rows_seen == 5 * 2 * sum(draws)


def test_the_descriptions_of_an_interpolation_are_guided_and_its_flow_is_not(world):
    images = {name: part[:2] for name, part in fixed(world, "image")[0].items()}
    world.rows_seen = 0
    sample(world, "interpolate", IMAGE_AND_TEXT, 2, 5, 3.0, [1] * 4, condition=images)
    assert world.rows_seen == 5 * (2 * 2 + 2 + 4)  # guided descriptions of two ends, their encodings, four frames


def test_the_frames_of_an_interpolation_are_drawn_by_the_sampler_that_was_asked_for():
    """Where the picture does not depend on the text, the descriptions that the sampler drew make no difference to it."""
    world = two_numbers(0.0)
    ends = {"x": torch.tensor([[0.3], [1.5]])}
    first, second = (
        sample(world, "interpolate", world.modalities, 2, 5, 0.0, [1] * 3, sampler, ends)["x"] for sampler in ("ddim", "dpm++2m")
    )
    assert (first - second).abs().min() > 1e-3


@pytest.mark.parametrize("guidance", [0.0, 7.0])
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_interpolation_goes_from_image_to_image_along_the_flow(world, sampler, guidance):
    """Against the flow in closed form: to the noise of both images given their texts, between, and back; see ``reached``."""
    parts = world.split(world.draw(2, seed=3))
    images = {"latent": parts["latent"].float(), "clip": parts["clip"].float()}
    out = sample(world, "interpolate", IMAGE_AND_TEXT, 8, enough(sampler, 200), guidance, [5] * 5, sampler, images)
    assert out["latent"].shape == (5, 1, 2, 2) and out["text"].shape == (5, 2, 2)
    for name, image in images.items():
        torch.testing.assert_close(out[name][[0, -1]], image, atol=0.03, rtol=0.03)

    mean, covariance = world.conditional("image", "text", out["text"].flatten(1).double())
    values, vectors = torch.linalg.eigh(covariance)
    shrink = vectors @ torch.diag((values / (values + (1 - LAST) / LAST)).sqrt()) @ vectors.T
    ends = mean[[0, -1]] + (world.flat(images) - mean[[0, -1]]) @ torch.linalg.inv(shrink)
    for frame, fraction in enumerate(torch.linspace(0, 1, 5).tolist()):
        start = torch.cat([slerp(*LAST**0.5 * part, fraction) for part in ends.split([4, 2], dim=1)]) / LAST**0.5
        expected = mean[frame] + shrink @ (start - mean[frame])
        found = world.flat({name: out[name][frame : frame + 1] for name in images})[0]
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


def test_a_draw_that_names_no_sampler_has_the_default_of_its_task(world):
    parts = {name: part[:2] for name, part in fixed(world, "image")[0].items()}
    for task, sampler in (("i2t", DEFAULT_SAMPLER), ("interpolate", "dpm++2m")):
        plain, named = (sample(world, task, IMAGE_AND_TEXT, 2, 5, 0.0, [1, 1], by, parts) for by in (None, sampler))
        assert all(torch.equal(plain[name], named[name]) for name in plain)


def test_slerp_keeps_the_norm_of_unit_vectors_and_its_ends():
    a, b = torch.eye(3)[0], torch.eye(3)[1]
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6), 0.0]))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)


def test_tasks_of_three_modalities_draw_the_true_distribution():
    modalities = (*IMAGE_AND_TEXT, Modality(name="sound", parts=(Part(name="waves", shape=(2,)),)))
    world = GaussianWorld.random(modalities, seed=2)
    check(world.flat(sample(world, Task(sample=("text", "sound")), modalities, COUNT, 100, 0.0, SEEDS, "dpm++2m")),
          *reached(*world.marginal("text", "sound")))  # fmt: skip
    condition, value = fixed(world, "image", "sound")
    mean, covariance = world.conditional("text", ("image", "sound"), value)
    task = Task(sample=("text",), given=("image", "sound"))
    drawn = sample(world, task, modalities, COUNT, 100, 0.0, SEEDS, "dpm++2m", condition)
    check(world.flat(drawn), *reached(mean[0], covariance))
    kept = sample(world, "gibbs", modalities, COUNT, 60, 0.0, SEEDS, "dpm++2m", rounds=1)
    check(world.flat(kept), *world.marginal("image", "text", "sound"), slack=0.1)


@pytest.fixture(scope="module")
def network() -> UViT:
    torch.manual_seed(0)
    model = UViT(UViTConfig(width=32, depth=2, heads=2, modalities=IMAGE_AND_TEXT, position_std=0.5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize(
    ("task", "sampler"), [*((task, "dpm++2m") for task in TASK_NAMES), ("joint", "era"), ("joint", "analytic-dpm")]
)
def test_batch_size_changes_nothing(network, task, sampler):
    seeds = [11, 12, 13, 14, 15] if task != "interpolate" else [11] * 5
    condition = {}
    if task in ("i2t", "i2t2i", "interpolate"):
        rows = 2 if task == "interpolate" else 5
        condition = {"latent": torch.randn(rows, 1, 2, 2), "clip": torch.randn(rows, 2)}
    elif task in ("t2i", "t2i2t"):
        condition = {"text": torch.randn(5, 2, 2)}
    runs, calls = [], []
    hook = network.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0]["latent"])))
    for batch in (1, 2, 5):
        calls.clear()
        runs.append(sample(network, task, IMAGE_AND_TEXT, batch, 8, 2.0, seeds, sampler, condition, rounds=2))
        # Guidance adds a row for each modality that is drawn.
        assert max(calls) <= batch * (3 if task in ("joint", "gibbs") else 2)
    hook.remove()
    for run in runs[1:]:
        for name, part in run.items():
            torch.testing.assert_close(part, runs[0][name], atol=1e-4, rtol=1e-4)


def test_a_sample_depends_on_its_own_seed_only(network):
    first = sample(network, "joint", IMAGE_AND_TEXT, 8, 8, 1.0, [1, 2, 3])
    again = sample(network, "joint", IMAGE_AND_TEXT, 8, 8, 1.0, [3, 9])
    torch.testing.assert_close(first["text"][2], again["text"][0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first["text"][0], first["text"][1])


def test_grids_of_another_size_and_not_square_are_drawn(network):
    wide = resized(IMAGE_AND_TEXT, {"latent": (1, 2, 6)})
    one, many = (sample(network, "joint", wide, batch, 8, 1.0, [1, 2, 3]) for batch in (1, 3))
    assert one["latent"].shape == (3, 1, 2, 6)
    for name, part in one.items():
        torch.testing.assert_close(many[name], part, atol=1e-4, rtol=1e-4)


def test_wrong_requests_are_named(network):
    def draw(task="t2i", **settings):
        wanted = {"condition": {"text": torch.zeros(1, 2, 2)}, **settings}
        return sample(network, task, IMAGE_AND_TEXT, 1, 4, 0.0, [1], **wanted)

    with pytest.raises(ValueError, match="no task named 't2v'; there are t2i"):
        draw("t2v")
    with pytest.raises(ValueError, match="no sampler named 'euler'; there are dpm"):
        draw(sampler="euler")
    with pytest.raises(ValueError, match="the condition lacks text"):
        draw(condition={})
    with pytest.raises(ValueError, match=r"condition text: \(2, 2, 2\) where t2i takes \(1, 2, 2\)"):
        draw(condition={"text": torch.zeros(2, 2, 2)})
    with pytest.raises(ValueError, match=r"condition text: \(1, 2, 3\) where t2i takes \(1, 2, 2\)"):
        draw(condition={"text": torch.zeros(1, 2, 3)})
    with pytest.raises(ValueError, match="condition caption: no such part; there are latent, clip, text"):
        draw(condition={"caption": torch.zeros(1, 2, 2)})
    for interval in ((700, 300), (0, 1001), (-1, 5)):
        with pytest.raises(ValueError, match=r"guidance_interval must be two timesteps in 0 .. 1000, the lower one first"):
            draw(guidance_interval=interval)
    with pytest.raises(ValueError, match="batch and rounds of 1 or more, not 1, 1 and 0"):
        draw("gibbs", condition={}, rounds=0)
    other = tuple(Modality(name=name, parts=(Part(name=name, shape=(2,)),)) for name in ("picture", "sound"))
    with pytest.raises(ValueError, match="different ones of the modalities picture, sound"):
        sample(network, "interpolate", other, 1, 4, 0.0, [1], condition={"picture": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="condition_t must be in 0 .. 1000"):
        draw(condition_t=1001)
    for task in ("joint", "i", "i2t2i", "t2i2t", "gibbs", "interpolate"):
        with pytest.raises(ValueError, match=f"condition_t goes with one draw that is given something, not with {task}"):
            draw(task, condition_t=5)
    with pytest.raises(ValueError, match="'dpm\\+\\+2m-sde' cannot, dpm\\+\\+2m, dpm\\+\\+3m, unipc, ddim, era can"):
        draw("interpolate", sampler="dpm++2m-sde")
    with pytest.raises(ValueError, match="interpolate is given two images"):
        draw("interpolate", condition={})
    with pytest.raises(ValueError, match="a task draws and is given"):
        draw(Task(sample=("sound",)))
