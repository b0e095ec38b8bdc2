"""A robot in twenty lines: openpi's own client sends the recording inside the package to a server.

openpi serve --pruner=safe --prompt-lengths 16 policy:embedded      in one terminal
python docs/first_client.py [PORT]                                  in another
"""

import sys
import time
from importlib import resources

from openpi_client.websocket_client_policy import WebsocketClientPolicy

from safe_pruner_jax.libero.demonstrations import read_packed


def main(port: int) -> None:
    """Eight calls along the recorded episode; each asks for a chunk of ten actions."""
    robot = WebsocketClientPolicy("127.0.0.1", port)
    (episode,) = read_packed(resources.files("safe_pruner_jax") / "assets" / "recordings" / "cream_cheese.zip")
    for call in range(8):
        frame = 2 * call  # every third step has a frame, and the robot asks every sixth
        request = {name: pictures[frame] for name, pictures in episode.images.items()}  # two cameras
        request |= {"observation/state": episode.state[episode.every * frame], "prompt": episode.prompt}
        start = time.monotonic()
        reply = robot.infer(request)
        pruning, ms = reply["pruning"], 1e3 * (time.monotonic() - start)
        what = "keyframe" if pruning["keyframe"] else f"κ {pruning['kappa']:.2f}"
        print(f"call {call}: {pruning['kept']} of {pruning['alive']} tokens, {what}, {ms:.0f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
