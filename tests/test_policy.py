import diffusers
import pytest
import torch
from runs import largest_difference, metrics, run_jobs, short_run, weights
from safetensors.torch import load_file, save_file

from lora import LinearApart, add_lora, lora_weights, merge_lora
from model import load_wan
from policy import Policy
from run import Processes
from sample import generator, sampling_of
from train import parse_arguments


@pytest.fixture(scope="module")
def arguments(checkpoint, twins):
    return [*short_run(checkpoint, twins), "--save-every", "2"]


# ------------------------------------------------------------------------ one run, on any number of processes

BY_ONE = ["--batch", "1"]
GENERAL = ["--meta", "0", "--recon", "0", "--traj", "0"]  # how all judges' terms are shared, "one" and "by one" show
# evaluated between steps, which swaps the averaged weights in and out again
FULL = [*BY_ONE, *GENERAL, "--full", "--lr", "1e-4", "--groups", "2", "--eval-every", "2", "--eval-prompts", "2"]
SHARDED = ["--parallel", "fsdp"]
HYBRID = [*SHARDED, "--shard-size", "2"]
BRANCHING = [*BY_ONE, *GENERAL, "--pooled", "--shared", "--released", "--groups", "2"]
JOBS = {  # name: processes, options
    "one": (1, []),
    "four": (4, []),
    "sharded": (2, SHARDED),
    "by one": (1, BY_ONE),
    "by one, three": (3, BY_ONE),  # whose processes split groups
    "by one, sharded": (4, [*BY_ONE, *SHARDED]),
    "by one, hybrid": (4, [*BY_ONE, *HYBRID]),
    "branching": (1, BRANCHING),
    "branching, three": (3, BRANCHING),
    "branching, sharded": (2, [*BRANCHING, *SHARDED]),
    "full": (1, FULL),
    "full, two": (2, FULL),
    "full, sharded": (2, [*FULL, *SHARDED]),
    "full, hybrid": (4, [*FULL, *HYBRID])}
SAME = [("one", other) for other in ("four", "sharded")]
SAME += [(name.split(",")[0], name) for name in JOBS if "," in name]
ROLLED = ("prompts", "meta", "recon", "traj", "general", "total", "total_std", "advantage_abs", "motion",
          "masked")


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder of JOBS' runs, all done."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, (world, options) in JOBS.items():
        jobs.append(dict(args=[*arguments, "--runs", str(folder), "--name", name, *options], world=world))
    codes, err = run_jobs(jobs, at_once=2)
    assert codes == [[0] * world for world, _ in JOBS.values()], err[-3000:]
    return folder


@pytest.mark.parametrize("name", ["one", "branching", "full"])
def test_a_run_moves_away_from_its_reference(finished, name):
    rows, state = metrics(finished / name), weights(finished / name)
    assert [row["phase"] for row in rows] == ["main", "main", "dynamic"]
    assert rows[0]["kl"] == 0 < rows[2]["kl"]
    assert max(state[key].abs().max() for key in state if key.startswith("adam.exp_avg_sq")) > 0


@pytest.mark.parametrize("name, other", SAME)
def test_any_number_of_processes_makes_the_same_run(finished, name, other):
    """Rollouts and rewards of the first step bit for bit, and all weights at the end to 1e-6."""
    expected, found = metrics(finished / name)[0], metrics(finished / other)[0]
    assert {key: found[key] for key in ROLLED} == {key: expected[key] for key in ROLLED}
    assert largest_difference(weights(finished / other), weights(finished / name)) <= 1e-6


def test_one_video_at_a_time_is_the_same_step_but_for_rounding(finished):
    alone, together = metrics(finished / "by one")[0], metrics(finished / "one")[0]
    assert alone["grad"] == pytest.approx(together["grad"], rel=1e-3)
    assert alone["total"] == pytest.approx(together["total"], abs=1e-4)


@pytest.mark.parametrize("other", ["four", "sharded"])
def test_any_number_of_processes_exports_the_same_adapter(finished, other):
    expected = load_file(finished / "one" / "lora.safetensors")
    assert largest_difference(load_file(finished / other / "lora.safetensors"), expected) <= 1e-6


@pytest.mark.parametrize("name, options", [("one", []), ("full", [*FULL, *SHARDED])])
def test_a_run_goes_on_with_another_number_of_processes(finished, arguments, tmp_path, name, options):
    """Two of three steps on two, the third on one."""
    base = [*arguments, *options, "--runs", str(tmp_path), "--name", "moved"]
    codes, err = run_jobs([dict(args=[*base, "--total-steps", "2"], world=2), dict(args=base)])
    assert codes == [[0, 0], [0]], err[-3000:]
    assert [row["step"] for row in metrics(tmp_path / "moved")] == [0, 1, 2]
    assert largest_difference(weights(tmp_path / "moved"), weights(finished / name)) <= 1e-6


@pytest.mark.parametrize("name", ["full", "full, two", "full, sharded", "full, hybrid"])
def test_a_full_run_exports_a_model_of_its_averaged_weights(finished, checkpoint, name):
    """With the base's other parts: it loads as any model does, and Diffusers' pipeline takes it as well."""
    folder = finished / name / "model"
    wan, base, average = load_wan(folder), load_wan(checkpoint), weights(finished / name)
    found = dict(wan.dit.named_parameters())
    assert found.keys() == dict(base.dit.named_parameters()).keys()
    assert all(torch.equal(values, average[f"average.{key}"]) for key, values in found.items())
    assert not torch.equal(wan.dit.proj_out.weight, base.dit.proj_out.weight)
    assert torch.equal(wan.vae.state_dict()["decoder.conv_in.weight"], base.vae.state_dict()["decoder.conv_in.weight"])
    assert sampling_of(folder) == sampling_of(checkpoint) and wan.shift == base.shift
    if name == "full":
        theirs = diffusers.WanPipeline.from_pretrained(folder).transformer.state_dict()
        assert all(torch.equal(theirs[key], values) for key, values in found.items())


# --------------------------------------------------------------------------------------------- in one process

@pytest.fixture
def policy(arguments):
    c = parse_arguments([*arguments, "--guidance", "2", "--ema-every", "2", "--ema-decay", ".75"])
    return Policy(c, Processes("cpu"))


def test_options_reach_the_adapter_the_optimiser_and_the_weights(arguments, tmp_path):
    given = "--beta1 .8 --beta2 .95 --weight-decay .01 --lora-rank 3 --lora-alpha 6 --seed 5 --dtype bfloat16"
    policy = Policy(parse_arguments([*arguments, "--runs", str(tmp_path), *given.split()]), Processes("cpu"))
    group, = policy.optimiser.param_groups
    assert (group["betas"], group["weight_decay"]) == ((.8, .95), .01)
    layer = policy.wan.dit.blocks[0].attn1.to_q
    bound = layer.linear.in_features ** -.5
    drawn = torch.empty(3, layer.linear.in_features).uniform_(-bound, bound, generator=generator(5, "lora"))
    assert layer.scale == 2 and torch.equal(layer.lora_A, drawn)
    assert layer.linear.weight.dtype == policy.embedding("push_in a box").dtype == torch.bfloat16
    assert {p.dtype for p in policy.trained.values()} == {torch.float32}


def some_gradients(policy, seed):
    for name, p in policy.trained.items():
        p.grad = torch.randn(p.shape, generator=generator(seed, name))


@torch.no_grad()
def test_the_velocity_is_guided_towards_the_prompt(policy):
    x, t = torch.randn(2, 4, 2, 4, 4), torch.full((2,), 800.0)
    conditional, unconditional = (policy.wan.dit(x, t, policy.embedding(text).expand(2, -1, -1))
                                  for text in ("push_in a red box", ""))
    found = policy.velocity("push_in a red box")(x, torch.tensor(.8))
    assert torch.allclose(found, unconditional + 2 * (conditional - unconditional), atol=1e-4)
    assert not torch.allclose(found, conditional, atol=1e-3)


def test_the_average_is_what_is_exported(policy, tmp_path):
    some_gradients(policy, 0)
    policy.step(lr=.1, norm=1.0)
    policy.update_average(1)
    policy.export(tmp_path)
    found, live = load_file(tmp_path / "lora.safetensors"), lora_weights(policy.wan.dit)
    expected = lora_weights(policy.wan.dit, policy.average)
    for name in live:
        assert torch.equal(found[name], expected[name]) and not torch.equal(found[name], live[name])


def test_the_order_of_the_groups_does_not_show_in_the_gradient(policy):
    """Sums are in float64: float32 ones would differ in their last bits."""
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        for seed in order:
            some_gradients(policy, seed)
            policy.collect_gradients()
        norm = policy.sum_gradients()
        results.append((norm, [p.grad.clone() for p in policy.trained.values()]))
    (norm, gradients), (norm_again, gradients_again) = results
    assert norm == norm_again > 1
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))
    clipped = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert clipped == pytest.approx(policy.c.grad_clip, rel=1e-4)


def test_the_average_follows_every_few_steps_and_is_left_again(policy):
    name = next(iter(policy.trained))
    start = policy.trained[name].detach().clone()
    some_gradients(policy, 0)
    policy.step(lr=.1, norm=1.0)
    moved = policy.trained[name].detach().clone()
    assert not torch.equal(moved, start)
    policy.update_average(0)
    assert torch.equal(policy.average[name], start)
    policy.update_average(1)
    assert torch.allclose(policy.average[name], start + (moved - start) / 4)
    with policy.averaged():
        assert torch.equal(policy.trained[name], policy.average[name])
    assert torch.equal(policy.trained[name], moved)


def test_the_velocity_of_the_reference_stays_when_the_weights_move(policy):
    x, sigma = torch.randn(3, 4, 2, 4, 4), torch.tensor(.8)
    with torch.no_grad():
        whole = policy.velocity("push_in a red box")(x, sigma)
        some_gradients(policy, 0)
        policy.step(lr=.1, norm=1.0)
        assert (policy.velocity("push_in a red box")(x, sigma) - whole).abs().max() > 1e-3
        assert torch.equal(policy.reference_velocity("push_in a red box")(x, sigma), whole)


# --------------------------------------------------------------------------------------------------- adapters

@pytest.fixture
def adapted(checkpoint):
    """A model with a random adapter of rank 4."""
    wan = load_wan(checkpoint)
    with torch.no_grad():
        for name, p in add_lora(wan.dit, 4, 8.0, generator("lora")).items():
            if name.endswith("lora_B"):
                p.normal_(std=.1, generator=generator(name))
    return wan


def dit_output(dit):
    """Of one fixed input."""
    draw = generator("input")
    x, text = torch.randn(2, 4, 2, 2, 4, generator=draw), torch.randn(2, 5, 32, generator=draw)
    with torch.no_grad():
        return dit(x, torch.tensor([500.0, 20]), text)


def test_a_bfloat16_run_keeps_its_first_adapter_apart(arguments, adapted, tmp_path):
    """Added to bfloat16 weights, most of it would be rounded away."""
    save_file(lora_weights(adapted.dit), tmp_path / "lora.safetensors")
    given = ["--runs", str(tmp_path), "--lora", str(tmp_path), "--dtype", "bfloat16"]
    policy = Policy(parse_arguments([*arguments, *given]), Processes("cpu"))
    assert isinstance(policy.wan.dit.blocks[0].attn1.to_q.linear, LinearApart)
    assert policy.optimiser.param_groups[0]["eps"] == 1e-8


def test_a_run_starts_from_an_adapter_and_exports_both(arguments, checkpoint, adapted, tmp_path):
    """A run of learning rate 0 on a base exports the base; one that learns, the base and what it learned, as
    one adapter."""
    save_file(lora_weights(adapted.dit), tmp_path / "lora.safetensors")
    base = [*arguments, "--runs", str(tmp_path), "--total-steps", "1"]
    base += ["--lora-rank", "2", "--lora", str(tmp_path), *GENERAL]
    still, moved = [*base, "--name", "still", "--lr", "0"], [*base, "--name", "moved"]
    codes, err = run_jobs([dict(args=still), dict(args=moved)], at_once=2)
    assert codes == [[0], [0]], err[-3000:]
    exported = load_file(tmp_path / "still" / "lora.safetensors")
    assert exported["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape[0] == 4 + 2

    outputs = {}
    for name in ("still", "moved"):
        for layout in ("lora", "lora_comfyui"):
            wan = load_wan(checkpoint)
            merge_lora(wan.dit, tmp_path / name / f"{layout}.safetensors")
            outputs[name, layout] = dit_output(wan.dit)
        assert (outputs[name, "lora"] - outputs[name, "lora_comfyui"]).abs().max() < 1e-5
    expected = dit_output(adapted.dit)
    assert (outputs["still", "lora"] - expected).abs().max() < 1e-5
    assert (outputs["moved", "lora"] - expected).abs().max() > 1e-4
    assert metrics(tmp_path / "still")[0]["kl"] == 0  # the reference is the base
