"""Training: openpi's loss on one prefix pass, data that resumes, a loop that goes on where it stopped."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import DATA, SETTINGS, demo, equal, tiny, two_steps

from safe_pruner_jax.cli import train
from safe_pruner_jax.model import config as sizes
from safe_pruner_jax.model import flow, pi0
from safe_pruner_jax.model.params import draw_params, param_shapes
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import RobotIO
from safe_pruner_jax.robots.transforms import Tokenizer
from safe_pruner_jax.training import augment, data, imitation, loop

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def samples():
    config = dataclasses.replace(get_config("mini_libero"), model=tiny())
    demos = [demo(9, 0), demo(6, 1, prompt="open the top drawer"), demo(7, 2)]
    return data.make_samples(demos, config, data.norm_stats(demos), Tokenizer(DATA / "toy_sentencepiece.model", 200))


# loss


@pytest.mark.parametrize("pi05", [True, False])
def test_flow_loss_is_openpis_formula_for_every_draw(pi05):
    config = tiny(depth=2, pi05=pi05)
    params = draw_params(config)
    rng = np.random.default_rng(0)
    B, draws, shape = 2, 3, (config.action_horizon, config.action_dim)
    images = rng.integers(0, 255, (B, 2, 28, 28, 3), np.uint8)
    cameras, tokens = np.array([[True, True], [True, False]]), rng.integers(0, 99, (B, 5)).astype(np.int32)
    mask = np.arange(5) < np.array([[5], [3]])
    state, actions = rng.normal(size=(B, config.action_dim)).astype(np.float32), rng.normal(size=(B, *shape))
    noise = rng.normal(size=(B, draws, *shape)).astype(np.float32)
    times = rng.uniform(0.1, 1, (B, draws)).astype(np.float32)
    observed = (images, cameras, tokens, mask, state)

    @jax.jit
    def losses(params):
        prefix = flow.prefix(params, config, *observed[:4])
        return flow.flow_loss(params, config, prefix, state, actions, times, noise)

    loss = losses(params)
    assert loss.shape == (B, draws, config.action_horizon)

    @jax.jit
    def velocity(row, x_t, at):
        weights = pi0.prepare(params, config)
        rows = pi0.embed_prefix(weights, config, *row[:4])
        _, segments, _ = pi0.prefix_layers(weights, config, rows, range(config.depth))
        return pi0.velocity(weights, config, pi0.Prefix(segments, rows.count), row[4], x_t[None], at)[0][0]

    for b in range(B):
        row = [a[b : b + 1] for a in observed]
        for d in range(draws):
            x_t = times[b, d] * noise[b, d] + (1 - times[b, d]) * actions[b]
            at = jax.tree.map(lambda a: a[0], pi0.schedule(params, config, [times[b, d]]))
            v = velocity(row, x_t.astype(np.float32), at)
            want = np.square(v - (noise[b, d] - actions[b])).mean(-1)
            np.testing.assert_allclose(loss[b, d], want, rtol=2e-3)


def test_times_are_betas():
    times = np.asarray(flow.draw_times(jax.random.key(0), (50_000,)))
    assert times.min() >= 0.001 and times.max() <= 1.0
    # Beta(1.5, 1): mean 0.6, distribution function t^1.5
    assert times.mean() == pytest.approx(0.6 * 0.999 + 0.001, abs=5e-3)
    for t in (0.2, 0.5, 0.8):
        assert (times <= t * 0.999 + 0.001).mean() == pytest.approx(t**1.5, abs=1e-2)


# data


def test_samples_of_sparse_frames_are_the_dense_ones_of_those_steps(samples):
    config = dataclasses.replace(get_config("mini_libero"), model=tiny())
    tokenizer = Tokenizer(DATA / "toy_sentencepiece.model", 200)
    dense = demo(8, 3)
    sparse = SimpleNamespace(**vars(dense) | {"every": 3, "images": {k: v[::3] for k, v in dense.images.items()}})
    stats = data.norm_stats([dense])
    a, b = (data.make_samples([d], config, stats, tokenizer) for d in (dense, sparse))
    assert len(b.prompt) == 3
    for name in ("frames", "state", "actions", "prompt", "episode"):
        np.testing.assert_array_equal(getattr(a, name)[::3], getattr(b, name)[:])


def test_the_state_is_in_the_prompt_as_it_is_when_served():
    config = dataclasses.replace(get_config("mini_libero"), model=tiny(discrete_state_input=True))
    tokenizer = Tokenizer(DATA / "toy_sentencepiece.model", 200)
    sparse = SimpleNamespace(**vars(demo(9, 4)) | {"every": 2})
    sparse.images = {k: v[::2] for k, v in sparse.images.items()}
    stats = data.norm_stats([sparse])
    made = data.make_samples([sparse], config, stats, tokenizer)
    served = RobotIO(config, stats, tokenizer)
    assert len(set(made.prompt)) == 5
    for step in range(5):
        request = {k: v[step] for k, v in sparse.images.items()}
        request |= {"observation/state": sparse.state[2 * step], "prompt": sparse.prompt}
        row = made.prompt[step]
        assert made.tokens[row][made.token_mask[row]].tolist() == served.prepare(request)[0].tokens.tolist()


def test_chunks_follow_the_step_and_repeat_the_last_action(samples):
    assert samples.actions.shape == (22, 4, 8) and samples.frames.shape == (22, 2, 28, 28, 3)
    np.testing.assert_array_equal(samples.actions[0, 1:], samples.actions[1, :3])
    np.testing.assert_array_equal(samples.actions[8], np.broadcast_to(samples.actions[8, 0], (4, 8)))
    assert (samples.actions[:, :, 7:] == 0).all()  # padding of the network's width
    assert samples.tokens[samples.prompt[0]].tolist() != samples.tokens[samples.prompt[10]].tolist()
    assert samples.prompt[0] == samples.prompt[-1] and samples.episode.tolist() == [0] * 9 + [1] * 6 + [2] * 7


def test_validation_holds_out_whole_demonstrations(samples):
    training, held = data.split(samples, 0.34)
    assert set(training) | set(held) == set(range(22)) and not set(training) & set(held)
    assert not set(samples.episode[training]) & set(samples.episode[held])


def test_batches_are_whole_passes_and_can_be_skipped():
    one = data.batches(np.arange(10), 4, seed=3)
    first = [next(one) for _ in range(5)]
    assert sorted(np.concatenate(first)[:10]) == sorted(np.concatenate(first)[10:]) == list(range(10))
    later = data.batches(np.arange(10), 4, seed=3, start=3)
    np.testing.assert_array_equal(next(later), first[3])


def test_frames_of_another_size_and_no_demonstration_are_refused():
    config, tokenizer = get_config("mini_libero"), Tokenizer(DATA / "toy_sentencepiece.model", 200)
    stats = data.norm_stats([demo(5, 0)])
    side = config.model.image_size
    with pytest.raises(ValueError, match=rf"expected frames \[T, {side}, {side}, 3\], got \[5, 28"):
        data.make_samples([demo(5, 0)], config, stats, tokenizer)
    with pytest.raises(ValueError, match="at least one demonstration"):
        data.make_samples([], config, stats, tokenizer)


def test_a_constant_value_is_not_blown_up():
    still = demo(50, 0)
    still.actions[:, 6] = -1.0
    stats = data.norm_stats([still])["actions"]
    assert stats.q99[6] - stats.q01[6] == pytest.approx(2.0)


# augmentation


def test_augmentation_moves_outside_cameras_and_recolours_all():
    ramp = np.broadcast_to(np.arange(56, dtype=np.uint8)[:, None, None] * 4, (56, 56, 3))
    images = np.stack([np.stack([ramp, ramp])] * 3)
    out = np.asarray(augment.augment(jax.random.key(0), images, moving=(False, True)))
    assert out.shape == images.shape and out.dtype == np.float32 and np.abs(out).max() <= 1
    # a wrist camera keeps its geometry: every row stays constant; a turned one does not
    assert np.ptp(out[:, 1], axis=2).max() < 1e-5
    assert np.ptp(out[:, 0], axis=2).max() > 1e-3
    assert not np.allclose(out[0, 1], out[1, 1])  # every sample has its own colours


# loop


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(samples, tmp_path):
    config, rows = tiny(), []
    whole, step = imitation.imitate(config, samples, draw_params(config), SETTINGS, tmp_path / "a", on_log=rows.append)
    assert step == 6 and [r["step"] for r in rows if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in rows if "validation" in r] == [3, 6]

    class Stop(Exception):
        pass

    def stop(row):
        if row.get("step") == 4:
            raise Stop

    with pytest.raises(Stop):
        imitation.imitate(config, samples, draw_params(config), SETTINGS, tmp_path / "b", on_log=stop)
    resumed, step = imitation.imitate(config, samples, draw_params(config, seed=9), SETTINGS, tmp_path / "b")
    assert step == 6
    equal(whole, resumed)


def test_the_rate_falls_over_the_whole_run_or_over_its_end():
    s = loop.Settings(steps=1000, warmup=100, learning_rate=1.0)
    at = lambda s, *steps: [round(float(loop.learning_rate(s)(i)), 3) for i in steps]
    assert at(s, 0, 50, 100, 550, 1000) == [0, 0.5, 1, 0.55, 0.1]
    assert at(dataclasses.replace(s, decay=200), 50, 100, 799, 900, 1000, 2000) == [0.5, 1, 1, 0.55, 0.1, 0.1]


def test_it_learns(samples, tmp_path):
    config, rows = tiny(), []
    settings = dataclasses.replace(SETTINGS, steps=60, augment=False, validation=0.0, log_every=10, save_every=60)
    imitation.imitate(config, samples, draw_params(config), settings, tmp_path, on_log=rows.append)
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < 0.6 * losses[0]


def test_a_model_of_full_width_trains_with_the_same_step():
    config = sizes.pi05(action_horizon=10, discrete_state_input=False)
    prefix, expert = (dataclasses.replace(part, depth=2) for part in (config.prefix, config.expert))
    config = config.replace(prefix=prefix, expert=expert, vision=dataclasses.replace(config.vision, depth=2))
    s = loop.Settings(batch=2, draws=1)
    shape = jax.ShapeDtypeStruct
    batch = imitation.Batch(
        images=shape((2, 2, 224, 224, 3), jnp.uint8),
        state=shape((2, 32), jnp.float32),
        actions=shape((2, 10, 32), jnp.float32),
        tokens=shape((2, 32), jnp.int32),
        token_mask=shape((2, 32), bool),
    )
    state = jax.eval_shape(lambda p: loop.init_state(p, s), param_shapes(config))
    objective = imitation.flow_objective(config, s)
    after, metrics = jax.eval_shape(lambda st, b: loop.train_step(objective, s, st, b), state, batch)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, after)
    assert all(jax.tree.leaves(same)) and metrics["loss"].shape == ()


@pytest.mark.nightly
def test_two_devices_give_the_result_of_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    run = subprocess.run(
        [sys.executable, str(DATA.parent / "tiny_training.py"), str(tmp_path / "two")],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(DATA.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[-1] == "2" and len(jax.devices()) == 1
    np.testing.assert_allclose(np.load(tmp_path / "two" / "w.npy"), two_steps(tmp_path / "one"), atol=2e-5)


def test_a_batch_that_does_not_divide_is_refused(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]] * 3)
    with pytest.raises(ValueError, match="multiple of the 3 devices, got 4"):
        imitation.imitate(tiny(), samples, {}, SETTINGS, tmp_path)


# command


@pytest.mark.nightly
def test_the_command_trains_exports_and_goes_on_at_another_image_size(tmp_path, monkeypatch):
    from safe_pruner_jax.cli.train import Train, run_train
    from safe_pruner_jax.libero import demonstrations
    from safe_pruner_jax.policy.loading import load_policy
    from safe_pruner_jax.robots import configs

    config = dataclasses.replace(get_config("mini_libero"), model=tiny())
    monkeypatch.setitem(configs.CONFIGS, "mini_libero", config)
    made = [demo(9, 0), demo(6, 1)]
    file = tmp_path / "bowl_demo.hdf5"
    numbers = [(d.images, d.state.astype(np.float32), d.actions.astype(np.float32), d.prompt) for d in made]
    demonstrations.write_demos(file, [demonstrations.Demo(*n, seed=i) for i, n in enumerate(numbers)])
    settings = dataclasses.replace(SETTINGS, steps=2, augment=False)
    run_train(Train(data=(file,), out=tmp_path / "small", settings=settings))
    assert (tmp_path / "small" / "curves.png").stat().st_size > 1000
    checkpoint = tmp_path / "small" / "checkpoint"
    run_train(Train(data=(file,), out=tmp_path / "large", init=str(checkpoint), image_size=56, settings=settings))
    monkeypatch.setitem(configs.CONFIGS, "mini_libero", dataclasses.replace(config, model=tiny(image_size=56)))
    policy = load_policy("mini_libero", tmp_path / "large" / "checkpoint", prompt_lengths=(16,))
    request = policy.transform.example(np.random.default_rng(0))
    assert np.isfinite(policy.session().infer(request)["actions"]).all()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected files or LeRobot datasets that exist, got .*none.hdf5; make some"):
        list(train.read(tmp_path / "none.hdf5", get_config("mini_libero")))
