"""`openpi serve`: a policy behind openpi's wire."""

import dataclasses
from typing import Literal

from safe_pruner_jax.engine.xla import default_folder, keep_programs
from safe_pruner_jax.policy.identity import SERVED, local_device
from safe_pruner_jax.policy.spec import EnvMode, Method, Model
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.robots import LIBERO, RequestError
from safe_pruner_jax.serving import Recorder, serve
from safe_pruner_jax.serving.episodes import EpisodeRecorder
from safe_pruner_jax.serving.options import Serving
from safe_pruner_jax.serving.replay import header
from safe_pruner_jax.serving.wire import PROTOCOL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(Model):
    """Serve a policy to openpi clients.

    Args:
      env: environment whose default policy is served; ignored with another policy.
      default_prompt: used for requests without a prompt.
      host: address to listen on; 0.0.0.0 for every interface, which needs an API key.
      port: port to listen on.
      record: write every request and reply to policy_records/.
      record_as: one file per episode that `openpi inspect` replays, or openpi's own files, one pickle per step.
      programs: folder that keeps compiled programs for the next start; "none": nowhere. Default:
        $SAFE_PRUNER_PROGRAMS, else in ~/.cache.
      serving: who may connect, and what a request may expect.
    """

    env: EnvMode = EnvMode.ALOHA_SIM
    default_prompt: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    record: bool = False
    record_as: Literal["episodes", "openpi"] = "episodes"
    programs: str | None = None
    serving: Serving = dataclasses.field(default_factory=Serving)


def run_serve(args: Serve, method: Method) -> None:
    """Loads, warms up, listens until interrupted."""
    access, terms = args.serving.access(args.host), args.serving.terms()  # before gigabytes are read
    if args.programs != "none":
        keep_programs(args.programs or default_folder())
    method = args.fit(args.env.name, method)
    policy = args.load(args.env.name, method.make(), default_prompt=args.default_prompt, describe=method.describe)
    if method.describe and get_config(args.named(args.env.name)[0]).robot == LIBERO:
        config = args.describe(args.env.name, method)
        config = dataclasses.replace(config, noise=f"the server's, seed {args.seed}")
        policy.metadata[SERVED] = {"configuration": config.as_json(), "device": local_device()}
        policy.metadata[SERVED]["protocol"] = PROTOCOL
    recorder = None
    if args.record:
        recorder = _recorder(args, method, policy.engine.config.kernels)
    serve(
        args.serving.fleet(policy),
        host=args.host,
        port=args.port,
        max_message_bytes=args.serving.max_message_mib * 2**20,
        client_errors=(RequestError,),
        recorder=recorder,
        access=access,
        terms=terms,
    )


def _recorder(args: Serve, method: Method, kernels: tuple[str, ...]) -> Recorder | EpisodeRecorder:
    if args.record_as == "openpi":
        return Recorder("policy_records")
    name, checkpoint = args.named(args.env.name)
    options = args.options() | {"default_prompt": args.default_prompt, "describe": method.describe, "kernels": kernels}
    about = header(name, checkpoint, method.name, method.choices, options=options)
    return EpisodeRecorder("policy_records", about)
