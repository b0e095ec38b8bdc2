"""Coarser meshes for training pictures: the same model, a seventh of the time.

LIBERO's scenes have 320 thousand visible triangles, and a software renderer pays for vertices, not for pixels.
`decimate` merges vertices that fall into one cell of a grid (Rossignac & Borrel 1993) in the compiled model, in place
and before a rendering context is made. Collision shapes are other geometries and stay. Evaluation keeps LIBERO's own
meshes.
"""

from typing import Any

import numpy as np

CELLS = {"living_room": 0.03, "robot0": 0.006, "gripper0": 0.004, "basket": 0.006}
"""Cell sizes in metres by a mesh's first words; other meshes have `CELL`."""
CELL = 0.004
_SMALL = 500  # triangles; a mesh of fewer is left alone


def decimate(model: Any, scale: float = 1.0) -> tuple[int, int]:
    """Thins out every large mesh of a compiled model.

    Args:
      model: `mujoco.MjModel`; its face arrays are changed.
      scale: of all cells.

    Returns:
      Triangles of the large meshes before and after.
    """
    before = after = 0
    for i in range(model.nmesh):
        count = int(model.mesh_facenum[i])
        if count < _SMALL:
            continue
        name = model.mesh(i).name
        cell = next((c for start, c in CELLS.items() if name.startswith(start)), CELL) * scale
        start, first = model.mesh_faceadr[i], model.mesh_vertadr[i]
        vertices = model.mesh_vert[first : first + model.mesh_vertnum[i]]
        kept, faces = _thin(vertices, model.mesh_face[start : start + count], cell)
        for name in ("mesh_facenormal", "mesh_facetexcoord"):
            array = getattr(model, name)
            array[start : start + len(kept)] = array[start + kept]
        model.mesh_face[start : start + len(kept)] = faces
        model.mesh_facenum[i] = len(kept)
        before, after = before + count, after + len(kept)
    return before, after


def _thin(vertices: np.ndarray, faces: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Which triangles remain [k], and their vertices [k, 3]: per cell the one nearest to the cell's mean."""
    cells = np.unique(np.floor(vertices / cell).astype(np.int64), axis=0, return_inverse=True)[1].ravel()
    size = np.bincount(cells)
    mean = np.stack([np.bincount(cells, vertices[:, d]) / size for d in range(3)], axis=1)
    order = np.lexsort((np.linalg.norm(vertices - mean[cells], axis=1), cells))
    nearest = order[np.append(0, np.flatnonzero(np.diff(cells[order])) + 1)]
    corners = np.sort(cells[faces], axis=1)
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
    single = np.unique(np.where(whole[:, None], corners, -1), axis=0, return_index=True)[1]
    kept = np.sort(single[whole[single]])
    return kept, nearest[cells[faces[kept]]]
