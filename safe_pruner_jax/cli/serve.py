"""`openpi serve`: a policy behind openpi's wire."""

import dataclasses
from functools import partial
from typing import Any, Literal

from safe_pruner_jax.cluster.connect import read_replicas, require_ray
from safe_pruner_jax.engine.xla import default_folder, keep_programs
from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.policy.identity import SERVED, identity, local_device
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.spec import Checkpoint, Embedded, EnvMode, Method, Model
from safe_pruner_jax.robots.configs import get_config, replan_of
from safe_pruner_jax.robots.robots import LIBERO, RequestError
from safe_pruner_jax.serving import Access, Recorder, Terms, serve
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
      protocol: openpi's, or that of allenai's evaluation harness (docs/observing.md).
      record: write every request and reply to policy_records/.
      record_as: one file per episode that `openpi inspect` replays, or openpi's own files, one pickle per step.
      programs: folder that keeps compiled programs for the next start; "none": nowhere. Default:
        $SAFE_PRUNER_PROGRAMS, else in ~/.cache.
      serving: who may connect, and what a request may expect.
      on: this process, or replicas on the nodes of a Ray cluster.
      address: of the cluster: auto or host:port; without it one is started on this machine.
      replicas: N, or LEAST..MOST as robots come and go; one accelerator each.
      robots_per_replica: connections that a replica is meant for; more of them add one.
    """

    env: EnvMode = EnvMode.ALOHA_SIM
    default_prompt: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    record: bool = False
    record_as: Literal["episodes", "openpi"] = "episodes"
    programs: str | None = None
    serving: Serving = dataclasses.field(default_factory=Serving)
    on: Literal["here", "ray"] = "here"
    address: str | None = None
    replicas: str = "1"
    robots_per_replica: int = 8


def run_serve(args: Serve, method: Method) -> None:
    """Loads, warms up, listens until interrupted."""
    access, terms = args.serving.access(args.host), args.serving.terms()  # before gigabytes are read
    harness = _harness(args, access) if args.protocol == "vla-eval" else None
    if args.programs != "none":
        keep_programs(args.programs or default_folder())
    method = args.fit(args.env.name, method)
    if args.on == "ray":
        _on_ray(args, method, access, terms)
        return
    policy = load_policy(args, method)
    recorder = None
    if args.record:
        recorder = _recorder(args, method, policy.engine.config.kernels)
    if harness is not None:
        chunk = replan_of(args.named(args.env.name)[0])
        server = harness.PolicyServer(args.serving.fleet(policy), chunk_size=chunk, max_wait_time=terms.max_delay_s)
        harness.serve(server, host=args.host, port=args.port)
        return
    serve(
        args.serving.fleet(policy),
        host=args.host,
        port=args.port,
        max_message_bytes=args.serving.max_message_mib * 2**20,
        client_errors=(RequestError,),
        recorder=recorder,
        access=access,
        terms=terms,
        watch=args.serving.watch,
    )


def load_policy(args: Serve, method: Method) -> Policy:
    """The policy, with what it tells a client about itself."""
    policy = args.load(args.env.name, method.make(), default_prompt=args.default_prompt, describe=method.describe)
    if method.describe and get_config(args.named(args.env.name)[0]).robot == LIBERO:
        config = args.describe(args.env.name, method)
        config = dataclasses.replace(config, noise=f"the server's, seed {args.seed}")
        policy.metadata[SERVED] = {"configuration": config.as_json(), "device": local_device()}
        policy.metadata[SERVED]["protocol"] = PROTOCOL
    return policy


def load_fleet(args: Serve, method: Method) -> Fleet:
    """What a replica serves."""
    return args.serving.fleet(load_policy(args, method))


def load_identity(args: Serve, method: Method) -> dict[str, Any]:
    """What identifies the policy of a replica, as its node has it."""
    return identity(args.describe(args.env.name, method, anywhere=True).as_json())


def _on_ray(args: Serve, method: Method, access: Access, terms: Terms) -> None:
    if args.record:
        raise ValueError("record: expected one server with --record, got --on ray; record where the policy runs alone")
    replicas = read_replicas(args.replicas)
    require_ray()
    from safe_pruner_jax.cluster.serve import run_until_signal, service

    plain = Serve(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Serve)})
    files = (args.serving.tls_cert, args.serving.tls_key)
    with service(
        partial(load_fleet, plain, method),
        identify=partial(load_identity, plain, method),
        replicas=replicas,
        robots=args.robots_per_replica,
        host=args.host,
        port=args.port,
        access=access,
        tls_files=files if access.tls else None,
        terms=terms,
        address=args.address,
        max_message_bytes=args.serving.max_message_mib * 2**20,
        client_errors=(RequestError,),
    ):
        run_until_signal()


def _harness(args: Serve, access: Access) -> Any:
    """The module that speaks vla-eval's protocol. Raises ValueError for what that protocol does not have."""
    used = {"record": args.record, "serving.watch": args.serving.watch, "serving.tls-cert": access.tls is not None}
    used |= {"serving.api-key-file": access.key is not None, "env": args.env != EnvMode.LIBERO}
    if isinstance(args.policy, Embedded):
        used["env"] = False
    elif isinstance(args.policy, Checkpoint):
        used["env"] = get_config(args.policy.config).robot != LIBERO
    if wrong := [name for name, is_used in used.items() if is_used]:
        raise ValueError(f"protocol vla-eval: expected a LIBERO policy without key, TLS, record and watch, got {wrong}")
    try:
        from safe_pruner_jax.serving import vla_eval
    except ImportError as error:
        raise ValueError(
            "protocol vla-eval: expected the package vla-eval, got none; pip install 'safe-pruner-jax[vla-eval]'"
        ) from error
    return vla_eval


def _recorder(args: Serve, method: Method, kernels: tuple[str, ...]) -> Recorder | EpisodeRecorder:
    if args.record_as == "openpi":
        return Recorder("policy_records")
    name, checkpoint = args.named(args.env.name)
    options = args.options() | {"default_prompt": args.default_prompt, "describe": method.describe, "kernels": kernels}
    about = header(name, checkpoint, method.name, method.choices, options=options)
    return EpisodeRecorder("policy_records", about)
