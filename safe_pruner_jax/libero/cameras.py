"""Both cameras of a scene, drawn by MuJoCo in a context of their own."""

from typing import Any

import numpy as np

CAMERAS = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}
"""Image entry of a request → camera of the simulator."""


class Cameras:
    """Rendering in two parts: `look` notes where everything is, `frame` makes pixels of that."""

    def __init__(self, mujoco: Any, model: Any, size: int):
        self._mujoco, self._model, self._size = mujoco, model, size
        self._scenes = {name: mujoco.MjvScene(model, maxgeom=1000) for name in CAMERAS.values()}
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:2] = (0, 1)  # as robosuite: collision shapes hidden, visual meshes shown
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def look(self, data: Any) -> None:
        """Updates both scenes from the simulator's current geometry."""
        mj = self._mujoco
        for name, scene in self._scenes.items():
            view = mj.MjvCamera()
            view.type = mj.mjtCamera.mjCAMERA_FIXED
            view.fixedcamid = mj.mj_name2id(self._model, mj.mjtObj.mjOBJ_CAMERA, name)
            mj.mjv_updateScene(self._model, data, self._options, None, view, mj.mjtCatBit.mjCAT_ALL, scene)

    def frame(self, name: str) -> np.ndarray:
        """Renders one scene: uint8 [size, size, 3], lowest row first, as OpenGL and robosuite have it."""
        pixels = np.empty((self._size, self._size, 3), np.uint8)
        whole = self._mujoco.MjrRect(0, 0, self._size, self._size)
        self._gl.make_current()
        self._mujoco.mjr_render(whole, self._scenes[name], self._context)
        self._mujoco.mjr_readPixels(pixels, None, whole, self._context)
        return pixels

    def identities(self, name: str) -> np.ndarray:
        """Number of the geometry in every pixel, -1 for none: int32 [size, size], lowest row first."""
        mj, scene = self._mujoco, self._scenes[name]
        flags = [int(mj.mjtRndFlag.mjRND_SEGMENT), int(mj.mjtRndFlag.mjRND_IDCOLOR)]
        scene.flags[flags] = 1
        pixels = self.frame(name).astype(np.int32)
        scene.flags[flags] = 0
        numbers = pixels[..., 0] + (pixels[..., 1] << 8) + (pixels[..., 2] << 16)
        table = np.full(scene.ngeom + 1, -1, np.int32)
        for geom in scene.geoms[: scene.ngeom]:
            if geom.objtype == mj.mjtObj.mjOBJ_GEOM and 0 <= geom.segid < scene.ngeom:
                table[geom.segid + 1] = geom.objid
        return table[np.where(numbers > scene.ngeom, 0, numbers)]

    def close(self) -> None:
        """Frees the OpenGL context and what it holds."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()
