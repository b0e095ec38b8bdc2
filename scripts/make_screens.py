"""Takes the pictures of docs/observing.md: the page `/watch`, and the viewer of `openpi view`, in headless Chromium.

    python scripts/make_screens.py                          both, into docs/figures
    python scripts/make_screens.py watch --out /tmp/screens

Both show the embedded policy with `safe` at 20 % on the recording inside the package. Needs Debian's chromium, and for
`view` the extra `rerun`. The third picture of that page is `openpi diagnose example --out docs/figures`'s.
"""

import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import tyro
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from tyro.conf import Positional

from safe_pruner_jax.analysis import view as rerun_view
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.policy.loading import calibrated, load_policy
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import safe
from safe_pruner_jax.serving import running

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser  # noqa: E402

WEB = 9390
"""Port of the page with rerun's viewer."""


def embedded() -> tuple[Policy, list[dict]]:
    """The policy, and what it is asked in the recording."""
    (recording,) = episodes(EXAMPLE)
    policy = load_policy("mini_libero", pruner=safe(keep=0.2, **calibrated()), prompt_lengths=(32,))
    return policy, [call.request for call in recording.calls()]


def watch(path: Path) -> None:
    """Two robots in the page; one has begun later."""
    policy, requests = embedded()
    with running(Fleet(policy, 1), watch=True) as server, tempfile.TemporaryDirectory() as folder:
        for name, steps in (("left arm", len(requests)), ("right arm", 12)):
            robot = WebsocketClientPolicy("127.0.0.1", server.port)
            for request in requests[:steps]:
                robot.infer(request | {"robot_id": name})
        with Browser(Path(folder), size=(1120, 830)) as page:
            page.open(f"http://127.0.0.1:{server.port}/watch")
            page.until("document.querySelectorAll('canvas.camera[data-drawn]').length == 4")
            page.picture(path)


def view(path: Path, settle_s: float = 20.0) -> None:
    """The viewer at the last step of the recording, as `openpi view example --web 9090` opens it."""
    policy, requests = embedded()
    frames = rerun_view.played(policy, requests, calibrated()["threshold"])
    (first,) = islice(frames, 1)
    stream = rerun_view.open_recording(EXAMPLE, first, web=WEB)
    for frame in (first, *frames):
        rerun_view.show(stream, frame)
    stream.flush()
    flags = ("--enable-unsafe-swiftshader", "--use-angle=swiftshader", "--ignore-gpu-blocklist")
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder), size=(1400, 1000), flags=flags) as page:
        page.open(rerun_view.page(WEB))
        last, since = 0, time.monotonic()
        while time.monotonic() - since < settle_s:  # what is drawn does not tell when it is complete
            page.picture(path)
            if (size := path.stat().st_size) != last:
                last, since = size, time.monotonic()
            time.sleep(1)


SCREENS = {"watch": watch, "view": view}


def main(names: Positional[tuple[str, ...]] = tuple(SCREENS), out: Path = ROOT / "docs" / "figures") -> int:
    """Takes pictures.

    Args:
      names: which ones.
      out: folder.
    """
    if unknown := set(names) - set(SCREENS):
        print(f"make_screens: expected {', '.join(SCREENS)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = out / f"{name}.png"
        SCREENS[name](path)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
