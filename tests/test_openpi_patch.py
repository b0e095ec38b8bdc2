"""`openpi_patch` around a policy with openpi's interface, against openpi's own numbers."""

import json
import socket
import textwrap
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import openpi_standin
import pytest
from flax import nnx, traverse_util
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from tiny_policy import request

import openpi_patch.serve
from openpi_patch import PatchError, prune
from openpi_patch.policy import OpenpiTransform
from openpi_patch.weights import parameters, shared, sizes
from safe_pruner_jax.robots.robots import DROID, LIBERO
from safe_pruner_jax.serving import running

DATA = Path(__file__).parent / "data"
PROMPTS = (16,)


@pytest.fixture(scope="module")
def openpi():
    return openpi_standin.Policy(metadata={"reset_pose": [0.0, 1.0]})


@pytest.fixture(scope="module")
def pruned(openpi):
    return prune(openpi, "safe", keep=0.2, threshold=-1.0, prompt_lengths=PROMPTS)


def test_unpruned_it_gives_openpis_own_actions(openpi):
    arrays = np.load(DATA / "openpi_pi05_libero_e2e.npz")
    meta = json.loads((DATA / "openpi_pi05_libero_e2e.json").read_text())
    asked = {f"observation/{k}": arrays[f"in/{k}"] for k in ("image", "wrist_image", "state")} | {
        "prompt": meta["prompt"]
    }
    want = arrays["discrete_false/actions"]
    full = prune(openpi, "full", prompt_lengths=PROMPTS)
    for noise in (arrays["in/noise"], arrays["in/noise"][None]):
        reply = full.infer(asked, noise=noise)
        assert reply["actions"].shape == want.shape and reply["actions"].dtype == want.dtype
        np.testing.assert_allclose(reply["actions"], want, atol=1e-4 * np.ptp(want))


def test_without_noise_it_draws_what_openpi_draws():
    make = lambda: openpi_standin.Policy(sample_kwargs={"num_steps": 2}, rng=jax.random.key(3))
    full, openpi = prune(make(), "full", prompt_lengths=PROMPTS), make()
    for step in range(2):
        want = openpi.infer(request(0, step))["actions"]
        np.testing.assert_allclose(full.infer(request(0, step))["actions"], want, atol=1e-4 * np.ptp(want))
        full.reset()  # starts a new episode, not the noise


def test_it_keeps_openpis_interface(openpi, pruned):
    assert pruned.metadata is openpi.metadata
    first, second = pruned.infer(request(0)), pruned.infer(request(0, 1))
    assert (first["pruning"]["kept"], second["pruning"]["kept"]) == (512, 102)
    pruned.reset()
    assert pruned.infer(request(0))["pruning"]["keyframe"]


def test_the_given_request_is_left_as_it_was(pruned):
    asked = request(0)
    before = {k: np.array(v) for k, v in asked.items()}
    pruned.infer(asked)
    assert list(asked) == list(before) and all(np.array_equal(asked[k], v) for k, v in before.items())


def test_unchanged_leaves_share_openpis_buffers(openpi, pruned):
    params = parameters(openpi._model)
    flat = traverse_util.flatten_dict(params, sep="/")
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(openpi._model, nnx.Param))}
    assert {leaf.unsafe_buffer_pointer() for leaf in flat.values()} == held, "taking the parameters copied them"
    common = shared(params, pruned.policy.engine.weights)
    assert {"PaliGemma/llm/embedder/input_embedding", "action_in_proj/kernel", "action_out_proj/kernel"} <= set(common)
    assert not any("/layers/" in path for path in common)  # split and fused


def test_freed_there_is_one_copy_and_the_given_policy_is_spent():
    spent = openpi_standin.Policy()
    leaves = traverse_util.flatten_dict(parameters(spent._model), sep="/")
    policy = prune(spent, "full", prompt_lengths=PROMPTS)
    shared_before = shared(parameters(spent._model), policy.policy.engine.weights)
    policy = prune(spent, "full", prompt_lengths=PROMPTS, free=True)
    assert policy.infer(request(0))["actions"].shape == (10, 7)
    deleted = {path for path, leaf in leaves.items() if leaf.is_deleted()}
    assert "PaliGemma/llm/layers/mlp/linear" in deleted and "PaliGemma/llm/embedder/input_embedding" not in deleted
    assert not deleted & set(shared_before)


def test_sample_arguments_are_respected():
    few = prune(openpi_standin.Policy(sample_kwargs={"num_steps": 3}), "full", prompt_lengths=PROMPTS)
    assert few.policy.engine.weights.schedule.times.shape == (3,)
    with pytest.raises(PatchError, match="expected num_steps alone, got temperature"):
        prune(openpi_standin.Policy(sample_kwargs={"temperature": 1.0}))


def test_what_cannot_be_pruned_says_why(openpi):
    other = openpi_standin.Policy()
    other._is_pytorch_model = True
    with pytest.raises(PatchError, match="PyTorch"):
        prune(other)
    with pytest.raises(ValueError, match="did you mean 'safe'"):
        prune(openpi, "sfe")
    params = parameters(openpi._model)
    lora = params | {"lora": {"a": np.zeros((2, 2))}}
    with pytest.raises(PatchError, match=r"others at lora/a; merge LoRA"):
        sizes(openpi._model, lora)
    with pytest.raises(PatchError, match="got Node without 'PaliGemma/llm/layers/attn/q_einsum/w'"):
        sizes(openpi._model, {"PaliGemma": {}})


def test_sizes_are_read_off_the_model(openpi):
    assert sizes(openpi._model, parameters(openpi._model)) == openpi._config.replace(discrete_state_input=False)


def test_a_request_of_another_robot_fails_as_in_openpi(pruned):
    with pytest.raises(Exception, match="observation/image"):
        pruned.infer(DROID.example(np.random.default_rng(0)))


def test_a_robot_is_known_by_its_transforms_or_by_an_example(openpi):
    known = OpenpiTransform(openpi, openpi._config)
    assert set(known.example(np.random.default_rng(0))) == set(LIBERO.example(np.random.default_rng(0)))
    other = SimpleNamespace(_input_transform=lambda request: request, _output_transform=None)
    with pytest.raises(PatchError, match=r"give prune\(\.\.\., example=\.\.\.\)"):
        OpenpiTransform(other, openpi._config).example(np.random.default_rng(0))
    given = OpenpiTransform(other, openpi._config, lambda rng: {"prompt": "go"})
    assert given.example(np.random.default_rng(0)) == {"prompt": "go"}


# --- the server --------------------------------------------------------------------------------------------


def test_arguments_are_split():
    argv = [
        "--port",
        "1",
        "--serving.insecure",
        "policy:checkpoint",
        "--policy.dir=x",
        "--pruner",
        "safe",
        "--pruner.keep",
        "1",
    ]
    ours, theirs = openpi_patch.serve.split(argv)
    assert ours == ["--serving.insecure", "--pruner", "safe", "--pruner.keep", "1"]
    assert theirs == ["--port", "1", "policy:checkpoint", "--policy.dir=x"]


SCRIPT = """
    import dataclasses
    import sys

    sys.path.insert(0, {tests!r})
    import openpi_standin

    @dataclasses.dataclass
    class Args:
        env: str = "aloha_sim"
        default_prompt: str | None = None
        port: int = 8000
        record: bool = False

    def create_policy(args):
        assert args.env == "libero"
        return openpi_standin.Policy(metadata={{"served": "here"}})
"""


def test_openpis_script_is_served_through_the_pruner(tmp_path):
    script = tmp_path / "serve_policy.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["--env", "libero", "--port", str(port), "--serve-policy", str(script)]
    argv += ["--pruner=safe", "--pruner.keep", "0.1"]
    args, policy, ours = openpi_patch.serve.make(argv)
    policy.policy.prompt_lengths = PROMPTS
    with running(ours.serving.fleet(policy.policy), port=args.port) as server:
        assert urllib.request.urlopen(f"http://127.0.0.1:{server.port}/readyz").status == 200
        client = WebsocketClientPolicy("127.0.0.1", port)
        assert client.get_server_metadata() == {"served": "here"}
        replies = [client.infer(request(0, step)) for step in range(2)]
        client._ws.close()
    assert [reply["pruning"]["kept"] for reply in replies] == [512, 51]


def test_a_start_without_openpi_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(openpi_patch.serve.importlib.util, "find_spec", lambda name: None)
    assert openpi_patch.serve.main(["--pruner=safe"]) == 2
    assert "openpi is not installed" in capsys.readouterr().err.splitlines()[-1]
    assert openpi_patch.serve.main(["--serve-policy", str(tmp_path / "absent.py")]) == 2
    assert "give it with --serve-policy" in capsys.readouterr().err.splitlines()[-1]
