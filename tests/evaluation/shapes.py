"""Label maps with known metrics, and nnU-Net folders that hold them."""

import json

import numpy as np
import SimpleITK as sitk


def box(shape, *corners):
    """A boolean mask with boxes given as ((start, stop), ...) for each axis."""
    mask = np.zeros(shape, bool)
    for corner in corners:
        mask[tuple(slice(*c) for c in corner)] = True
    return mask


def ball(shape, centre, radius, spacing=(1, 1, 1)):
    """Voxels within ``radius`` mm of ``centre``, which is given in voxels."""
    grid = np.indices(shape).astype(float)
    return sum(((grid[i] - centre[i]) * spacing[i]) ** 2 for i in range(3)) <= radius**2


def write(file, labels, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1)):
    """Write a label map (D, H, W); spacing and origin in the order x, y, z."""
    image = sitk.GetImageFromArray(labels, isVector=False)
    if labels.ndim == 3:
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(direction)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def write_dataset_json(folder, labels, file_ending=".nii.gz"):
    file = folder / "dataset.json"
    file.write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": file_ending}))
    return file
